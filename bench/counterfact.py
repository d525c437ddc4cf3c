"""Sequential editing of CounterFact records that a model knows: one table, before and after.

    python bench/counterfact.py --model MODEL_DIR --records records.json
    python bench/counterfact.py --model MODEL_DIR --records records.json --method rome --batch-size 1 --layers 0

Key statistics are collected from the records' own true sentences, then the records are edited in batches, never
undoing any, and all of them are scored at the end. Prints the table and writes it, with the settings and all
scores as JSON, to bench/results.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

import fastedit
from fastedit.data import load_records
from fastedit.evaluation import Evaluator, run_sequential
from fastedit.io import atomic_write_text
from fastedit.models.loading import load_model
from fastedit.stats import collect

RESULTS = Path(__file__).parent / "results"


def main() -> None:
    args = parse()
    model, tokenizer = load_model(args.model)
    records = load_records(args.records)
    layers = tuple(args.layers)
    texts = true_sentences(args.records)
    statistics = collect(model, tokenizer, texts, layers=list(layers), n_tokens=10**6)
    params = {"layers": layers, "clamp": args.clamp, "steps": args.steps}
    if args.method == "memit":
        params["covariance_weight"] = args.covariance_weight
    editor = fastedit.editor(args.method, model, tokenizer, params=params, statistics=statistics)
    chosen = records[: args.limit]
    evaluator = Evaluator(model, tokenizer, chosen)
    report = run_sequential(editor, chosen, args.batch_size, evaluator)
    settings = {
        "method": args.method,
        "params": vars(editor.params),
        "records": len(chosen),
        "batch_size": args.batch_size,
        "model": Path(args.model).name,
        "data": Path(args.records).name,
    }
    text = f"{json.dumps(settings)}\n\n{report.table()}\n"
    print(text)
    where = "-".join(str(layer) for layer in layers)
    stem = f"counterfact_{Path(args.model).name}_{args.method}_layers{where}"
    atomic_write_text(RESULTS / f"{stem}.txt", text)
    atomic_write_text(
        RESULTS / f"{stem}.json",
        json.dumps({"settings": settings, "report": report.as_dict()}, indent=1) + "\n",
    )


def true_sentences(path: str) -> list[str]:
    """What the model was trained on: each record's fact and its neighbour's, as sentences."""
    rows = json.loads(Path(path).read_text(encoding="utf-8"))
    pairs = (("prompt", "ground_truth"), ("locality_prompt", "locality_ground_truth"))
    return [f"{row[prompt]} {row[answer]}." for row in rows for prompt, answer in pairs]


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("--model", required=True, metavar="DIR", help="a causal language model")
    add("--records", required=True, metavar="FILE", help="flat CounterFact records that the model knows")
    add("--method", default="memit")
    add("--limit", type=int, default=100, metavar="N")
    add("--batch-size", type=int, default=10, metavar="N")
    add("--layers", type=int, nargs="+", default=[0])
    add("--clamp", type=float, default=1.5)
    add("--steps", type=int, default=25)
    add("--covariance-weight", type=float, default=100.0)
    return parser.parse_args()


if __name__ == "__main__":
    main()
