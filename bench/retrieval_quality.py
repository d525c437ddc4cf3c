"""How well retrieval editors edit: 1, 10, 100 and 1,000 facts, against what they are made of and against others.

    python bench/retrieval_editing.py quality --model MODEL_DIR --data test.json --train train.json \\
        --checkpoints recipe0 recipe1 recipe2

Asked are records of --data that share no subject and no prompt, of locality neither, with those of --train. At each
number of edits as many windows of that many facts are edited, asked and taken off as it takes to ask the first
--scored records; whether prompts find their facts is asked of all that are edited. Methods:

none           the unedited model
ike@0          IKE without demonstrations: the fact as text in front
ike            IKE with --demonstrations from --train, as many as the context holds
recipe         RECIPE; a run for each checkpoint, as for the next three, which share its retriever and its networks
recipe@text    the fact as text in the place of the soft prompt
recipe@words   the fact's token embeddings in the place of the soft prompt ("without CPT")
recipe@cosine  one threshold of the cosine of query and key in the place of the sentinel ("without KS")
METHOD         any other of fastedit's, such as grace or memit

The thresholds of recipe@cosine and of both IKEs and the template of texts in front are chosen on further records of
--data, which are not asked: the threshold for the greatest mean of the share of prompts that find their own fact and
the share of unrelated prompts that find none; the template for what the unedited model reads best. Settings of other
methods are read from SETTINGS_DIR/MODEL_NAME_METHOD.json, if there is one; statistics, where they are needed, come
from the records' true sentences. A text encoder reads each text once for all runs: how long editing takes is measured
by ``speed``, not here.

Each run (method, checkpoint, number of edits) is written to the results folder when it is finished, and the same
command goes on with the runs that are missing.
"""

from __future__ import annotations

import argparse
import contextlib
import copy
import functools
import json
import logging
import math
import random
import weakref
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from unittest import mock

import torch
import torch.nn.functional as F
from torch import Tensor

import fastedit
from fastedit import FasteditError
from fastedit.bench import retrieval_report
from fastedit.data import Record, load_records
from fastedit.demo import MODEL_FOLDER, load_demo_facts
from fastedit.editors.base import Editor, editor_class
from fastedit.editors.ike import Ike
from fastedit.editors.locate_then_edit import LocateThenEdit
from fastedit.editors.params import resolve_params
from fastedit.editors.recipe import Recipe
from fastedit.editors.recipe_training import train as train_recipe
from fastedit.editors.training_loop import checkpoint_of
from fastedit.evaluation import Before, Evaluator
from fastedit.evaluation.metrics import exact_match, token_accuracy
from fastedit.evaluation.scoring import Pair, PairScore, Scorer
from fastedit.io import atomic_write_json, atomic_write_text, read_json
from fastedit.memory import Decision
from fastedit.memory.demonstrations import Demonstrator, filled
from fastedit.memory.encoder import TextEncoder
from fastedit.memory.prefix import Prefix
from fastedit.memory.recipe import RecipeMemory, knowledge_text, load_parts
from fastedit.memory.sentences import DEFAULT_ENCODER, SentenceEncoder
from fastedit.memory.text_prefix import IkeMemory, ids_in_front
from fastedit.models import describe, encode_prompt, fingerprint
from fastedit.models.loading import load_model
from fastedit.stats import collect

HERE = Path(__file__).parent
METHODS = (
    "none",
    "ike@0",
    "ike",
    "recipe",
    "recipe@text",
    "recipe@words",
    "recipe@cosine",
    "grace",
    "memit",
)
TEMPLATES = (
    "{fact}\n{prompt}",
    "{fact}. {prompt}",
    "Note: {fact}.\n{prompt}",
    "New Fact: {fact}\nPrompt: {prompt}",
    "[Updated Information] {fact}.\n[Query] {prompt}",
)
FOR_SMALL_MODELS = {"dim": 256, "lr": 3e-4, "generator_lr": 5e-3, "tied_towers": True, "validation": 256}
BROKEN = (FasteditError, torch.linalg.LinAlgError)
PROTOCOLS = ("easyedit.tf", "wild", "drift.ppl")
MEASURES = {  # name -> protocol and metric
    "reliability": ("easyedit.tf", "reliability.tacc"),
    "reliability_exact": ("easyedit.tf", "reliability.exact"),
    "generality": ("easyedit.tf", "generality.tacc"),
    "generality_exact": ("easyedit.tf", "generality.exact"),
    "locality": ("easyedit.tf", "locality.agreement"),
    "generated": ("wild", "reliability.em"),
    "generated_rephrased": ("wild", "generality.em"),
    "generated_locality": ("wild", "locality.agreement"),
}


