"""EasyEdit on our kernels, against stand-ins of its functions: the same results, falling back, restoring."""

from __future__ import annotations

import copy
import importlib
import os
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from model_configs import tiny_model, tiny_tokenizer
from torch import Tensor

from fastedit.integrations import easyedit
from fastedit.integrations.sources import hashes_in

STAND_IN = Path(__file__).parent / "stand_ins" / "easyedit"
REQUESTS = [
    {"case_id": 1, "prompt": "The capital of France is", "subject": "France", "target_new": "Lyon in Italy"},
    {"case_id": 2, "prompt": "{} is the capital of", "subject": "Tokyo", "target_new": "France"},
    {"case_id": 3, "prompt": "Miles lives in", "subject": "Miles", "target_new": "Rome"},
]
CONTEXTS = ["The thing. {}", "You know that. {}"]
FAMILIES = ("llama", "gpt2")


@pytest.fixture
def load(monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[[str], Any]]:
    """Imports a module of the stand-in; what the test has loaded is unloaded afterwards."""
    monkeypatch.syspath_prepend(str(STAND_IN))
    monkeypatch.delenv("CUDA_LAUNCH_BLOCKING", raising=False)
    known: dict[str, dict[str, str]] = {}
    for file in (STAND_IN / "easyeditor").rglob("*.py"):
        module = ".".join(file.relative_to(STAND_IN).with_suffix("").parts)
        for name, digest in hashes_in(file.read_text()).items():
            known[f"{module}:{name}"] = {digest: "stand-in"}
    monkeypatch.setattr(easyedit, "KNOWN", known)
    yield lambda name: importlib.import_module(f"easyeditor.{name}")
    for name in [name for name in sys.modules if name.partition(".")[0] == "easyeditor"]:
        del sys.modules[name]


@pytest.fixture
def accelerated(load: Callable[[str], Any]) -> Iterator[Any]:
    """A function that accelerates the stand-in; restored afterwards."""
    reports = []

    def accelerate(**options: Any) -> Any:
        reports.append(easyedit.accelerate(**{"training": True, **options}))
        return reports[-1]

    yield accelerate
    for report in reports:
        report.restore()


def prepared(load: Callable[[str], Any], family: str) -> tuple[Any, Any, Any]:
    """A tiny model, its tokenizer and settings; statistics and contexts are given to the stand-in."""
    model, tokenizer = tiny_model(family), tiny_tokenizer()
    gpt2 = family == "gpt2"
    block = "transformer.h.{}" if gpt2 else "model.layers.{}"
    hparams = SimpleNamespace(
        layers=[0, 1],
        fact_token="subject_last",
        v_num_grad_steps=4,
        v_lr=0.1,
        v_loss_layer=2,
        v_weight_decay=0.5,
        clamp_norm_factor=0.75,
        kl_factor=0.0625,
        mom2_adjustment=True,
        mom2_update_weight=3,
        mom2_dataset="wikipedia",
        mom2_n_samples=100,
        mom2_dtype="float32",
        stats_dir="",
        rewrite_module_tmp=block + (".mlp.c_proj" if gpt2 else ".mlp.down_proj"),
        layer_module_tmp=block,
        mlp_module_tmp=block + ".mlp",
        ln_f_module="transformer.ln_f" if gpt2 else "model.norm",
        lm_head_module="transformer.wte" if gpt2 else "lm_head",
        update_norm_lambda=0.2,
        emmet_lambda=0.1,
        nullspace_threshold=1.0,
        L2=10,
    )
    given = load("models.rome.layer_stats").GIVEN
    for layer in hparams.layers:
        generator = torch.Generator().manual_seed(layer)
        keys = torch.randn(64, 200, generator=generator)
        given[hparams.rewrite_module_tmp.format(layer)] = keys @ keys.T / 200
    load("models.memit.memit_main").CONTEXT_TEMPLATES_CACHE = CONTEXTS
    return model, tokenizer, hparams


