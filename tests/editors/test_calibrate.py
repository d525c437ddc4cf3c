"""Calibration: what it shares between settings changes no result, it chooses by what it measured, bits come back."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import torch
from model_configs import tiny_model, tiny_tokenizer
from tiny import CONTEXTS, bits, make, moments, same_bits

import fastedit
from fastedit import Fact
from fastedit.artefacts import stack_of
from fastedit.data import Item, Record
from fastedit.editors import calibrate as module
from fastedit.editors import locate_then_edit, trials
from fastedit.editors.base import editor_class
from fastedit.editors.calibrate import calibrate
from fastedit.editors.prompts import fact_rows
from fastedit.editors.trials import Scores, packaged_records
from fastedit.errors import InvalidFact, NumericalError
from fastedit.evaluation import PairScore, Scorer
from fastedit.models.runner import BlockRunner

COUNTRIES = ["France", "Italy", "Spain", "Norway", "Japan", "Peru", "Kenya", "Cuba", "Chad"]
FACTS = [Fact("The capital of {} is", name, "Lyon") for name in COUNTRIES]
TEXTS = ["The law of the land is not what it was.", "Nobody plays the violin here.", "It rains in Rome."]


@pytest.fixture(autouse=True)
def small_search(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    if request.node.get_closest_marker("slow"):
        return
    small = {
        "_STEPS": (2, 3), "_CLAMPS": (0.75, 1.5), "_RATES": (0.1, 0.5), "_WINDOWS": (1, 2), "_WEIGHTS": (0.3, 3.0),
        "_SHARES": (0.2,), "_RIDGES": (0.03, 0.3), "_MASSES": (0.8, 1.0), "_KEPT_LAYERS": 1, "_KEPT_TARGETS": 2,
        "_KEPT_WINDOWS": 1,
    }  # fmt: skip
    for name, value in small.items():
        monkeypatch.setattr(module, name, value)
    monkeypatch.setattr(locate_then_edit, "sample_contexts", lambda *_args, **_options: CONTEXTS)


def records() -> list[Record]:
    return [
        Record(
            fact,
            rephrase=[f"{fact.subject}'s capital is"],
            locality={"neighborhood": [Item(f"The river of {fact.subject} is", ["Po"])]},
        )
        for fact in FACTS
    ]


def run(model: Any, facts: Any = None, method: str = "memit", **options: Any) -> Any:
    given = {"statistics": moments(model), "texts": TEXTS, "limit": 4, "progress": False, **options}
    return calibrate(model, tiny_tokenizer(), records() if facts is None else facts, method, **given)


def shared_of(model: Any) -> Any:
    """What settings share."""
    tokenizer = tiny_tokenizer()
    given = trials.Moments(model, tokenizer, moments(model), TEXTS, False)
    common = trials.Common(model, tokenizer, given, Scorer(model, tokenizer), [[1, 2, 3]], None, 0, False)
    rows = fact_rows(tokenizer, FACTS, CONTEXTS, None)
    return trials.Shared(common, FACTS, rows, BlockRunner(model))


@pytest.mark.parametrize("method", ["rome", "memit", "memit-cache", "emmet", "alphaedit", "nse"])
def test_what_settings_share_changes_no_result(method: str) -> None:
    """Two batches with λ in the keys of a factor of C, and with the method's own factor of λC."""
    settings: dict[str, Any] = {"steps": 4, "layers": (1,) if method in ("rome", "emmet") else (0, 1)}
    if method not in ("rome", "alphaedit"):
        settings["covariance_weight"] = 7.0
    if method == "alphaedit":
        settings |= {"null_threshold": 1.0, "ridge": 2.0}
    if method == "nse":
        settings["mass"] = 0.7
    kind = editor_class(method)

    def of_its_own(shared: Any, *args: Any, **given: Any) -> Any:
        class WithTheseTargets(kind):  # type: ignore[misc, valid-type]
            def targets(self, facts: Any, rows: Any) -> Any:
                return shared.values_of(facts, self.objective())

        return WithTheseTargets(*args, **given)

    changes = []
    for build in (of_its_own, trials.on_shared(kind)):
        model = tiny_model("llama")
        shared = shared_of(model)
        before = bits(model)
        for _ in range(2):  # the second editor finds the factors that the first one appended to
            stack_of(model).clear()
            shared.retain(settings["layers"])
            editor = build(
                shared,
                model,
                tiny_tokenizer(),
                params=settings,
                statistics=moments(model),
                contexts=CONTEXTS,
                progress=False,
            )
            editor.edit(FACTS[:2])
            editor.edit(FACTS[2:4])
        changes.append({name: p.detach() - before[name] for name, p in model.named_parameters()})
    for name, change in changes[0].items():
        assert torch.allclose(change, changes[1][name], rtol=0, atol=2e-6), name
    assert any(bool(change.any()) for change in changes[0].values())


