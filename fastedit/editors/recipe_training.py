"""Training of RECIPE's encoder, towers, generator and sentinel (Chen et al. 2024, arXiv 2405.03279).

A step draws records. Their facts become keys and prompts, and three things are asked at once of the frozen model with
each fact's own prompt in front: the edited prompt, a rephrasing (both shall be answered by the target), and an
unrelated prompt (which shall be answered as without). Beside it, the contrastive terms order scores: own key >
sentinel > foreign keys for relevant queries, sentinel > all keys for irrelevant ones.

    L = L_rel + L_gen + L_loc + (L_no + L_so,in + L_so,out)          see :mod:`fastedit.editors.recipe_losses`

A step is one pass of the model over the three prompts of all records and one pass of the encoder. The first reads a
soft prompt, and what the texts behind it begin with alike, once, and runs the head at scored tokens only. With
``train_encoder=False`` the encoder is read once for all texts, and a step costs no pass of it. What the model puts
out without prompts is read once, too.

The best step is chosen on subjects held out, by the same terms without their hinges.
"""

from __future__ import annotations

import logging
import math
import random
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ..artefacts.safetensors_file import explained
from ..data import Record
from ..facts import Fact
from ..io import atomic_directory
from ..memory.encoder import TextEncoder
from ..memory.prefix_trees import states_behind
from ..memory.recipe import RecipeNetworks, RecipeSizes, knowledge_text, write_checkpoint
from ..models.describe import describe
from ..models.fingerprint import fingerprint
from ..models.runner import frozen
from ..models.tokens import encode_prompt, target_ids
from ..progress import progress as bar_of
from .memory_editor import TargetRow
from .params import from_mapping
from .recipe_losses import edit_losses, inside_loss, neighbour_loss, outside_loss
from .training_loop import Learner, Loop, name_of, require_room, split_by_subject

logger = logging.getLogger(__name__)

_TOGETHER = 64  # rows in one pass of the model without prompts
_SAMPLE = 1024  # texts whose pooled states are averaged, if the encoder is trained

Asked = tuple[str, str]  # a prompt and its answer


@dataclass(frozen=True)
class RecipeTrainingParams:
    """Hyper-parameters of the training. What is None depends on the profile: published in ``official``.

    Attributes:
        steps: of Adam, at most.
        batch: records in a step; None: 16, published 8.
        lr: of towers and sentinel; None: 3e-4, published 1e-5.
        generator_lr: of the prompt generator; None: 3e-3, published 1e-5.
        encoder_lr: of the encoder; None: 2e-5, published 1e-5.
        train_encoder: whether the encoder is trained as well, as published, or read once.
        dim: d, of keys and queries; None: 512, published 4096.
        prompt_tokens: n, vectors of a soft prompt.
        sentinel_tokens: vectors of the sentinel.
        tied_towers: one tower for knowledge and queries.
        standardise: the towers read the encoder's pooled states less their mean over the training texts, divided by
            their deviation: an affine map in front of an affine map, which only eases training. None: not in
            ``official``.
        both_queries: both contrastive terms for edited prompts and rephrasings, averaged, as in the paper; False: a
            coin gives each record's prompt one term and its rephrasing the other, as in the published code. None:
            False in ``official``.
        drop_conflicts: a fact of the batch is no candidate for another one's query that is in its scope too, such as
            the same prompt with another target. None: not in ``official``.
        scale: t, factor of the scores.
        hinge: a token or row counts only while its probability is less than this times the second greatest.
        epsilon: ε of −log(p + ε); None: 0, published 1e-8. See :mod:`fastedit.editors.recipe_losses`.
        reliability: weight of the edited prompts' loss.
        generality: weight of the rephrasings' loss.
        locality: weight of the unrelated prompts' KL.
        contrastive: weight of the three contrastive terms.
        validate_every: steps.
        patience: steps without improvement after which training ends.
        holdout: share of the subjects that choose the best step.
        validation: examples of these that are asked, at most.
    """

    steps: int = 3000
    batch: int | None = None
    lr: float | None = None
    generator_lr: float | None = None
    encoder_lr: float | None = None
    train_encoder: bool = True
    dim: int | None = None
    prompt_tokens: int = 3
    sentinel_tokens: int = 10
    tied_towers: bool = False
    standardise: bool | None = None
    both_queries: bool | None = None
    drop_conflicts: bool | None = None
    scale: float = 1.0
    hinge: float = 1.2
    epsilon: float | None = None
    reliability: float = 1.0
    generality: float = 1.0
    locality: float = 1.0
    contrastive: float = 1.0
    validate_every: int = 100
    patience: int = 40_000
    holdout: float = 0.1
    validation: int = 512

    def __post_init__(self) -> None:
        for name in (
            "steps",
            "batch",
            "lr",
            "generator_lr",
            "encoder_lr",
            "dim",
            "validate_every",
            "patience",
            "validation",
        ):
            value = getattr(self, name)
            if value is not None and not value > 0:
                raise ValueError(f"{name} must be positive, got {value}")
        if not 0 < self.holdout < 1:
            raise ValueError(f"holdout must be between 0 and 1, got {self.holdout}")
        if not self.hinge >= 1:
            raise ValueError(f"hinge must be at least 1, got {self.hinge}")

    def resolved(self, profile: str) -> Settings:
        """With nothing left open."""
        official = profile == "official"
        chosen: dict[str, Any] = {
            "batch": 8 if official else 16,
            "lr": 1e-5 if official else 3e-4,
            "generator_lr": 1e-5 if official else 3e-3,
            "encoder_lr": 1e-5 if official else 2e-5,
            "dim": 4096 if official else 512,
            "both_queries": not official,
            "standardise": not official,
            "drop_conflicts": not official,
            "epsilon": 1e-8 if official else 0.0,
        }
        given = {key: value for key, value in asdict(self).items() if value is not None}
        return Settings(**{**chosen, **given})


