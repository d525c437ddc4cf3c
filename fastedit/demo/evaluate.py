"""What the demo model knows and what it reads: greedy accuracies."""

from __future__ import annotations

import random
from collections.abc import Sequence
from typing import Any

import torch

from fastedit.demo import corpus


@torch.no_grad()
def greedy_matches(
    model: Any, tokenizer: Any, pairs: Sequence[tuple[str, str]], batch_size: int = 64
) -> list[bool]:
    """For each (prompt, answer), whether the greedy continuation of the prompt begins with the answer.

    Greedy decoding begins with the answer's tokens exactly when each of them is the most likely one given
    the prompt and the answer's tokens before it, so one forward pass decides.
    """
    encoded = []
    for prompt, answer in pairs:
        head = tokenizer(prompt, add_special_tokens=False)["input_ids"]
        tail = tokenizer(" " + answer, add_special_tokens=False)["input_ids"]
        encoded.append((list(head), list(tail)))
    device = model.get_input_embeddings().weight.device
    result = [False] * len(encoded)
    order = sorted(range(len(encoded)), key=lambda index: sum(map(len, encoded[index])))
    for start in range(0, len(order), batch_size):
        chosen = order[start : start + batch_size]
        width = max(sum(map(len, encoded[index])) for index in chosen)
        ids = torch.full((len(chosen), width), int(tokenizer.pad_token_id), dtype=torch.long)
        for row, index in enumerate(chosen):
            head, tail = encoded[index]
            ids[row, : len(head) + len(tail)] = torch.tensor(head + tail)
        # Padding stands behind the text, where causal attention never looks from.
        predicted = model(input_ids=ids.to(device), use_cache=False).logits.argmax(-1).cpu()
        for row, index in enumerate(chosen):
            head, tail = encoded[index]
            got = predicted[row, len(head) - 1 : len(head) + len(tail) - 1]
            result[index] = got.tolist() == tail
    return result


def evaluate_recall(
    model: Any, tokenizer: Any, *, sample: int | None = None, seed: int = 0
) -> dict[str, float]:
    """Greedy accuracy on the demo facts, each in every phrasing.

    Args:
        model: a causal language model.
        tokenizer: its tokenizer.
        sample: number of random fact and phrasing pairs; all without.
        seed: of the sample.

    Returns:
        ``accuracy`` over all pairs, and the accuracy of each relation under its name.
    """
    cases = [
        (relation.name, template.replace("{}", subject), obj)
        for relation in corpus.relations()
        for subject, obj in relation.facts
        for template in relation.templates
    ]
    if sample is not None and sample < len(cases):
        cases = random.Random(seed).sample(cases, sample)
    return _accuracies(model, tokenizer, cases)


def evaluate_in_context(model: Any, tokenizer: Any, *, sample: int = 300, seed: int = 0) -> dict[str, float]:
    """Greedy accuracy on facts that a context states, none of which training has shown.

    Args:
        model: a causal language model.
        tokenizer: its tokenizer.
        sample: number of probes.
        seed: of the probes.

    Returns:
        ``accuracy`` over all probes, and the accuracy by layout and by kind of fact.
    """
    probes = corpus.context_probes(sample, seed)
    matches = greedy_matches(model, tokenizer, [(probe.prompt, probe.answer) for probe in probes])
    groups: dict[str, list[bool]] = {}
    for probe, match in zip(probes, matches, strict=True):
        for name in ("accuracy", probe.layout, probe.kind):
            groups.setdefault(name, []).append(match)
    return {name: sum(values) / len(values) for name, values in groups.items()}


def _accuracies(model: Any, tokenizer: Any, cases: list[tuple[str, str, str]]) -> dict[str, float]:
    matches = greedy_matches(model, tokenizer, [(prompt, answer) for _, prompt, answer in cases])
    groups: dict[str, list[bool]] = {}
    for (name, _, _), match in zip(cases, matches, strict=True):
        groups.setdefault("accuracy", []).append(match)
        groups.setdefault(name, []).append(match)
    return {name: sum(values) / len(values) for name, values in groups.items()}
