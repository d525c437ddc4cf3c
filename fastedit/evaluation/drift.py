"""How far an edited model has moved: perplexity, KL and argmax on a fixed text; size of the weight change.

Definitions: perplexity over non-overlapping windows with the tokenizer's BOS in front, N − 1 tokens scored
per window, exp(ΣNLL / Σcount); KL is Σ p₀ log(p₀/p_t) in nats, unedited against edited; top1 is the share of
positions with the same argmax.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from ..models import describe, leading_specials, pad_id
from ..models.describe import unwrap
from ..progress import progress
from .scoring import Forward

EXACT_VOCABULARY = 8192
"""Vocabularies up to this size keep the whole distribution of the unedited model; larger ones the top."""
TOP = 512


class Window(NamedTuple):
    """Sums over the ``n`` scored tokens of one window: NLL, KL to the unedited model, unchanged argmaxes.

    ``finite`` is False if a logit was not finite; the sums are then not to be used.
    """

    nll: float
    kl: float | None
    same: float | None
    n: int
    finite: bool


@dataclass
class DriftReference:
    """The unedited model's predictions on the text.

    Attributes:
        windows: ids of each window.
        mode: ``exact`` (all log-probabilities are kept) or ``top-512`` (these and the remainder).
        ids: per window, (n, kept) ids of the kept log-probabilities, the argmax first (``exact``: it alone).
        log_probs: per window, (n, kept) float32.
    """

    windows: list[list[int]]
    mode: str
    ids: list[Tensor]
    log_probs: list[Tensor]


def text_windows(
    tokenizer: Any,
    text: str,
    *,
    length: int = 1024,
    context_length: int | None = None,
    limit: int | None = None,
) -> list[list[int]]:
    """Cut a text's ids into windows of at most ``length`` tokens, the tokenizer's BOS in front of each.

    Args:
        tokenizer: of the model.
        text: the fixed text.
        length: tokens a window, fewer if the context is smaller.
        context_length: number of tokens the model takes.
        limit: use at most this many tokens of the text.

    Raises:
        ValueError: the text gives fewer than two tokens.
    """
    length = min(length, context_length or length)
    leading = leading_specials(tokenizer)
    ids = list(tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"])[:limit]
    step = length - len(leading)
    if step < 1:
        raise ValueError(f"windows of {length} tokens leave no room for text")
    windows = [leading + ids[i : i + step] for i in range(0, len(ids), step)]
    windows = [window for window in windows if len(window) >= 2]
    if not windows:
        raise ValueError(f"the drift text gives {len(ids)} token(s); at least two are needed")
    return windows


class DriftMeter:
    """Measures drift of one model on fixed windows.

    Args:
        model: a causal language model.
        tokenizer: its tokenizer.
        windows: from :func:`text_windows`.
        batch_size: windows a batch.
        show_progress: True, False, or None for a bar on a terminal only.
    """

    def __init__(
        self,
        model: nn.Module,
        tokenizer: Any,
        windows: Sequence[Sequence[int]],
        *,
        batch_size: int = 4,
        show_progress: bool | None = None,
    ) -> None:
        self.forward = Forward(model)
        self.windows = [list(window) for window in windows]
        self.pad = pad_id(tokenizer)
        self.batch_size = batch_size
        self.show_progress = show_progress

    def before(self) -> tuple[list[Window], DriftReference]:
        """Measure the unedited model and keep what it predicts."""
        sums = [Window(0.0, 0.0, 0.0, 0, True) for _ in self.windows]
        kept: list[list[tuple[Tensor, Tensor]]] = [[] for _ in self.windows]
        mode = "exact"
        for index, _, log_probs, targets in self._parts():
            if log_probs.shape[-1] > EXACT_VOCABULARY:
                mode = f"top-{TOP}"
                values, ids = log_probs.topk(TOP, dim=-1)
            else:
                values, ids = log_probs, log_probs.argmax(dim=-1, keepdim=True)
            kept[index].append((ids.int().cpu(), values.float().cpu()))
            sums[index] = _add(sums[index], log_probs, targets, 0.0, float(len(targets)))
        ids_of, values_of = ([torch.cat([part[i] for part in parts]) for parts in kept] for i in (0, 1))
        return sums, DriftReference(self.windows, mode, ids_of, values_of)

    def after(self, reference: DriftReference | None = None) -> list[Window]:
        """Measure the edited model against ``reference``; without one, KL and argmax are None."""
        start = None if reference is None else 0.0
        sums = [Window(0.0, start, start, 0, True) for _ in self.windows]
        for index, offset, log_probs, targets in self._parts():
            kl = same = None
            if reference is not None:
                kl, same = _compare(reference, index, offset, log_probs)
            sums[index] = _add(sums[index], log_probs, targets, kl, same)
        return sums

    def _parts(self) -> Iterator[tuple[int, int, Tensor, Tensor]]:
        """Window, first position, log-probabilities (n, vocabulary), and the tokens (n,) they are for."""
        starts = range(0, len(self.windows), self.batch_size)
        with self.forward.evaluating():
            for start in progress(starts, desc="measuring drift", unit="batch", show=self.show_progress):
                rows = self.windows[start : start + self.batch_size]
                states, _ = self.forward.step(rows, self.pad, "right")
                for index, (row, state) in enumerate(zip(rows, states, strict=True), start):
                    offset = 0
                    for logits in self.forward.logits(state[: len(row) - 1]):
                        targets = row[offset + 1 : offset + 1 + len(logits)]
                        yield (
                            index,
                            offset,
                            logits.log_softmax(-1),
                            torch.tensor(targets, device=logits.device),
                        )
                        offset += len(logits)


def _add(sums: Window, log_probs: Tensor, targets: Tensor, kl: float | None, same: float | None) -> Window:
    nll = sums.nll - log_probs.gather(1, targets[:, None]).double().sum().item()
    kl = None if kl is None or sums.kl is None else sums.kl + kl
    same = None if same is None or sums.same is None else sums.same + same
    finite = math.isfinite(nll) and (kl is None or math.isfinite(kl))
    return Window(nll, kl, same, sums.n + len(targets), finite)


def _compare(reference: DriftReference, index: int, offset: int, log_probs: Tensor) -> tuple[float, float]:
    """Sums of KL and of unchanged argmaxes over a part of one window."""
    place = slice(offset, offset + len(log_probs))
    before = reference.log_probs[index][place].to(log_probs.device, torch.float64)
    ids = reference.ids[index][place].to(log_probs.device, torch.int64)
    same = (log_probs.argmax(dim=-1) == ids[:, 0]).sum().item()
    after = log_probs if reference.mode == "exact" else log_probs.gather(1, ids)
    after = after.double()
    kl = (before.exp() * (before - after)).nan_to_num(nan=0.0, posinf=math.inf).sum(dim=-1)
    if reference.mode != "exact":  # everything outside the top as one event
        rest_before = (1 - before.exp().sum(dim=-1)).clamp(min=1e-12)
        rest_after = (1 - after.exp().sum(dim=-1)).clamp(min=1e-12)
        kl = kl + rest_before * (rest_before.log() - rest_after.log())
    return math.nan if bool(log_probs.isnan().any()) else kl.sum().item(), float(same)


@dataclass(frozen=True)
class WeightDrift:
    """The change of one matrix.

    Attributes:
        name: the weight's name.
        relative: ‖W_t − W₀‖_F / ‖W₀‖_F.
        spectral: ‖W_t − W₀‖₂.
    """

    name: str
    relative: float
    spectral: float


def weight_drift(model: nn.Module, edits: Iterable[Any]) -> list[WeightDrift]:
    """Measure how far the edited matrices have moved, from the edits' factors alone.

    The dense difference is never formed: with Δ = L Rᵀ, ‖Δ‖_F² = tr(LᵀL RᵀR), ‖Δ‖₂ is the largest singular
    value of the product of the factors' triangles, and ‖W₀‖_F² = ‖W_t‖² − 2⟨W_t, Δ⟩ + ‖Δ‖².

    Args:
        model: the model with all ``edits`` applied.
        edits: edits with ``factors``: weight name to a pair ``left`` (d_out, r), ``right`` (d_in, r).

    Returns:
        One entry per matrix, in the order of first use.
    """
    lefts: dict[str, list[Tensor]] = {}
    rights: dict[str, list[Tensor]] = {}
    for edit in edits:
        for name, factor in edit.factors.items():
            lefts.setdefault(name, []).append(factor.left.detach())
            rights.setdefault(name, []).append(factor.right.detach())
    return [
        _matrix_drift(model, name, torch.cat(lefts[name], 1), torch.cat(rights[name], 1)) for name in lefts
    ]


def _matrix_drift(model: nn.Module, name: str, left: Tensor, right: Tensor) -> WeightDrift:
    weight, transposed = _weight(model, name)
    if transposed:
        left, right = right, left
    with torch.no_grad():
        left, right = (factor.to(weight.device, torch.float32) for factor in (left, right))
        triangles = [torch.linalg.qr(factor.double(), mode="r").R for factor in (left, right)]
        singular = torch.linalg.svdvals(triangles[0] @ triangles[1].T)
        delta2 = singular.square().sum().item()
        inner = ((weight.float() @ right) * left).double().sum().item()
        before2 = weight.double().square().sum().item() - 2 * inner + delta2
    relative = math.sqrt(delta2 / before2) if before2 > 0 else math.inf
    return WeightDrift(name, relative, singular[0].item() if len(singular) else 0.0)


def _weight(model: nn.Module, name: str) -> tuple[Tensor, bool]:
    description = describe(model)
    for layer in range(description.n_layers):
        projection = description.projection(layer)
        if projection.weight_name == name:
            return projection.weight, projection.transposed
    return unwrap(model).get_parameter(name), False
