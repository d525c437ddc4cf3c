"""One side of ``drop_in.py``: a repository's own functions on some facts, with fastedit behind them or without.

Runs in the repository's environment; nothing of fastedit is imported unless ``accelerate`` is asked for.
Usage: ``python drop_in_worker.py JOB.json``; writes the job's ``out`` (torch.save).
"""

from __future__ import annotations

import ast
import contextlib
import importlib
import inspect
import io
import json
import os
import sys
import tempfile
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import torch

sys.path = [folder for folder in sys.path if folder]  # the working directory changes
sys.path.append(str(Path(__file__).resolve().parent))
import drop_in_shim  # noqa: E402

METHODS = {  # module, hyper-parameter module and class, apply function
    "memit": ("memit.memit_main", "memit.memit_hparams", "MEMITHyperParams", "apply_memit_to_model"),
    "memit-rect": ("memit.memit_rect_main", "memit.memit_hparams", "MEMITHyperParams", "apply_memit_rect_to_model"),
    "alphaedit": ("AlphaEdit.AlphaEdit_main", "AlphaEdit.AlphaEdit_hparams", "AlphaEditHyperParams",
                  "apply_AlphaEdit_to_model"),
    "nse": ("nse.nse_main", "nse.nse_hparams", "NSEHyperParams", "apply_nse_to_model"),
    "emmet": ("emmet.emmet_main", "emmet.emmet_hparams", "EMMETHyperParams", "apply_emmet_to_model"),
    "rome": ("rome.rome_main", "rome.rome_hparams", "ROMEHyperParams", "apply_rome_to_model"),
}  # fmt: skip


class Side:
    """The model, the timer and what is kept for the comparison."""

    def __init__(self, job: dict[str, Any]) -> None:
        from transformers import AutoModelForCausalLM, AutoTokenizer

        self.job = job
        self.model = AutoModelForCausalLM.from_pretrained(job["model"]).eval()
        self.model.config._name_or_path = Path(job["model"]).name
        drop_in_shim.old_names(self.model.config)
        self.tok = AutoTokenizer.from_pretrained(job["model"])
        self.tok.padding_side, self.tok.pad_token = "right", self.tok.eos_token
        self.kept: dict[str, Any] = {"seconds": {}, "weights": [], "zs": []}
        self.requests = [
            [
                {
                    **{k: fact[k] for k in ("case_id", "prompt", "subject")},
                    "target_new": {"str": fact["target_new"]},
                }
                for fact in batch
            ]
            for batch in job["batches"]
        ]

    @contextlib.contextmanager
    def timed(self, name: str) -> Any:
        """Add the time spent here to a stage, with the output held back."""
        log = io.StringIO()
        with contextlib.redirect_stdout(log), contextlib.redirect_stderr(io.StringIO()):
            wall, processor = time.perf_counter(), time.process_time()
            yield
            taken = time.perf_counter() - wall, time.process_time() - processor
        so_far = self.kept["seconds"].get(name, (0.0, 0.0))
        self.kept["seconds"][name] = so_far[0] + taken[0], so_far[1] + taken[1]

    def keep_weights(self, names: Any) -> None:
        parameters = dict(self.model.named_parameters())
        self.kept["weights"].append({name: parameters[name].detach().clone() for name in names})


def main() -> None:
    job = json.loads(Path(sys.argv[1]).read_text())
    torch.set_num_threads(job["threads"])
    drop_in_shim.install()
    os.chdir(job["repository"])
    sys.path.insert(0, job["repository"])
    report = None
    if job["accelerate"]:
        start = time.perf_counter()
        from fastedit.integrations import research

        report = research.accelerate(verbose=False)
        importing = time.perf_counter() - start
    side = Side(job)
    RUNS.get(job["method"], edit)(side)
    if report is not None:
        side.kept["importing"] = importing
        side.kept["report"] = report.as_dict()
    side.kept["versions"] = {
        "torch": torch.__version__,
        "transformers": importlib.import_module("transformers").__version__,
    }
    torch.save(side.kept, job["out"])