@dataclass(frozen=True)
class Options:
    """What all runs share."""

    model: str
    data: str
    train: tuple[str, ...]
    counts: tuple[int, ...]
    scored: int
    tuning: int
    demonstrations: int
    settings: str
    out: str
    text: str | None
    text_tokens: int
    batch: int
    seed: int


# ------------------------------------------------------------------ records


def texts_of(record: Record) -> tuple[set[str], set[str]]:
    """Subjects and prompts of a record, locality's too."""
    subjects, prompts = set(), set()
    for fact, rephrased in record.edits:
        subjects.add(fact.subject.casefold().strip())
        prompts |= {fact.text, *rephrased}
    for items in (*record.locality.values(), *record.portability.values()):
        prompts |= {item.prompt for item in items}
    return subjects, prompts | set(record.neighborhood)


def apart(
    records: Iterable[Record], others: Iterable[Record], fits: Callable[[Record], bool]
) -> tuple[list[Record], dict[str, int]]:
    """Records that share neither a subject nor a prompt with others, and how many do not count, by reason.

    Of records with the same prompt to edit, and of records of which one's locality prompt is another's to edit, the
    first counts.
    """
    subjects: set[str] = set()
    prompts: set[str] = set()
    for other in others:
        found = texts_of(other)
        subjects |= found[0]
        prompts |= found[1]
    kept: list[Record] = []
    edited: set[str] = set()
    unrelated: set[str] = set()
    reasons = ("subject in training", "prompt in training", "nothing to ask", "too long", "edited elsewhere")
    left_out = dict.fromkeys(reasons, 0)
    for record in records:
        own_subjects, own_prompts = texts_of(record)
        far = {item.prompt for items in record.locality.values() for item in items}
        if not (record.rephrase and far):
            left_out["nothing to ask"] += 1
        elif own_subjects & subjects:
            left_out["subject in training"] += 1
        elif own_prompts & prompts:
            left_out["prompt in training"] += 1
        elif not fits(record):
            left_out["too long"] += 1
        elif record.fact.text in edited | unrelated or far & edited:
            left_out["edited elsewhere"] += 1
        else:
            kept.append(record)
            edited.add(record.fact.text)
            unrelated |= far
    return kept, left_out


def demo_rows(answers: int = 6, seed: int = 0) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
    """Facts of the demo model with other answers, divided by subject: rows to train on, and rows to test with.

    Half of the subjects are trained on, a third is edited in the test, and its locality prompts are about the rest.

    Args:
        answers: rows of each fact to train on, each with another answer and another phrasing.
        seed: of the division and the answers.
    """
    rng = random.Random(seed)
    facts = load_demo_facts(neighbours=10**6)
    subjects = sorted({fact["subject"].casefold() for fact in facts})
    rng.shuffle(subjects)
    half, most = len(subjects) // 2, len(subjects) * 5 // 6
    part_of = {name: 0 if i < half else 1 if i < most else 2 for i, name in enumerate(subjects)}
    rows: tuple[list[dict[str, Any]], list[dict[str, Any]]] = ([], [])
    for fact in facts:
        part = part_of[fact["subject"].casefold()]
        near_part = 2 if part else 0
        near = [each for each in fact["neighbours"] if part_of[each["subject"].casefold()] == near_part]
        if part == 2 or not near:
            continue
        others = sorted({each["target"] for each in fact["neighbours"]})
        phrasings = rng.sample(fact["paraphrases"], len(fact["paraphrases"]))
        for number, answer in enumerate(rng.sample(others, min(1 if part else answers, len(others)))):
            far = rng.choice(near)
            row = {
                "case_id": len(rows[part]),
                "prompt": fact["prompt"].replace("{}", fact["subject"]),
                "subject": fact["subject"],
                "target_new": answer,
                "ground_truth": fact["target"],
                "rephrase_prompt": phrasings[number % len(phrasings)].replace("{}", fact["subject"]),
                "locality_prompt": far["prompt"].replace("{}", far["subject"]),
                "locality_ground_truth": far["target"],
            }
            rows[part].append(row)
    return rows


def write_demo_rows(out: Path) -> None:
    """Write ``demo_train.json`` and ``demo_test.json``."""
    out.mkdir(parents=True, exist_ok=True)
    for name, rows in zip(("train", "test"), demo_rows(), strict=True):
        atomic_write_text(out / f"demo_{name}.json", json.dumps(rows, indent=1, ensure_ascii=False))
        print(f"{len(rows)} rows in {out / f'demo_{name}.json'}")


# ------------------------------------------------------------------ training


