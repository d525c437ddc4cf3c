"""Research repositories: the stand-in's functions, which are plain, and ours behind them give the same numbers."""

import importlib
import json
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from model_configs import tiny_model, tiny_tokenizer
from tiny import bits, same_bits

from fastedit.integrations import research
from fastedit.integrations.key_cache import KeyCache
from fastedit.integrations.research import projector, statistics
from fastedit.integrations.sources import hashes_in
from fastedit.models import describe

STAND_INS = Path(__file__).parent / "stand_ins"
STAND_IN = STAND_INS / "research"
REQUESTS = [
    {"case_id": 4, "prompt": "The capital of {} is", "subject": "France", "target_new": {"str": "Lyon"}},
    {"case_id": 7, "prompt": "{} plays the", "subject": "Miles Davis", "target_new": {"str": " violin"}},
    {"case_id": 9, "prompt": "The tongue of {} is", "subject": "Danielle Darrieux", "target_new": {"str": "English"}},
]  # fmt: skip
PROJECTS = ("memit", "rome", "util", "AlphaEdit", "nse", "experiments", "dsets", "editor", "data", "nets")


def versions(folder):
    """The stand-in as the only known version; its statistics are laid out like AlphaEdit's."""
    known = {}
    for path in folder.rglob("*.py"):
        module = ".".join(path.relative_to(folder).with_suffix("").parts).removesuffix(".__init__")
        own = "jianghoucheng/AlphaEdit" if module == "rome.layer_stats" else "kmeng01/memit"
        for name, digest in hashes_in(path.read_text()).items():
            known[f"{module}:{name}"] = {digest: f"{own} 0000000"}
    return known


@pytest.fixture
def repository(tmp_path, monkeypatch):
    """Imports a module of the stand-in; its modules are forgotten afterwards."""
    yield from _importer(STAND_IN, tmp_path, monkeypatch)


@pytest.fixture
def ultra(tmp_path, monkeypatch):
    yield from _importer(STAND_INS / "ultraedit", tmp_path, monkeypatch)


def _importer(folder, tmp_path, monkeypatch):
    known = versions(folder)
    monkeypatch.setattr(research, "known_versions", lambda: known)
    monkeypatch.syspath_prepend(str(folder))
    projector._made.clear()

    def load(name):
        module = importlib.import_module(name)
        if hasattr(module, "STATS_DIR"):
            module.STATS_DIR = str(tmp_path / "stats")
        return module

    yield load
    for name in list(sys.modules):
        if name.partition(".")[0] in PROJECTS:
            del sys.modules[name]


def hparams(model, **changes):
    description = describe(model)
    settings = {
        "layers": [0, 1], "fact_token": "subject_last", "v_num_grad_steps": 6, "v_lr": 0.5, "clamp_norm_factor": 0.75,
        "v_weight_decay": 0.5, "kl_factor": 0.0625, "v_loss_layer": description.n_layers - 1,
        "rewrite_module_tmp": description.projection(0).name.replace(".0.", ".{}."),
        "layer_module_tmp": description.block_names[0].replace(".0", ".{}"),
        "ln_f_module": "model.norm" if hasattr(model, "model") else "transformer.ln_f",
        "lm_head_module": "lm_head", "mom2_dataset": "wikipedia", "mom2_n_samples": 30, "mom2_dtype": "float32",
        "mom2_update_weight": 5, "L2": 1, "nullspace_threshold": 0.07, "alpha": 1e-3, "upper_bound": 1e4,
        "max_iterations": 3, "neuron_threshold": 0.8,
        "model_name": "gpt2-xl" if description.projection(0).transposed else "Llama3-8B",
    }  # fmt: skip
    return SimpleNamespace(**{**settings, **changes})


def model_of(family):
    model = tiny_model(family)
    model.config._name_or_path = f"some/{family}"
    return model


def relative(a, b):
    return float((a.double() - b.double()).norm() / b.double().norm())


def changes(model, before):
    return {
        name: p.detach() - before[name]
        for name, p in model.named_parameters()
        if not torch.equal(p, before[name])
    }


