"""A research repository with fastedit behind it and without: the same requests, in separate processes.

    python bench/drop_in.py REPOSITORY METHOD --model FOLDER --python ENV/bin/python --facts FILE -n 10

Compares targets and changes of weights, and the time of each stage. Both sides run in the repository's
environment under ``drop_in_shim.py``, with the same context templates and statistics files. Rows are added to
``results/drop_in_<device>.csv`` and ``.md`` (``--out``). All rows of ``TABLE`` in one command, where CLONES
is the folder that holds the clones ``memit``, ``AlphaEdit`` and ``NSE``:

    python bench/drop_in.py CLONES table --model FOLDER --python ENV/bin/python --facts FILE --stats FOLDER \\
        --texts FILE -n 10 --threads 2 --out bench/results/drop_in_cpu.csv

The stage "whole" is, for MEMIT, the call that edits; for AlphaEdit the projectors too; for NSE the targets
too, which its script makes before the first edit. These repositories do not set ``CUDA_LAUNCH_BLOCKING``, and
on a processor it means nothing: there is one baseline.
"""

from __future__ import annotations

import argparse
import csv
import datetime
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import torch

import fastedit
from fastedit.models.describe import ModelDescription, describe

RESULTS = Path(__file__).resolve().parent / "results"
CONTEXTS = [
    "{}", "The thing. {}", "Therefore it is so. {}", "Because of this. {}", "I think about it. {}",
    "You know that. {}",
]  # fmt: skip
COLUMNS = (
    "repository", "method", "model", "facts", "batches", "stage", "original_s", "fastedit_s", "factor",
    "factor_of_cpu_time", "dw_max", "z_max", "replaced", "fell_back", "threads", "device", "versions", "date", "note",
)  # fmt: skip


TABLE = (("memit", "memit"), ("AlphaEdit", "alphaedit"), ("NSE", "nse"), ("memit", "statistics"))


def main() -> None:
    args = _arguments()
    if args.method != "table":
        measure(args)
        return
    for name, method in TABLE:
        chosen = {"repository": str(Path(args.repository) / name), "method": method}
        if method == "statistics":
            chosen |= {"facts": None, "n": 0}
        measure(argparse.Namespace(**{**vars(args), **chosen}))


def measure(args: argparse.Namespace) -> None:
    """Both sides of one method, one after the other; prints and saves its rows."""
    model = Path(args.model).resolve()
    description, head = _describe(model)
    job = {
        "repository": str(Path(args.repository).resolve()),
        "method": args.method,
        "like": args.like,
        "model": str(model),
        "batches": _facts(args),
        "hparams": {
            **_hparams(description, args.method, _layers(description, args), head),
            **json.loads(args.set),
        },
        "contexts": CONTEXTS,
        "stats_dir": str(Path(args.stats).resolve()) if args.stats else "",
        "texts": str(Path(args.texts).resolve()) if args.texts else "",
        "edit_modules": [description.projection(layer).name for layer in _layers(description, args)],
        "threads": args.threads,
    }
    with tempfile.TemporaryDirectory() as folder:
        sides = [_run(job, args.python, accelerate, Path(folder)) for accelerate in (False, True)]
    rows = _compare(args, job, *sides)
    _print(rows, sides[1]["report"])
    if args.out:
        _save(rows, args.out)


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("repository", help="folder of the cloned repository; for a table, the folder of the clones")
    add("method", help="memit, memit-rect, alphaedit, nse, emmet, rome, ultraedit or statistics; or table")
    add("--model", required=True, help="folder of a model that the repository's environment can load")
    add("--python", default=sys.executable, help="interpreter of the repository's environment")
    add("--facts", help="JSON list with prompt, subject, target_new and case_id, or CounterFact-like records")
    add("-n", type=int, default=10, help="facts in a batch")
    add("--batches", type=int, default=1)
    add("--layers", type=lambda text: [int(part) for part in text.split(",")], help="default: by depth")
    add("--stats", help="folder with the repository's statistics files")
    add("--texts", help="text file for 'statistics', one text a line")
    add("--like", default="memit", help="method whose statistics are collected")
    add("--set", default="{}", help="hyper-parameters, as JSON")
    add("--threads", type=int, default=1)
    add("--out", type=Path, help="CSV file to add to; the table beside it is written anew")
    add("--note", default="")
    return parser.parse_args()