def edit(side: Side) -> None:
    """All batches, one after the other, as the repository's evaluation script has them."""
    job, method = side.job, side.job["method"]
    module, hparams_module, hparams_class, apply_name = METHODS[method]
    main = importlib.import_module(module)
    hparams = _hparams(getattr(importlib.import_module(hparams_module), hparams_class), job)
    contexts = job["contexts"]
    main.CONTEXT_TEMPLATES_CACHE = list(contexts) if method == "rome" else [contexts[:1], contexts[1:]]
    _statistics_from(Path(job["stats_dir"]))
    names = [f"{hparams.rewrite_module_tmp.format(layer)}.weight" for layer in hparams.layers]
    side.keep_weights(names)
    state: dict[str, Any] = {}
    weight = dict(side.model.named_parameters())[names[0]]
    width = weight.shape[0] if hparams.__dict__.get("model_name") == "gpt2-xl" else weight.shape[1]
    if method in ("alphaedit", "nse"):
        state["cache_c"] = torch.zeros((len(hparams.layers), width, width))
    if method == "alphaedit":
        project = _get_project(job["repository"], main)
        with side.timed("projector"):
            state["P"] = torch.stack(
                [project(side.model, side.tok, layer, hparams) for layer in hparams.layers]
            )
    with tempfile.TemporaryDirectory() as folder:
        cached = f"{folder}/layer_{{}}_clamp_{{}}_case_{{}}.npz"
        if method != "rome":  # one file for each target: that is how they are read off
            state["cache_template"] = cached
        if method == "nse":
            with side.timed("targets"):
                _targets_first(side, main, hparams, cached)
        apply = getattr(main, apply_name)
        for batch in side.requests:
            with side.timed("editing"):
                answer = apply(side.model, side.tok, batch, hparams, **state)
            if "cache_c" in state:
                state["cache_c"] = answer[1]
            side.keep_weights(names)
            if method != "rome":
                files = [
                    cached.format(hparams.layers[-1], hparams.clamp_norm_factor, x["case_id"]) for x in batch
                ]
                side.kept["zs"].append(np.stack([np.load(file)["v_star"] for file in files]))
    if "cache_c" in state:
        side.kept["cache_c"] = state["cache_c"].cpu().clone()


def _targets_first(side: Side, main: Any, hparams: Any, cached: str) -> None:
    """As the evaluation script of NSE: every target of the data set before the first edit, one at a time."""
    compute_z = importlib.import_module("memit.compute_z").compute_z
    layer = hparams.layers[-1]
    with tempfile.TemporaryDirectory() as folder:
        requests = [each for batch in side.requests for each in batch]
        records = [
            {
                "case_id": each["case_id"],
                "requested_rewrite": {
                    "prompt": each["prompt"],
                    "subject": each["subject"],
                    "target_new": {"str": " " + each["target_new"]["str"].strip()},
                },
            }
            for each in requests
        ]
        (Path(folder) / "counterfact.json").write_text(json.dumps(records))
        for record in importlib.import_module("dsets.counterfact").CounterFactDataset(folder):
            request = {"case_id": record["case_id"], **record["requested_rewrite"]}
            z = compute_z(side.model, side.tok, request, hparams, layer, main.CONTEXT_TEMPLATES_CACHE)
            file = cached.format(layer, hparams.clamp_norm_factor, record["case_id"])
            np.savez(file, v_star=z.detach().cpu().numpy())


def statistics(side: Side) -> None:
    """``layer_stats`` of all layers over a text file, into an empty folder."""
    job = side.job
    main = importlib.import_module(METHODS[job["like"]][0])
    importlib.import_module("rome.layer_stats").load_dataset = drop_in_shim.texts_from(Path(job["texts"]))
    hparams = _hparams(None, job)
    with tempfile.TemporaryDirectory() as folder:
        _statistics_from(Path(folder))
        with side.timed("statistics"):
            expecting = contextlib.nullcontext()
            if job["accelerate"]:  # what every execute function does
                from fastedit.integrations.research.statistics import expecting as expect

                expecting = expect(
                    side.model, [hparams.rewrite_module_tmp.format(layer) for layer in hparams.layers]
                )
            with expecting:
                found = {
                    layer: main.get_cov(
                        side.model,
                        side.tok,
                        hparams.rewrite_module_tmp.format(layer),
                        "wikipedia",
                        hparams.mom2_n_samples,
                        "float32",
                    )
                    for layer in hparams.layers
                }
        first = {name: found[name][0] if isinstance(found[name], tuple) else found[name] for name in found}
        side.kept["weights"] = [
            {str(n): torch.zeros_like(c) for n, c in first.items()},
            {str(n): c for n, c in first.items()},
        ]


