"""Streaming collection of key statistics: one forward pass over the texts for all layers.

Source: Meng et al. 2022 (ROME), section 3.1, C = E[k kᵀ]; kmeng01/memit : rome/layer_stats.py.
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from importlib.metadata import version
from itertools import islice
from typing import Any

import torch

from .._version import __version__
from ..models import describe, fingerprint, has_bos, pad_batch, pad_id, tokenizer_digest
from ..models.describe import unwrap
from ..progress import progress as progress_bar
from . import tokens
from .accumulate import Accumulators
from .checkpoint import Checkpoint, State
from .distributed import Group, joined
from .statistics import Statistics
from .tokens import Position, TokenStream

logger = logging.getLogger(__name__)

_BATCH_TOKENS = 8192
_BATCHES_PER_GROUP = 8  # texts enough for this many batches are sorted together
_OFFICIAL_TEXTS = 100_000


@dataclass(frozen=True)
class _Plan:
    """Every choice that shapes the result; two collections with equal plans give equal bits."""

    layers: tuple[int, ...]
    n_tokens: int | None
    max_length: int
    batch_tokens: int
    group_tokens: int
    dtype: str
    add_special_tokens: bool
    order: str
    rank: int
    world: int
    model: str
    tokenizer: str

    def identity(self) -> str:
        return hashlib.sha256(json.dumps(asdict(self), sort_keys=True).encode()).hexdigest()


def collect(
    model: Any,
    tokenizer: Any,
    texts: Iterable[str],
    *,
    layers: Iterable[int],
    n_tokens: int | None = None,
    max_length: int | None = None,
    batch_tokens: int | None = None,
    dtype: torch.dtype = torch.float32,
    add_special_tokens: bool = True,
    shuffle: bool = False,
    seed: int = 0,
    n_texts: int | None = None,
    profile: str = "clean",
    checkpoint: str | os.PathLike[str] | None = None,
    checkpoint_seconds: float = 600.0,
    accumulate_on: torch.device | str | None = None,
    progress: bool | None = None,
) -> dict[int, Statistics]:
    """Collect the second moment of the keys of several layers in one pass over ``texts``.

    A key is the input of a block's MLP output projection at one token. The forward pass ends after the last
    layer wanted; padding is masked out. With a process group initialised, or under ``torchrun``, each
    process computes its share, and all of them return the same sums over the same tokens as one alone.

    Args:
        model: a causal language model, on any device or spread over several.
        tokenizer: its tokenizer.
        texts: the texts; read as they are needed, up to the token budget.
        layers: numbers of the blocks.
        n_tokens: exact number of tokens to use, BOS included, if the texts hold that many. Default: ten
            times the width of the keys; with ``profile="official"`` all tokens.
        max_length: tokens kept of each text. Default: 1024, or the context length if that is smaller; with
            ``profile="official"`` the context length (4096 for Qwen2, the window or 4096 for Mistral).
        batch_tokens: tokens in one forward pass, padding included. Default: 8192; official: three contexts.
        dtype: of the products k kᵀ, float32 or float64; sums over batches are always float64.
        add_special_tokens: whether texts begin with the tokenizer's BOS, which then counts as a token.
        shuffle: take the texts in an order that depends on ``seed`` only; reads them all into memory.
        seed: see ``shuffle``.
        n_texts: use at most so many texts. Default: all; official: 100,000.
        profile: ``"clean"``, or ``"official"`` for the sample (``random.Random(1)``), lengths and packing of
            the published code.
        checkpoint: file to keep the state in; a collection that was interrupted goes on from there, to the
            same bits, if model, layers, texts, tokenizer and settings are the same. The file stays; remove it
            when the result is saved. Every process needs a file of its own.
        checkpoint_seconds: least time between two writes of it.
        accumulate_on: device of the float64 sums (8 d² bytes a layer); default: beside each layer.
        progress: True shows a bar, False hides it, None shows it on a terminal.

    Returns:
        One :class:`Statistics` per layer, on the CPU.

    Raises:
        ValueError: a layer that does not exist, an unknown profile, or texts without any token.
        NumericalError: NaN or infinity among the keys.
    """
    model = unwrap(model)
    wanted = _check_layers(model, layers)
    _check_settings(dtype, profile, n_tokens, max_length, batch_tokens, n_texts)
    official = profile == "official"
    if official:
        ordered: Iterable[str] = tokens.official_order(texts, n_texts or _OFFICIAL_TEXTS)
    else:
        ordered = islice(tokens.shuffled(texts, seed) if shuffle else texts, n_texts)
    length, batch, group_tokens, budget = _sizes(model, wanted, max_length, batch_tokens, n_tokens, official)
    with joined() as group:
        plan = _Plan(
            layers=tuple(wanted),
            n_tokens=budget,
            max_length=length,
            batch_tokens=batch,
            group_tokens=group_tokens * (1 if official else group.world),
            dtype=str(dtype),
            add_special_tokens=add_special_tokens,
            order="official" if official else f"shuffled {seed}" if shuffle else "given",
            rank=group.rank,
            world=group.world,
            model=fingerprint(model),
            tokenizer=tokenizer_digest(tokenizer),
        )
        stream = TokenStream(
            ordered,
            tokenizer,
            n_tokens=budget,
            max_length=length,
            group_tokens=plan.group_tokens,
            add_special_tokens=add_special_tokens,
        )
        sums = Accumulators(model, wanted, dtype=dtype, device=accumulate_on)
        saved = None
        if checkpoint is not None:
            saved = Checkpoint(checkpoint, identity=plan.identity(), seconds=checkpoint_seconds)
        show = progress if group.rank == 0 else False
        count = group.total(_run(stream, sums, plan, saved, pad_id(tokenizer), show))
        _check_count(count, plan, stream, sums)
        meta = _meta(plan, stream, tokenizer, model, profile)
        return {layer: _finish(layer, sums, count, meta, dtype, group) for layer in wanted}


def _check_layers(model: Any, layers: Iterable[int]) -> list[int]:
    n_layers = describe(model).n_layers
    wanted = sorted(set(layers))
    if not wanted or wanted[0] < 0 or wanted[-1] >= n_layers:
        raise ValueError(f"layers must be among 0 to {n_layers - 1}, got {wanted}")
    return wanted


def _check_settings(dtype: torch.dtype, profile: str, *numbers: int | None) -> None:
    if dtype not in (torch.float32, torch.float64):
        raise ValueError(f"dtype must be torch.float32 or torch.float64, got {dtype}")
    if profile not in ("clean", "official"):
        raise ValueError(f"profile must be 'clean' or 'official' for statistics, got {profile!r}")
    for name, number in zip(("n_tokens", "max_length", "batch_tokens", "n_texts"), numbers, strict=True):
        if number is not None and number < 1:
            raise ValueError(f"{name} must be at least 1, got {number}")


def _sizes(
    model: Any,
    layers: Sequence[int],
    max_length: int | None,
    batch_tokens: int | None,
    n_tokens: int | None,
    official: bool,
) -> tuple[int, int, int, int | None]:
    """Length of a text, tokens in a batch, tokens in a group, and the budget; explicit values win."""
    if official:
        context = tokens.official_length(model.config)
        batch = batch_tokens or 3 * context
        return max_length or min(context, batch), batch, 1, n_tokens
    description = describe(model)
    context = description.context_length or 1024
    length = min(max_length or 1024, context)
    batch = batch_tokens or max(_BATCH_TOKENS, length)
    width = max(description.projection(layer).d_in for layer in layers)
    return length, batch, _BATCHES_PER_GROUP * batch, 10 * width if n_tokens is None else n_tokens


def _run(
    stream: TokenStream,
    sums: Accumulators,
    plan: _Plan,
    checkpoint: Checkpoint | None,
    padding: int,
    show: bool | None,
) -> int:
    """Feed the stream to the model; returns the number of tokens that this process has counted."""
    start, n_done, count = _resume(stream, sums, checkpoint)
    with progress_bar(total=plan.n_tokens, desc="collecting statistics", unit=" tokens", show=show) as bar:
        bar.update(count * plan.world)
        for group in stream.groups():
            # All processes see the same groups; each takes every world-th sequence of the sorted group.
            share = sorted(group, key=len, reverse=True)[plan.rank :: plan.world]
            for number, batch in enumerate(tokens.pack(share, plan.batch_tokens)):
                if stream.group_start == start and number < n_done:
                    continue
                ids, mask, _ = pad_batch(batch, padding)
                sums.add(ids, mask)
                size = sum(map(len, batch))
                count += size
                bar.update(size * plan.world)
                if checkpoint is not None and checkpoint.due():
                    place = (stream.group_start, stream.position)
                    checkpoint.save(State(*place, number + 1, count, sums.sums))
    return count


def _resume(
    stream: TokenStream, sums: Accumulators, checkpoint: Checkpoint | None
) -> tuple[Position, int, int]:
    """Where to begin: position of the group, batches of it that are done, tokens counted."""
    state = checkpoint.load() if checkpoint is not None else None
    if state is None:
        return Position(), 0, 0
    if not stream.skip_to(state.group_start, state.group_end):
        logger.warning("the checkpoint was made with other texts: starting anew")
        return Position(), 0, 0
    for layer, total in state.sums.items():
        sums.load(layer, total)
    logger.info("going on from a checkpoint after %d tokens", state.group_start.n_tokens)
    return state.group_start, state.n_batches, state.count


def _meta(plan: _Plan, stream: TokenStream, tokenizer: Any, model: Any, profile: str) -> dict[str, Any]:
    end = stream.position
    return {
        "model_fingerprint": plan.model,
        "model_name": getattr(model.config, "_name_or_path", ""),
        "tokenizer_hash": plan.tokenizer,
        "texts_hash": end.texts_hash,
        "n_texts": end.n_texts,
        "order": plan.order,
        "bos": "counted" if plan.add_special_tokens and has_bos(tokenizer) else "none",
        "max_length": plan.max_length,
        "profile": profile,
        "model_dtype": str(model.dtype),
        "versions": {
            "fastedit": __version__,
            "torch": torch.__version__,
            "transformers": version("transformers"),
        },
    }


def _check_count(count: int, plan: _Plan, stream: TokenStream, sums: Accumulators) -> None:
    if count == 0:
        raise ValueError("the texts hold no tokens: nothing to collect statistics from")
    if plan.rank != 0:
        return
    if plan.n_tokens is not None and count < plan.n_tokens:
        logger.warning(
            "%d tokens were asked for, the texts hold %d: using these%s",
            plan.n_tokens,
            count,
            f" ({stream.n_cut} texts were cut at {plan.max_length} tokens)" if stream.n_cut else "",
        )
    width = max(projection.d_in for projection in sums.projections.values())
    if count < width:
        logger.warning(
            "%d tokens for keys of width %d: the second moment is singular. Give at least %d tokens, "
            "or editors will need a ridge",
            count,
            width,
            10 * width,
        )


def _finish(
    layer: int, sums: Accumulators, count: int, meta: dict[str, Any], dtype: torch.dtype, group: Group
) -> Statistics:
    width = sums.projections[layer].d_in
    total = sums.sums.pop(layer, None)
    if total is None:  # more processes than batches
        total = torch.zeros(width, width, dtype=torch.float64)
    mean = (group.sum_(total) / count).to("cpu", dtype)
    return Statistics(layer, sums.projections[layer].name, mean, count, dict(meta))