def same_changes(ours, theirs):
    assert ours.keys() == theirs.keys()
    assert ours
    assert max(relative(ours[name], theirs[name]) for name in ours) < 1e-3


@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_memit_gives_the_same_factors_and_leaves_the_model(repository, tmp_path, family):
    main = repository("memit.memit_main")
    model = model_of(family)
    template = str(tmp_path / "layer_{}_clamp_{}_case_{}.npz")
    theirs = main.execute_memit(model, tiny_tokenizer(), REQUESTS, hparams(model), template)
    zs = [np.load(template.format(1, 0.75, each["case_id"]))["v_star"] for each in REQUESTS]
    before = bits(model)
    for path in tmp_path.glob("*.npz"):
        path.unlink()

    with research.accelerate() as report:
        ours = main.execute_memit(model, tiny_tokenizer(), REQUESTS, hparams(model), template)
        assert report.points["memit.memit_main:execute_memit"].calls == 1
        assert not report.fell_back
    assert same_bits(model, before)
    for name, pair in theirs.items():
        assert [(part.shape, part.dtype) for part in ours[name]] == [
            (part.shape, part.dtype) for part in pair
        ]
        assert relative(ours[name][1] @ ours[name][0].T, pair[1] @ pair[0].T) < 1e-3
    for each, z in zip(REQUESTS, zs, strict=True):
        mine = np.load(template.format(1, 0.75, each["case_id"]))["v_star"]
        assert np.linalg.norm(mine - z) / np.linalg.norm(z) < 1e-4


def test_values_on_file_are_read(repository, tmp_path):
    main = repository("memit.memit_main")
    model = model_of("llama")
    template = str(tmp_path / "layer_{}_clamp_{}_case_{}.npz")
    given = np.ones(32, dtype=np.float32)
    np.savez(template.format(1, 0.75, 7), v_star=given)
    theirs = main.execute_memit(model, tiny_tokenizer(), REQUESTS, hparams(model), template)
    with research.accelerate():
        ours = main.execute_memit(model, tiny_tokenizer(), REQUESTS, hparams(model), template)
    for name, pair in theirs.items():
        assert relative(ours[name][1] @ ours[name][0].T, pair[1] @ pair[0].T) < 1e-3