def _describe(folder: Path) -> tuple[ModelDescription, str]:
    """The model's description, and the name of the module that its files keep the output head's weight under."""
    from transformers import AutoConfig, AutoModelForCausalLM

    config = AutoConfig.from_pretrained(folder)
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config)
    description = describe(model)
    holder = description.embeddings if config.tie_word_embeddings else description.head
    return description, next(name for name, module in model.named_modules() if module is holder)


def _facts(args: argparse.Namespace) -> list[list[dict[str, Any]]]:
    if not args.facts:
        return [[]]
    facts = []
    for number, row in enumerate(json.loads(Path(args.facts).read_text())):
        row = row.get("requested_rewrite", row)
        target = row["target_new"]["str"] if isinstance(row["target_new"], dict) else row["target_new"]
        prompt, subject = row["prompt"], row["subject"]
        if "{}" not in prompt:
            prompt = prompt.replace(subject, "{}", 1)
        if prompt.count("{}") == 1:
            facts.append({"prompt": prompt, "subject": subject, "target_new": target, "case_id": number})
    return [facts[start * args.n : (start + 1) * args.n] for start in range(args.batches)]


def _layers(description: ModelDescription, args: argparse.Namespace) -> list[int]:
    """Those asked for, or three a quarter of the way up; five for statistics, as published settings edit."""
    first = description.n_layers // 4
    return args.layers or list(range(first, first + (5 if args.method == "statistics" else 3)))


def _hparams(description: ModelDescription, method: str, layers: list[int], head: str) -> dict[str, Any]:
    """The published names, with the published values where they do not go by the model."""
    if method in ("rome", "emmet"):
        layers = layers[-1:]
    block = description.block_names[0].rpartition(".")[0] + ".{}"
    mlp = description.output_path.rpartition(".")[0]
    norm = next(name for name in ("transformer.ln_f", "model.norm") if name.startswith(block.split(".")[0]))
    return {
        "layers": layers, "layer_selection": "all", "fact_token": "subject_last", "v_num_grad_steps": 25,
        "v_lr": 0.5, "v_loss_layer": description.n_layers - 1, "v_weight_decay": 0.5, "kl_factor": 0.0625,
        "clamp_norm_factor": 4 if method == "rome" else 0.75, "mom2_adjustment": True, "mom2_update_weight": 100,
        "rewrite_module_tmp": f"{block}.{description.output_path}", "layer_module_tmp": block,
        "mlp_module_tmp": f"{block}.{mlp}", "attn_module_tmp": f"{block}.attn", "ln_f_module": norm,
        "lm_head_module": head, "mom2_dataset": "wikipedia", "mom2_n_samples": 100000, "mom2_dtype": "float32",
        "context_template_length_params": [[5, 10], [10, 10]], "nullspace_threshold": 2e-2, "L2": 10,
        "model_name": "gpt2-xl" if description.projection(0).transposed else "Llama3-8B",
        "alpha": 0.2, "upper_bound": 1e4, "max_iterations": 3, "neuron_threshold": 0.8,
        "calculate_objective_value": False, "update_norm_lambda": 0, "emmet_lambda": 0.1, "bias_update": False,
        "dynamic": False, "dynamic_multiplier": 1,
    }  # fmt: skip