@contextlib.contextmanager
def encoded_once() -> Iterator[None]:
    """In here text encoders with the same weights read each text once; for encoders that are not trained."""
    digests = weakref.WeakKeyDictionary[TextEncoder, str]()
    known: dict[tuple[str, ...], dict[str, Tensor]] = {}

    def once(name: str) -> Any:
        read = getattr(TextEncoder, name)

        def reads(self: TextEncoder, texts: Sequence[str], *how: str) -> Tensor:
            if self not in digests:
                digests[self] = fingerprint(self.module)
            found = known.setdefault((name, digests[self], *how), {})
            missing = [text for text in dict.fromkeys(texts) if text not in found]
            if missing:
                found.update(zip(missing, read(self, missing, *how), strict=True))
            return torch.stack([found[text] for text in texts])

        return mock.patch.object(TextEncoder, name, reads)

    with once("statistics"), once("pooled"):
        yield


def train(args: argparse.Namespace) -> None:
    """A checkpoint a seed; what was interrupted goes on, what is finished stays."""
    model, tokenizer = load_model(str(MODEL_FOLDER) if args.model == "demo" else args.model, dtype="float32")
    records = [record for path in args.data for record in load_records(path)]
    exclude = [record for path in args.exclude for record in load_records(path)]
    with contextlib.nullcontext() if args.train_encoder else encoded_once():
        for seed in args.seeds:
            out = Path(f"{args.out}{seed}")
            if out.exists() and not checkpoint_of(out).exists():
                print(f"{out} is there", flush=True)
                continue
            params = {
                "steps": args.steps,
                "train_encoder": args.train_encoder,
                "validate_every": args.validate_every,
                **FOR_SMALL_MODELS,
            }
            options: dict[str, Any] = {"encoder": args.encoder, "exclude": exclude, "params": params}
            report = train_recipe(model, tokenizer, records, out, seed=seed, progress=None, **options)
            print(json.dumps({"out": str(out), "seed": seed, **report}), flush=True)


# ------------------------------------------------------------------ memories with parts exchanged


class Exchanged(RecipeMemory):
    """RECIPE's memory with something else in front of prompts, or another rule to find facts by.

    Attributes:
        front: ``"soft"``, ``"text"`` or ``"words"``.
        template: of texts in front.
        threshold: of the cosine, in the place of the sentinel; None for the sentinel.
        told: prompt -> the text of the fact that it is about; None for finding facts.
    """

    front, template = "soft", TEMPLATES[0]
    threshold: float | None = None
    told: dict[str, str] | None = None
    base: Any = None

    def scores(self, texts: Sequence[str]) -> tuple[Tensor, Tensor]:
        """(texts, facts) scores in the order of the store's entries, and (texts,) what they must be above."""
        assert self.parts is not None
        queries = self.parts.queries(texts).double()
        keys = self.store.keys([entry.id for entry in self.store.entries()]).double().cpu()
        if self.threshold is None:
            return queries @ keys.T, queries @ self.parts.sentinel.double()
        return cosines(queries, keys), torch.full((len(texts),), self.threshold, dtype=torch.float64)

    def find(self, texts: list[str]) -> Decision:
        ids = [entry.id for entry in self.store.entries()]
        if self.told is not None:
            by_text = {entry.fact.text: entry.id for entry in self.store.entries()}
            return Decision(
                torch.tensor([by_text.get(self.told.get(text.strip(), ""), -1) for text in texts])
            )
        if self.threshold is None or not ids:
            return super().find(texts)
        scores, bounds = self.scores(texts)
        best, place = scores.max(1)
        return Decision(
            torch.where(best > bounds, torch.tensor(ids)[place], -1), score=(best - bounds).float()
        )

    def prefix(self, index: int) -> Prefix:
        if self.front == "soft":
            return super().prefix(index)
        fact = self.store.entry(index).fact
        if self.front == "text":
            return Prefix(ids=ids_in_front(self.tokenizer, filled(self.template, fact, "")))
        ids = self.tokenizer(knowledge_text(fact.text, fact.target), add_special_tokens=False)["input_ids"]
        weight = self.base.get_input_embeddings().weight.detach()
        return Prefix(embeddings=weight[torch.tensor(ids, device=weight.device)])


class ExchangedRecipe(Recipe):
    """RECIPE with such a memory.

    Args:
        model: see :class:`Recipe`.
        tokenizer: see :class:`Recipe`.
        exchange: attributes of the memory.
        **options: see :class:`Recipe`.
    """

    memory_class = Exchanged

    def __init__(self, model: Any, tokenizer: Any, *, exchange: dict[str, Any], **options: Any) -> None:
        super().__init__(model, tokenizer, **options)
        self.exchange = {"base": model, **exchange}

    def new_memory(self) -> RecipeMemory:
        width = self.description.hidden_size
        memory = Exchanged(width, width, vars(self.params), self.profile, self.seed)
        memory.parts, memory.tokenizer = self.parts, self.tokenizer
        for name, value in self.exchange.items():
            setattr(memory, name, value)
        return memory