def ultraedit(side: Side) -> None:
    """The three lines of ``sequential_valid`` for each turn."""
    from omegaconf import OmegaConf

    job = side.job
    data, base = importlib.import_module("data.zsre"), importlib.import_module("data.base")
    ultra = importlib.import_module("editor.ultraedit")
    with tempfile.TemporaryDirectory() as folder:
        rows = [
            {"src": fact["prompt"].format(fact["subject"]), "rephrase": fact["prompt"].format(fact["subject"]),
             "ans": fact["target_new"].strip(), "loc": "The sky is", "loc_ans": "blue"}
            for batch in job["batches"] for fact in batch
        ]  # fmt: skip
        path = Path(folder) / "facts.json"
        path.write_text(json.dumps(rows))
        n = len(job["batches"][0])
        config = OmegaConf.create(
            {
                "num_seq": len(job["batches"]), "model_device": "cpu", "editor_device": "cpu", "model_cache": False,
                "dataset": {"name": "zsre", "n_edits": n, "batch_size": min(5, n), "valid_path": str(path),
                            "num_seq": len(job["batches"])},
                "model": {"name_or_path": job["model"], "name": "model", "class_name": "AutoModelForCausalLM",
                          "edit_modules": job["edit_modules"], "half": False},
                "editor": {"name": "ultraedit", "lr": 1e-4, "batch_size": 128, "token": "ans", "cache_dir": folder},
            }
        )  # fmt: skip
        names = {f"{name}.weight" for name in job["edit_modules"]}
        for name, parameter in side.model.named_parameters():
            parameter.requires_grad = name in names
        _, loader = base.make_loader(config, data.ZSREDataset)
        editor = ultra.ULTRAEDIT(config, side.model)
        side.keep_weights(names)
        for turn in list(loader)[: len(job["batches"])]:
            with side.timed("gradients"):
                editor.cache(turn["edit_tuples"])
            with side.timed("solve"):
                shifts = editor.predict_param_shifts()
            with side.timed("apply"):
                editor.edit_model(shifts, False)
            side.keep_weights(names)


RUNS = {"statistics": statistics, "ultraedit": ultraedit}


def _hparams(cls: Any, job: dict[str, Any]) -> Any:
    """The repository's own class, with the fields that it has."""
    values = {**job["hparams"], "stats_dir": job["stats_dir"]}
    if cls is None:
        return SimpleNamespace(**values)
    fields = inspect.signature(cls).parameters
    made = cls(**{name: value for name, value in values.items() if name in fields})
    made.stats_dir = values[
        "stats_dir"
    ]  # the ROME of some repositories reads it and its class has no such field
    return made


def _statistics_from(folder: Path) -> None:
    """Point every module of the repository to the statistics."""
    for module in list(sys.modules.values()):
        if vars(module).get("STATS_DIR") is not None:
            module.STATS_DIR = folder  # type: ignore[attr-defined]


def _get_project(repository: str, main: Any) -> Any:
    """``get_project`` of the evaluation script, whose other imports are not needed here."""
    path = Path(repository) / "experiments" / "evaluate.py"
    tree = ast.parse(path.read_text())
    function = next(x for x in tree.body if isinstance(x, ast.FunctionDef) and x.name == "get_project")
    module = type(sys)("experiments.evaluate")
    module.__file__ = str(path)
    module.__dict__.update(torch=torch, get_cov=main.get_cov)
    exec(compile(ast.Module([function], []), str(path), "exec"), module.__dict__)
    sys.modules["experiments.evaluate"] = module
    if "fastedit" in sys.modules:
        from fastedit.integrations.patching import meet

        meet(module)
    return module.get_project  # type: ignore[attr-defined]


if __name__ == "__main__":
    main()