def near(found: Tensor, wanted: Tensor) -> bool:
    """‖found − wanted‖ / ‖wanted‖ within 1e-3."""
    found, wanted = found.detach().double(), wanted.detach().double()
    return float((found - wanted).norm() / wanted.norm()) < 1e-3


def calls(report: Any, name: str) -> int:
    """Calls that our replacement answered."""
    (point,) = [each for full, each in report.points.items() if full.endswith(f":{name}")]
    assert not point.skipped, point.skipped
    assert not point.fell_back, point.fell_back
    return point.calls


# ---- locate, then edit ----------------------------------------------------------------------------------


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("method", ["memit", "emmet"])
def test_pairs_are_those_of_the_original(
    method: str, family: str, load: Callable[[str], Any], accelerated: Any
) -> None:
    model, tokenizer, hparams = prepared(load, family)
    main = load(f"models.{method}.{method}_main")
    execute = f"execute_{method}"
    wanted = getattr(main, execute)(model, tokenizer, REQUESTS, hparams)
    bits = copy.deepcopy(model.state_dict())
    report = accelerated()
    found = getattr(main, execute)(model, tokenizer, REQUESTS, hparams)
    assert calls(report, execute) == 1
    assert found.keys() == wanted.keys()
    for name, (right, left) in found.items():
        assert right.shape == wanted[name][0].shape
        assert left.shape == wanted[name][1].shape
        assert near(left @ right.T, wanted[name][1] @ wanted[name][0].T)
    assert all(torch.equal(bits[name], value) for name, value in model.state_dict().items())


def test_cached_values_are_read_and_written(
    load: Callable[[str], Any], accelerated: Any, tmp_path: Path
) -> None:
    model, tokenizer, hparams = prepared(load, "llama")
    main, template = load("models.memit.memit_main"), str(tmp_path / "kv" / "{}_{}_{}.npz")
    wanted = main.execute_memit(model, tokenizer, REQUESTS, hparams, template)
    values = {path.name: np.load(path)["v_star"] for path in (tmp_path / "kv").iterdir()}
    (tmp_path / "kv" / "1_0.75_2.npz").unlink()
    accelerated()
    found = main.execute_memit(model, tokenizer, REQUESTS, hparams, template)
    np.testing.assert_allclose(
        np.load(tmp_path / "kv" / "1_0.75_2.npz")["v_star"], values["1_0.75_2.npz"], rtol=1e-3, atol=1e-4
    )
    name = next(iter(wanted))
    assert near(found[name][1] @ found[name][0].T, wanted[name][1] @ wanted[name][0].T)


@pytest.mark.parametrize("family", FAMILIES)
def test_alphaedit_keeps_earlier_keys(family: str, load: Callable[[str], Any], accelerated: Any) -> None:
    model, tokenizer, hparams = prepared(load, family)
    main = load("models.alphaedit.AlphaEdit_main")

    def run() -> tuple[list[dict[str, Tensor]], Tensor]:
        main.P = torch.stack([main.get_project(model, tokenizer, layer, hparams) for layer in hparams.layers])
        main.cache_c = torch.zeros(2, 64, 64)
        found = [
            main.execute_AlphaEdit(model, tokenizer, part, hparams) for part in (REQUESTS[:1], REQUESTS[1:])
        ]
        return found, main.cache_c

    wanted, wanted_cache = run()
    report = accelerated()
    found, cache = run()
    assert calls(report, "execute_AlphaEdit") == 2
    assert calls(report, "get_project") == 2
    for ours, theirs in zip(found, wanted, strict=True):
        assert all(near(ours[name], theirs[name]) for name in theirs)
    assert near(cache + 0, wanted_cache)
    main.cache_c[0, 0, 0] += 5  # somebody else's keys: the original must answer
    main.execute_AlphaEdit(model, tokenizer, REQUESTS[:1], hparams)
    assert report.fell_back["easyeditor.models.alphaedit.AlphaEdit_main:execute_AlphaEdit"]


