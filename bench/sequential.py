"""Long sequences of edits: every method on the same facts in the same order, all of them scored at the end.

    python bench/sequential.py --model MODEL_DIR --records records.json
    python bench/sequential.py --model MODEL_DIR --records records.json --methods ft-m memit nse@0.8 --norm-control
    python bench/sequential.py --model MODEL_DIR --records records.json --table-only
    python bench/sequential.py --model MODEL_DIR --records zsre.json.gz --known records.json --out zsre

A run is one method (and variant) in one order of the records. Facts are edited in batches, never undoing any; ROME
edits the facts of a batch one after the other. At the checkpoints all facts edited so far are scored (retention), at
the end all records. Each run is written to the results folder as soon as it is finished, whole or not at all, and the
same command goes on with the runs that are missing; a run that was interrupted starts again. A method that breaks (a
NumericalError) writes nothing more from that batch on: the run is marked as collapsed there, and scored as it is.

The statistics that MEMIT, AlphaEdit, NSE and ROME need come from the records' own true sentences, for all runs alike.
Every score is given for all records, and for the optimisable ones: those whose target MEMIT's settings bring below a
negative log-likelihood of 0.5 on the unedited model. A variant "+norm" has the norm anchor measured on the unedited
model, from the same records.

Memory editors (grace, defer, wise@merge, wise@retrieve) leave the weights alone: their norms do not change.

With --known the records are of another data set (zsRE, WISE's hallucination set), whose facts are new to the model;
those that do not fit its context are left out, and shared.json has both counts.

Settings are read from SETTINGS_DIR/MODEL_NAME.json, NAME as given or without its @ part; else they are the method's
own for the model's shape.
"""

from __future__ import annotations

import argparse
import copy
import functools
import json
import logging
import math
import random
import time
from collections.abc import Callable, Collection, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import dataclass
from multiprocessing import get_context
from pathlib import Path
from typing import Any, get_args

import torch

import fastedit
from fastedit import Fact, NumericalError
from fastedit.artefacts.plain import plain
from fastedit.bench import sequential_report
from fastedit.data import Record, load_records
from fastedit.editors.base import Editor, editor_class
from fastedit.editors.grace import Replacement
from fastedit.editors.locate_then_edit import LocateThenEdit
from fastedit.editors.nse import Nse
from fastedit.editors.params import resolve_params
from fastedit.editors.prompts import fact_rows
from fastedit.evaluation import Before, Evaluator
from fastedit.evaluation.sequential import steps
from fastedit.io import atomic_write_json, read_json
from fastedit.models import describe
from fastedit.models.loading import load_model
from fastedit.models.runner import frozen
from fastedit.stats import collect

HERE = Path(__file__).parent
AT_THE_END = ("easyedit.tf", "cf.prob", "wild", "drift.ppl", "drift.kl")
ON_THE_WAY = ("easyedit.tf", "drift.ppl", "drift.kl")
METHODS = ("ft-m", "rome", "memit", "alphaedit", "nse@0.8", "nse@1.0", "ultraedit")
CONTEXT_ROOM = 24  # tokens for what editors put in front of a prompt
OPTIMISABLE_NLL = 0.5


def share(text: str) -> float:
    """A number above 0 and at most 1; ValueError for anything else."""
    value = float(text)
    if not 0 < value <= 1:
        raise ValueError(text)
    return value


SUFFIXES: dict[
    str, tuple[str, Callable[[str], Any]]
] = {  # METHOD@SUFFIX: the parameter that the suffix gives
    "grace": ("replacement", {name: name for name in get_args(Replacement)}.__getitem__),
    "nse": ("mass", share),
    "wise": ("retrieve", {"merge": False, "retrieve": True}.__getitem__),
}
BROKEN = (NumericalError, torch.linalg.LinAlgError)