@pytest.mark.parametrize("method", ["rome", "memit", "alphaedit", "nse"])
def test_it_chooses_the_best_it_measured_and_leaves_the_model_alone(method: str, tmp_path: Path) -> None:
    model = tiny_model("llama")
    before = bits(model)
    result = run(model, method=method)
    assert same_bits(model, before)
    assert not stack_of(model).edits
    best = max(result.trials, key=lambda trial: trial.rank)
    assert result.searched == best.scores
    assert result.trials[0].params == {**result.default, "layers": tuple(result.default["layers"])}
    assert (result.n_searched, result.n_checked) == (4, 2)
    assert result.finished
    assert result.checked is not None
    assert result.checked.paraphrased is not None
    tried = [tuple(sorted((k, str(v)) for k, v in trial.params.items())) for trial in result.trials]
    assert len(set(tried)) == len(tried), "no setting is tried twice"
    assert result.as_dict()["n_tried"] == {"targets": len(result.targets), "edits": len(result.trials)}

    path = result.save(tmp_path / "found.json")
    editor = make(method, model, params=path)
    assert list(editor.params.layers) == result.params["layers"]
    assert editor.params.lr == result.params["lr"]
    editor.edit(FACTS[:1]).revert()


def test_the_same_seed_gives_the_same_choice() -> None:
    first, second = (run(tiny_model("llama"), seed=3) for _ in range(2))
    assert first.params == second.params
    assert first.searched == second.searched
    assert first.checked == second.checked


def test_plain_facts_are_judged_by_text_alone() -> None:
    result = run(tiny_model("gpt2"), FACTS)
    assert result.searched.paraphrased is None
    assert result.searched.neighbours is None
    assert 0 <= result.searched.text <= 1


@pytest.mark.parametrize("call", [4, 8, 14])
def test_an_interrupt_leaves_every_bit(call: int, monkeypatch: pytest.MonkeyPatch) -> None:
    model = tiny_model("llama")
    before = bits(model)
    calls = iter(range(1, 1000))
    score = Scorer.score

    def interrupted(self: Scorer, pairs: Any) -> Any:
        if next(calls) == call:
            raise KeyboardInterrupt
        return score(self, pairs)

    monkeypatch.setattr(Scorer, "score", interrupted)
    with pytest.raises(KeyboardInterrupt):
        run(model)
    assert same_bits(model, before)
    assert not stack_of(model).edits


def test_edits_that_were_there_before_stay() -> None:
    model = tiny_model("llama")
    edit = make("memit", model).edit([Fact("{} plays the", "Miles Davis", "violin")])
    before = bits(model)
    run(model)
    assert same_bits(model, before)
    assert [each.id for each in stack_of(model).edits] == [edit.id]


def test_a_spent_budget_gives_the_default() -> None:
    said: list[str] = []
    result = run(tiny_model("llama"), budget=0, say=said.append)
    assert not result.finished
    assert result.params == result.default
    assert len(result.trials) == 1
    assert result.checked == result.checked_default
    assert "budget" in result.why
    assert "about" in said[0]