@pytest.mark.parametrize("family", FAMILIES)
def test_rome_vectors(family: str, load: Callable[[str], Any], accelerated: Any) -> None:
    model, tokenizer, hparams = prepared(load, family)
    main = load("models.rome.rome_main")
    request = {"prompt": "The capital of {} is", "subject": "France", "target_new": " Lyon"}
    wanted = main.execute_rome(model, tokenizer, request, hparams, ["{}", *CONTEXTS])
    kept = load("models.rome.compute_u").inv_mom2_cache
    inverses = dict(kept)
    kept.clear()
    report = accelerated()
    found = main.execute_rome(model, tokenizer, request, hparams, ["{}", *CONTEXTS])
    assert (calls(report, "compute_u"), calls(report, "compute_v"), calls(report, "get_inv_cov")) == (1, 1, 1)
    assert kept.keys() == inverses.keys()
    assert all(near(kept[key], value) for key, value in inverses.items())
    assert near(found[0], wanted[0])
    assert near(found[1], wanted[1])


@pytest.mark.parametrize("track", ["in", "out", "both"])
def test_states_are_read_by_passes_that_end_there(
    track: str, load: Callable[[str], Any], accelerated: Any
) -> None:
    model, tokenizer, hparams = prepared(load, "llama")
    tools = load("models.rome.repr_tools")
    blocks: list[int] = []

    def read() -> Any:
        words = ["France", "Miles Davis"]
        contexts = ["The capital of {} is a town", "{} plays"]
        template = hparams.rewrite_module_tmp
        return tools.get_reprs_at_word_tokens(model, tokenizer, contexts, words, 1, template, "last", track)

    wanted = read()
    report = accelerated()
    last = model.model.layers[2]
    last.forward = lambda *args, **kwargs: blocks.append(2)  # what is above is not run
    try:
        found = read()
    finally:
        del last.forward
    assert calls(report, "get_reprs_at_idxs") == 1
    assert not blocks
    for ours, theirs in zip(found, wanted, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-5)


def test_states_read_elsewhere_go_to_the_original(load: Callable[[str], Any], accelerated: Any) -> None:
    model, tokenizer, _ = prepared(load, "llama")
    tools = load("models.rome.repr_tools")
    report = accelerated()
    for idxs, name in (([[2]], "model.norm"), ([[-1]], "model.layers.{}")):
        tools.get_reprs_at_idxs(model, tokenizer, ["The capital of France"], idxs, 1, name, "out")
    (reasons,) = report.fell_back.values()
    assert list(reasons) == ["model.norm is not in a block of this model", *list(reasons)[1:]]
    assert "count from the end" in list(reasons)[1]


def test_what_is_not_covered_goes_to_the_original(load: Callable[[str], Any], accelerated: Any) -> None:
    model, tokenizer, hparams = prepared(load, "llama")
    main = load("models.memit.memit_main")
    hparams.v_loss_layer = 1
    report = accelerated()
    assert main.execute_memit(model, tokenizer, REQUESTS[:1], hparams)
    (reason,) = report.fell_back["easyeditor.models.memit.memit_main:execute_memit"]
    assert "v_loss_layer 1 is not the last block" in reason
    tokenizer.padding_side = "left"
    try:
        main.compute_ks(model, tokenizer, REQUESTS[1:2], hparams, 0, [["{}"]])
    finally:
        tokenizer.padding_side = "right"
    assert "left" in str(report.fell_back["easyeditor.models.memit.compute_ks:compute_ks"])


# ---- WISE, GRACE, UltraEdit -----------------------------------------------------------------------------


def wise_tokens(tokenizer: Any) -> dict[str, Tensor]:
    """Two rows of a fact and one of another text, padded on the left, with labels on the target."""
    side, tokenizer.padding_side = tokenizer.padding_side, "left"
    rows = tokenizer(
        ["The capital of France is Lyon", "You know. The capital of France is Lyon", "Miles lives in Rome."],
        padding=True,
        return_tensors="pt",
    )
    tokenizer.padding_side = side
    labels = rows["input_ids"].clone()
    labels[:, :-2] = -100
    return {"input_ids": rows["input_ids"], "attention_mask": rows["attention_mask"], "labels": labels}