# name of a measure -> its protocol and metric
MEASURES = {
    "efficacy": ("easyedit.tf", "reliability.exact"),
    "efficacy_token": ("easyedit.tf", "reliability.tacc"),
    "paraphrase": ("easyedit.tf", "generality.exact"),
    "paraphrase_token": ("easyedit.tf", "generality.tacc"),
    "locality": ("easyedit.tf", "locality.agreement"),
    "locality_right": ("easyedit.tf", "locality.gold"),
    "ES": ("cf.prob", "ES"),
    "PS": ("cf.prob", "PS"),
    "NS": ("cf.prob", "NS"),
    "generated": ("wild", "reliability.em"),
    "generated_paraphrase": ("wild", "generality.em"),
    "generated_locality": ("wild", "locality.agreement"),
}


@dataclass(frozen=True)
class Options:
    """What all runs share."""

    model: str
    records: str
    settings: str
    out: str
    limit: int
    batch_size: int
    checkpoints: tuple[int, ...]
    text: str | None
    known: str | None = None  # the records that the model knows, if those to edit are others


@dataclass(frozen=True)
class Variant:
    """A method as given, such as ``nse@0.8``, with or without the norm anchor."""

    name: str
    norm_control: bool = False

    @property
    def method(self) -> str:
        """The editor's name."""
        return self.name.partition("@")[0]

    @property
    def label(self) -> str:
        """What it is called in files and tables."""
        return self.name + ("+norm" if self.norm_control else "")

    @property
    def optimises_targets(self) -> bool:
        """Whether there are targets whose norm could be anchored."""
        return issubclass(editor_class(self.method), LocateThenEdit)


