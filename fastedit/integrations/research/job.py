"""One call of an execute function of a research repository: its requests, rows, cached values and statistics."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from ...editors.prompts import FactRows
from ...editors.values import Values
from ...io import atomic_file
from ..locate import (
    Lookup,
    Request,
    covered_model,
    covered_value_loss,
    describe_optimisation,
    objective_of,
    optimised,
    value_rows,
)
from ..patching import Context, NotCovered, follow
from .statistics import expecting


class Job:
    """What the methods of the MEMIT family have in common in one call.

    Args:
        context: of the replaced function.
        model: the project's model.
        tokenizer: its tokenizer.
        requests: dictionaries as the project has them.
        hparams: the project's hyper-parameters.
        contexts: groups of context templates; None asks the project for its own.

    Raises:
        NotCovered: something that our pipeline does not compute as the published code does.
    """

    def __init__(
        self,
        context: Context,
        model: nn.Module,
        tokenizer: Any,
        requests: Sequence[Mapping[str, Any]],
        hparams: Any,
        contexts: Sequence[Sequence[str]] | None = None,
    ) -> None:
        self.context, self.model, self.tokenizer, self.hparams = context, model, tokenizer, hparams
        self.description = covered_model(model, tokenizer, hparams)
        self.requests = [
            Request(each["prompt"], each["subject"], spaced(each["target_new"]["str"]), each.get("case_id"))
            for each in requests
        ]
        if contexts is None:
            contexts = context.namespace["get_context_templates"](model, tokenizer)
        if contexts[0] != ["{}"] or len(contexts) > 2:
            raise NotCovered("the context templates are not the bare one and one group of others")
        self.contexts = [each for group in contexts for each in group]
        self.weights: dict[str, Tensor] = {
            projection.weight_name: projection.weight
            for projection in (self.description.projection(layer) for layer in hparams.layers)
        }
        compute = follow(context.original, "compute_z")
        self.rows: list[FactRows] = value_rows(
            tokenizer,
            self.requests,
            self.contexts,
            lookup_of(context.original, "compute_z.repr_tools.get_words_idxs_in_templates", tokenizer),
            trim_of(compute, context.used["compute_z"], tokenizer, model),
            self.description.context_length,
        )

    def values(self, cache_template: str | Path | None) -> Values:
        """Target values: those on file, and the others optimised together and filed."""
        z_layer = self.hparams.layers[-1]
        files = [self._file(cache_template, z_layer, request) for request in self.requests]
        found = [None if file is None else _read(file) for file in files]
        missing = [number for number, z in enumerate(found) if z is None]
        if missing:
            covered_value_loss(self.model, self.description, self.hparams, z_layer)
            chosen = [self.requests[number] for number in missing]
            made = optimised(
                self.model,
                chosen,
                [self.rows[number] for number in missing],
                objective_of(self.hparams, z_layer),
            )
            self.say(*describe_optimisation(chosen, made))
            for number, z in zip(missing, made.target, strict=True):
                found[number] = z
                if (file := files[number]) is not None:
                    _write(file, z)
                    self.say(f"Cached k/v pair at {file}")
        device = next(self.description.embeddings.parameters()).device
        return values_of(torch.stack([z.to(device) for z in found if z is not None]))

    def covariance(self, layer: int) -> Tensor:
        """The project's second moment of a layer, from its own cache, which is filled if need be."""
        name = self.hparams.rewrite_module_tmp.format(layer)
        cache = self.context.namespace["COV_CACHE"]
        key = (self.model.config._name_or_path.replace("/", "_"), name)  # type: ignore[union-attr, operator]
        if key not in cache:
            names = [self.hparams.rewrite_module_tmp.format(each) for each in self.hparams.layers]
            with expecting(self.model, names):
                self.context.namespace["get_cov"](
                    self.model,
                    self.tokenizer,
                    name,
                    self.hparams.mom2_dataset,
                    self.hparams.mom2_n_samples,
                    self.hparams.mom2_dtype,
                )
        if key not in cache:
            raise NotCovered(f"get_cov keeps no statistics of {name}")
        return cache[key]

    def norms(self) -> dict[str, float]:
        """Norms of the weights as they are, if they are to be printed."""
        return (
            {name: float(weight.norm()) for name, weight in self.weights.items()}
            if self.context.verbose
            else {}
        )

    def say(self, *lines: str) -> None:
        """Print, if that is wanted."""
        if self.context.verbose:
            print(*lines, sep="\n")

    def say_requests(self) -> None:
        """What every execute function begins with."""
        for each in self.requests[:10]:
            self.say(f"MEMIT request sample: [{each.prompt.format(each.subject)}] -> [{each.target}]")

    def _file(self, template: str | Path | None, layer: int, request: Request) -> Path | None:
        if template is None:
            return None
        return Path(str(template).format(layer, self.hparams.clamp_norm_factor, request.case_id))


def spaced(target: str) -> str:
    """The target with a leading space."""
    return target if target.startswith(" ") else f" {target}"


def lookup_of(function: Callable[..., Any], path: str, tokenizer: Any) -> Lookup:
    """The project's own way of finding subjects' last tokens; ``path`` leads to it from ``function``."""
    words = follow(function, path)

    def lookup(templates: list[str], subjects: list[str]) -> list[int]:
        return [place for (place,) in words(tokenizer, templates, subjects, "last")]

    return lookup


def trim_of(
    compute: Callable[..., Any], label: str, tokenizer: Any, model: nn.Module
) -> Callable[[list[int]], list[int]]:
    """What a version of ``compute_z`` or ``compute_v`` does to a target's ids before it uses them."""

    def without_bos(ids: list[int]) -> list[int]:
        return ids[1:] if ids and ids[0] in (tokenizer.bos_token_id, tokenizer.unk_token_id) else ids

    if label.startswith("jianghoucheng/"):
        return without_bos
    if label.startswith("scalable-model-editing/") and compute.__module__ == "memit.compute_z":
        if "llama-2" in model.config._name_or_path.lower():  # type: ignore[union-attr, operator]
            return lambda ids: ids[2:]
        return without_bos
    return lambda ids: ids


def values_of(z: Tensor) -> Values:
    """Values whose targets (n, hidden) are given, and nothing else is known of."""
    nothing = torch.zeros_like(z, dtype=torch.float32)
    return Values(z.float(), nothing, nothing, torch.full((len(z), 1, 4), float("nan"), dtype=torch.float64))


def _read(file: Path) -> Tensor | None:
    """A cached value; None if it is not there or cannot be read, as the published code has it."""
    if not file.exists():
        return None
    try:
        with np.load(file) as data:
            return torch.from_numpy(data["v_star"])
    except Exception as error:
        print(f"Error reading cache file due to {error}. Recomputing...")
        return None


def _write(file: Path, z: Tensor) -> None:
    file.parent.mkdir(exist_ok=True, parents=True)
    with atomic_file(file) as temporary, open(temporary, "wb") as opened:
        np.savez(opened, v_star=z.detach().cpu().numpy())