class ToldIkeMemory(IkeMemory):
    """IKE's memory, which can be told what a prompt is about; see :class:`Exchanged`."""

    told: dict[str, str] | None = None

    def scores(self, texts: Sequence[str]) -> tuple[Tensor, Tensor]:
        """See :class:`Exchanged`."""
        assert self.encoder is not None
        keys = self.encoder.embed([line.fact.text for line in self.lines.values()])
        bounds = torch.full((len(texts),), self.params["threshold"], dtype=torch.float64)
        return cosines(self.encoder.embed(list(texts)), keys), bounds

    def find(self, texts: list[str]) -> Decision:
        if self.told is None:
            return super().find(texts)
        by_text = {line.fact.text: number for number, line in self.lines.items()}
        numbers = [by_text.get(self.told.get(text.strip(), "")) for text in texts]
        return Decision(torch.tensor([-1 if n is None else self._entry((n,)) for n in numbers]))


class ToldIke(Ike):
    """IKE with such a memory."""

    memory_class = ToldIkeMemory

    def new_memory(self) -> ToldIkeMemory:
        width = self.description.hidden_size
        memory = ToldIkeMemory(width, width, vars(self.params), self.profile, self.seed)
        memory.encoder, memory.tokenizer = self.encoder, self.tokenizer
        return memory


def cosines(queries: Tensor, keys: Tensor) -> Tensor:
    """(queries, keys) fp64."""
    return F.normalize(queries.double(), dim=1) @ F.normalize(keys.double(), dim=1).T


def best_threshold(relevant: Tensor, own: Sequence[int], irrelevant: Tensor) -> float:
    """The threshold of the greatest mean of two shares: relevant queries that find their own, others that find none.

    Args:
        relevant: (queries, keys) scores.
        own: each relevant query's own key.
        irrelevant: (queries, keys) scores.
    """
    best, place = relevant.max(1)
    right = best[place == torch.tensor(own)]
    wrong = irrelevant.amax(1)
    values = torch.cat((best, wrong)).unique()
    between = torch.cat((values[:1] - 1e-6, (values[1:] + values[:-1]) / 2, values[-1:]))
    found = (right[None] > between[:, None]).sum(1) / len(best)
    left = (wrong[None] <= between[:, None]).double().mean(1)
    return float(between[int((found + left).argmax())])


# ------------------------------------------------------------------ the study