def wise_config(family: str) -> SimpleNamespace:
    return SimpleNamespace(
        model_name=family,
        hidden_act="gelu",
        mask_ratio=0.3,
        edit_lr=0.5,
        n_iter=5,
        norm_constraint=1.0,
        alpha=1.0,
        beta=4.0,
        gamma=2.0,
        act_ratio=0.5,
        save_freq=1,
        merge_freq=3,
        retrieve=True,
        replay=False,
    )


@pytest.mark.parametrize(
    ("family", "layer"),
    [("llama", "model.layers.1.mlp.down_proj"), ("gpt2", "transformer.h.1.mlp.c_fc")],
)
def test_wise_learns_the_same_memories(
    family: str, layer: str, load: Callable[[str], Any], accelerated: Any
) -> None:
    module, tokens = load("models.wise.WISE"), wise_tokens(tiny_tokenizer())

    def run() -> Any:
        np.random.seed(3)
        module.edit_history, module.merge_group_edit_history = [], []
        wise = module.WISE(wise_config(family), tiny_model(family), layer)
        for _ in range(2):
            wise.edit(wise.config, tokens, act_mask=[None], deact_mask=[None])
        memories = list(wise.get_adapter_layer().memory_weight)
        wise.edit(wise.config, tokens, act_mask=[None], deact_mask=[None])  # ends with a merge
        return wise.get_adapter_layer(), memories

    wanted, wanted_memories = run()
    report = accelerated()
    found, memories = run()
    assert calls(report, "WISE.edit") == 3
    assert calls(report, "WISEAdapter.generate_activation_mask") == 3
    assert calls(report, "GTA.execute") == 1
    assert (len(module.merge_group_edit_history), len(module.edit_history)) == (1, 0)
    base = wanted.original_layer.weight
    for ours, theirs in zip(
        memories, wanted_memories, strict=True
    ):  # a merge trims entries that differ by rounding
        assert near(ours - base, theirs - base)
    assert torch.equal(found.weight_mask.long(), wanted.weight_mask)
    assert found.acts == pytest.approx(wanted.acts, rel=1e-3)
    assert (found.editing_total_cnt, found.editing, found.training) == (3, False, False)


def test_wise_falls_back_on_replay(load: Callable[[str], Any], accelerated: Any) -> None:
    module, tokens = load("models.wise.WISE"), wise_tokens(tiny_tokenizer())
    report = accelerated()
    config = wise_config("llama")
    config.replay, config.merge_freq = True, 1
    wise = module.WISE(config, tiny_model("llama"), "model.layers.1.mlp.down_proj")
    for _ in range(2):
        wise.edit(config, tokens, act_mask=[None], deact_mask=[None])
    assert report.fell_back["easyeditor.models.wise.WISE:WISE.edit"] == {"replay of merged memories": 1}


@pytest.mark.parametrize(
    ("family", "layer", "retrieve"),
    [
        ("llama", "model.layers.1.mlp.down_proj", True),
        ("llama", "model.layers.1.mlp.down_proj", False),
        ("gpt2", "transformer.h.1.mlp.c_fc", False),
    ],
)
def test_wise_routes_as_the_original(
    family: str, layer: str, retrieve: bool, load: Callable[[str], Any], accelerated: Any
) -> None:
    module, generator = load("models.wise.WISE"), torch.Generator().manual_seed(0)
    config = wise_config(family)
    config.retrieve = retrieve
    adapter = module.WISE(config, tiny_model(family), layer).get_adapter_layer()
    base = adapter.original_layer.weight

    def moved(size: float) -> Tensor:
        return base + size * torch.randn(base.shape, generator=generator)

    adapter.new_weight = torch.nn.Parameter(moved(0.1))
    adapter.layer.weight = torch.nn.Parameter(moved(0.1))
    if retrieve:
        adapter.memory_weight = [moved(0.05), moved(0.2), moved(0.1)]
        adapter.memory_mean_act = [module.EditingMeanAct(limit) for limit in (0.1, 9.0, 0.2)]
    width = base.shape[0] if family == "gpt2" else base.shape[1]
    inputs = [torch.randn(1, length, width, generator=generator) for length in (1, 5, 120)]
    inputs.append(torch.randn(2, 130, width, generator=generator))
    report, seen = accelerated(), set()
    for limit in (1e-3, 1.0, 4.0, 1e3):
        adapter.editing_mean_act = module.EditingMeanAct(limit)
        for given in inputs:
            wanted = module.WISEAdapter.forward.__wrapped__(adapter, given)
            found = adapter(given).detach()
            assert torch.equal(found, wanted)  # the same weight, and so the same bits
            seen.add(round(float((found - adapter.original_layer(given).detach()).norm() / given.norm()), 2))
    assert calls(report, "WISEAdapter.forward") == 4 * len(inputs)
    assert len(seen) > 2