class Study:
    """A model, its records and what all runs share, in one process."""

    def __init__(self, options: Options) -> None:
        self.options = options
        self.folder = Path(options.out)
        self.name = Path(options.model).resolve().name
        self.model, self.tokenizer = load_model(options.model)
        loaded = load_records(options.records)
        usable = list(loaded) if options.known is None else [r for r in loaded if self.fits(r)]
        self.records: list[Record] = usable[: options.limit]
        self.about: dict[str, Any] = {
            "model": self.name,
            "data": Path(options.records).name,
            "data_sha256": loaded.sha256,
            "records": len(self.records),
            "batch_size": options.batch_size,
            "checkpoints": list(options.checkpoints),
            "text": None if options.text is None else Path(options.text).name,
            "fastedit": fastedit.__version__,
            "torch": str(torch.__version__),
        }
        if options.known is not None:
            self.about |= {"in_file": len(loaded), "fitting": len(usable), "known": Path(options.known).name}
            print(f"{len(usable)} of {len(loaded)} records fit the model's context", flush=True)
        self.about["memit"] = self.params(Variant("memit"))  # which records are optimisable depends on it
        self._statistics: dict[int, Any] = {}
        self._before: Before | None = None
        self._made_ahead: dict[str, Any] = {}

    def fits(self, record: Record) -> bool:
        """Whether each of a record's texts, and room for editors' contexts, is within the model's context."""
        limit = describe(self.model).context_length
        asked = [(fact.text, [fact.target_new]) for fact in record.facts]
        asked += [(text, [record.fact.target_new]) for text in record.rephrase]
        asked += [(item.prompt, item.answers) for items in record.locality.values() for item in items]
        texts = [f"{prompt} {answer}" for prompt, answers in asked for answer in answers or [""]]
        lengths = [len(ids) for ids in self.tokenizer(texts)["input_ids"]]
        return limit is None or max(lengths) + CONTEXT_ROOM <= limit

    # -- editors ------------------------------------------------------------------------------------

    def params(self, variant: Variant) -> dict[str, Any]:
        """The settings from the file, if there is one, and those that the variant's name gives."""
        folder = Path(self.options.settings)
        names = [f"{self.name}_{name}.json" for name in (variant.name, variant.method)]
        path = next((folder / name for name in names if (folder / name).exists()), None)
        params = {} if path is None else dict(read_json(path))
        _, at, suffix = variant.name.partition("@")
        if at:
            name, value_of = SUFFIXES[variant.method]
            params[name] = value_of(suffix)
        return params

    def editor(self, variant: Variant, model: Any) -> Editor:
        """The variant's editor for ``model``, a copy of the study's."""
        params = self.params(variant)
        if not variant.optimises_targets:
            return fastedit.editor(variant.method, model, self.tokenizer, params=params, progress=False)
        if variant.norm_control:
            params["norm_anchor"] = self.shared()["norm_anchors"][variant.name]["norm"]
        kind = editor_class(variant.method)
        resolved = resolve_params(
            kind.params_file or kind.method, kind.Params, describe(model), params or None
        )
        editor = fastedit.editor(
            variant.method,
            model,
            self.tokenizer,
            params=resolved,
            statistics=self.statistics(resolved.layers),
            progress=False,
        )
        if isinstance(editor, Nse):
            self._give_targets(editor)
        return editor

    def _give_targets(self, editor: Nse) -> None:
        """NSE's targets are those of the unedited model: they are made once for all runs with the same objective."""
        objective = str(editor.objective())
        if objective not in self._made_ahead:
            editor.optimise_targets([record.fact for record in self.records])
            self._made_ahead[objective] = editor.made_ahead
        editor.made_ahead = dict(self._made_ahead[objective])

    def statistics(self, layers: Sequence[int]) -> dict[int, Any]:
        """Second moments of keys over the records' true sentences."""
        missing = [layer for layer in layers if layer not in self._statistics]
        if missing:
            texts = true_sentences(self.options.known or self.options.records)
            found = collect(self.model, self.tokenizer, texts, layers=missing, n_tokens=10**6, progress=False)
            self._statistics.update(found)
        return {layer: self._statistics[layer] for layer in layers}

    # -- what is measured once, on the unedited model ----------------------------------------------

    def shared(self) -> dict[str, Any]:
        """What :meth:`prepare` has written."""
        return read_json(self.folder / "shared.json")

    def prepare(self, variants: Sequence[Variant]) -> None:
        """Write ``shared.json``: scores of the unedited model, optimisable records, norm anchors."""
        path = self.folder / "shared.json"
        known: dict[str, Any] = (
            read_json(path) if path.exists() else {"about": self.about, "norm_anchors": {}}
        )
        if known["about"] != self.about:
            raise SystemExit(
                f"{path} is of other records or settings ({known['about']}, not {self.about}): choose another "
                "folder with --out"
            )
        if "optimisable" not in known:
            known["optimisable"] = self.optimisable()
            everything = range(len(self.records))
            known["unedited"] = self.point(
                self.evaluator(self.model), "before", 0, everything, known["optimisable"]
            )
            atomic_write_json(path, known)
        facts = [record.fact for record in self.records]
        for variant in variants:
            given = self.params(variant)
            if not variant.norm_control or known["norm_anchors"].get(variant.name, {}).get("given") == given:
                continue
            editor = self.editor(Variant(variant.name), self.model)
            assert isinstance(editor, LocateThenEdit)
            known["norm_anchors"][variant.name] = {"given": given, "norm": editor.measure_norm_anchor(facts)}
            atomic_write_json(path, known)

    def optimisable(self) -> list[int]:
        """Positions of the records whose target MEMIT's optimisation reaches on the unedited model."""
        editor = self.editor(Variant("memit"), self.model)
        assert isinstance(editor, LocateThenEdit)
        facts = [record.fact for record in self.records]
        with frozen(self.model):
            rows = fact_rows(self.tokenizer, facts, editor.contexts, editor.description.context_length)
            values = editor.targets(facts, rows)
        final = values.final_loss.tolist()
        return [i for i, nll in enumerate(final) if i not in values.broken and nll < OPTIMISABLE_NLL]

    def evaluator(self, model: Any) -> Evaluator:
        """Scores of ``model``, with the unedited model's to compare with."""
        evaluator = Evaluator(
            model,
            self.tokenizer,
            self.records,
            AT_THE_END,
            batch_size=64,
            text=self.text(),
            show_progress=False,
            drift_tokens=4096,
            before=self._before,
        )
        self._before = evaluator.before()
        return evaluator

    def text(self) -> str:
        """The text that perplexity is measured on: that given, or the true sentences that are never edited."""
        if self.options.text is not None:
            return Path(self.options.text).read_text(encoding="utf-8")
        return "\n".join(true_sentences(self.options.known or self.options.records)[1::2])

    # -- scores -------------------------------------------------------------------------------------

    def point(
        self,
        evaluator: Evaluator,
        when: str,
        n_edits: int,
        scored: Sequence[int],
        optimisable: Sequence[int],
    ) -> dict[str, Any]:
        """The scores at one moment: of all records in ``scored``, and of the optimisable ones among them."""
        chosen = set(optimisable)
        result: dict[str, Any] = {"edits": n_edits}
        for name, subset in (("all", scored), ("optimisable", [i for i in scored if i in chosen])):
            result[name] = {"records": len(subset), **_means(evaluator, when, n_edits, subset)}
        ppl, kl = (_over_windows(evaluator, name, when, n_edits) for name in ("drift.ppl", "drift.kl"))
        return {**result, "ppl": None if ppl is None else math.exp(min(ppl, 700.0)), "kl": kl}

    # -- runs ---------------------------------------------------------------------------------------

    def path(self, variant: Variant, order: int) -> Path:
        """Where a run's result is."""
        return self.folder / f"{variant.label}_order{order}.json"

    def finished(self, variant: Variant, order: int) -> bool:
        """Whether the run is there.

        Raises:
            SystemExit: it is, with other settings.
        """
        path = self.path(variant, order)
        if not path.exists():
            return False
        given = read_json(path)["given"]
        if given != self.params(variant):
            raise SystemExit(
                f"{path} was made with other settings ({given}, not {self.params(variant)}): delete it, or choose "
                "another folder with --out"
            )
        return True

    def run(self, variant: Variant, order: int) -> dict[str, Any]:
        """Edit and score everything once, and write the result."""
        shared = self.shared()
        model = copy.deepcopy(self.model)
        editor = self.editor(variant, model)
        evaluator = self.evaluator(model)
        sequence = EditSequence(editor, self.model)
        places = list(range(len(self.records)))
        if order:
            random.Random(order).shuffle(places)
        marks = set(self.options.checkpoints)
        points = []
        began, cpu = time.perf_counter(), time.process_time()
        for start, done in batches(len(places), self.options.batch_size, marks):
            for facts in steps([self.records[i] for i in places[start:done]]):
                sequence.edit(facts)
            if done in marks and done < len(places):
                evaluator.after("checkpoint", done, indices=places[:done], protocols=ON_THE_WAY)
                point = self.point(evaluator, "checkpoint", done, places[:done], shared["optimisable"])
                points.append({**point, **sequence.norms()})
        evaluator.after("final", len(places), indices=places)
        point = self.point(evaluator, "final", len(places), places, shared["optimisable"])
        points.append({**point, **sequence.norms()})
        result = {
            "label": variant.label,
            "method": variant.method,
            "norm_control": variant.norm_control,
            "order": order,
            "given": self.params(variant),
            "params": plain(vars(editor.params)),
            "profile": editor.profile,
            "about": self.about,
            "collapsed": sequence.collapsed,
            "set_aside": sequence.set_aside,
            "seconds": {
                "editing": round(sequence.seconds, 2),
                "all": round(time.perf_counter() - began, 2),
                "cpu": round(time.process_time() - cpu, 2),
            },
            "points": points,
        }
        atomic_write_json(self.path(variant, order), result)
        return result


