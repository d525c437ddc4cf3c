"""Plain texts for perplexity, and the reference snippets of CounterFact."""

from __future__ import annotations

import os
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from .files import read_text, read_values


def load_texts(path: str | os.PathLike[str]) -> list[str]:
    """Read texts: a ``.txt`` file is one text; JSON may be a list of texts or of ``{"Text": ...}`` (ME-PPL).

    Raises:
        CorruptFile: the file is cut off or not JSON.
        ValueError: JSON that holds something else.
    """
    names = Path(path).name.lower()
    if not any(suffix in names for suffix in (".json", ".jsonl")):
        return [read_text(path)]
    values = read_values(path)
    texts = []
    for value in values if isinstance(values, list) else [values]:
        text = value if isinstance(value, str) else _text_field(value)
        if text is None:
            raise ValueError(f"{path} holds no texts: expected strings or a Text field, got {_shape(value)}")
        texts.append(text)
    return texts


def _text_field(value: Any) -> str | None:
    if isinstance(value, Mapping):
        for key in ("Text", "text"):
            if isinstance(value.get(key), str):
                return value[key]
    return None


def _shape(value: Any) -> str:
    return f"the fields {sorted(value)}" if isinstance(value, Mapping) else type(value).__name__


@dataclass(frozen=True)
class Snippets:
    """CounterFact's attribute snippets: texts about things that have an attribute.

    Attributes:
        texts: (relation id, target id) to the texts about things with that attribute.
        by_name: (relation id, target id, name of the thing) to the texts about that thing.
    """

    texts: dict[tuple[str, str], list[str]] = field(default_factory=dict)
    by_name: dict[tuple[str, str, str], list[str]] = field(default_factory=dict)

    @classmethod
    def from_values(cls, values: Iterable[Mapping[str, Any]]) -> Snippets:
        """Build from the list in ``attribute_snippets.json``."""
        snippets = cls()
        for entry in values:
            key = (str(entry["relation_id"]), str(entry["target_id"]))
            for sample in entry["samples"]:
                snippets.texts.setdefault(key, []).append(sample["text"])
                snippets.by_name.setdefault((*key, str(sample.get("name", ""))), []).append(sample["text"])
        return snippets


def load_snippets(path: str | os.PathLike[str]) -> Snippets:
    """Read ``attribute_snippets.json``: a list of {relation_id, target_id, samples [{name, text}]}.

    Raises:
        CorruptFile: the file is cut off or not JSON.
        ValueError: it holds something else.
    """
    values = read_values(path)
    try:
        return Snippets.from_values(values)
    except (KeyError, TypeError):
        raise ValueError(
            f"{path} holds no attribute snippets: expected a list of relation_id, target_id, samples"
        ) from None