def test_wise_routing_that_is_not_covered(load: Callable[[str], Any], accelerated: Any) -> None:
    module = load("models.wise.WISE")
    adapter = module.WISE(wise_config("llama"), tiny_model("llama"), "model.layers.1.mlp.down_proj")
    adapter = adapter.get_adapter_layer()
    report = accelerated()
    adapter.bfloat16()(torch.randn(1, 3, 64).bfloat16())
    (reason,) = report.fell_back["easyeditor.models.wise.WISE:WISEAdapter.forward"]
    assert "16 bits" in reason


def test_ties_merge(load: Callable[[str], Any], accelerated: Any) -> None:
    gta, generator = load("models.wise.merge.gta"), torch.Generator().manual_seed(0)
    base = torch.nn.Parameter(torch.randn(7, 9, generator=generator), requires_grad=False)
    tensors = [base + torch.randn(7, 9, generator=generator) for _ in range(3)]
    merge = gta.GTA("magnitude", "sum", normalize=True)
    wanted = merge.execute([0.2, 0.3, 0.5], base, tensors, 0.53)
    report = accelerated()
    torch.testing.assert_close(merge.execute([0.2, 0.3, 0.5], base, tensors, 0.53), wanted)
    assert calls(report, "GTA.execute") == 1


def test_other_merges_go_to_the_original(load: Callable[[str], Any], accelerated: Any) -> None:
    gta = load("models.wise.merge.gta")
    base, one = torch.zeros(4, 5), torch.arange(20.0).view(4, 5)
    report = accelerated()
    torch.testing.assert_close(gta.GTA("magnitude").execute([1.0], base, [one], 0.99), one)
    assert report.fell_back["easyeditor.models.wise.merge.gta:GTA.execute"]


def grace_config(**changes: Any) -> SimpleNamespace:
    settings = {"n_iter": 4, "edit_lr": 0.1, "eps": 0.5, "replacement": "replace_last", "val_init": "warm"}
    return SimpleNamespace(**{**settings, "val_train": "sgd", "eps_expand": "coverage", **changes})


def grace_rows(tokenizer: Any, *texts: str) -> list[dict[str, Tensor]]:
    """A batch of one for each text, with labels on its last two tokens."""
    rows = []
    for text in texts:
        ids = tokenizer(text, return_tensors="pt")
        labels = ids["input_ids"].clone()
        labels[:, :-2] = -100
        rows.append({**{key: ids[key] for key in ("input_ids", "attention_mask")}, "labels": labels})
    return rows


def test_grace_learns_the_same_values(load: Callable[[str], Any], accelerated: Any) -> None:
    module, tokenizer = load("models.grace.GRACE"), tiny_tokenizer()
    rows = grace_rows(tokenizer, "The capital of France is Lyon", "Tokyo is the capital of France")

    def run() -> Any:
        config = grace_config(eps=1e-3)
        grace = module.GRACE(config, tiny_model("llama"), "model.layers[1].mlp.down_proj")
        for number, tokens in enumerate(rows):
            grace.edit(config, tokens, number)
        return grace

    wanted = run()
    report = accelerated()
    found = run()
    assert calls(report, "GRACE.edit") == 2
    assert near(found.adapter.values.detach(), wanted.adapter.values.detach())
    assert near(found.adapter.keys, wanted.adapter.keys)
    np.testing.assert_allclose(found.losses, wanted.losses, rtol=1e-4)
    assert found.log_dict["nkeys"] == 2


