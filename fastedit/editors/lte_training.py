"""Training of a model for LTE: a LoRA adapter, by supervised examples with and without a block of facts (peft).

Every record gives two rows a step. *In scope*: its prompt or a rephrasing, with a block of its fact in front, is to
be answered by the new target. *Out of scope*: a prompt that the fact does not bear on, half of the time with that
block in front, is to be answered as the base model answers it, whose greedy answers are collected once before
training. In half of the blocks the fact stands alone, in a quarter each with one and with two others in shuffled
order: facts of other subjects among its five nearest neighbours by the embeddings of their prompts. The loss is the
mean over the rows of the mean negative log-likelihood of the answer's tokens.

The published training also has long-form and general instructions, answers by a stronger model, and tunes all
weights; its LoRA variant gave the rank, the scale, the dropout and the rate here. The rate rises over the first 3 %
of the steps and falls by a cosine to nothing.
"""

from __future__ import annotations

import math
import random
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..artefacts.safetensors_file import explained
from ..data import Record
from ..errors import FasteditError, InvalidFact
from ..facts import Fact
from ..io import atomic_directory, atomic_write_json
from ..memory.sentences import DEFAULT_ENCODER, SentenceEncoder
from ..memory.side_module import sides_of
from ..memory.text_prefix import block_text, ids_in_front
from ..models.describe import describe, unwrap
from ..models.fingerprint import fingerprint
from ..models.runner import frozen
from ..models.tokens import encode_prompt, leading_specials, pad_batch, pad_id, target_ids
from ..ops.key_index import KeyIndex
from .lte import FORMAT, MERGED, SETTINGS, TEMPLATE, VERSION, import_peft, require_template
from .params import from_mapping
from .training_loop import Learner, Loop, name_of, require_room, split_by_subject

_NEIGHBOURS = 5
_SEARCHED = 32  # neighbours, among which those of the same subject are left out
_TOGETHER = 32  # prompts that the base model answers in one batch
TOKENIZER = "tokenizer"


