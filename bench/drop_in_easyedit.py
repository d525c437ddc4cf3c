"""EasyEdit with and without fastedit, on the same requests, each side in a process of its own: time and weights.

    python bench/drop_in_easyedit.py --easyedit EasyEdit --model gpt2-xl --stats data/stats --requests facts.json \\
        --methods MEMIT AlphaEdit ROME WISE --n 10

EasyEdit must be importable by the interpreter that runs this (its own environment, with fastedit installed
beside it). Both sides run the same lines: an editor from hyper-parameters, then ``batch_edit`` or ``edit``,
which edits and scores. Seconds are of that call; ``edit`` is what EasyEdit reports for the edits alone. Given
are the statistics (``fastedit stats --format easyedit``) and the context templates, which EasyEdit would
sample. Compared are the changes of all weights, ‖ΔWa − ΔWb‖ / ‖ΔWa‖, and the scores after the edits. On a
GPU, run it with ``--unblocked`` too: the original then runs without the ``CUDA_LAUNCH_BLOCKING=1`` that
EasyEdit sets, whose part of the factor is not ours.
"""

from __future__ import annotations

import argparse
import csv
import datetime
import importlib
import importlib.util
import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

CONTEXTS = [
    "The thing. {}",
    "Therefore it is so. {}",
    "Because of this. {}",
    "I think about it. {}",
    "You know that. {}",
]
BATCHED = ("MEMIT", "EMMET", "AlphaEdit")
COLUMNS = (
    "method", "model", "facts", "batch", "original_s", "accelerated_s", "factor", "original_cpu_s",
    "accelerated_cpu_s", "cpu_factor", "original_edit_s",
    "accelerated_edit_s", "edit_factor", "weights_difference", "score_original", "score_accelerated", "replaced",
    "fell_back", "threads", "device", "date",
)  # fmt: skip


