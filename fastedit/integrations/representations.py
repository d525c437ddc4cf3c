"""``get_reprs_at_idxs``: what enters or leaves a module at some tokens, by passes that end there.

All locate-then-edit projects read keys and values through it, also in methods that we do not replace (PMET, EAMET,
CORE, R-ROME). As published a pass goes through all blocks and the head. Nothing behind the module can reach what is
read, and nothing to the right of the last token that is read.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from ..models.describe import describe
from .locate import covering
from .patching import Context, NotCovered

_BATCH = 128  # prompts in a pass, as published


class _Reached(Exception):
    """The module has been run."""


def get_reprs_at_idxs(context: Context) -> Callable[..., Any]:
    """``get_reprs_at_idxs``: (prompts, d) for ``track`` "in" or "out", the pair of both for "both"."""

    def read(
        model: nn.Module,
        tok: Any,
        contexts: Sequence[str],
        idxs: Sequence[Sequence[int]],
        layer: int,
        module_template: str,
        track: str = "in",
    ) -> Any:
        kinds = {"in": ("in",), "out": ("out",), "both": ("in", "out")}.get(track)
        if kinds is None or not len(contexts) or not all(len(each) and min(each) >= 0 for each in idxs):
            raise NotCovered(f"track {track!r}, no prompt, or indices that count from the end")
        if getattr(tok, "padding_side", "right") != "right":
            raise NotCovered("the tokenizer pads on the left")
        module = _module(model, module_template.format(layer))
        found: dict[str, list[Tensor]] = {kind: [] for kind in kinds}
        for start in range(0, len(contexts), _BATCH):
            places = idxs[start : start + _BATCH]
            rows = tok(list(contexts[start : start + _BATCH]), padding=True, return_tensors="pt")
            width = max(max(each) for each in places) + 1
            if width > rows["input_ids"].shape[1]:
                raise NotCovered("an index behind the end of its prompt")
            cut = {name: value[:, :width] for name, value in rows.items()}
            seen = _states(model, module, cut, kinds)
            for kind, states in seen.items():
                found[kind] += [states[row, list(each)].mean(0) for row, each in enumerate(places)]
        answers = [torch.stack(found[kind]) for kind in kinds]
        return answers[0] if len(answers) == 1 else tuple(answers)

    return read


def _module(model: nn.Module, name: str) -> nn.Module:
    """A module inside a block of a decoder, which runs once a pass.

    Raises:
        NotCovered: a model that is not known, in training mode or with hooks; a module elsewhere.
    """
    with covering():
        description = describe(model)
    if not any(name == block or name.startswith(f"{block}.") for block in description.block_names):
        raise NotCovered(f"{name} is not in a block of this model")
    if model.training:
        raise NotCovered("the model is in training mode")
    if any(module._forward_hooks or module._forward_pre_hooks for module in model.modules()):
        raise NotCovered("a module of the model has a forward hook")
    module = dict(model.named_modules()).get(name)
    if module is None:
        raise NotCovered(f"there is no {name}")
    return module


@torch.no_grad()
def _states(
    model: nn.Module, module: nn.Module, rows: dict[str, Tensor], kinds: Sequence[str]
) -> dict[str, Tensor]:
    """What enters ("in") and leaves ("out") the module, (rows, length, d), in a pass that ends there."""
    seen: dict[str, Any] = {}

    def keep(_module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], out: Any) -> None:
        seen["in"] = args[0] if args else kwargs.get("hidden_states")
        seen["out"] = out if isinstance(out, Tensor) else out[0]
        raise _Reached

    handle = module.register_forward_hook(keep, with_kwargs=True)
    device = next(model.parameters()).device
    try:
        model(**{name: value.to(device) for name, value in rows.items()})
    except _Reached:
        pass
    finally:
        handle.remove()
    shape = rows["input_ids"].shape
    for kind in kinds:
        if not isinstance(seen.get(kind), Tensor) or seen[kind].shape[:-1] != shape:
            raise NotCovered("the module's states are not (rows, length, d)")
    return {kind: seen[kind] for kind in kinds}