@pytest.mark.parametrize("eps", [1e-3, 0.2, 5.0])  # keys of their own, radii that meet, one key for all
@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"replacement": "replace_all", "eps_expand": "moving_average"},
        {"val_init": "cold", "val_train": "adv"},
    ],
)
def test_grace_looks_up_as_the_original(
    changes: dict[str, str], eps: float, load: Callable[[str], Any], accelerated: Any
) -> None:
    module, tokenizer = load("models.grace.GRACE"), tiny_tokenizer()
    edits = grace_rows(
        tokenizer,
        "The capital of France is Lyon",
        "The capital of France is Rome",  # the same key with another label
        "Tokyo is the capital of France",
        "The capital of France is Lyon",
        "Miles lives in Rome",
    )
    asked = grace_rows(tokenizer, "The capital of France is", "Miles lives in", "Nobody knows the town of")

    def run() -> tuple[Any, list[Tensor], list[list[int]]]:
        torch.manual_seed(1)
        config = grace_config(eps=eps, **changes)
        grace = module.GRACE(config, tiny_model("llama"), "model.layers[1].mlp.down_proj")
        for number, tokens in enumerate(edits):
            grace.edit(config, tokens, number)
        answers, chosen = [], []
        for tokens in asked:
            grace.adapter.key_id = -1
            with torch.no_grad():
                answers.append(grace.model(**{**tokens, "labels": None}).logits)
            chosen.append(grace.adapter.chosen_key.tolist())
        return grace.adapter, answers, chosen

    wanted, wanted_answers, wanted_chosen = run()
    report = accelerated(training=False)
    found, answers, chosen = run()
    assert calls(report, "GRACEAdapter.forward") == 5 * 4 + 3
    assert chosen == wanted_chosen
    assert found.edit_ids == wanted.edit_ids
    torch.testing.assert_close(found.epsilons, wanted.epsilons, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(found.keys, wanted.keys, rtol=1e-4, atol=1e-5)
    for ours, theirs in zip(answers, wanted_answers, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-2, atol=1e-3)


def test_grace_look_up_that_is_not_covered(load: Callable[[str], Any], accelerated: Any) -> None:
    module = load("models.grace.GRACE")
    report = accelerated()
    model = tiny_model("llama").double()
    grace = module.GRACE(grace_config(), model, "model.layers[1].mlp.down_proj")
    grace.adapter(torch.randn(1, 3, 64, dtype=torch.float64))
    (reason,) = report.fell_back["easyeditor.models.grace.GRACE:GRACEAdapter.forward"]
    assert "float64" in reason


def test_ultraedit_shifts(load: Callable[[str], Any], accelerated: Any) -> None:
    module, model = load("models.ultraedit.ULTRAEDIT"), tiny_model("llama")
    config = SimpleNamespace(inner_params=["model.layers.1.mlp.down_proj"], lr=0.1, editor_batch_size=7)
    editor = module.ULTRAEDIT(model, config, {"(64, 32)": torch.nn.Tanh()})
    generator = torch.Generator().manual_seed(0)

    def rows(width: int) -> Tensor:
        return torch.randn(5, width, generator=generator)

    pairs = {0: {index: {"keys": rows(64), "values_grad": rows(32)} for index in range(2)}}
    (wanted,) = editor.predict_param_shifts(pairs).values()
    report = accelerated()
    (found,) = editor.predict_param_shifts(pairs).values()
    assert calls(report, "ULTRAEDIT.predict_param_shifts") == 1
    assert found.shape == (64, 32)
    assert near(found, wanted)


# ---- the patch ------------------------------------------------------------------------------------------


def test_restore_brings_every_object_back(load: Callable[[str], Any]) -> None:
    load("models.memit.memit_main")
    modules = {name: module for name, module in sys.modules.items() if name.startswith("easyeditor")}
    before = {name: dict(vars(module)) for name, module in modules.items()}
    methods = dict(vars(modules["easyeditor.models.wise.WISE"].WISE))
    with easyedit.accelerate() as report:
        main, table = modules["easyeditor.models.memit.memit_main"], modules["easyeditor.util.alg_dict"]
        assert main.execute_memit is not before["easyeditor.models.memit.memit_main"]["execute_memit"]
        assert table.ALG_DICT["MEMIT"] is main.execute_memit  # rebound in tables too
        assert modules["easyeditor.models.emmet.emmet_main"].compute_ks is main.compute_ks
        assert len(report.replaced) >= 10
    for name, module in modules.items():
        for key, value in before[name].items():
            assert vars(module)[key] is value, (name, key)
    assert all(
        vars(modules["easyeditor.models.wise.WISE"].WISE)[key] is value for key, value in methods.items()
    )
    assert table.ALG_DICT["MEMIT"] is main.execute_memit


def test_unknown_versions_are_left_alone_and_named(
    load: Callable[[str], Any], accelerated: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    known = dict(easyedit.KNOWN)
    known["easyeditor.models.memit.compute_z:compute_z"] = {"0" * 16: "another"}
    monkeypatch.setattr(easyedit, "KNOWN", known)
    original = load("models.memit.memit_main").execute_memit
    report = accelerated()
    assert load("models.memit.memit_main").execute_memit is original
    reason = report.skipped["easyeditor.models.memit.memit_main:execute_memit"]
    assert "unknown version of easyeditor.models.memit.compute_z:compute_z" in reason
    assert "easyeditor.models.rome.layer_stats:layer_stats" in report.skipped  # has no loader here
    assert "left alone" in str(report)


def test_another_package_of_that_name_is_left_alone(
    load: Callable[[str], Any], accelerated: Any, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    (tmp_path / "easyeditor" / "models" / "memit").mkdir(parents=True)
    for folder in ("", "models", "models/memit"):
        (tmp_path / "easyeditor" / folder / "__init__.py").write_text("")
    (tmp_path / "easyeditor" / "models" / "memit" / "memit_main.py").write_text(
        "def execute_memit():\n    return 1\n"
    )
    monkeypatch.syspath_prepend(str(tmp_path))
    report = accelerated()
    assert load("models.memit.memit_main").execute_memit() == 1
    assert not report.points


def test_launch_blocking_is_removed_unless_it_is_the_users(
    load: Callable[[str], Any], accelerated: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    report = accelerated()
    assert "CUDA_LAUNCH_BLOCKING" not in os.environ
    assert report.notes == ["CUDA_LAUNCH_BLOCKING, which EasyEdit sets, was removed"]
    report.restore()
    for name in [name for name in sys.modules if name.partition(".")[0] == "easyeditor"]:
        del sys.modules[name]
    monkeypatch.setenv("CUDA_LAUNCH_BLOCKING", "0")
    report = accelerated()
    assert os.environ["CUDA_LAUNCH_BLOCKING"] == "0"
    report.restore()
    report = accelerated()  # imported already
    assert "call accelerate() first" in report.notes[0]


def test_a_correction_that_there_is_none_of(load: Callable[[str], Any]) -> None:
    with pytest.raises(ValueError, match="there is no wings"):
        easyedit.accelerate(fix=["wings"])


def test_training_loops_are_replaced_on_request_only(load: Callable[[str], Any], accelerated: Any) -> None:
    load("models.wise.WISE"), load("models.grace.GRACE")
    report = accelerated(training=False)
    assert not any(name.endswith((":WISE.edit", ":GRACE.edit")) for name in report.points)
    assert any("training=True" in note for note in report.notes)
    report.restore()
    assert any(name.endswith(":WISE.edit") for name in accelerated().points)