@dataclass(frozen=True)
class Settings(RecipeTrainingParams):
    """:class:`RecipeTrainingParams` with nothing left open."""

    batch: int = 16
    lr: float = 3e-4
    generator_lr: float = 3e-3
    encoder_lr: float = 2e-5
    dim: int = 512
    both_queries: bool = True
    standardise: bool = True
    drop_conflicts: bool = True
    epsilon: float = 0.0


@dataclass(frozen=True)
class Example:
    """A record as training sees it.

    Attributes:
        fact: the edit.
        inside: by kind, other prompts in its scope with their answers.
        outside: by kind, prompts out of its scope with the answers that shall stay.
    """

    fact: Fact
    inside: dict[str, list[Asked]]
    outside: dict[str, list[Asked]]

    @property
    def own(self) -> Asked:
        """The edited prompt and its target."""
        return self.fact.text, self.fact.target.strip()


def train(
    model: nn.Module,
    tokenizer: Any,
    records: Iterable[Record],
    out: str | Path,
    *,
    encoder: str | Path = "roberta-base",
    exclude: Iterable[Record] = (),
    params: RecipeTrainingParams | Mapping[str, Any] | None = None,
    profile: str = "clean",
    seed: int = 0,
    progress: bool | None = None,
) -> dict[str, Any]:
    """Train, and write the checkpoint that ``editor("recipe", ..., params={"checkpoint": out})`` takes.

    ``out`` always holds the best so far, whole. Beside it, ``<out>.checkpoint`` holds the newest state until training
    ends: call this again with the same arguments to go on from there.

    Args:
        model: the base model; it is not changed.
        tokenizer: its tokenizer.
        records: of a data set; those with a rephrasing and a locality prompt are taken.
        out: folder to write; must not exist, unless training goes on.
        encoder: folder or hub name of a text encoder, or an installed package that holds one.
        exclude: records to test with later: what shares a subject or a prompt with them is not trained on.
        params: see :class:`RecipeTrainingParams`.
        profile: ``"official"`` takes the published hyper-parameters, and ``lr`` for the generator, too.
        seed: of the networks, the split and the batches.
        progress: show a bar; None shows it on a terminal only.

    Returns:
        ``steps``, ``best_step``, ``examples``, ``validation`` of the best and ``history``, a validation a row:
        ``loss`` and its parts without hinges (``reliability``, ``generality``, ``locality``, ``contrastive``);
        ``accuracy`` and ``accuracy_rephrased``, target tokens got right with the fact's own prompt; ``hit`` and
        ``hit_rephrased``, prompts that find their own fact among those held out; ``false_hit``, unrelated prompts
        that find any.

    Raises:
        ValueError: too few subjects, or a checkpoint of another training.
        FileExistsError: ``out`` exists and there is no checkpoint to go on from.
        FasteditError: the encoder cannot be loaded, or has no stack of blocks that the sentinel can be fed to.
        NumericalError: the loss stopped being finite.
    """
    given = (
        params
        if isinstance(params, RecipeTrainingParams)
        else from_mapping(RecipeTrainingParams, params or {})
    )
    settings = given.resolved(profile)
    out = Path(out)
    require_room(out)
    reader = TextEncoder.load(encoder)
    with frozen(model):
        examples, left_out = examples_of(records, exclude, tokenizer, _room(model, settings))
        trained, held = split_by_subject(examples, settings.holdout, seed)
        learner = _Learner(model, tokenizer, settings, reader, str(encoder), profile, seed)
        name = _name(learner, examples, seed)
        learner.prepare(examples, progress)
        loop = Loop(learner, trained, held, seed, name)
        loop.notes["left_out"] = left_out
        return loop.run(out, progress)