class EditSequence:
    """The edits of one run, which end where the method breaks."""

    def __init__(self, editor: Editor, unedited: Any) -> None:
        self.editor = editor
        originals = dict(unedited.named_parameters())
        self._weights = {
            name: (parameter, originals[name])
            for name, parameter in editor.model.named_parameters()
            if name in editor.weight_names
        }
        self.collapsed: dict[str, Any] | None = None
        self.edited = 0
        self.set_aside = 0
        self.seconds = 0.0

    def edit(self, facts: list[Fact]) -> None:
        """Write a batch, unless the method has broken before."""
        if self.collapsed is not None:
            return
        began = time.perf_counter()
        try:
            edit = self.editor.edit(facts)
        except BROKEN as error:
            self.collapsed = {"edits": self.edited, "reason": str(error)}
            return
        finally:
            self.seconds += time.perf_counter() - began
        self.edited += len(facts)
        self.set_aside += len(edit.measured.get("set_aside", []))

    @torch.no_grad()
    def norms(self) -> dict[str, float]:
        """‖W‖ / ‖W₀‖ and ‖W − W₀‖ / ‖W₀‖ (Frobenius) of all edited matrices together."""
        if not self._weights:
            return {"weight_norm": 1.0, "change_norm": 0.0}
        squares = torch.zeros(3, dtype=torch.float64)
        for weight, original in self._weights.values():
            now, before = weight.double(), original.double()
            squares += torch.stack([part.square().sum().cpu() for part in (before, now, now - before)])
        return {
            "weight_norm": math.sqrt(squares[1] / squares[0]),
            "change_norm": math.sqrt(squares[2] / squares[0]),
        }