def main() -> None:
    """Compare the methods asked for, or run one side."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("--easyedit", type=Path, required=True, help="folder of the clone")
    add("--prelude", type=Path, help="a script run first, for what EasyEdit's imports need here")
    add("--model", required=True, help="folder; its name decides about EasyEdit's way to load it")
    add("--stats", type=Path, help="statistics in EasyEdit's format")
    add(
        "--requests",
        type=Path,
        required=True,
        help="JSON list with prompt, subject, target_new, ground_truth",
    )
    add("--methods", nargs="+", default=["MEMIT", "AlphaEdit", "ROME", "WISE"])
    add("--n", type=int, default=10, help="facts")
    add("--batch", type=int, default=10, help="facts in a batch, where the method has batches")
    add("--set", nargs="+", default=[], metavar="NAME=JSON", help="hyper-parameters")
    add("--device", default="cpu")
    add("--threads", type=int, default=1)
    add(
        "--unblocked",
        action="store_true",
        help="without CUDA_LAUNCH_BLOCKING on both sides, which matters on a GPU",
    )
    add("--save", type=Path, help="CSV file to add to; the table beside it is written anew")
    add("--side", choices=("original", "accelerated"), help="run one side only and write --out")
    add("--out", type=Path)
    args = parser.parse_args()
    if args.side:
        run_side(args, args.methods[0])
        return
    print("  ".join(COLUMNS))
    for method in args.methods:
        row = compare(args, method)
        print("  ".join(str(row[name]) for name in COLUMNS), flush=True)
        if args.save:
            save(row, args.save)


# ---- both sides -----------------------------------------------------------------------------------------


def compare(args: argparse.Namespace, method: str) -> dict[str, Any]:
    """One row: the two sides in new processes, one after the other."""
    import torch

    sides = {}
    with tempfile.TemporaryDirectory() as folder:
        for side in ("original", "accelerated"):
            out = Path(folder) / f"{side}.pt"
            command = [sys.executable, __file__, *sys.argv[1:], "--methods", method, "--side", side]
            command += ["--out", str(out)]
            done = subprocess.run(command, capture_output=True, text=True, cwd=folder)
            if not out.exists():
                raise SystemExit(f"{method}, {side}: {done.stdout[-1500:]}\n{done.stderr[-3000:]}")
            sides[side] = torch.load(out)
    ours, theirs = sides["accelerated"], sides["original"]
    return {
        "method": method,
        "model": Path(args.model).name,
        "facts": args.n,
        "batch": args.batch if method in BATCHED else 1,
        "original_s": round(theirs["seconds"], 3),
        "accelerated_s": round(ours["seconds"], 3),
        "factor": round(theirs["seconds"] / ours["seconds"], 2),
        "original_cpu_s": round(theirs["cpu_seconds"], 3),
        "accelerated_cpu_s": round(ours["cpu_seconds"], 3),
        "cpu_factor": round(theirs["cpu_seconds"] / ours["cpu_seconds"], 2),
        "original_edit_s": round(theirs["edit_seconds"], 3),
        "accelerated_edit_s": round(ours["edit_seconds"], 3),
        "edit_factor": round(theirs["edit_seconds"] / ours["edit_seconds"], 2),
        "weights_difference": difference(theirs["changes"], ours["changes"]),
        "score_original": theirs["score"],
        "score_accelerated": ours["score"],
        "replaced": sorted(name for name, entry in ours["report"]["replaced"].items() if entry["calls"]),
        "fell_back": ours["report"]["fell_back"],
        "threads": args.threads,
        "device": args.device,
        "date": datetime.date.today().isoformat(),
    }


def save(row: dict[str, Any], path: Path) -> None:
    """Add a row, in the place of one of the same method, model and facts, and write the table anew."""
    row = {
        name: value if isinstance(value, (str, int, float)) else json.dumps(value)
        for name, value in row.items()
    }
    rows = []
    if path.exists():
        with open(path, newline="", encoding="utf-8") as file:
            rows = list(csv.DictReader(file))
    same = ("method", "model", "facts", "batch", "threads")
    rows = [each for each in rows if any(each[name] != str(row[name]) for name in same)] + [row]
    with open(path, "w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, COLUMNS)
        writer.writeheader()
        writer.writerows(rows)
    shown = [name for name in COLUMNS if name not in ("replaced", "fell_back")]
    lines = [f"| {' | '.join(shown)} |", "|" + "---|" * len(shown)]
    lines += [f"| {' | '.join(str(each[name]) for name in shown)} |" for each in rows]
    path.with_suffix(".md").write_text("\n".join(lines) + "\n", encoding="utf-8")


def difference(theirs: dict[str, Any], ours: dict[str, Any]) -> float:
    """‖ΔWa − ΔWb‖ / ‖ΔWa‖ over all tensors together."""
    if theirs.keys() != ours.keys():
        raise SystemExit(f"other weights were changed: {sorted(theirs)} and {sorted(ours)}")
    apart = sum(float((theirs[name].double() - ours[name].double()).square().sum()) for name in theirs)
    size = sum(float(change.double().square().sum()) for change in theirs.values())
    return float(f"{(apart / size) ** 0.5:.3g}")


# ---- one side -------------------------------------------------------------------------------------------


def run_side(args: argparse.Namespace, method: str) -> None:
    """Edit as an EasyEdit user would; with acceleration that is one line more."""
    sys.path.insert(0, str(args.easyedit.resolve()))
    if args.prelude:
        load_prelude(args.prelude)
    import torch

    torch.set_num_threads(args.threads)
    report = None
    if args.side == "accelerated":
        from fastedit.integrations import easyedit

        report = easyedit.accelerate(training=True)
    import easyeditor

    if args.unblocked:
        os.environ.pop("CUDA_LAUNCH_BLOCKING", None)
    hparams = settings(easyeditor, args, method)
    fix_contexts(method)
    requests = json.loads(args.requests.read_text(encoding="utf-8"))[: args.n]
    editor = easyeditor.BaseEditor.from_hparams(hparams)
    model = editor.model
    before = {name: parameter.detach().clone() for name, parameter in model.named_parameters()}
    columns = {
        name: [each[name] for each in requests]
        for name in ("prompt", "target_new", "ground_truth", "subject")
    }
    given: dict[str, Any] = {"subject": columns["subject"], "sequential_edit": True, "verbose": False}
    if method == "WISE":
        given["loc_prompts"] = [each["locality_prompt"] for each in requests]
    run = editor.batch_edit if method in BATCHED else editor.edit
    start, start_cpu = time.perf_counter(), time.process_time()
    metrics, edited, _ = run(columns["prompt"], columns["target_new"], columns["ground_truth"], **given)
    seconds, cpu = time.perf_counter() - start, time.process_time() - start_cpu
    scores = [sum(each["post"]["rewrite_acc"]) / len(each["post"]["rewrite_acc"]) for each in metrics]
    times = [each["time"] for each in metrics if "time" in each] or [seconds]
    if method in BATCHED:
        times = times[:: args.batch]
    torch.save(
        {
            "seconds": seconds,
            "cpu_seconds": cpu,
            "edit_seconds": sum(times),
            "changes": changes(edited, before),
            "score": round(float(sum(scores)) / len(scores), 4),
            "report": report.as_dict() if report is not None else None,
            "blocking": os.environ.get("CUDA_LAUNCH_BLOCKING"),
        },
        args.out,
    )


def load_prelude(path: Path) -> None:
    """Run a script as a module that stays loaded."""
    spec = importlib.util.spec_from_file_location("prelude", path)
    assert spec is not None
    assert spec.loader is not None
    sys.modules["prelude"] = module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)


def changes(edited: Any, before: dict[str, Any]) -> dict[str, Any]:
    """Differences of the weights that changed, and all that an adapter of WISE or GRACE has learned."""
    model = edited.model if type(edited).__name__ in ("WISE", "GRACE") else edited
    found = {}
    for name, parameter in model.named_parameters():
        plain = name.replace(".layer.weight", ".weight")
        old = before.get(plain)
        if old is not None and old.shape == parameter.shape and not bool((parameter == old).all()):
            found[name] = parameter.detach() - old
    for name, module in model.named_modules():
        if type(module).__name__ == "WISEAdapter":
            found[f"{name}.new_weight"] = module.new_weight.detach() - module.original_layer.weight.detach()
            for number, memory in enumerate(module.memory_weight):
                found[f"{name}.memory.{number}"] = memory.detach() - module.original_layer.weight.detach()
        if type(module).__name__ == "GRACEAdapter":
            found[f"{name}.values"], found[f"{name}.keys"] = module.values.detach(), module.keys.detach()
    return found


def fix_contexts(method: str) -> None:
    """The same context templates on both sides, where EasyEdit would sample them."""
    places = {
        "MEMIT": "memit.memit_main",
        "EMMET": "emmet.emmet_main",
        "AlphaEdit": "alphaedit.AlphaEdit_main",
        "ROME": "rome.rome_main",
        "WISE": "wise.utils",
    }
    if method not in places:
        return
    module = importlib.import_module(f"easyeditor.models.{places[method]}")
    values: dict[str, Any] = {
        "ROME": ["{}", *CONTEXTS],
        "WISE": ["{}", *(context.replace(". {}", " {}") for context in CONTEXTS)],
    }
    module.CONTEXT_TEMPLATES_CACHE = values.get(method, [["{}"], CONTEXTS])  # type: ignore[attr-defined]


def settings(easyeditor: Any, args: argparse.Namespace, method: str) -> Any:
    """Hyper-parameters by EasyEdit's names, in published proportions, for GPT-2 and Llama layouts."""
    config = json.loads((Path(args.model) / "config.json").read_text(encoding="utf-8"))
    n_layers = config.get("n_layer") or config["num_hidden_layers"]
    gpt2 = config["model_type"] == "gpt2"
    block = "transformer.h.{}" if gpt2 else "model.layers.{}"
    last = max(2, int(0.27 * n_layers))
    values: dict[str, Any] = {
        "alg_name": method,
        "model_name": args.model,
        "device": args.device,
        "stats_dir": str(args.stats),
        "layers": list(range(max(0, last - 4), last + 1)),
        "layer_selection": "all",
        "fact_token": "subject_last",
        "v_num_grad_steps": 25,
        "v_lr": 0.5,
        "v_loss_layer": n_layers - 1,
        "v_weight_decay": 0.5,
        "clamp_norm_factor": 0.75,
        "kl_factor": 0.0625,
        "mom2_adjustment": True,
        "mom2_update_weight": 1000,
        "rewrite_module_tmp": block + (".mlp.c_proj" if gpt2 else ".mlp.down_proj"),
        "layer_module_tmp": block,
        "mlp_module_tmp": block + ".mlp",
        "attn_module_tmp": block + (".attn" if gpt2 else ".self_attn"),
        "ln_f_module": "transformer.ln_f" if gpt2 else "model.norm",
        "lm_head_module": "transformer.wte" if gpt2 else "model.embed_tokens",
        "mom2_dataset": "wikipedia",
        "mom2_n_samples": 100000,
        "mom2_dtype": "float32",
        "model_parallel": False,
    }
    if method in BATCHED:
        values["batch_size"] = args.batch
    name = f"{method}HyperParams"
    if method == "AlphaEdit":
        values |= {"nullspace_threshold": 2e-2, "L2": 10, "P_loc": "null_space_project.pt"}
    elif method == "EMMET":
        one = values["layers"][-1:]
        values |= {"layers": one, "mom2_update_weight": 1, "update_norm_lambda": 0, "emmet_lambda": 0.1}
    elif method == "ROME":
        dropped = ("layer_selection", "mom2_update_weight")
        values = {key: value for key, value in values.items() if key not in dropped}
        values |= {
            "layers": [max(1, int(0.35 * n_layers))],
            "clamp_norm_factor": 4,
            "context_template_length_params": [[5, 10], [10, 10]],
        }
    elif method == "WISE":
        layer = int(0.84 * n_layers)
        module = f"transformer.h[{layer}].mlp.c_fc" if gpt2 else f"model.layers[{layer}].mlp.down_proj"
        values = {
            "alg_name": "WISE",
            "model_name": args.model,
            "device": args.device,
            "mask_ratio": 0.2,
            "edit_lr": 1.0,
            "n_iter": 70,
            "norm_constraint": 1.0,
            "act_margin": [5.0, 20.0, 10.0],
            "act_ratio": 0.88,
            "save_freq": 5,
            "merge_freq": 10,
            "merge_alg": "ties",
            "objective_optimization": "only_label",
            "inner_params": [f"{module}.weight"],
            "densities": 0.53,
            "weights": 1.0,
            "retrieve": True,
            "replay": False,
            "model_parallel": False,
        }
    elif method == "GRACE":
        name = "GraceHyperParams"
        layer = int(0.73 * n_layers)
        module = f"transformer.h[{layer}].mlp.c_fc" if gpt2 else f"model.layers[{layer}].mlp.down_proj"
        values = {
            "alg_name": "GRACE",
            "model_name": args.model,
            "device": args.device,
            "inner_params": [f"{module}.weight"],
            "edit_lr": 1.0,
            "n_iter": 50,
            "eps": 1.0,
            "dist_fn": "euc",
            "val_init": "cold",
            "val_train": "sgd",
            "val_reg": None,
            "reg": "early_stop",
            "replacement": "replace_last",
            "eps_expand": "coverage",
            "num_pert": 8,
            "dropout": 0.0,
        }
    for setting in args.set:
        key, _, value = setting.partition("=")
        values[key] = json.loads(value)
    config_file = Path(tempfile.mkdtemp()) / "settings.yaml"
    config_file.write_text(json.dumps(values), encoding="utf-8")
    return getattr(easyeditor, name).from_hparams(str(config_file))


if __name__ == "__main__":
    main()
