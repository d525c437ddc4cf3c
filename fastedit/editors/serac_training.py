"""Training of SERAC's scope classifier and counterfactual model (Mitchell et al. 2022, section 3.2, supervised).

A step draws records. The counterfactual model learns to answer a prompt in scope with the edit in front of it (NLL of
the target's tokens); the classifier learns that prompts in scope are similar to their own edit, and that prompts out
of scope are similar to none of the batch's edits (BCE, both kinds weighing alike):

    0.1 · NLL + 1.0 · (mean −log s⁺ + mean −log(1 − s⁻)),   s = exp(−scale · ‖E(edit) − E(prompt)‖²).

In scope are a record's own prompt and its rephrasings, out of scope its locality prompts; where a batch has none, the
other records' prompts. Records are split by subject into those trained on and those that choose the best step.
"""

from __future__ import annotations

import copy
import logging
import random
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..artefacts.safetensors_file import explained, write_tensors
from ..data import Record
from ..errors import FasteditError
from ..facts import Fact
from ..io import atomic_directory, atomic_write_json
from ..memory.encoder import TextEncoder
from ..memory.scope import (
    BASE,
    COUNTERFACTUAL,
    ENCODER,
    FORMAT,
    HEAD,
    SETTINGS,
    TOKENIZER,
    VERSION,
    ScopeSettings,
    embeddings,
)
from ..memory.serac import require_same_vocabulary
from ..models.describe import describe
from ..models.fingerprint import fingerprint
from ..models.tokens import encode_prompt, leading_specials, pad_batch, target_ids
from .memory_editor import depth_default
from .params import from_mapping
from .serac import edit_prefix, edit_text, pooled_by_base
from .training_loop import Learner, Loop, name_of, require_room, split_by_subject

logger = logging.getLogger(__name__)

COPY = "copy"
_LARGEST_COPY = 1_000_000_000  # parameters of a base model that is copied to be trained