class Study:
    """A model, the records that are asked, and what all runs share."""

    def __init__(self, options: Options) -> None:
        self.options, self.folder = options, Path(options.out)
        place = str(MODEL_FOLDER) if options.model == "demo" else options.model
        self.name = "demo" if options.model == "demo" else Path(place).resolve().name
        self.model, self.tokenizer = load_model(place, dtype="float32")
        self.description = describe(self.model)
        data = load_records(options.data)
        self.train = [record for path in options.train for record in load_records(path)]
        self.scorer = Scorer(self.model, self.tokenizer, batch_size=options.batch, show_progress=False)
        rows, left_out = apart(data, self.train, self.fits)
        random.Random(options.seed).shuffle(rows)
        if len(rows) < 8:
            raise SystemExit(
                f"{options.data} has {len(rows)} records that can be asked ({left_out}): too few"
            )
        n = min(max(options.counts), len(rows) - min(options.tuning, len(rows) // 4))
        self.records, self.scored = rows[:n], rows[: min(n, options.scored)]
        self.tuning = apart(rows[n:], self.records, self.fits)[0][: options.tuning]
        self.about = {
            "model": self.name,
            "data": Path(options.data).name,
            "data_sha256": data.sha256,
            "train": [Path(path).name for path in options.train],
            "rows": len(data),
            "left_out": left_out,
            "records": len(self.records),
            "tuning": len(self.tuning),
            "scored": options.scored,
            "demonstrations": options.demonstrations,
            "text": None if options.text is None else Path(options.text).name,
            "text_tokens": options.text_tokens,
            "seed": options.seed,
            "fastedit": fastedit.__version__,
            "torch": str(torch.__version__),
        }
        self._before: dict[str, Before] = {}
        self._statistics: dict[int, Any] = {}
        self._demonstrator: Demonstrator | None = None

    def fits(self, record: Record) -> bool:
        """Whether the longest prompt of a record fits into the model's context, with answer and fact in front."""
        limit = self.description.context_length
        if limit is None:
            return True
        asked = [(prompt, record.fact.target_new) for prompt in (record.fact.text, *record.rephrase)]
        asked += [(i.prompt, i.answers[0]) for items in record.locality.values() for i in items if i.answers]
        texts = [
            filled(template, record.fact, f"{prompt} {answer}")
            for prompt, answer in asked
            for template in TEMPLATES
        ]
        return len(encode_prompt(self.tokenizer, max(texts, key=len))) < limit

    # -- what is measured once ----------------------------------------------------------------------

    def shared(self) -> dict[str, Any]:
        """``shared.json``: how well the unedited model reads facts in its context, and the best template for that.

        Raises:
            SystemExit: the results folder is of other records or settings.
        """
        path = self.folder / "shared.json"
        if not path.exists():
            reading = {
                name: self.reading(rows) for name, rows in (("tuning", self.tuning), ("asked", self.scored))
            }
            of_template = reading["tuning"] if self.tuning else reading["asked"]
            best = max(TEMPLATES, key=lambda template: of_template[template]["generality"])
            atomic_write_json(path, {"about": self.about, "reading": reading, "template": best})
        found: dict[str, Any] = read_json(path)
        if found["about"] != self.about:
            raise SystemExit(
                f"{path} is of other records or settings ({found['about']}, not {self.about}): choose another folder "
                "with --out"
            )
        return found

    def reading(self, records: Sequence[Record]) -> dict[str, dict[str, float]]:
        """By template, and without a context under "": how well edited prompts and rephrasings are answered."""
        found = {}
        for template in ("", *TEMPLATES) if records else ():
            scores: dict[str, float] = {}
            for kind, pairs in self.asked(records, template).items():
                scores |= {kind: self.accuracy(pairs), f"{kind}_exact": self.accuracy(pairs, exact_match)}
            found[template] = scores
        return found

    def asked(self, records: Sequence[Record], template: str = "") -> dict[str, list[Pair]]:
        """Edited prompts and rephrasings with the new answer; with a template, the fact is stated before each."""
        found: dict[str, list[Pair]] = {"reliability": [], "generality": []}
        for record in records:
            fact = record.fact
            for kind, prompts in (("reliability", [fact.text]), ("generality", record.rephrase)):
                for prompt in prompts:
                    text = filled(template, fact, prompt) if template else prompt
                    found[kind].append(Pair(text, fact.target_new))
        return found

    def accuracy(
        self,
        pairs: Sequence[Pair],
        metric: Callable[[list[bool]], float] = token_accuracy,
        scorer: Scorer | None = None,
    ) -> float:
        """Mean over pairs of the share of the answer's tokens that are the most probable ones."""
        scores = (scorer or self.scorer).score(pairs)
        values = [metric(score.hits) for score in scores if isinstance(score, PairScore)]
        return sum(values) / len(values)

    # -- editors ------------------------------------------------------------------------------------

    def editor(self, method: str, model: Any, checkpoint: str | None) -> Editor:
        """The editor of a method as in --methods, for ``model``, a copy of the study's."""
        name, _, suffix = method.partition("@")
        options: dict[str, Any] = {"seed": self.options.seed, "progress": False}
        template = self.shared()["template"]
        if name == "recipe":
            assert checkpoint is not None
            exchange: dict[str, Any] = {"template": template}
            if suffix == "cosine":
                exchange["threshold"] = self.cosine_threshold(checkpoint)
            elif suffix:
                exchange["front"] = suffix
            return ExchangedRecipe(
                model, self.tokenizer, params={"checkpoint": checkpoint}, exchange=exchange, **options
            )
        if name == "ike":
            given: dict[str, Any] = {"threshold": self.sentence_threshold()}
            given |= {"k": 0, "template": template} if suffix else {"k": self.options.demonstrations}
            demonstrations = None if suffix else self.train
            editor = ToldIke(model, self.tokenizer, params=given, demonstrations=demonstrations, **options)
            if editor.demonstrator is not None:  # its texts are read once for all runs
                self._demonstrator = editor.demonstrator = self._demonstrator or editor.demonstrator
            return editor
        params: Any = self.settings(name)
        kind: Any = editor_class(name)
        if issubclass(kind, LocateThenEdit):
            params = resolve_params(kind.params_file or name, kind.Params, self.description, params or None)
            options["statistics"] = self.statistics(params.layers)
        return fastedit.editor(name, model, self.tokenizer, params=params, **options)

    def settings(self, method: str) -> dict[str, Any]:
        """From the file, if there is one."""
        path = Path(self.options.settings) / f"{self.name}_{method}.json"
        return dict(read_json(path)) if path.exists() else {}

    def statistics(self, layers: Sequence[int]) -> dict[int, Any]:
        """Second moments of keys over the asked records' true sentences."""
        missing = [layer for layer in layers if layer not in self._statistics]
        if missing:
            texts = [f"{r.fact.text} {r.target_true}." for r in self.records if r.target_true]
            texts += [
                f"{item.prompt} {item.answers[0]}."
                for record in self.records
                for items in record.locality.values()
                for item in items
                if item.answers
            ]
            found = collect(self.model, self.tokenizer, texts, layers=missing, n_tokens=10**6, progress=False)
            self._statistics.update(found)
        return {layer: self._statistics[layer] for layer in layers}

    def cosine_threshold(self, checkpoint: str) -> float:
        """For queries and keys of a checkpoint."""
        parts = load_parts(checkpoint)
        keys = parts.keys([knowledge_text(r.fact.text, r.fact.target) for r in self.tuning])
        return self.threshold(lambda texts: cosines(parts.queries(texts), keys))

    def sentence_threshold(self) -> float:
        """For sentence embeddings of prompts, those that IKE finds facts by."""
        encoder = SentenceEncoder.load(vars(editor_class("ike").Params()))
        keys = encoder.embed([record.fact.text for record in self.tuning])
        return self.threshold(lambda texts: cosines(encoder.embed(texts), keys))

    def threshold(self, scores: Callable[[list[str]], Tensor]) -> float:
        """The best one for the records that are not asked."""
        if not self.tuning:
            raise SystemExit(f"{self.options.data} has no records left to tune a threshold on")
        relevant, own, unrelated = queries_of(self.tuning)
        return best_threshold(scores(relevant), own, scores(unrelated))

    # -- scores -------------------------------------------------------------------------------------

    @functools.cached_property
    def before(self) -> dict[str, Before]:
        """What the unedited model gives, by protocol."""
        return {protocol: self.evaluator(self.model, protocol, None).before() for protocol in PROTOCOLS}

    def evaluator(self, model: Any, protocol: str, before: Before | None) -> Evaluator:
        """Scores of ``model`` by one protocol."""
        text = self.options.text
        return Evaluator(
            model,
            self.tokenizer,
            self.scored,
            (protocol,),
            batch_size=self.options.batch,
            text=None if text is None else Path(text).read_text(encoding="utf-8"),
            show_progress=False,
            drift_tokens=self.options.text_tokens,
            before=before,
        )

    # -- runs ---------------------------------------------------------------------------------------

    def path(self, method: str, checkpoint: int | None, count: int) -> Path:
        """Where a run's result is."""
        of_checkpoint = "" if checkpoint is None else f"_c{checkpoint}"
        return self.folder / f"{method}{of_checkpoint}_n{count}.json"

    def run(
        self, method: str, checkpoints: Sequence[str], checkpoint: int | None, count: int
    ) -> dict[str, Any]:
        """Edit, ask and take off window after window, and write the result."""
        given = None if checkpoint is None else checkpoints[checkpoint]
        run = Run(self, method, given, count)
        try:
            run.all_windows()
        except BROKEN as error:
            run.failed = f"{type(error).__name__}: {error}"
        result = {
            "method": method,
            "checkpoint": given and Path(given).resolve().name,
            "checkpoint_number": checkpoint,
            "training": None
            if given is None
            else read_json(Path(given) / "recipe.json")["training"].get("params"),
            "edits": count,
            "about": self.about,
            **run.result(),
        }
        atomic_write_json(self.path(method, checkpoint, count), result)
        return result


def queries_of(records: Sequence[Record]) -> tuple[list[str], list[int], list[str]]:
    """Edited prompts and rephrasings, the number of each one's record, and unrelated prompts."""
    relevant = [(prompt, i) for i, r in enumerate(records) for prompt in (r.fact.text, *r.rephrase)]
    unrelated = [item.prompt for r in records for items in r.locality.values() for item in items]
    return [prompt for prompt, _ in relevant], [number for _, number in relevant], unrelated


class Run:
    """One method at one number of edits."""

    def __init__(self, study: Study, method: str, checkpoint: str | None, count: int) -> None:
        self.study, self.method, self.count = study, method, count
        self.model = copy.deepcopy(study.model)
        self.editor = None if method == "none" else study.editor(method, self.model, checkpoint)
        before = study.before
        self.evaluators = {name: study.evaluator(self.model, name, before[name]) for name in PROTOCOLS}
        self.n_windows = max(1, min(len(study.records) // count, math.ceil(study.options.scored / count)))
        self.sums: dict[str, list[float]] = {}
        self.failed: str | None = None

    def all_windows(self) -> None:
        """Edit, ask and take off."""
        for number in range(self.n_windows):
            places = range(number * self.count, (number + 1) * self.count)
            records = [self.study.records[i] for i in places]
            if self.editor is None:
                self.ask(number, places)
                continue
            edit = self.editor.edit([record.fact for record in records])
            try:
                self.ask(number, places)
                side = getattr(self.editor, "side", None)
                memory = getattr(side, "memory", None)
                if isinstance(memory, (Exchanged, ToldIkeMemory)):
                    self.look(memory, records, self.study.scored[places.start : places.stop])
            finally:
                edit.revert(self.model)

    def ask(self, number: int, places: Sequence[int]) -> None:
        """Score a window; perplexity is measured in the first."""
        scored = [i for i in places if i < len(self.study.scored)]
        for protocol in ("easyedit.tf", "wild"):
            self.evaluators[protocol].after("batch", self.count, indices=scored)
        if number == 0:
            self.evaluators["drift.ppl"].after("batch", self.count)

    def look(
        self, memory: Exchanged | ToldIkeMemory, records: Sequence[Record], scored: Sequence[Record]
    ) -> None:
        """What the retriever does with each prompt, and how scored ones are answered when it need not find any."""
        relevant, own, unrelated = queries_of(records)
        scores, bounds = memory.scores(relevant)
        best, place = scores.max(1)
        first = torch.tensor(
            [prompt == records[i].fact.text for prompt, i in zip(relevant, own, strict=True)]
        )
        right = place == torch.tensor(own)
        self.add("hit", right[first])
        self.add("hit_rephrased", right[~first])
        self.add("true_positive", (best > bounds)[first])
        self.add("true_positive_rephrased", (best > bounds)[~first])
        scores, bounds = memory.scores(unrelated)
        self.add("false_positive", scores.amax(1) > bounds)
        tokenizer = self.study.tokenizer
        memory.told = {
            tokenizer.decode(encode_prompt(tokenizer, prompt), skip_special_tokens=True).strip(): records[
                i
            ].fact.text
            for prompt, i in zip(relevant, own, strict=True)
        }
        scorer = Scorer(self.model, tokenizer, batch_size=self.study.options.batch, show_progress=False)
        for kind, pairs in self.study.asked(scored).items():
            value = self.study.accuracy(pairs, scorer=scorer)
            self.sums.setdefault(f"told_{kind}", []).extend([value] * len(pairs))
        memory.told = None

    def add(self, name: str, values: Tensor) -> None:
        """Keep values of a measure, to be averaged over all windows."""
        self.sums.setdefault(name, []).extend(values.double().tolist())

    def result(self) -> dict[str, Any]:
        """Means over all windows."""
        found: dict[str, Any] = {}
        for name, (protocol, metric) in MEASURES.items():
            rows = [row["metrics"] for row in self.evaluators[protocol].rows(protocol, "batch", self.count)]
            values = [row[metric] for row in rows if metric in row]
            found[name] = sum(values) / len(values) if values else None
        found |= {name: sum(values) / len(values) for name, values in self.sums.items()}
        rows = [row["metrics"] for row in self.evaluators["drift.ppl"].rows("drift.ppl", "batch", self.count)]
        nll = sum(row["sum"] for row in rows) / sum(row["count"] for row in rows) if rows else None
        found["ppl"] = None if nll is None else math.exp(min(nll, 700.0))
        asked = len(self.evaluators["easyedit.tf"].rows("easyedit.tf", "batch", self.count))
        return {
            "windows": self.n_windows,
            "asked": asked,
            "threshold": threshold_of(self.editor),
            "scores": found,
            "failed": self.failed,
        }


def threshold_of(editor: Editor | None) -> float | None:
    """The tuned threshold of an editor, if it has one."""
    if isinstance(editor, ExchangedRecipe):
        return editor.exchange.get("threshold")
    return editor.params.threshold if isinstance(editor, ToldIke) else None


# ------------------------------------------------------------------ the command


def wanted(
    methods: Sequence[str], n_checkpoints: int, counts: Sequence[int]
) -> list[tuple[str, int | None, int]]:
    """Method, checkpoint and number of edits of each run, one number of edits after another."""
    return [
        (method, number, count)
        for count in counts
        for method in methods
        for number in (range(n_checkpoints) if method.startswith("recipe") else (None,))
    ]


def read(args: argparse.Namespace) -> None:
    """How well unedited models read facts in their context; no edit is made."""
    logging.getLogger("fastedit").setLevel(logging.ERROR)
    rows = []
    for model in args.models:
        options = Options(
            model=model,
            data=args.data,
            train=tuple(args.train),
            counts=(args.records,),
            scored=args.records,
            tuning=0,
            demonstrations=0,
            settings="",
            out="",
            text=None,
            text_tokens=0,
            batch=args.batch_size,
            seed=args.seed,
        )
        study = Study(options)
        about = {"model": study.name, "data": study.about["data"], "records": len(study.scored)}
        rows += [
            {**about, "in front": template, **scores}
            for template, scores in study.reading(study.scored).items()
        ]
    print(retrieval_report.write_reading(rows, str(args.out)))


def main(args: argparse.Namespace) -> None:
    """Make the runs that are missing, and the table."""
    name = "demo" if args.model == "demo" else Path(args.model).resolve().name
    out = args.out or HERE / "results" / f"retrieval_editing_{name}"
    if not args.table_only:
        logging.getLogger("fastedit").setLevel(logging.ERROR)
        options = Options(
            model=args.model,
            data=args.data,
            train=tuple(args.train),
            counts=tuple(args.counts),
            scored=args.scored,
            tuning=args.tuning,
            demonstrations=args.demonstrations,
            settings=args.settings,
            out=str(out),
            text=args.text,
            text_tokens=args.text_tokens,
            batch=args.batch_size,
            seed=args.seed,
        )
        out.mkdir(parents=True, exist_ok=True)
        study = Study(options)
        study.shared()
        runs = wanted(
            args.methods, len(args.checkpoints), [n for n in args.counts if n <= len(study.records)]
        )
        missing = [run for run in runs if not study.path(*run).exists()]
        too_many = [n for n in args.counts if n > len(study.records)]
        print(
            f"{len(study.records)} records are asked, left out: {study.about['left_out']}"
            + (f"; too few for {too_many} edits" if too_many else "")
            + f". {len(runs) - len(missing)} runs are there, {len(missing)} to do",
            flush=True,
        )
        with encoded_once():
            for method, checkpoint, count in missing:
                say(study.run(method, args.checkpoints, checkpoint, count))
    print(retrieval_report.write(out))


def say(result: dict[str, Any]) -> None:
    """One line about a finished run."""
    scores = result["scores"]
    parts = [
        f"{name} {100 * scores[name]:.1f} %"
        for name in ("reliability", "generality", "locality")
        if scores.get(name) is not None
    ]
    print(
        f"{result['method']} {result['checkpoint'] or ''} {result['edits']} edits: {', '.join(parts)} "
        f"{result['failed'] or ''}",
        flush=True,
    )


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of the command."""
    add = parser.add_argument
    add("--model", required=True, metavar="DIR", help='a causal language model; "demo" is the packaged one')
    add(
        "--data",
        required=True,
        metavar="FILE",
        help="records to edit and ask, in any format that fastedit reads",
    )
    add(
        "--train",
        nargs="+",
        default=[],
        metavar="FILE",
        help="records that the checkpoints were trained on, with which nothing may be shared",
    )
    add("--checkpoints", nargs="*", default=[], metavar="DIR", help="of RECIPE, one a seed")
    add("--methods", nargs="+", default=METHODS, metavar="NAME", help=f"default: {' '.join(METHODS)}")
    add("--counts", type=int, nargs="+", default=[1, 10, 100, 1000], metavar="N", help="numbers of edits")
    add("--scored", type=int, default=100, metavar="N", help="records that are asked, at least")
    add("--tuning", type=int, default=500, metavar="N", help="further records to choose thresholds on")
    add("--demonstrations", type=int, default=32, metavar="K", help="of IKE")
    add("--settings", default=str(HERE / "settings"), metavar="DIR", help="holds MODEL_METHOD.json")
    add("--text", metavar="FILE", help="for perplexity; default: the packaged neutral text")
    add("--text-tokens", type=int, default=4096, metavar="N", help="of that text")
    add("--batch-size", type=int, default=64, metavar="N", help="texts in a pass")
    add("--seed", type=int, default=0, help="of the choice of records")
    add("--out", type=Path, metavar="DIR", help="results, by default bench/results/retrieval_editing_MODEL")
    add("--table-only", action="store_true", help="make table and plot from the results that are there")


def add_training_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of ``train``."""
    add = parser.add_argument
    add("--model", required=True, metavar="DIR", help='a causal language model; "demo" is the packaged one')
    add("--data", required=True, nargs="+", metavar="FILE", help="records to train on, of all files together")
    add("--exclude", nargs="+", default=[], metavar="FILE", help="records that nothing may be shared with")
    add("--out", required=True, metavar="DIR", help="the seed is appended")
    add("--encoder", default=DEFAULT_ENCODER, metavar="DIR", help="folder or name of the text encoder")
    add("--train-encoder", action="store_true", help="train it as well; otherwise it reads each text once")
    add("--seeds", type=int, nargs="+", default=[0, 1, 2], metavar="N")
    add("--steps", type=int, default=1250, metavar="N", help="of each seed")
    add("--validate-every", type=int, default=250, metavar="N", help="steps between validations")


def add_reading_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of ``reading``."""
    add = parser.add_argument
    add(
        "--models",
        required=True,
        nargs="+",
        metavar="DIR",
        help='language models; "demo" is the packaged one',
    )
    add("--data", required=True, metavar="FILE", help="records to ask")
    add("--train", nargs="+", default=[], metavar="FILE", help="records with which nothing may be shared")
    add("--records", type=int, default=100, metavar="N", help="that are asked")
    add("--batch-size", type=int, default=64, metavar="N", help="texts in a pass")
    add("--seed", type=int, default=0, help="of the choice of records")
    add("--out", required=True, metavar="STEM", help="of the table and the CSV")