def projectors(model, settings):
    torch.manual_seed(3)
    stack = []
    for layer in settings.layers:
        d = describe(model).projection(layer).d_in
        Q = torch.linalg.qr(torch.randn(d, d // 4)).Q
        stack.append(torch.eye(d) - Q @ Q.T)
    return torch.stack(stack)


def run_sequence(apply, model, settings, **state):
    d = describe(model).projection(0).d_in
    cache_c = torch.zeros(len(settings.layers), d, d)
    for batch in (REQUESTS[:2], REQUESTS[2:]):
        _, cache_c = apply(model, tiny_tokenizer(), batch, settings, cache_c=cache_c, **state)
    return cache_c


@pytest.mark.parametrize("family", ["llama", "gpt2"])
@pytest.mark.parametrize("method", ["alphaedit", "nse"])
def test_batches_one_after_the_other_give_the_same_weights_and_cache(repository, method, family):
    module, name = {
        "alphaedit": ("AlphaEdit.AlphaEdit_main", "apply_AlphaEdit_to_model"),
        "nse": ("nse.nse_main", "apply_nse_to_model"),
    }[method]
    repository("memit.memit_main")
    main = repository(module)
    found = []
    for accelerated in (False, True):
        model = model_of(family)
        before = bits(model)
        settings = hparams(model)
        state = {"P": projectors(model, settings)} if method == "alphaedit" else {}
        if accelerated:
            report = research.accelerate()
        cache_c = run_sequence(getattr(main, name), model, settings, **state)
        found.append((changes(model, before), cache_c))
    assert report.points[f"{module}:{name}"].calls == 2
    assert not report.fell_back
    report.restore()
    same_changes(found[1][0], found[0][0])
    assert isinstance(found[1][1], KeyCache)
    assert isinstance(found[1][1], torch.Tensor)
    assert relative(found[1][1] + 0, found[0][1]) < 1e-3
    # the original goes on with what ours gave back
    getattr(main, name)(model, tiny_tokenizer(), REQUESTS[:1], settings, cache_c=found[1][1], **state)


@pytest.mark.parametrize("given", ["somebody's", "changed"])
def test_a_key_cache_that_is_not_ours_goes_to_the_original(repository, given):
    repository("memit.memit_main")
    main = repository("AlphaEdit.AlphaEdit_main")
    model = model_of("llama")
    settings = hparams(model)
    P = projectors(model, settings)
    with research.accelerate() as report:
        cache_c = torch.zeros(2, 64, 64)
        if given == "changed":
            _, cache_c = main.apply_AlphaEdit_to_model(
                model, tiny_tokenizer(), REQUESTS[:1], settings, cache_c=cache_c, P=P
            )
        cache_c[0] += torch.eye(64)
        main.apply_AlphaEdit_to_model(model, tiny_tokenizer(), REQUESTS[1:], settings, cache_c=cache_c, P=P)
    (reason,) = report.fell_back["AlphaEdit.AlphaEdit_main:apply_AlphaEdit_to_model"]
    assert ("changed" if given == "changed" else "not known one by one") in reason


def test_a_matrix_that_is_no_projector_goes_to_the_original(repository):
    repository("memit.memit_main")
    main = repository("AlphaEdit.AlphaEdit_main")
    model = model_of("llama")
    settings = hparams(model)
    with research.accelerate() as report:
        run_sequence(main.apply_AlphaEdit_to_model, model, settings, P=0.5 * torch.eye(64).repeat(2, 1, 1))
    reasons = report.fell_back["AlphaEdit.AlphaEdit_main:apply_AlphaEdit_to_model"]
    assert any("no orthogonal projector" in reason for reason in reasons)


@pytest.mark.parametrize("cause", ["padding", "hook", "loss layer", "training", "layers"])
def test_what_is_not_covered_is_left_to_the_original(repository, cause):
    main = repository("memit.memit_main")
    model, tokenizer = model_of("llama"), tiny_tokenizer()
    settings = hparams(model)
    if cause == "padding":
        tokenizer.padding_side = "left"
    elif cause == "loss layer":
        settings.v_loss_layer = 1
    elif cause == "layers":
        settings.layers = [1, 0]
    elif cause == "training":
        model.train()
    theirs = main.execute_memit(model, tokenizer, REQUESTS[:1], settings)
    if cause == "hook":
        model.model.layers[0].register_forward_hook(lambda *args: None)
    with research.accelerate() as report:
        ours = main.execute_memit(model, tokenizer, REQUESTS[:1], settings)
    assert report.points["memit.memit_main:execute_memit"].fell_back.total() == 1
    for name, pair in theirs.items():
        assert relative(ours[name][1], pair[1]) < 1e-6


def test_pieces_by_themselves(repository):
    z, ks = repository("memit.compute_z"), repository("memit.compute_ks")
    main = repository("memit.memit_main")
    model = model_of("llama")
    contexts = main.get_context_templates(model, None)
    arguments = (model, tiny_tokenizer(), REQUESTS[0], hparams(model), 1, contexts)
    several = (model, tiny_tokenizer(), REQUESTS, hparams(model), 1, contexts)
    theirs = z.compute_z(*arguments).detach(), ks.compute_ks(*several)
    with research.accelerate() as report:
        ours = z.compute_z(*arguments), ks.compute_ks(*several)
        assert report.points["memit.compute_z:compute_z"].calls == 1
        assert report.points["memit.compute_ks:compute_ks"].calls == 1
    assert relative(ours[0], theirs[0]) < 1e-4
    assert relative(ours[1], theirs[1]) < 1e-5


def test_rome_left_vector_and_the_inverse_of_the_statistics(repository):
    rome = repository("rome.compute_u")
    model = model_of("llama")
    settings = hparams(model, mom2_adjustment=True)
    arguments = (model, tiny_tokenizer(), REQUESTS[0], settings, 1, ["{}", "The thing. {}"])
    theirs, inverses = rome.compute_u(*arguments), dict(rome.inv_mom2_cache)
    rome.inv_mom2_cache.clear()
    with research.accelerate() as report:
        ours = rome.compute_u(*arguments)
        assert report.points["rome.compute_u:compute_u"].calls == 1
        assert report.points["rome.compute_u:get_inv_cov"].calls == 1
        assert not report.fell_back
    assert relative(ours, theirs) < 1e-3
    assert rome.inv_mom2_cache.keys() == inverses.keys()
    for key, inverse in inverses.items():
        assert relative(rome.inv_mom2_cache[key], inverse) < 1e-3


def test_states_are_read_by_passes_that_end_there(repository):
    tools = repository("rome.repr_tools")
    model = model_of("gpt2")
    arguments = (
        model,
        tiny_tokenizer(),
        ["The capital of {} is"],
        ["France"],
        1,
        "transformer.h.{}.mlp",
        "last",
        "both",
    )
    theirs = tools.get_reprs_at_word_tokens(*arguments)
    with research.accelerate() as report:
        ours = tools.get_reprs_at_word_tokens(*arguments)
        assert report.points["rome.repr_tools:get_reprs_at_idxs"].calls == 1
    for mine, other in zip(ours, theirs, strict=True):
        assert relative(mine, other) < 1e-5


def test_the_targets_of_a_data_set_are_made_ahead(repository, monkeypatch):
    z, main = repository("memit.compute_z"), repository("memit.memit_main")
    data = repository("dsets.counterfact")
    model, tokenizer = model_of("llama"), tiny_tokenizer()
    settings, contexts = hparams(model), main.get_context_templates(model, None)
    records = [{"case_id": i, "requested_rewrite": {**REQUESTS[i % 3], "case_id": i}} for i in range(9)]

    def targets():
        found = []
        for record in data.CounterFactDataset(records):
            request = {"case_id": record["case_id"], **record["requested_rewrite"]}
            found.append(z.compute_z(model, tokenizer, request, settings, 1, contexts).detach())
        return torch.stack(found)

    theirs = targets()
    from fastedit.integrations.research import memit

    sizes = []
    optimised = memit.optimised
    monkeypatch.setattr(memit, "optimised", lambda *args: (sizes.append(len(args[1])), optimised(*args))[1])
    with research.accelerate():
        assert relative(targets(), theirs) < 1e-4
        assert sizes == [1, 8]
        with torch.no_grad():  # a write to the model makes what was made ahead worthless
            next(iter(model.parameters())).mul_(1.1)
        sizes.clear()
        changed = targets()
        assert sizes == [1, 8]
    assert relative(changed, theirs) > 1e-3


def test_statistics_of_all_layers_come_from_one_pass(repository, tmp_path):
    main, stats = repository("memit.memit_main"), repository("rome.layer_stats")
    model = model_of("llama")
    settings = hparams(model)
    names = [settings.rewrite_module_tmp.format(layer) for layer in (0, 1)]

    def covariance(name, folder):
        main.STATS_DIR = str(tmp_path / folder)
        return main.get_cov(model, tiny_tokenizer(), name, "wikipedia", 30, "float32")

    theirs = [covariance(name, "theirs") for name in names]
    main.COV_CACHE.clear()
    stats.PASSES.clear()
    with research.accelerate() as report, statistics.expecting(model, names):
        ours = [covariance(name, "ours") for name in names]
        assert report.points["rome.layer_stats:layer_stats"].calls == 2
    assert not stats.PASSES  # the original only read files
    for a, b in zip(ours, theirs, strict=True):
        assert relative(a, b) < 1e-5
    files = {path.name for path in (tmp_path / "ours").rglob("*.npz")}
    assert files == {path.name for path in (tmp_path / "theirs").rglob("*.npz")}
    for path in (tmp_path / "ours").rglob("*.npz"):
        with np.load(path) as mine, np.load(next((tmp_path / "theirs").rglob(path.name))) as other:
            assert set(mine.files) == set(other.files)
            assert int(mine["mom2.count"]) == int(other["mom2.count"])
            assert mine["mom2.mom2"].dtype == other["mom2.mom2"].dtype


@pytest.mark.parametrize("removed", [True, False])
def test_projectors_are_found_again_from_their_matrix(removed):
    torch.manual_seed(0)
    Q = torch.linalg.qr(torch.randn(40, 12, dtype=torch.float64)).Q
    P = torch.eye(40, dtype=torch.float64) - Q @ Q.T if removed else Q @ Q.T
    found = projector.recalled_projector("some.layer", P.float(), torch.device("cpu"))
    assert found.removed is removed
    assert found.vectors.shape == (40, 12)
    assert relative(projector.dense(found), P) < 1e-5


def test_the_originals_come_back(repository):
    names = ("memit.memit_main", "memit.compute_z", "nse.nse_main", "rome.layer_stats")
    modules = [repository(name) for name in names]
    before = [dict(vars(module)) for module in modules]
    report = research.accelerate()
    assert modules[0].execute_memit is not before[0]["execute_memit"]
    assert modules[2].compute_z is modules[1].compute_z is not before[1]["compute_z"]
    report.restore()
    for module, names in zip(modules, before, strict=True):
        assert all(vars(module)[name] is value for name, value in names.items())


def test_what_is_printed_with_verbose(repository, capsys):
    main = repository("memit.memit_main")
    model = model_of("llama")
    with research.accelerate(verbose=True):
        main.execute_memit(model, tiny_tokenizer(), REQUESTS, hparams(model))
    out = capsys.readouterr().out
    assert out.count("loss ") == 3
    assert out.count("z error ") == out.count("upd norm ") == 2
    with research.accelerate():
        main.execute_memit(model, tiny_tokenizer(), REQUESTS, hparams(model))
    assert capsys.readouterr().out == ""


def test_templates_are_kept_by_model_if_that_is_asked_for(repository):
    main = repository("memit.memit_main")
    first, second = model_of("llama"), model_of("gpt2")
    with research.accelerate(fix=["template_not_keyed"]):
        kept = main.get_context_templates(first, None)
        assert main.get_context_templates(first, None) is kept
        assert main.get_context_templates(second, None) is not kept


def test_an_unknown_correction_is_refused():
    with pytest.raises(ValueError, match="there is no nonsense; there are memit_seq_cache"):
        research.accelerate(fix=["nonsense"])


def turn(folder, model, names, n_edits=5, size=2):
    """Files of one turn as the cache of UltraEdit leaves them, and the configuration."""
    from nets import RunningMeanStd

    torch.manual_seed(1)
    config = SimpleNamespace(
        num_seq=1,
        model=SimpleNamespace(name="m", edit_modules=names),
        dataset=SimpleNamespace(name="zsre", n_edits=n_edits, batch_size=size),
        editor=SimpleNamespace(name="ultraedit", cache_dir=str(folder), lr=1e-3),
    )
    place = folder / f"m_zsre_ultraedit_{n_edits}_1"
    place.mkdir()
    normalisers = {}
    for number, name in enumerate(names):
        d_out, d_in = model.get_submodule(name).weight.shape
        normaliser = normalisers.setdefault(str((d_in, d_out)), RunningMeanStd(d_in + d_out))
        for i in range(-(-n_edits // size)):
            keys, gradients = torch.randn(4, d_in), torch.randn(4, d_out)
            normaliser.update(torch.cat((keys, gradients), 1))
            torch.save(keys, place / f"{number}_{i}_keys.pth")
            torch.save(gradients, place / f"{number}_{i}_values_grad.pth")
    return config, normalisers


def test_ultraedit_gives_the_same_shifts(ultra, tmp_path):
    main = ultra("editor.ultraedit")
    model = tiny_model("llama")
    names = ["model.layers.0.mlp.down_proj", "model.layers.1.mlp.up_proj"]
    config, normalisers = turn(tmp_path, model, names)
    editor = main.ULTRAEDIT(config, model)
    editor.lifelong_normalizer = normalisers
    theirs = editor.predict_param_shifts()
    with research.accelerate() as report:
        ours = editor.predict_param_shifts()
        assert report.points["editor.ultraedit:ULTRAEDIT.predict_param_shifts"].calls == 1
    with research.accelerate(fix=["ultra_floor_ceil"]):
        fixed = editor.predict_param_shifts()
    for name in names:
        assert ours[name].shape == theirs[name].shape
        assert relative(ours[name], theirs[name]) < 1e-4
        assert relative(fixed[name], theirs[name]) > 1e-2


def test_the_running_spread_of_one_row_is_finite_if_that_is_asked_for(ultra):
    nets = ultra("nets")
    rows = torch.randn(7, 3)
    with research.accelerate(fix=["running_var"]):
        one = nets.RunningMeanStd(3)
        for part in (rows[:1], rows[1:]):
            one.update(part)
    assert torch.allclose(one.std, rows.std(0), atol=1e-5)


# -- the runner -------------------------------------------------------------------------------------------


RUN = """
import importlib.util, json, sys
sys.path[:0] = {paths}
from fastedit.integrations import research, runner
research.known_versions = lambda: json.loads({known!r})
sys.path[:] = [folder for folder in sys.path if folder not in {paths}] + {tests}
runner.main([json.dumps(dict(fix=[], verbose=False, json=True, report={report!r})), "--", *{command}])
"""


@pytest.fixture
def script(tmp_path):
    """Runs the stand-in's script in another process; returns what it left, the report and the process."""
    model = tiny_model("llama")
    model.save_pretrained(tmp_path / "model")
    tiny_tokenizer().save_pretrained(tmp_path / "model")
    settings = vars(hparams(model, mom2_n_samples=30))
    package = str(Path(research.__file__).parents[3])

    def run(command, known=None):
        out, report = tmp_path / "out.pt", tmp_path / "report.json"
        arguments = [*command, str(out), str(tmp_path / "model"), json.dumps(settings)]
        if known is None:
            line = [sys.executable, *arguments]
        else:
            text = RUN.format(
                paths=[package],
                tests=[package],
                known=json.dumps(known),
                report=str(report),
                command=arguments,
            )
            line = [sys.executable, "-c", text]
        environment = {"PATH": "/usr/bin:/bin", "PYTHONDONTWRITEBYTECODE": "1", "OMP_NUM_THREADS": "1"}
        done = subprocess.run(
            line, cwd=tmp_path / "repository", env=environment, capture_output=True, text=True
        )
        assert done.returncode == 7, done.stderr
        assert done.stdout.endswith("done\n")
        return (
            torch.load(out, weights_only=True),
            json.loads(report.read_text()) if known is not None else None,
            done,
        )

    import shutil

    shutil.copytree(STAND_IN, tmp_path / "repository", ignore=shutil.ignore_patterns("__pycache__"))
    return run


@pytest.mark.slow
def test_a_script_runs_accelerated_and_unchanged(script):
    command = ["-m", "experiments.evaluate"]
    theirs, _, _ = script(command)
    ours, report, done = script(command, versions(STAND_IN))
    assert report["replaced"]["experiments.evaluate:get_project"]["calls"] == 2
    assert report["replaced"]["AlphaEdit.AlphaEdit_main:apply_AlphaEdit_to_model"]["calls"] == 1
    assert not report["fell_back"]
    assert json.loads(done.stderr[done.stderr.index("{\n") :]) == report
    assert ours["argv"] == theirs["argv"]
    assert 10 < theirs["P"][0].trace() < 60
    assert relative(ours["P"], theirs["P"]) < 1e-4
    assert relative(ours["cache_c"], theirs["cache_c"]) < 1e-3
    for name, weight in theirs["weights"].items():
        assert relative(ours["weights"][name], weight) < 1e-4
