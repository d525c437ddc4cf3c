"""What must hold between the methods' formulas, whatever the model."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from helpers import relative_error
from model_configs import tiny_model
from tiny import FACTS, bits, make, moments, same_bits

from fastedit import Fact
from fastedit.editors.alphaedit import null_space
from fastedit.editors.locate_then_edit import LayerMeasurement
from fastedit.models import describe
from fastedit.ops import CovarianceFactor, RidgeSolver

D, OUT, BATCH, BATCHES = 300, 40, 12, 6
F64 = torch.float64


def ill_conditioned(d: int = D, condition: float = 1e7) -> torch.Tensor:
    """A covariance with eigenvalues from 1 down to 1 / condition."""
    generator = torch.Generator().manual_seed(3)
    basis = torch.linalg.qr(torch.randn(d, d, generator=generator, dtype=F64))[0]
    return (
        basis @ torch.diag(torch.logspace(0, -torch.tensor(condition).log10().item(), d, dtype=F64)) @ basis.T
    )


def batches() -> list[tuple[torch.Tensor, torch.Tensor]]:
    """Keys (D, n) and residuals (OUT, n) of several batches, with a repeated subject in each."""
    generator = torch.Generator().manual_seed(4)
    out = []
    for _ in range(BATCHES):
        keys = torch.randn(D, BATCH, generator=generator, dtype=F64)
        keys[:, 1] = keys[:, 0] + 1e-3 * keys[:, 1]
        out.append((keys, torch.randn(OUT, BATCH, generator=generator, dtype=F64)))
    return out


# ---- 1: the solvers against dense float64 --------------------------------------------------------------


@pytest.mark.parametrize("ridge", [1.0, 0.1, 1e-6])
def test_1_solver_without_history_equals_the_dense_solve(ridge: float) -> None:
    """MEMIT and PMET (ridge 1), EMMET (0.1), ROME (nearly 0)."""
    moment = ill_conditioned()
    for keys, residual in batches():
        solved = torch.linalg.solve(50.0 * moment, keys)
        dense = residual @ torch.linalg.solve(ridge * torch.eye(BATCH, dtype=F64) + keys.T @ solved, solved.T)
        thin = residual @ CovarianceFactor(moment, 50.0).regularised(keys, ridge).T
        assert relative_error(thin, dense) < 1e-8


def test_1_solver_with_an_edit_cache_equals_the_dense_solve() -> None:
    """MEMIT with a cache, and NSE with all neurons."""
    factor = CovarianceFactor(ill_conditioned(), 50.0)
    system = 50.0 * ill_conditioned()
    for keys, residual in batches():
        system = system + keys @ keys.T
        dense = residual @ torch.linalg.solve(system, keys).T
        assert relative_error(residual @ factor.regularised(keys).T, dense) < 1e-8
        factor.append(keys)


@pytest.mark.parametrize("threshold", [1e-3, 0.3, 1e-6])
def test_1_solver_in_a_null_space_equals_the_published_system(threshold: float) -> None:
    projector = null_space(ill_conditioned(), threshold, 0)
    matrix = projector(torch.eye(D, dtype=F64))
    solver = RidgeSolver(D, 10.0, projector=projector)
    past = torch.zeros(D, D, dtype=F64)
    for keys, residual in batches():
        system = matrix @ (keys @ keys.T + past) + 10.0 * torch.eye(D, dtype=F64)
        dense = torch.linalg.solve(system, matrix @ keys @ residual.T).T
        assert relative_error(residual @ solver.solve(keys).T, dense) < 1e-8
        solver.append(keys)
        past += keys @ keys.T


def test_1_solver_of_chosen_neurons_equals_the_dense_solve() -> None:
    editor = make("nse", tiny_model("llama"), params={"mass": 0.6, "covariance_weight": 5.0})
    editor.prepare()
    layer = editor.params.layers[0]
    d = editor.description.projection(layer).d_in
    system = 5.0 * moments(editor.model)[layer].double()
    generator = torch.Generator().manual_seed(1)
    for number in range(3):
        keys = torch.randn(d, 4, generator=generator)
        residual = torch.randn(editor.description.hidden_size, 4, generator=generator)
        left, right = editor.solve(LayerMeasurement(layer, keys, residual, keys))
        chosen = editor.neurons(keys)
        inside = keys[chosen].double()
        small = system[chosen][:, chosen] + inside @ inside.T
        dense = torch.zeros(len(residual), d, dtype=F64)
        dense[:, chosen] = residual.double() @ torch.linalg.solve(small, inside).T
        assert relative_error(left.double() @ right.T, dense) < 1e-8
        editor.history.add(str(number), {layer: keys})
        system += keys.double() @ keys.double().T


# ---- 2: methods that are special cases of each other ---------------------------------------------------


def change(
    method: str, params: dict[str, Any], facts: list[Fact] = FACTS, **options: Any
) -> dict[str, torch.Tensor]:
    """What a method changes in a tiny model."""
    model = tiny_model("llama")
    before = bits(model)
    make(method, model, params={"steps": 6, "lr": 0.02, "layers": (1,), **params}, **options).edit(facts)
    return {
        name: parameter.detach() - before[name]
        for name, parameter in model.named_parameters()
        if not torch.equal(parameter, before[name])
    }


def same_change(
    first: dict[str, torch.Tensor], second: dict[str, torch.Tensor], tolerance: float = 1e-3
) -> bool:
    """Up to the rounding of float32 weights, which is large beside small changes."""
    return first.keys() == second.keys() and all(
        relative_error(first[name], second[name]) < tolerance for name in first
    )


def test_2_emmet_is_memit_with_the_product_of_its_weights() -> None:
    emmet = change("emmet", {"covariance_weight": 100.0, "ridge": 0.2})
    assert same_change(emmet, change("memit", {"covariance_weight": 20.0}))


def test_2_rome_is_emmet_of_one_fact_without_a_ridge() -> None:
    moment, (keys, residual) = ill_conditioned(), batches()[0]
    key, value = keys[:, :1], residual[:, :1]
    direction = torch.linalg.solve(moment, key)
    rome = value @ direction.T / (direction * key).sum()
    emmet = value @ CovarianceFactor(moment).regularised(key, 1e-12).T
    assert relative_error(emmet, rome) < 1e-8


def test_2_nse_with_all_neurons_is_a_sweep_of_memit_with_a_cache() -> None:
    once = {"covariance_weight": 20.0, "layers": (0, 1)}
    nse = change("nse", {**once, "mass": 1.0, "max_sweeps": 2, "tolerance": 0.0, "upper_bound": 1e9})
    assert same_change(nse, change("memit-cache", once))


def test_2_alphaedit_without_a_threshold_is_ridge_regression() -> None:
    keys, residual = batches()[0]
    solver = RidgeSolver(D, 2.0, projector=null_space(ill_conditioned(), float("inf"), 0))
    ridge = torch.linalg.solve(keys @ keys.T + 2.0 * torch.eye(D, dtype=F64), keys @ residual.T).T
    assert relative_error(residual @ solver.solve(keys).T, ridge) < 1e-8


# ---- 3: NSE changes the chosen neurons only, and optimally ----------------------------------------------


@pytest.mark.parametrize("family", ["gpt2", "llama"])
def test_3_columns_of_other_neurons_keep_their_bits(family: str) -> None:
    model = tiny_model(family)
    before = bits(model)
    editor = make("nse", model, params={"steps": 6, "lr": 0.02, "layers": (0,), "max_sweeps": 2, "mass": 0.5})
    chosen = []
    choose = editor.neurons
    editor.neurons = lambda keys: chosen.append(choose(keys)) or chosen[-1]
    editor.edit(FACTS)
    projection = describe(model).projection(0)
    old = before[projection.weight_name]
    old, new = (old.T, projection.weight.T) if projection.transposed else (old, projection.weight)
    others = torch.ones(old.shape[1], dtype=torch.bool)
    others[chosen[0]] = False
    assert 0 < int(others.sum()) < len(others)
    assert torch.equal(old[:, others], new[:, others])
    assert not torch.equal(old[:, ~others], new[:, ~others])


def test_3_no_other_update_of_the_chosen_neurons_is_better() -> None:
    editor = make("nse", tiny_model("llama"), params={"mass": 0.6, "covariance_weight": 5.0})
    editor.prepare()
    layer = editor.params.layers[0]
    generator = torch.Generator().manual_seed(2)
    moment = 5.0 * moments(editor.model)[layer].double()
    keys = torch.randn(len(moment), 4, generator=generator)
    residual = torch.randn(editor.description.hidden_size, 4, generator=generator)
    left, right = editor.solve(LayerMeasurement(layer, keys, residual, keys))
    best = left.double() @ right.T
    chosen = editor.neurons(keys)

    def loss(update: torch.Tensor) -> float:
        missing = residual.double() - update @ keys.double()
        return float((update @ moment * update).sum() + missing.square().sum())

    for _ in range(20):
        other = best.clone()
        other[:, chosen] += 1e-3 * torch.randn(len(best), len(chosen), generator=generator, dtype=F64)
        assert loss(other) > loss(best)


# ---- 7: the memory of earlier batches --------------------------------------------------------------------

REMEMBERING = ["memit-cache", "alphaedit", "nse"]
MORE = [Fact("The capital of {} is", "Italy", "Oslo"), Fact("{} was born in", "Marie Curie", "Rome")]


@pytest.mark.parametrize("method", REMEMBERING)
def test_7_the_history_holds_the_keys_of_every_batch(method: str) -> None:
    editor = make(method, tiny_model("llama"), params={"steps": 6, "lr": 0.02, "layers": (0, 1)})
    edits = [editor.edit(FACTS), editor.edit(MORE)]
    assert editor.history.ids == [edit.id for edit in edits]
    for layer in (0, 1):
        keys = editor.history.keys(layer)
        assert keys.shape[1] == len(FACTS) + len(MORE)
        last = editor.history.batches[-1].keys[layer]
        assert torch.equal(keys[:, len(FACTS) :], last)


@pytest.mark.parametrize("method", REMEMBERING)
@pytest.mark.parametrize("which", [[1], [2, 1], [0]], ids=["last", "last two", "first"])
def test_7_a_batch_that_is_taken_off_is_forgotten(method: str, which: list[int]) -> None:
    """Editing goes on as if the batch had never been; weights and factors have the same bits."""
    params = {"steps": 6, "lr": 0.02, "layers": (0, 1), "mass": 1.0} if method == "nse" else {
        "steps": 6, "lr": 0.02, "layers": (0, 1)}  # fmt: skip
    facts = [FACTS, MORE, [Fact("{} speaks", "Ada Lovelace", "French")]]
    facts = facts[: max(which) + 1] if max(which) else facts[:2]
    model, other = tiny_model("llama"), tiny_model("llama")
    editor, untouched = make(method, model, params=params), make(method, other, params=params)
    edits = [editor.edit(batch) for batch in facts]
    for index in which:
        edits[index].revert()
    kept = [batch for index, batch in enumerate(facts) if index not in which]
    if 0 not in which:
        for batch in kept:
            untouched.edit(batch)
        assert same_bits(model, bits(other))
        last = [Fact("{} lives in", "Alan Turing", "Lima")]
        editor.edit(last)
        untouched.edit(last)
        assert same_bits(model, bits(other))
    else:  # what was measured with the first batch beneath stays; its keys go
        editor.edit([Fact("{} lives in", "Alan Turing", "Lima")])
        assert edits[0].id not in editor.history.ids
        assert len(editor.history) == 2


@pytest.mark.parametrize("method", REMEMBERING)
def test_7_a_failed_batch_leaves_no_trace(method: str, monkeypatch: pytest.MonkeyPatch) -> None:
    model = tiny_model("llama")
    editor = make(method, model, params={"steps": 6, "lr": 0.02, "layers": (0, 1)})
    editor.edit(FACTS)
    before, ids = bits(model), list(editor.history.ids)
    monkeypatch.setattr(editor, "_edit", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
    with pytest.raises(KeyboardInterrupt):
        editor.edit(MORE)
    assert same_bits(model, before)
    assert editor.history.ids == ids


def test_nse_targets_do_not_depend_on_earlier_edits() -> None:
    params = {"steps": 6, "lr": 0.02, "layers": (0, 1)}
    editor = make("nse", tiny_model("llama"), params=params)
    fresh = make("nse", tiny_model("llama"), params=params)
    editor.edit(FACTS)
    first = editor.edit(MORE).measured["facts"]
    alone = fresh.edit(MORE).measured["facts"]
    for ours, theirs in zip(first, alone, strict=True):
        assert ours["shift_norm"] == pytest.approx(theirs["shift_norm"], rel=1e-6)
    ahead = make("nse", tiny_model("llama"), params=params)
    ahead.optimise_targets([*FACTS, *MORE])
    ahead.edit(FACTS)
    again = ahead.edit(MORE).measured["facts"]
    for ours, theirs in zip(again, alone, strict=True):
        assert ours["shift_norm"] == pytest.approx(theirs["shift_norm"], rel=1e-5)