@dataclass(frozen=True)
class SeracTrainingParams:
    """Hyper-parameters of the training; published values where there are some.

    Attributes:
        steps: of Adam, at most.
        lr: of the encoder and the counterfactual model.
        head_lr: of the head and the scale.
        batch: records in a pass.
        accumulate: passes in a step.
        clip: largest norm of the gradient.
        nll_weight: of the counterfactual model's loss.
        bce_weight: of the classifier's loss.
        head: whether a linear map after the pooling is trained; None: only for ``classifier="base"``, which has
            nothing else to train.
        pooling: of an encoder's states; None: the published ``"cls"`` in ``official``, else ``"mean"``.
        validate_every: steps.
        patience: steps without improvement after which training ends.
        holdout: share of the subjects that choose the best step.
        layers: the block of the base model's states, one; None: at four fifths of the depth.
        separator: text between an edit and a prompt; None: a new line, in ``official`` a space.
    """

    steps: int = 2000
    lr: float = 1e-5
    head_lr: float = 1e-3
    batch: int = 10
    accumulate: int = 10
    clip: float = 100.0
    nll_weight: float = 0.1
    bce_weight: float = 1.0
    head: bool | None = None
    pooling: str | None = None
    validate_every: int = 50
    patience: int = 40_000
    holdout: float = 0.1
    layers: tuple[int, ...] | None = None
    separator: str | None = None

    def __post_init__(self) -> None:
        for name in ("steps", "batch", "accumulate", "validate_every", "patience"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be positive, got {getattr(self, name)}")
        if not 0 < self.holdout < 1:
            raise ValueError(f"holdout must be between 0 and 1, got {self.holdout}")


@dataclass(frozen=True)
class Example:
    """A record as training sees it.

    Attributes:
        fact: the edit.
        inside: prompts in its scope, its own first.
        outside: prompts out of its scope; may be empty.
    """

    fact: Fact
    inside: list[str]
    outside: list[str]


def train(
    model: nn.Module,
    tokenizer: Any,
    records: Iterable[Record],
    out: str | Path,
    *,
    classifier: str | Path = BASE,
    counterfactual: str | Path = COPY,
    params: SeracTrainingParams | Mapping[str, Any] | None = None,
    profile: str = "clean",
    seed: int = 0,
    progress: bool | None = None,
) -> dict[str, Any]:
    """Train, and write what ``editor("serac", ..., classifier=out)`` takes.

    ``out`` always holds the best so far, whole. Beside it, ``<out>.checkpoint`` holds the newest state until training
    ends: call this again with the same arguments to go on from there.

    Args:
        model: the base model; it is not changed.
        tokenizer: its tokenizer.
        records: of a data set; see the module for what is taken from them.
        out: folder to write; must not exist, unless training goes on.
        classifier: folder or name of a text encoder, or ``"base"``: a head over the base model's own states, which
            are computed once.
        counterfactual: folder or name of a causal language model with the base model's vocabulary; ``"copy"``: a copy
            of the base model; ``"base"``: the base model itself, untrained.
        params: see :class:`SeracTrainingParams`.
        profile: what the classifier reads of an edit: in ``official`` its target too. The scale is 1 there; else it
            is trained.
        seed: of the split and the batches.
        progress: show a bar; None shows it on a terminal only.

    Returns:
        ``steps``, ``best_step``, ``examples``, ``validation`` (``loss``, ``nll``, ``bce``, ``accuracy_inside``,
        ``accuracy_outside`` of the best) and ``history``, a validation a row.

    Raises:
        ValueError: too few subjects, a checkpoint of another training, or a base model too large to copy.
        FileExistsError: ``out`` exists and there is no checkpoint to go on from.
        NumericalError: the loss stopped being finite.
    """
    settings = (
        params if isinstance(params, SeracTrainingParams) else from_mapping(SeracTrainingParams, params or {})
    )
    out = Path(out)
    require_room(out)
    examples = examples_of(records)
    trained, held = split_by_subject(examples, settings.holdout, seed)
    learner = _Learner(model, tokenizer, settings, str(classifier), str(counterfactual), profile, examples)
    name = _name(learner, examples, seed)
    return Loop(learner, trained, held, seed, name).run(out, progress)


def examples_of(records: Iterable[Record]) -> list[Example]:
    """What training takes from records: all their facts, with what is in and out of scope."""
    found = []
    for record in records:
        outside = [item.prompt for items in record.locality.values() for item in items] + record.neighborhood
        for fact, rephrased in record.edits:
            inside = list(dict.fromkeys([fact.text, *rephrased]))
            found.append(
                Example(fact, inside, [text for text in dict.fromkeys(outside) if text not in inside])
            )
    return found


def balanced_bce(positive: Tensor, negative: Tensor) -> Tensor:
    """Mean −log s⁺ + mean −log(1 − s⁻), from x = −log s of both kinds, fp32; a kind that is empty counts nothing."""
    total = positive.new_zeros(())
    if len(positive):
        total = total + positive.mean()
    if len(negative):
        total = total - torch.log(-torch.expm1(-negative.clamp(min=1e-6))).mean()
    return total


class _Learner(Learner[Example]):
    """The two models in training: their parameters, their losses, and how they are written."""

    def __init__(
        self,
        model: nn.Module,
        tokenizer: Any,
        settings: SeracTrainingParams,
        classifier: str,
        counterfactual: str,
        profile: str,
        examples: Sequence[Example],
    ) -> None:
        super().__init__()
        self.settings: SeracTrainingParams = settings
        self.profile, self.tokenizer = profile, tokenizer
        self.accumulate, self.clip = settings.accumulate, settings.clip
        self.leading = leading_specials(tokenizer)
        self.names = {"classifier": classifier, "counterfactual": counterfactual}
        self.base = {"fingerprint": fingerprint(model)}
        self.layers = settings.layers or depth_default(describe(model), 0.8)
        if len(self.layers) != 1:
            raise ValueError(f"the states of one layer are compared, got layers {self.layers}")
        official = profile == "official"
        self.separator = settings.separator if settings.separator is not None else " " if official else "\n"
        self.reader: TextEncoder | None = None
        self.states: dict[str, Tensor] = {}
        self.device = next(model.parameters()).device
        if classifier == BASE:
            self.pooling = "last"
            texts = list(dict.fromkeys(text for example in examples for text in self._texts(example)))
            pooled = pooled_by_base(model, tokenizer, texts, self.layers[0], self.pooling).float()
            self.states = dict(zip(texts, pooled, strict=True))
        else:
            self.pooling = settings.pooling or ("cls" if official else "mean")
            self.reader = TextEncoder.load(classifier)
            self.encoder = self.reader.module.float().requires_grad_(True).to(self.device)
        head = classifier == BASE if settings.head is None else settings.head
        if classifier == BASE and not head:
            raise ValueError("classifier='base' has nothing but its head to train: head must not be false")
        with torch.no_grad():
            width = self.pooled([examples[0].fact.text]).shape[1]
        self.weight = nn.Parameter(torch.eye(width, device=self.device)) if head else None
        self.log_scale = nn.Parameter(torch.zeros((), device=self.device), requires_grad=not official)
        if not official:
            self._start_scale(examples)
        self.answering, self.dtype = self._load_answering(model, counterfactual)

    def _load_answering(self, model: nn.Module, name: str) -> tuple[Any, torch.dtype]:
        if name == BASE:
            return None, torch.float32
        if name == COPY:
            size = sum(p.numel() for p in model.parameters())
            if size > _LARGEST_COPY:
                raise ValueError(
                    f"the base model has {size:,} parameters, too many to train a copy of it: name the folder of a "
                    "small model with its vocabulary as the counterfactual model, or 'base' for the base model itself"
                )
            found: Any = copy.deepcopy(model)
        else:
            from transformers import AutoModelForCausalLM

            from ..models.loading import load_tokenizer

            try:
                found = AutoModelForCausalLM.from_pretrained(name)
                theirs = load_tokenizer(name)
            except (OSError, ValueError, ImportError) as error:
                raise FasteditError(f"cannot load the counterfactual model {name}: {error}") from error
            require_same_vocabulary(model, self.tokenizer, found, theirs)
        dtype = next(found.parameters()).dtype
        return found.eval().float().requires_grad_(True).to(self.device), dtype

    # -- the classifier -----------------------------------------------------------------------------

    def _texts(self, example: Example) -> list[str]:
        return [self.edit_text(example), *example.inside, *example.outside]

    def edit_text(self, example: Example) -> str:
        """What the classifier reads of an edit."""
        return edit_text(example.fact, self.profile, self.reader)

    def pooled(self, texts: Sequence[str]) -> Tensor:
        """(n, d) pooled states."""
        if self.reader is not None:
            return self.reader.pooled(texts, self.pooling)
        return torch.stack([self.states[text] for text in texts])

    def scope(self) -> ScopeSettings:
        """The classifier's settings as they are now."""
        scale = float(self.log_scale.detach().exp())
        return ScopeSettings(self.pooling, "distance", scale, 0.5, normalise=self.reader is None)

    def neg_log_similarity(self, edits: Sequence[str], prompts: Sequence[str]) -> Tensor:
        """(len(edits), len(prompts)) −log s = scale · ‖E(edit) − E(prompt)‖², fp32."""
        x = embeddings(self.pooled([*edits, *prompts]), self.scope(), self.weight)
        a, b = x[: len(edits)], x[len(edits) :]
        return (a[:, None] - b[None]).square().sum(-1) * self.log_scale.exp()

    @torch.no_grad()
    def _start_scale(self, examples: Sequence[Example]) -> None:
        """Begin where a prompt half-way between the two kinds, by geometric mean of distances, has similarity 1/2."""
        chosen = [e for e in examples if len(e.inside) > 1][:64] or list(examples[:64])
        inside = [example.inside[-1] for example in chosen]
        found = self.neg_log_similarity([self.edit_text(example) for example in chosen], inside)
        own = found.diagonal()
        others = found[~torch.eye(len(chosen), dtype=torch.bool, device=found.device)]
        near, far = (
            x[x > 0].median() if bool((x > 0).any()) else found.new_tensor(1.0) for x in (own, others)
        )
        self.log_scale.copy_(torch.log(torch.log(found.new_tensor(2.0)) / (near * far).sqrt()))

    # -- losses -------------------------------------------------------------------------------------

    def distances(self, batch: Sequence[Example], rng: random.Random) -> tuple[Tensor, Tensor, list[str]]:
        """−log s of drawn prompts in scope with their own edit, and of those out of scope with the nearest edit.

        The third is the prompts in scope.
        """
        inside = [rng.choice(example.inside) for example in batch]
        drawn: list[tuple[str, int | None]] = [(rng.choice(e.outside), None) for e in batch if e.outside]
        if not drawn and len(batch) > 1:  # then the other edits' prompts
            drawn = [(text, i) for i, text in enumerate(inside)]
        edits = [self.edit_text(example) for example in batch]
        found = self.neg_log_similarity(edits, [*inside, *(text for text, _ in drawn)])
        positive, rest = found[:, : len(inside)].diagonal(), found[:, len(inside) :]
        own = torch.zeros_like(rest, dtype=torch.bool)
        for column, (_, row) in enumerate(drawn):
            if row is not None:
                own[row, column] = True
        return positive, rest.masked_fill(own, float("inf")).amin(0), inside

    def nll(self, batch: Sequence[Example], prompts: Sequence[str]) -> Tensor:
        """Mean over the batch of the mean loss of the targets' tokens, after edit and prompt."""
        rows, targets = [], []
        for example, prompt in zip(batch, prompts, strict=True):
            bare = encode_prompt(self.tokenizer, prompt)
            if self.leading and bare[: len(self.leading)] == self.leading:
                bare = bare[len(self.leading) :]
            target = target_ids(self.tokenizer, example.fact.target)
            rows.append([*edit_prefix(self.tokenizer, example.fact, self.separator), *bare, *target])
            targets.append(len(target))
        ids, mask, positions = (t.to(self.device) for t in pad_batch(rows, 0))
        logits = self.answering(input_ids=ids, attention_mask=mask, use_cache=False).logits[:, :-1].float()
        losses = F.cross_entropy(logits.transpose(1, 2), ids[:, 1:], reduction="none")
        ends = mask.sum(1, keepdim=True)
        counts = torch.tensor(targets, device=ids.device)[:, None]
        scored = (positions[:, 1:] >= ends - counts) & mask[:, 1:].bool()
        return ((losses * scored).sum(1) / counts[:, 0]).mean()

    def losses(self, batch: Sequence[Example], rng: random.Random) -> tuple[Tensor, dict[str, float]]:
        """The objective, and its parts as numbers."""
        positive, negative, inside = self.distances(batch, rng)
        bce = balanced_bce(positive, negative)
        nll = bce.new_zeros(()) if self.answering is None else self.nll(batch, inside)
        loss = self.settings.bce_weight * bce + self.settings.nll_weight * nll
        half = torch.log(torch.tensor(2.0))
        parts = {
            "loss": float(loss.detach()),
            "nll": float(nll.detach()),
            "bce": float(bce.detach()),
            "accuracy_inside": float((positive.detach().cpu() < half).float().mean()),
            "accuracy_outside": float((negative.detach().cpu() >= half).float().mean())
            if len(negative)
            else 1.0,
        }
        return loss, parts

    def groups(self) -> list[dict[str, Any]]:
        """Parameters with their learning rates."""
        small = [p for p in (self.weight, self.log_scale) if p is not None and p.requires_grad]
        ids = {id(p) for p in (self.weight, self.log_scale)}
        large = [p for p in self.parameters() if p.requires_grad and id(p) not in ids]
        return [
            {"params": params, "lr": lr}
            for params, lr in ((large, self.settings.lr), (small, self.settings.head_lr))
            if params
        ]

    # -- on disk ------------------------------------------------------------------------------------

    def save(self, out: Path, report: Mapping[str, Any]) -> None:
        """Write the folder as it is now, whole or not at all; an older one is replaced."""
        content = {
            "format": FORMAT,
            "version": VERSION,
            "backbone": BASE if self.reader is None else ENCODER,
            "settings": asdict(self.scope()),
            "layers": list(self.layers),
            "separator": self.separator,
            "profile": self.profile,
            "base": self.base["fingerprint"],
            "training": {**self.names, "params": asdict(self.settings), **report},
        }
        with explained(out), atomic_directory(out, overwrite=True) as temporary:
            self.tokenizer.save_pretrained(temporary / TOKENIZER)
            if self.reader is not None:
                self.reader.module.save_pretrained(temporary / ENCODER)  # type: ignore[operator]
                self.reader.tokenizer.save_pretrained(temporary / ENCODER)
            if self.weight is not None:
                write_tensors(temporary / HEAD, {"weight": self.weight.detach()})
            if self.answering is not None:
                copy.deepcopy(self.answering).to(self.dtype).save_pretrained(temporary / COUNTERFACTUAL)
                self.tokenizer.save_pretrained(temporary / COUNTERFACTUAL)
            atomic_write_json(temporary / SETTINGS, content)


def _name(learner: _Learner, examples: Sequence[Example], seed: int) -> str:
    """A digest of everything that a training depends on, but the number of steps."""
    settings = {
        key: value for key, value in asdict(learner.settings).items() if key not in ("steps", "patience")
    }
    content = [
        learner.names,
        learner.base,
        learner.profile,
        settings,
        seed,
        [[example.fact.as_dict(), example.inside, example.outside] for example in examples],
    ]
    return name_of(content)