def batches(n: int, size: int, marks: Collection[int]) -> Iterator[tuple[int, int]]:
    """Start and end of each batch; none reaches across a checkpoint."""
    start = 0
    while start < n:
        done = min([start + size, n, *(mark for mark in marks if mark > start)])
        yield start, done
        start = done


def _means(evaluator: Evaluator, when: str, n_edits: int, scored: Sequence[int]) -> dict[str, float]:
    """Mean of each measure over the records in ``scored`` that have it; a score that is not finite counts as 0."""
    means = {}
    for name, (protocol, metric) in MEASURES.items():
        if when == "checkpoint" and protocol not in ON_THE_WAY:
            continue
        before = {row["index"]: row["metrics"] for row in evaluator.rows(protocol, "before")}
        now = {row["index"]: row["metrics"] for row in evaluator.rows(protocol, when, n_edits)}
        values = [now.get(i, {}).get(metric, 0.0) for i in scored if metric in before.get(i, {})]
        if values:
            means[name] = sum(values) / len(values)
    return means


def _over_windows(evaluator: Evaluator, protocol: str, when: str, n_edits: int) -> float | None:
    """Mean over the tokens of the text; None if any logit is not finite."""
    rows = [row["metrics"] for row in evaluator.rows(protocol, when, n_edits)]
    if not rows or len(rows) < len(evaluator.rows(protocol, "before")):
        return None
    return sum(row["sum"] for row in rows) / sum(row["count"] for row in rows)


def true_sentences(path: str) -> list[str]:
    """What the model was trained on: each record's fact and its neighbour's, as sentences."""
    rows = json.loads(Path(path).read_text(encoding="utf-8"))
    pairs = (("prompt", "ground_truth"), ("locality_prompt", "locality_ground_truth"))
    return [f"{row[prompt]} {row[answer]}." for row in rows for prompt, answer in pairs]


@functools.cache
def study_of(options: Options) -> Study:
    """The study of this process."""
    logging.getLogger("fastedit").setLevel(logging.ERROR)
    return Study(options)


def work(options: Options, variant: Variant, order: int) -> dict[str, Any]:
    """One run, in whichever process."""
    return study_of(options).run(variant, order)


def variants_of(names: Sequence[str], norm_control: bool) -> list[Variant]:
    """The methods as given, each followed by its variant with the norm anchor, if it has one and that is wanted."""
    chosen = []
    for name in dict.fromkeys(names):
        variant = Variant(name)
        method, at, suffix = name.partition("@")
        try:
            if at:
                SUFFIXES[method][1](suffix)
        except (KeyError, ValueError):
            raise SystemExit(
                f"--methods: {name!r} is none of the variants grace@REPLACEMENT, nse@MASS, wise@merge, wise@retrieve"
            ) from None
        chosen.append(variant)
        if norm_control and variant.optimises_targets:
            chosen.append(Variant(name, norm_control=True))
    return chosen