def test_only_layers_with_statistics_are_tried(monkeypatch: pytest.MonkeyPatch) -> None:
    model = tiny_model("llama")
    given = {layer: moment for layer, moment in moments(model).items() if layer < 2}
    result = run(model, statistics=given)
    assert {layer for trial in result.trials for layer in trial.params["layers"]} == {0, 1}
    with pytest.raises(ValueError, match=r"lack layers of the default .*\(0, 1\).* hold \[0\]"):
        run(model, statistics={0: given[0]})


def test_a_setting_that_fails_is_one_that_is_not_chosen(monkeypatch: pytest.MonkeyPatch) -> None:
    model = tiny_model("llama")
    kind = editor_class("memit")
    solve = kind.solve

    def fails(self: Any, measured: Any) -> Any:
        if len(self.params.layers) == 1:
            raise NumericalError("no")
        return solve(self, measured)

    monkeypatch.setattr(kind, "solve", fails)
    before = bits(model)
    result = run(model)
    assert same_bits(model, before)
    assert len(result.params["layers"]) > 1
    failed = [trial for trial in result.trials if trial.failure]
    assert failed
    assert all(trial.failure == "no" and trial.scores is None for trial in failed)


def test_bad_input_is_named() -> None:
    model = tiny_model("llama")
    with pytest.raises(ValueError, match="locate-then-edit methods such as memit and rome, got 'ultraedit'"):
        run(model, method="ultraedit")
    with pytest.raises(ValueError, match="limit must be at least 4, got 2"):
        run(model, limit=2)
    with pytest.raises(ValueError, match="batch_size must be at least 1, got 0"):
        run(model, batch_size=0)
    with pytest.raises(InvalidFact, match=r"at least 6 facts .*, got 3 of 4"):
        run(model, [*FACTS[:3], FACTS[0]])


def test_facts_known_already_and_repeats_are_left_out() -> None:
    class Knows:
        def score(self, pairs: Any) -> list[PairScore]:
            return [PairScore((-1.0,), (5 if "Malta" in pair.prompt else 6,), (5,)) for pair in pairs]

    given = [*FACTS, FACTS[0], Fact("The capital of {} is", "Malta", "Lyon")]
    cases = trials.usable_cases(given, Knows(), 0, 20)  # type: ignore[arg-type]
    assert sorted(case.fact.subject for case in cases) == sorted(COUNTRIES)


def test_the_total_is_the_harmonic_mean_of_what_there_is() -> None:
    assert Scores(1.0, 0.5, None, 1.0, 0.1).total == pytest.approx(3 / 4)
    assert Scores(0.5, None, None, 1.0, 0.1).total == pytest.approx(2 / 3)
    assert Scores(0.0, 1.0, 1.0, 1.0, 0.1).total == 0
    broken = Scores(1.0, 1.0, 1.0, 1.0, math.inf)
    assert broken.total == 0
    assert broken.as_dict()["kl"] is None


def test_the_packaged_facts_have_other_answers_of_their_relation() -> None:
    first, second = packaged_records(1), packaged_records(1)
    assert [r.fact for r in first] == [r.fact for r in second]
    assert len(first) > 100
    for record in first:
        assert record.fact.target_new != record.fact.target_old
        assert record.rephrase
        assert all("{}" not in text for text in record.rephrase)
        assert record.locality["neighborhood"]


def test_a_threshold_leaves_a_share_of_the_trace() -> None:
    values = torch.tensor([0.1, 0.2, 0.3, 3.4])
    assert module._threshold(values, 0.2) == pytest.approx(3.4)  # 0.6 of 4.0 are below it
    assert module._threshold(values, 1.0) == pytest.approx(6.8)


@pytest.mark.slow
def test_on_the_demo_model_it_beats_the_default_of_no_model(monkeypatch: pytest.MonkeyPatch) -> None:
    from fastedit import demo

    model, tokenizer = demo.load_demo_model()
    before = bits(model)
    result = calibrate(model, tokenizer, limit=8, progress=False)
    assert same_bits(model, before)
    assert result.searched.total >= result.trials[0].scores.total  # type: ignore[union-attr]
    assert result.searched.written >= 0.5
    assert fastedit.editor("memit", model, tokenizer, params=result.params)