# ------------------------------------------------------------------ records


def examples_of(
    records: Iterable[Record], exclude: Iterable[Record], tokenizer: Any, room: float
) -> tuple[list[Example], dict[str, int]]:
    """What training takes from records, and how many it cannot take, by reason.

    Rephrasings are in scope, of RippleEdits the kinds of portability as well. Of several answers the first counts.

    Args:
        records: of a data set.
        exclude: records that nothing may be shared with: neither a subject nor a prompt.
        tokenizer: the base model's.
        room: tokens that a prompt and its answer may take.
    """
    subjects, prompts = _of_others(exclude)
    found: list[Example] = []
    left_out = {"shared subject": 0, "shared prompt": 0, "no rephrasing or locality prompt": 0, "too long": 0}

    def fits(asked: Asked) -> bool:
        return len(row_of(tokenizer, *asked).ids) <= room

    for record in records:
        inside, outside = _inside(record), _outside(record)
        for fact, rephrased in record.edits:
            target = fact.target.strip()
            near = {"rephrase": [(text, target) for text in rephrased], **inside}
            if fact.subject in subjects:
                left_out["shared subject"] += 1
                continue
            allowed = (_without(near, {*prompts, fact.text}), _without(outside, prompts))
            example = Example(fact, *(_where(part, fits) for part in allowed))
            if fact.text in prompts or (
                all(_without(part, set()) for part in (near, outside)) and not all(allowed)
            ):
                left_out["shared prompt"] += 1
            elif not all(allowed):
                left_out["no rephrasing or locality prompt"] += 1
            elif not (example.inside and example.outside and fits(example.own)):
                left_out["too long"] += 1
            else:
                found.append(example)
    return found, {reason: count for reason, count in left_out.items() if count}


def _inside(record: Record) -> dict[str, list[Asked]]:
    if not record.source.startswith("ripple"):
        return {}
    return {
        kind: [(item.prompt, item.answers[0].strip()) for item in items if item.answers]
        for kind, items in record.portability.items()
    }


def _outside(record: Record) -> dict[str, list[Asked]]:
    return {
        kind: [(item.prompt, item.answers[0].strip()) for item in items if item.answers]
        for kind, items in record.locality.items()
    }


def _without(asked: Mapping[str, list[Asked]], prompts: set[str]) -> dict[str, list[Asked]]:
    return _where(asked, lambda each: each[0] not in prompts)


def _where(asked: Mapping[str, list[Asked]], wanted: Any) -> dict[str, list[Asked]]:
    kept = {kind: [each for each in items if wanted(each)] for kind, items in asked.items()}
    return {kind: items for kind, items in kept.items() if items}


def _of_others(records: Iterable[Record]) -> tuple[set[str], set[str]]:
    """Subjects and prompts of records."""
    subjects: set[str] = set()
    prompts: set[str] = set()
    for record in records:
        for fact, rephrased in record.edits:
            subjects.add(fact.subject)
            prompts |= {fact.text, *rephrased}
        for items in (*record.locality.values(), *record.portability.values()):
            prompts |= {item.prompt for item in items}
        prompts |= set(record.neighborhood)
    return subjects, prompts


def row_of(tokenizer: Any, prompt: str, answer: str) -> TargetRow:
    """Prompt and answer as ids, one space between them; the answer's last token is left out of the row.

    They are read as one text if the prompt's tokens are its first ones, otherwise each by itself.
    """
    start, whole = (encode_prompt(tokenizer, text) for text in (prompt, knowledge_text(prompt, answer)))
    if whole[: len(start)] != start or len(whole) == len(start):
        whole = start + target_ids(tokenizer, " " + answer)
    return TargetRow(whole[:-1], len(start), whole[len(start) :])


def _room(model: nn.Module, settings: Settings) -> float:
    limit = describe(model).context_length
    return math.inf if limit is None else limit - settings.prompt_tokens