def main(arguments: Sequence[str] | None = None) -> None:
    args = parse(arguments)
    options = Options(
        args.model,
        args.records,
        args.settings,
        args.out or str(HERE / "results" / f"sequential_{Path(args.model).resolve().name}"),
        args.limit,
        args.batch_size,
        tuple(args.checkpoints),
        args.text,
        args.known,
    )
    if not args.table_only:
        variants = variants_of(args.methods, args.norm_control)
        Path(options.out).mkdir(parents=True, exist_ok=True)
        study = study_of(options)
        study.prepare(variants)
        wanted = [(variant, order) for order in range(args.orders) for variant in variants]
        missing = [run for run in wanted if not study.finished(*run)]
        print(f"{len(wanted) - len(missing)} runs are there, {len(missing)} to do", flush=True)
        do(options, missing, args.jobs)
    print(sequential_report.write(Path(options.out)))


def do(options: Options, runs: Sequence[tuple[Variant, int]], jobs: int) -> None:
    """Make the runs, ``jobs`` at a time."""
    if jobs == 1:
        for run in runs:
            say(work(options, *run))
        return
    threads = max(1, torch.get_num_threads() // jobs)
    spawn = get_context("spawn")
    with ProcessPoolExecutor(jobs, spawn, torch.set_num_threads, (threads,)) as pool:
        for future in as_completed([pool.submit(work, options, *run) for run in runs]):
            say(future.result())


def say(result: dict[str, Any]) -> None:
    """One line about a finished run."""
    last = result["points"][-1]["all"]
    collapsed = f", collapsed after {result['collapsed']['edits']}" if result["collapsed"] else ""
    print(
        f"{result['label']} order {result['order']}: efficacy {100 * last['efficacy']:.1f} %, locality "
        f"{100 * last['locality']:.1f} %{collapsed}; {result['seconds']['editing']:.0f} s of "
        f"{result['seconds']['all']:.0f} s editing",
        flush=True,
    )


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("--model", required=True, metavar="DIR", help="a causal language model")
    add("--records", required=True, metavar="FILE", help="flat CounterFact records that the model knows")
    add(
        "--known",
        metavar="FILE",
        help="then --records may be of any data set, and this one has the records that the model knows",
    )
    add(
        "--methods",
        nargs="+",
        default=METHODS,
        metavar="NAME",
        help="methods of fastedit; nse@0.8 is NSE with mass 0.8, wise@merge and wise@retrieve are WISE's two modes, "
        "grace@replace_all is GRACE with values at all positions",
    )
    add(
        "--norm-control",
        action="store_true",
        help="each method that optimises targets also with the norm anchor",
    )
    add(
        "--orders",
        type=int,
        default=3,
        metavar="N",
        help="orders of the records: the file's, then seeded shuffles",
    )
    add("--batch-size", type=int, default=10, metavar="N")
    add("--limit", type=int, default=600, metavar="N", help="use the first N records")
    add(
        "--checkpoints",
        type=int,
        nargs="*",
        default=[10, 100, 300],
        metavar="N",
        help="edits after which to score",
    )
    add("--settings", default=str(HERE / "settings"), metavar="DIR", help="holds MODEL_METHOD.json")
    add("--text", metavar="FILE", help="for perplexity; the records' true sentences that are never edited")
    add("--jobs", type=int, default=1, metavar="N", help="runs at a time, each in a process of its own")
    add("--out", metavar="DIR", help="results, by default bench/results/sequential_MODEL")
    add("--table-only", action="store_true", help="make table and plots from the results that are there")
    args = parser.parse_args(arguments)
    if min(args.orders, args.batch_size, args.limit, args.jobs) < 1:
        parser.error("--orders, --batch-size, --limit and --jobs must be at least 1")
    return args


if __name__ == "__main__":
    main()
