"""The examples do what they say, on the packaged model, and stand on ``fastedit.ops`` alone."""

from __future__ import annotations

import ast
import importlib.util
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from fastedit import demo

EXAMPLES = Path(__file__).parents[2] / "examples"
EDITOR = EXAMPLES / "closed_form_editor.py"
NEUTRAL = demo.MODEL_FOLDER.parent / "neutral.txt"
pytestmark = pytest.mark.skipif(not EXAMPLES.exists(), reason="not a source tree: no examples/")


@pytest.fixture(scope="module")
def example():
    spec = importlib.util.spec_from_file_location("closed_form_editor", EDITOR)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_the_editor_is_short_and_needs_the_operations_only():
    source = EDITOR.read_text()
    assert len(source.splitlines()) < 60
    imported = set()
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            imported |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            imported.add(node.module)
    assert imported == {"sys", "torch", "transformers", "fastedit.ops"}


def test_the_editor_edits(example):
    model, tokenizer = demo.load_demo_model()
    texts = [text for text in NEUTRAL.read_text(encoding="utf-8").split("\n") if text][:30]
    editor = example.ClosedFormEditor(model, tokenizer, texts)
    edits = demo.suggested_edits()[:3]
    others = [n["prompt"].format(n["subject"]) for e in edits for n in e["neighbours"]]
    before, weight = said(model, tokenizer, others), editor.projection.weight.clone()
    for batch in (edits[:2], edits[2:]):
        editor.edit([(e["prompt"], e["subject"], " " + e["target_new"]) for e in batch])
    assert torch.linalg.matrix_rank(editor.projection.weight - weight, rtol=1e-4) == 3
    answers = said(model, tokenizer, [e["prompt"].format(e["subject"]) for e in edits])
    assert answers == [e["target_new"] for e in edits]
    after = said(model, tokenizer, others)
    assert sum(a == b for a, b in zip(after, before, strict=True)) >= 0.9 * len(others)


def said(model, tokenizer, prompts):
    """What follows each prompt, up to the end of its sentence."""
    batch = tokenizer(prompts, return_tensors="pt", padding=True, padding_side="left")
    out = model.generate(**batch, max_new_tokens=3, do_sample=False)[:, batch.input_ids.shape[1] :]
    return [text.split(".")[0].strip() for text in tokenizer.batch_decode(out)]


@pytest.mark.slow
def test_the_editor_runs_as_a_program():
    arguments = [str(demo.MODEL_FOLDER), "The capital of {} is", "France", " Rome"]
    text = "\n".join(NEUTRAL.read_text(encoding="utf-8").split("\n")[:40])
    done = subprocess.run(
        [sys.executable, str(EDITOR), *arguments], input=text, capture_output=True, encoding="utf-8"
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith("The capital of France is Rome")