# ------------------------------------------------------------------ losses


@dataclass(frozen=True)
class _Drawn:
    """What is asked of a batch: the prompts that are queries, and what the model is asked."""

    own: list[str]
    inside: list[str]
    outside: list[str]
    rows: list[Asked]  # edited prompts, rephrasings, unrelated prompts: as many of each as facts
    first: list[bool]  # whether a fact's own prompt gets the neighbour term, its rephrasing the sentinel term


def conflicts(batch: Sequence[Example], drawn: _Drawn) -> Tensor:
    """(3 B, B + 1) bool: queries that are in the scope of a fact which is not their own."""
    scopes = [{e.fact.text, *(text for items in e.inside.values() for text, _ in items)} for e in batch]
    queries = [*enumerate(drawn.own), *enumerate(drawn.inside), *((-1, text) for text in drawn.outside)]
    rows = [[text in scope and i != own for i, scope in enumerate(scopes)] for own, text in queries]
    return torch.nn.functional.pad(torch.tensor(rows), (0, 1))


class _Learner(Learner[Example]):
    """The networks in training: their parameters, their losses, and how they are written."""

    def __init__(
        self,
        model: nn.Module,
        tokenizer: Any,
        settings: Settings,
        reader: TextEncoder,
        name: str,
        profile: str,
        seed: int,
    ) -> None:
        super().__init__()
        self.settings: Settings = settings
        self.tokenizer, self.profile = tokenizer, profile
        self.base = fingerprint(model)
        self.device = next(model.parameters()).device
        self._model = [model]  # not a part of this module
        self.description = describe(model)
        sizes = RecipeSizes(
            reader.width,
            settings.dim,
            self.description.hidden_size,
            settings.prompt_tokens,
            settings.sentinel_tokens,
            settings.tied_towers,
        )
        with torch.random.fork_rng([self.device] if self.device.type == "cuda" else []):
            torch.manual_seed(seed)
            self.networks = RecipeNetworks(sizes).to(self.device)
        self.encoder_digest, self.encoder_name = fingerprint(reader.module), name
        self.reader = reader
        reader.module.to(self.device)
        if settings.train_encoder:
            self.encoder = reader.module.float().requires_grad_(True)
        self._statistics: dict[str, Tensor] = {}
        self._before: dict[Asked, Tensor] = {}
        self._rows: dict[Asked, TargetRow] = {}

    # -- what is read once --------------------------------------------------------------------------

    @torch.no_grad()
    def prepare(self, examples: Sequence[Example], progress: bool | None) -> None:
        """Read what no step changes: unrelated prompts by the model, and all texts by a frozen encoder."""
        unrelated = list(dict.fromkeys(a for e in examples for items in e.outside.values() for a in items))
        texts = list(dict.fromkeys(text for example in examples for text in _texts(example)))
        if self.settings.train_encoder:
            texts = (
                random.Random(0).sample(texts, min(_SAMPLE, len(texts))) if self.settings.standardise else []
            )
        texts.sort(key=len)
        with bar_of(total=len(unrelated) + len(texts), desc="reading", unit="text", show=progress) as bar:
            for start in range(0, len(texts), _TOGETHER):
                part = texts[start : start + _TOGETHER]
                found = self.reader.statistics(part).to(self.networks.sentinel.dtype)
                self._statistics.update(zip(part, found, strict=True))
                bar.update(len(part))
            unrelated.sort(key=lambda asked: len(self._row(asked).ids))
            for start in range(0, len(unrelated), _TOGETHER):
                part_asked = unrelated[start : start + _TOGETHER]
                found_states = [states.clone() for states in self._states(part_asked, None)]
                self._before.update(zip(part_asked, found_states, strict=True))
                bar.update(len(part_asked))
        if self.settings.standardise:
            self.networks.standardise(torch.stack(list(self._statistics.values())))
        if self.settings.train_encoder:
            self._statistics.clear()

    def _row(self, asked: Asked) -> TargetRow:
        if asked not in self._rows:
            self._rows[asked] = row_of(self.tokenizer, *asked)
        return self._rows[asked]

    def _states(self, asked: Sequence[Asked], prompts: Tensor | None) -> list[Tensor]:
        """Per row the model's states (tokens, hidden) that predict its answer, behind prompt i % m or behind none."""
        rows = [self._row(each) for each in asked]
        places = [range(row.key, row.key + len(row.target)) for row in rows]
        of = None if prompts is None else [i % len(prompts) for i in range(len(rows))]
        return states_behind(self._model[0], [row.ids for row in rows], places, prompts, of)

    def _logits(self, states: Tensor) -> Tensor:
        logits = self.description.logits(states)
        return logits.to(torch.promote_types(logits.dtype, torch.float32))

    def statistics(self, texts: Sequence[str]) -> Tensor:
        """(n, 4 width) of texts, in the networks' dtype."""
        if self.settings.train_encoder:
            return self.reader.statistics(texts).to(self.networks.sentinel.dtype)
        return torch.stack([self._statistics[text] for text in texts])

    # -- the objective ------------------------------------------------------------------------------

    def losses(self, batch: Sequence[Example], rng: random.Random) -> tuple[Tensor, dict[str, float]]:
        """The objective, and its parts as numbers."""
        self.reader.module.train(self.settings.train_encoder)
        return self.objective(batch, rng, self.settings.hinge)

    def objective(
        self, batch: Sequence[Example], rng: random.Random, hinge: float | None
    ) -> tuple[Tensor, dict[str, float]]:
        """The objective with this hinge, and its parts as numbers, accuracies with them."""
        settings, n = self.settings, len(batch)
        drawn = self._draw(batch, rng)
        knowledge = [knowledge_text(*example.own) for example in batch]
        statistics = self.statistics([*knowledge, *drawn.own, *drawn.inside, *drawn.outside])
        keys = self.networks.keys(statistics[:n])
        scores = self.scores(self.networks.queries(statistics[n:]), keys)
        if settings.drop_conflicts:
            scores = scores.masked_fill(conflicts(batch, drawn).to(self.device), -torch.inf)
        contrastive = self._contrastive(scores[:n], scores[n : 2 * n], drawn.first, hinge)
        contrastive = contrastive + outside_loss(scores[2 * n :], hinge, settings.epsilon)
        states = self._states(drawn.rows, self.networks.prompts(keys))
        reliability, generality, locality, right = self._edit_losses(states, drawn.rows, hinge)
        loss = (
            settings.reliability * reliability
            + settings.generality * generality
            + settings.locality * locality
            + settings.contrastive * contrastive
        )
        parts = {
            "loss": loss,
            "reliability": reliability,
            "generality": generality,
            "locality": locality,
            "contrastive": contrastive,
        }
        return loss, {**{key: float(value.detach()) for key, value in parts.items()}, **right}

    def scores(self, queries: Tensor, keys: Tensor) -> Tensor:
        """(queries, keys + 1): t·⟨u, r⟩/√d, the sentinel's in the last column."""
        sentinel = self.networks.sentinel_key(self.reader)
        return queries @ torch.cat((keys, sentinel)).T * (self.settings.scale / math.sqrt(keys.shape[1]))

    def _contrastive(self, own: Tensor, inside: Tensor, first: Sequence[bool], hinge: float | None) -> Tensor:
        """The two terms of relevant queries: scores (B, B + 1) of edited prompts, and of their rephrasings."""
        epsilon = self.settings.epsilon
        if self.settings.both_queries:
            terms = [
                neighbour_loss(scores, epsilon) + inside_loss(scores, hinge, epsilon)
                for scores in (own, inside)
            ]
            return (terms[0] + terms[1]) / 2
        heads = torch.tensor(first, device=own.device)[:, None]
        first_scores, second_scores = torch.where(heads, own, inside), torch.where(heads, inside, own)
        return neighbour_loss(first_scores, epsilon) + inside_loss(second_scores, hinge, epsilon)

    def _edit_losses(
        self, scored: Sequence[Tensor], rows: Sequence[Asked], hinge: float | None
    ) -> tuple[Tensor, Tensor, Tensor, dict[str, float]]:
        """The losses of edited prompts and rephrasings, the KL of unrelated prompts, and accuracies."""
        n = len(rows) // 3
        labels = torch.tensor(
            [token for each in rows[: 2 * n] for token in self._row(each).target], device=self.device
        )
        n_first = sum(len(part) for part in scored[:n])
        with torch.no_grad():
            before = self._logits(torch.cat([self._before[each] for each in rows[2 * n :]])).log_softmax(1)
        logits = self._logits(torch.cat(list(scored)))
        right = (logits[: len(labels)].detach().argmax(1) == labels).float()
        accuracies = {
            "accuracy": float(right[:n_first].mean()),
            "accuracy_rephrased": float(right[n_first:].mean()),
        }
        return *edit_losses(logits, labels, n_first, before, hinge, self.settings.epsilon), accuracies

    def _draw(self, batch: Sequence[Example], rng: random.Random) -> _Drawn:
        """What is asked, and by which prompts: drawn independently, first the kind, then the prompt."""

        def draw(kinds: Mapping[str, list[Asked]]) -> Asked:
            return rng.choice(kinds[rng.choice(sorted(kinds))])

        queries = [(draw(e.inside)[0], draw(e.outside)[0]) for e in batch]
        inside, outside = [draw(e.inside) for e in batch], [draw(e.outside) for e in batch]
        return _Drawn(
            [e.fact.text for e in batch],
            [near for near, _ in queries],
            [far for _, far in queries],
            [*(e.own for e in batch), *inside, *outside],
            [rng.random() < 0.5 for _ in batch],
        )

    # -- validation ---------------------------------------------------------------------------------

    def validation(self, held: Sequence[Example], rng: random.Random) -> dict[str, float]:
        """Scores on examples held out; see :func:`train`."""
        self.reader.module.eval()
        asked = rng.sample(list(held), min(self.settings.validation, len(held)))
        batches = [asked[i : i + self.settings.batch] for i in range(0, len(asked), self.settings.batch)]
        rows = [(len(batch), self.objective(batch, rng, None)[1]) for batch in batches]
        means = {key: sum(n * parts[key] for n, parts in rows) / len(asked) for key in rows[0][1]}
        return {**means, **self._hits(asked, rng)}

    def _hits(self, asked: Sequence[Example], rng: random.Random) -> dict[str, float]:
        asked = list({example.fact.text: example for example in asked}.values())  # one target for a prompt
        drawn = self._draw(asked, rng)
        knowledge = [knowledge_text(*example.own) for example in asked]
        keys = self.networks.keys(self.statistics(knowledge))
        n = len(asked)
        queries = self.networks.queries(self.statistics([*drawn.own, *drawn.inside, *drawn.outside]))
        scores = self.scores(queries, keys)
        best, found = scores[:, :-1].max(1)
        found = torch.where(best > scores[:, -1], found, -1)
        own = torch.arange(n, device=found.device)
        return {
            "hit": float((found[:n] == own).float().mean()),
            "hit_rephrased": float((found[n : 2 * n] == own).float().mean()),
            "false_hit": float((found[2 * n :] >= 0).float().mean()),
        }

    # -- parameters, and on disk --------------------------------------------------------------------

    def groups(self) -> list[dict[str, Any]]:
        """Parameters with their learning rates; in ``official`` the generator's is not its own, as published."""
        settings, generator = self.settings, list(self.networks.generator.parameters())
        ids = {id(parameter) for parameter in generator}
        others = [parameter for parameter in self.networks.parameters() if id(parameter) not in ids]
        generator_lr = settings.lr if self.profile == "official" else settings.generator_lr
        groups: list[dict[str, Any]] = [
            {"params": others, "lr": settings.lr},
            {"params": generator, "lr": generator_lr},
        ]
        if settings.train_encoder:
            groups.append({"params": list(self.encoder.parameters()), "lr": settings.encoder_lr})
        return groups

    def save(self, out: Path, report: Mapping[str, Any]) -> None:
        """Write the checkpoint as it is now, whole or not at all; an older one is replaced."""
        training = {
            "encoder": self.encoder_name,
            "profile": self.profile,
            "params": asdict(self.settings),
            **report,
        }
        name = "" if self.settings.train_encoder else _absolute(self.encoder_name)
        with explained(out), atomic_directory(out, overwrite=True) as temporary:
            write_checkpoint(temporary, self.networks, self.reader, name, self.base, self.tokenizer, training)


def _texts(example: Example) -> list[str]:
    asked = [*example.inside.values(), *example.outside.values()]
    return [knowledge_text(*example.own), example.fact.text, *(text for items in asked for text, _ in items)]


def _absolute(name: str) -> str:
    return str(Path(name).resolve()) if Path(name).is_dir() else name


def _name(learner: _Learner, examples: Sequence[Example], seed: int) -> str:
    """A digest of everything that a training depends on, but the number of steps."""
    settings = {
        key: value for key, value in asdict(learner.settings).items() if key not in ("steps", "patience")
    }
    return name_of(
        [
            learner.encoder_digest,
            learner.base,
            learner.profile,
            settings,
            seed,
            [[example.fact.as_dict(), example.inside, example.outside] for example in examples],
        ]
    )