def _run(job: dict[str, Any], python: str, accelerate: bool, folder: Path) -> dict[str, Any]:
    out, path = folder / f"{accelerate}.pt", folder / f"{accelerate}.json"
    path.write_text(json.dumps({**job, "accelerate": accelerate, "out": str(out)}))
    environment = {**os.environ, "OMP_NUM_THREADS": str(job["threads"]), "HF_HUB_OFFLINE": "1"}
    environment.pop("PYTHONPATH", None)
    if accelerate:
        environment["PYTHONPATH"] = str(Path(fastedit.__file__).resolve().parents[1])
    worker = Path(__file__).resolve().parent / "drop_in_worker.py"
    subprocess.run([python, "-P", "-W", "ignore", str(worker), str(path)], check=True, env=environment)
    return torch.load(out, weights_only=False)


def _compare(
    args: argparse.Namespace, job: dict[str, Any], original: dict[str, Any], ours: dict[str, Any]
) -> list[dict[str, Any]]:
    change = _largest_difference(original["weights"], ours["weights"])
    z = None
    if original["zs"]:
        z = max(
            float((torch.from_numpy(b - a).norm(dim=1) / torch.from_numpy(a).norm(dim=1)).max())
            for a, b in zip(original["zs"], ours["zs"], strict=True)
        )
    fell = {name: entry["reasons"] for name, entry in ours["report"]["fell_back"].items()}
    used = [name for name, entry in ours["report"]["replaced"].items() if entry["calls"]]
    stages = list(original["seconds"])
    rows = []
    for stage in [*stages, "whole"] if len(stages) > 1 else stages:
        chosen = stages if stage == "whole" else [stage]
        (theirs, their_cpu), (own, own_cpu) = (
            [sum(side["seconds"][name][kind] for name in chosen) for kind in (0, 1)]
            for side in (original, ours)
        )
        values = (
            Path(job["repository"]).name, args.method, Path(job["model"]).name, args.n, args.batches, stage,
            round(theirs, 3), round(own, 3), round(theirs / own, 1), round(their_cpu / own_cpu, 1), f"{change:.1e}",
            "" if z is None else f"{z:.1e}", " ".join(used), json.dumps(fell) if fell else "", args.threads, "cpu",
            " ".join(f"{k} {v}" for k, v in ours["versions"].items()),
            datetime.date.today().isoformat(), args.note,
        )  # fmt: skip
        rows.append(dict(zip(COLUMNS, values, strict=True)))
    return rows


def _largest_difference(original: list[dict[str, Any]], ours: list[dict[str, Any]]) -> float:
    """Max over weights and batches of ‖ΔW_a − ΔW_b‖ / ‖ΔW_a‖, Δ since the start."""
    worst = 0.0
    for a, b in zip(original[1:], ours[1:], strict=True):
        for name, start in original[0].items():
            wanted = (a[name] - start).double()
            worst = max(worst, float((b[name].double() - a[name].double()).norm() / wanted.norm()))
    return worst


def _print(rows: list[dict[str, Any]], report: dict[str, Any]) -> None:
    for row in rows:
        print(", ".join(f"{name} {row[name]}" for name in COLUMNS[:12]), flush=True)
    for name, reason in report["skipped"].items():
        print("left alone:", name, reason)
    for name, entry in report["fell_back"].items():
        print("fell back:", name, entry)


def _save(rows: list[dict[str, Any]], path: Path) -> None:
    old = []
    if path.exists():
        with open(path, newline="") as file:
            old = list(csv.DictReader(file))
    key = ("repository", "method", "model", "facts", "batches", "threads")
    new = {tuple(str(row[name]) for name in key) for row in rows}
    kept = [row for row in old if tuple(row[name] for name in key) not in new]
    with open(path, "w", newline="") as file:
        writer = csv.DictWriter(file, COLUMNS)
        writer.writeheader()
        writer.writerows([*kept, *rows])
    shown = COLUMNS[:12]
    table = [f"| {' | '.join(shown)} |", "|" + "---|" * len(shown)]
    table += [f"| {' | '.join(str(row[name]) for name in shown)} |" for row in [*kept, *rows]]
    path.with_suffix(".md").write_text("\n".join(table) + "\n")


if __name__ == "__main__":
    main()