@dataclass(frozen=True)
class LteTrainingParams:
    """Hyper-parameters of the training; published values where there are some.

    Attributes:
        steps: of Adam.
        lr: the greatest rate.
        warm_up: share of the steps over which it rises.
        batch: records in a pass.
        accumulate: passes in a step.
        clip: largest norm of the gradient.
        rank: of the adapter.
        alpha: of the adapter; its product is scaled by alpha / rank.
        dropout: in front of the adapter.
        targets: names of the linear layers that have one; ``"all-linear"`` is all but the head.
        template: of a block; see :class:`fastedit.editors.lte.LteParams`.
        encoder: folder or name of the sentence encoder.
        pooling: of its states.
        answer_tokens: length of the base model's answers out of scope.
        validate_every: steps.
        patience: steps without improvement after which training ends.
        holdout: share of the subjects that choose the best step.
        merged: write the whole tuned model as well, into the folder ``merged``.
    """

    steps: int = 1000
    lr: float = 3e-4
    warm_up: float = 0.03
    batch: int = 8
    accumulate: int = 1
    clip: float = 1.0
    rank: int = 8
    alpha: float = 16.0
    dropout: float = 0.05
    targets: str | tuple[str, ...] = "all-linear"
    template: str = TEMPLATE
    encoder: str = DEFAULT_ENCODER
    pooling: str = "mean"
    answer_tokens: int = 8
    validate_every: int = 50
    patience: int = 40_000
    holdout: float = 0.1
    merged: bool = True

    def __post_init__(self) -> None:
        for name in ("steps", "batch", "accumulate", "validate_every", "patience", "rank", "answer_tokens"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be positive, got {getattr(self, name)}")
        for name in ("holdout", "warm_up", "dropout"):
            if not 0 <= getattr(self, name) < 1:
                raise ValueError(f"{name} must be from 0 to below 1, got {getattr(self, name)}")
        require_template(self.template)


@dataclass(frozen=True)
class Example:
    """A record as training sees it.

    Attributes:
        fact: the edit.
        inside: prompts in its scope, its own first.
        outside: prompts that it does not bear on; at least one.
        neighbours: facts of other subjects that are like it, the nearest first.
    """

    fact: Fact
    inside: list[str]
    outside: list[str]
    neighbours: list[Fact]


@dataclass(frozen=True)
class Row:
    """A sequence with an answer to be learned.

    Attributes:
        ids: block, prompt and answer.
        n_answer: tokens of the answer, at the end.
    """

    ids: list[int]
    n_answer: int


def train(
    model: nn.Module,
    tokenizer: Any,
    records: Iterable[Record],
    out: str | Path,
    *,
    encoder: str | Path | None = None,
    exclude: Iterable[Record] = (),
    params: LteTrainingParams | Mapping[str, Any] | None = None,
    seed: int = 0,
    progress: bool | None = None,
) -> dict[str, Any]:
    """Train an adapter, and write what ``editor("lte", ..., params={"adapter": out})`` takes.

    ``out`` always holds the best so far, whole: the adapter as peft reads it, ``lte.json``, the tokenizer, and at the
    end ``merged``, the tuned model. Beside it, ``<out>.checkpoint`` holds the newest state until training ends: call
    this again with the same arguments to go on from there.

    Args:
        model: the base model; it ends as it was.
        tokenizer: its tokenizer.
        records: of a data set; see the module for what is taken from them.
        out: folder to write; must not exist, unless training goes on.
        encoder: in the place of the hyper-parameter.
        exclude: records to test with later: facts and prompts that they share are not trained on, nor are their
            subjects.
        params: see :class:`LteTrainingParams`.
        seed: of the split, the batches, the adapter's first values and dropout.
        progress: show a bar; None shows it on a terminal only.

    Returns:
        ``steps``, ``best_step``, ``examples``, ``validation`` (of the best: ``loss``; ``nll`` and ``accuracy`` of
        rows ``inside`` and ``outside``, an answer being right if all its tokens are) and ``history``, a validation a
        row.

    Raises:
        FasteditError: peft is not installed, or the model has a memory.
        ValueError: too few subjects, no prompts out of scope, or a checkpoint of another training.
        FileExistsError: ``out`` exists and there is no checkpoint to go on from.
        InvalidFact: a fact with its block is longer than the model's context.
        NumericalError: the loss stopped being finite.
    """
    peft = import_peft()
    settings = (
        params if isinstance(params, LteTrainingParams) else from_mapping(LteTrainingParams, params or {})
    )
    out = Path(out)
    require_room(out)
    if sides_of(model):
        raise FasteditError("the model has a memory: take its edits off before training")
    base = fingerprint(model)
    name = str(encoder or settings.encoder)
    settings = replace(settings, encoder=str(Path(name).resolve()) if Path(name).is_dir() else name)
    reader = SentenceEncoder.load(asdict(settings))
    reader.encoder.module.to(next(model.parameters()).device)
    examples = examples_of(records, reader, exclude)
    trained, held = split_by_subject(examples, settings.holdout, seed)
    with frozen(model):
        answers = base_answers(model, tokenizer, examples, settings.answer_tokens)
        learner = LteLearner(peft, unwrap(model), tokenizer, settings, answers, base, seed)
        try:
            content = {
                key: value for key, value in asdict(settings).items() if key not in ("patience", "merged")
            }
            facts = [[e.fact.as_dict(), e.inside, e.outside] for e in examples]
            name = name_of([base, content, reader.digest, seed, facts])
            loop = _Scheduled(learner, trained, held, seed, name)
            report = loop.run(out, progress)
        finally:
            learner.unload()
        if settings.merged:
            _write_merged(peft, unwrap(model), tokenizer, out)
    return report


# ------------------------------------------------------------------ data


def examples_of(
    records: Iterable[Record], encoder: SentenceEncoder, exclude: Iterable[Record] = ()
) -> list[Example]:
    """What training takes from records: all their facts, with what is in and out of scope, and their neighbours.

    A record without prompts out of scope has those of the next record about another subject.

    Args:
        records: of a data set.
        encoder: finds the neighbours.
        exclude: records whose subjects and prompts are left out.

    Raises:
        ValueError: nothing is left, or no record has prompts out of scope.
    """
    others = list(exclude)
    subjects = {_plain(fact.subject) for record in others for fact, _ in record.edits}
    asked = {text for record in others for text in _inside(record) + _outside(record)}
    found: list[tuple[Fact, list[str], list[str]]] = []
    for record in records:
        for fact, rephrased in record.edits:
            inside = [text for text in dict.fromkeys([fact.text, *rephrased]) if text not in asked]
            if _plain(fact.subject) in subjects or fact.text in asked:
                continue
            outside = [t for t in dict.fromkeys(_outside(record)) if t not in inside and t not in asked]
            found.append((fact, inside, outside))
    if not any(outside for _, _, outside in found):
        raise ValueError(
            "training needs records with prompts out of scope (locality or neighbourhood), got none"
        )
    near = neighbours([fact for fact, _, _ in found], encoder)
    examples = []
    for number, (fact, inside, own) in enumerate(found):
        following = (found[(number + step) % len(found)] for step in range(1, len(found)))
        theirs = (
            each for other, _, each in following if each and _plain(other.subject) != _plain(fact.subject)
        )
        if outside := own or next(theirs, []):
            examples.append(Example(fact, inside, outside, near[number]))
    return examples


def _plain(subject: str) -> str:
    return subject.casefold().strip()


def _inside(record: Record) -> list[str]:
    return [text for fact, rephrased in record.edits for text in (fact.text, *rephrased)]


def _outside(record: Record) -> list[str]:
    found = [item.prompt for items in record.locality.values() for item in items] + record.neighborhood
    return [text for text in found if text.strip()]


def neighbours(facts: Sequence[Fact], encoder: SentenceEncoder) -> list[list[Fact]]:
    """Of each fact the five of other subjects whose prompts' embeddings are nearest, the nearest first."""
    keys = encoder.embed([fact.text for fact in facts])
    index = KeyIndex(keys.shape[1])
    index.add(keys, radius=0.0)
    ids, _ = index.max_inner_product(keys, k=min(_SEARCHED, len(facts)))
    found = []
    for fact, row in zip(facts, ids.tolist(), strict=True):
        others = [facts[i] for i in row if i >= 0 and _plain(facts[i].subject) != _plain(fact.subject)]
        found.append(others[:_NEIGHBOURS])
    return found


@torch.no_grad()
def base_answers(
    model: Any, tokenizer: Any, examples: Sequence[Example], n_tokens: int
) -> dict[str, list[int]]:
    """The model's greedy answers to all prompts out of scope, ids up to the end of the text or ``n_tokens``."""
    texts = sorted(
        {text for example in examples for text in example.outside}, key=lambda text: (len(text), text)
    )
    device = next(model.parameters()).device
    ends = model.generation_config.eos_token_id
    ending = {ends} if isinstance(ends, int) else set(ends or ())
    found: dict[str, list[int]] = {}
    for start in range(0, len(texts), _TOGETHER):
        batch = texts[start : start + _TOGETHER]
        rows = [encode_prompt(tokenizer, text) for text in batch]
        ids, mask, _ = (t.to(device) for t in pad_batch(rows, pad_id(tokenizer), side="left"))
        out = model.generate(
            input_ids=ids,
            attention_mask=mask,
            max_new_tokens=n_tokens,
            do_sample=False,
            num_beams=1,
            pad_token_id=pad_id(tokenizer),
        )
        for text, answer in zip(batch, out[:, ids.shape[1] :].tolist(), strict=True):
            end = next((i + 1 for i, token in enumerate(answer) if token in ending), len(answer))
            found[text] = answer[:end]
    return found


# ------------------------------------------------------------------ the adapter in training


class LteLearner(Learner[Example]):
    """The model with its adapter: rows, losses, and how it is written. Only the adapter is in checkpoints."""

    settings: LteTrainingParams

    def __init__(
        self,
        peft: Any,
        model: nn.Module,
        tokenizer: Any,
        settings: LteTrainingParams,
        answers: Mapping[str, list[int]],
        base: str,
        seed: int,
    ) -> None:
        super().__init__()
        self.settings, self.accumulate, self.clip = settings, settings.accumulate, settings.clip
        self.tokenizer, self.answers, self.base = tokenizer, answers, base
        self.device = next(model.parameters()).device
        self.limit = describe(model).context_length
        self.leading = leading_specials(tokenizer)
        targets = settings.targets if isinstance(settings.targets, str) else list(settings.targets)
        config = peft.LoraConfig(
            task_type="CAUSAL_LM",
            r=settings.rank,
            lora_alpha=settings.alpha,
            lora_dropout=settings.dropout,
            target_modules=targets,
            fan_in_fan_out=describe(model).projection(0).transposed,
        )
        with torch.random.fork_rng([self.device] if self.device.type == "cuda" else []):
            torch.manual_seed(seed)
            # in a list: the base model's weights are no part of a checkpoint
            self._tuned: list[Any] = [peft.get_peft_model(model, config)]
        self.adapter = nn.ParameterList([p for p in self._tuned[0].parameters() if p.requires_grad])
        self._dropouts = [
            part
            for name, module in self._tuned[0].named_modules()
            if name.endswith("lora_dropout")
            for part in module.modules()
        ]

    def unload(self) -> None:
        """Give the base model its modules back."""
        self._tuned[0].unload()

    def groups(self) -> list[dict[str, Any]]:
        """The adapter."""
        return [{"params": list(self.adapter), "lr": self.settings.lr}]

    # -- rows ---------------------------------------------------------------------------------------

    def block(self, example: Example, rng: random.Random) -> list[Fact]:
        """The fact alone, or in shuffled order with one or two of its neighbours: 50, 25 and 25 %."""
        n_others = min(rng.choice((0, 0, 1, 2)), len(example.neighbours))
        facts = [example.fact, *rng.sample(example.neighbours, n_others)]
        rng.shuffle(facts)
        return facts

    def row(self, facts: Sequence[Fact], prompt: str, answer: Sequence[int]) -> Row:
        """A prompt with its answer behind a block; without facts there is none."""
        own = encode_prompt(self.tokenizer, prompt)
        if facts:
            if own[: len(self.leading)] == self.leading:
                own = own[len(self.leading) :]
            own = ids_in_front(self.tokenizer, block_text(self.settings.template, facts)) + own
        return Row([*own, *answer], len(answer))

    def rows(self, batch: Sequence[Example], rng: random.Random) -> list[Row]:
        """Two rows of each example, in scope and out of scope. Neighbours are left out where they do not fit.

        Raises:
            InvalidFact: a fact's row is too long without them.
        """
        found = []
        for example in batch:
            facts, inside, outside = (
                self.block(example, rng),
                rng.choice(example.inside),
                rng.choice(example.outside),
            )
            shown = facts if rng.random() < 0.5 else []
            target = target_ids(self.tokenizer, example.fact.target)
            pair = self._pair(facts, inside, target, shown, outside)
            if self._too_long(pair):
                pair = self._pair([example.fact], inside, target, [example.fact] * bool(shown), outside)
            if self._too_long(pair):
                longest = max(len(row.ids) for row in pair)
                raise InvalidFact(
                    f"{example.fact.text!r} takes {longest} tokens with its block and a prompt, the context holds "
                    f"{self.limit}"
                )
            found += pair
        return found

    def _pair(
        self, facts: Sequence[Fact], inside: str, target: list[int], shown: Sequence[Fact], outside: str
    ) -> list[Row]:
        return [self.row(facts, inside, target), self.row(shown, outside, self.answers[outside])]

    def _too_long(self, rows: Sequence[Row]) -> bool:
        return self.limit is not None and any(len(row.ids) > self.limit for row in rows)

    # -- losses -------------------------------------------------------------------------------------

    def losses(self, batch: Sequence[Example], rng: random.Random) -> tuple[Tensor, dict[str, float]]:
        """The objective, and its parts as numbers."""
        for module in self._dropouts:
            module.train(torch.is_grad_enabled())
        nll, right = answer_losses(self._tuned[0], self.rows(batch, rng), self.device)
        parts = {"loss": float(nll.detach().mean())}
        for offset, kind in enumerate(("inside", "outside")):
            parts[f"nll_{kind}"] = float(nll.detach()[offset::2].mean())
            parts[f"accuracy_{kind}"] = float(right[offset::2].float().mean())
        return nll.mean(), parts

    # -- on disk ------------------------------------------------------------------------------------

    def save(self, out: Path, report: Mapping[str, Any]) -> None:
        """Write the adapter and its settings."""
        tuned = self._tuned[0]
        with explained(out), atomic_directory(out, overwrite=True) as folder:
            tuned.save_pretrained(folder, save_embedding_layers=False)
            self.tokenizer.save_pretrained(folder / TOKENIZER)
            content = {
                "format": FORMAT,
                "version": VERSION,
                "base": self.base,
                "tuned": "",
                **{name: getattr(self.settings, name) for name in ("template", "encoder", "pooling")},
                "training": {**asdict(self.settings), **report},
            }
            atomic_write_json(folder / SETTINGS, content)


def answer_losses(model: Any, rows: Sequence[Row], device: torch.device) -> tuple[Tensor, Tensor]:
    """(rows,) mean negative log-likelihood of each row's answer, fp32, and whether all its tokens are likeliest."""
    ids, mask, positions = (t.to(device) for t in pad_batch([row.ids for row in rows], 0))
    logits = model(input_ids=ids, attention_mask=mask, use_cache=False).logits[:, :-1].float()
    losses = F.cross_entropy(logits.transpose(1, 2), ids[:, 1:], reduction="none")
    counts = torch.tensor([row.n_answer for row in rows], device=device)[:, None]
    scored = (positions[:, 1:] >= mask.sum(1, keepdim=True) - counts) & mask[:, 1:].bool()
    right = ((logits.argmax(-1) == ids[:, 1:]) | ~scored).all(1)
    return (losses * scored).sum(1) / counts[:, 0], right


class _Scheduled(Loop[Example]):
    """The loop with a rate that rises and falls by the number of the step."""

    learner: LteLearner

    def advance(self) -> None:
        settings = self.learner.settings
        for group in self.optimiser.param_groups:
            group["lr"] = settings.lr * rate(self.step, settings.steps, settings.warm_up)
        super().advance()


def rate(step: int, steps: int, warm_up: float) -> float:
    """Share of the greatest rate at a step, counted from 0: a rise over the share ``warm_up``, then half a cosine."""
    rising = max(1, round(warm_up * steps))
    if step < rising:
        return (step + 1) / rising
    return 0.5 * (1 + math.cos(math.pi * (step - rising) / max(1, steps - rising)))


def _write_merged(peft: Any, model: Any, tokenizer: Any, out: Path) -> None:
    """Write the tuned model into its folder, and its fingerprint into the settings. The model ends as it was."""
    from ..io import read_json

    weights = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    tuned = peft.PeftModel.from_pretrained(model, str(out)).merge_and_unload()
    try:
        with explained(out), atomic_directory(out / MERGED, overwrite=True) as folder:
            tuned.save_pretrained(folder)
            tokenizer.save_pretrained(folder)
        content = read_json(out / SETTINGS)
        atomic_write_json(out / SETTINGS, {**content, "tuned": fingerprint(tuned)})
    finally:
        model.load_state_dict(weights)
