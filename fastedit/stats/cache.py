"""Statistics that are there when needed: from the cache, or collected now and kept."""

from __future__ import annotations

import hashlib
import json
import logging
import os
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

from ..errors import BaseMismatch, CorruptFile
from ..models import describe, fingerprint, tokenizer_digest
from .collect import collect
from .distributed import joined
from .statistics import Statistics, layer_file, load_directory, read_header, save_directory
from .texts import hash_texts

logger = logging.getLogger(__name__)


def cache_directory(cache_dir: str | os.PathLike[str] | None = None) -> Path:
    """``cache_dir``, else the environment variable ``FASTEDIT_CACHE``, else ``~/.cache/fastedit``."""
    return Path(cache_dir or os.environ.get("FASTEDIT_CACHE") or Path.home() / ".cache" / "fastedit")


def ensure(
    model: Any,
    tokenizer: Any,
    layers: Iterable[int],
    *,
    texts: Iterable[str] | None = None,
    cache_dir: str | os.PathLike[str] | None = None,
    n_tokens: int | None = None,
    progress: bool | None = None,
    **settings: Any,
) -> dict[int, Statistics]:
    """Return statistics of ``layers``, from the cache if it has them, else collected and cached.

    The cache is laid out as ``<cache>/stats/<model>/<texts and settings>/layer_005.safetensors``, the model
    by its fingerprint. With no ``texts``, the cached statistics of this model over the most tokens serve,
    from whatever texts, if the packaged neutral text could not give more; else that text is used.

    Args:
        model: the model, before any edit.
        tokenizer: its tokenizer.
        layers: numbers of the blocks.
        texts: texts to collect from; read into memory.
        cache_dir: see :func:`cache_directory`.
        n_tokens: tokens to use; by default ten times the width of the keys. If the texts hold fewer, all of
            them are used, none twice.
        progress: True shows a bar, False hides it, None shows it on a terminal.
        settings: further arguments of :func:`collect`.
    """
    wanted = sorted(set(layers))
    with joined() as group:  # all processes look before one of them writes
        listed = neutral_texts() if texts is None else list(texts)
        if texts is None:
            enough = min(n_tokens or _default_tokens(model, wanted), _n_tokens(listed, tokenizer))
            found = _best_cached(model, wanted, enough, cache_dir)
            if found is not None:
                return found
        place = cache_place(model, tokenizer, listed, cache_dir=cache_dir, n_tokens=n_tokens, **settings)
        found = load_cached(place, wanted, model)
        if found is not None:
            logger.info("statistics of layers %s come from %s", wanted, place)
            return found
        logger.log(
            logging.WARNING if group.rank == 0 else logging.DEBUG,
            "no statistics of this model for layers %s in %s: collecting them now, once, from %s",
            wanted,
            place.parent,
            f"the packaged neutral text ({len(listed)} paragraphs)"
            if texts is None
            else f"the {len(listed)} texts given",
        )
        return collect_and_save(
            model,
            tokenizer,
            listed,
            layers=wanted,
            directory=place,
            n_tokens=n_tokens,
            progress=progress,
            **settings,
        )


def collect_and_save(
    model: Any,
    tokenizer: Any,
    texts: Iterable[str],
    *,
    layers: Sequence[int],
    directory: str | os.PathLike[str],
    save: Callable[[dict[int, Statistics], Path], object] = save_directory,
    resume: bool = True,
    **settings: Any,
) -> dict[int, Statistics]:
    """Collect, write to ``directory``, and go on from where an earlier call was interrupted.

    Args:
        model: as for :func:`collect`.
        tokenizer: likewise.
        texts: likewise.
        layers: likewise.
        directory: where the files go, and a hidden checkpoint until they are written.
        save: writes the statistics into a folder; called by the first process only.
        resume: use the checkpoint of an earlier call, if there is one.
        settings: further arguments of :func:`collect`.
    """
    directory = Path(directory)
    with joined() as group:
        checkpoint = directory / f".collecting_{'_'.join(map(str, layers))}.{group.rank}"
        if not resume:
            checkpoint.unlink(missing_ok=True)
        statistics = collect(model, tokenizer, texts, layers=layers, checkpoint=checkpoint, **settings)
        if group.rank == 0:
            save(statistics, directory)
        group.wait()
        checkpoint.unlink(missing_ok=True)
        return statistics


def cache_place(
    model: Any,
    tokenizer: Any,
    texts: Sequence[str],
    *,
    cache_dir: str | os.PathLike[str] | None = None,
    n_tokens: int | None = None,
    **settings: Any,
) -> Path:
    """The folder of the cache for statistics of this model, over these texts, with these settings."""
    choices = {name: str(value) for name, value in settings.items() if value is not None}
    parts = [hash_texts(texts), tokenizer_digest(tokenizer), n_tokens, choices]
    key = hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()[:24]
    return _model_folder(model, cache_dir) / key


def load_cached(place: Path, layers: Sequence[int], model: Any) -> dict[int, Statistics] | None:
    """The statistics in a folder; None if a layer is missing, or a file is damaged (which is said)."""
    if not all((place / layer_file(layer)).is_file() for layer in layers):
        return None
    try:
        return load_directory(place, model, layers)
    except (CorruptFile, BaseMismatch) as error:
        logger.warning("cached statistics cannot be used and are made again: %s", error)
        return None


def neutral_texts() -> list[str]:
    """The packaged neutral text, by paragraphs."""
    from ..demo import neutral_text

    text: Any = neutral_text()
    return [part for part in text.split("\n") if part.strip()] if isinstance(text, str) else list(text)


def neutral_sentences() -> list[str]:
    """Its sentences of 4 to 30 words: texts that no fact is about."""
    sentences = [s.strip() for text in neutral_texts() for s in text.replace("\n", " ").split(". ")]
    return [s.rstrip(".") + "." for s in sentences if 4 <= len(s.split()) <= 30]


def _model_folder(model: Any, cache_dir: str | os.PathLike[str] | None) -> Path:
    return cache_directory(cache_dir) / "stats" / fingerprint(model)


def _default_tokens(model: Any, layers: Sequence[int]) -> int:
    description = describe(model)
    return 10 * max(description.projection(layer).d_in for layer in layers)


def _n_tokens(texts: list[str], tokenizer: Any) -> int:
    return sum(map(len, tokenizer(texts, truncation=True, max_length=1024)["input_ids"]))


def _best_cached(
    model: Any, layers: Sequence[int], n_tokens: int, cache_dir: str | os.PathLike[str] | None
) -> dict[int, Statistics] | None:
    """Of all cached statistics of a model, those over the most tokens, if they are enough."""
    folders = sorted(_model_folder(model, cache_dir).glob("*"))
    counts = {place: _count(place, layers) for place in folders}
    for place in sorted(folders, key=lambda place: counts[place], reverse=True):
        if counts[place] < n_tokens:
            return None
        found = load_cached(place, layers, model)
        if found is not None:
            logger.info("statistics of layers %s over %d tokens come from %s", layers, counts[place], place)
            return found
    return None


def _count(place: Path, layers: Sequence[int]) -> int:
    """Number of tokens behind the statistics in a folder; 0 if it lacks a layer or cannot be read."""
    try:
        return min(read_header(place / layer_file(layer))["count"] for layer in layers)
    except (CorruptFile, FileNotFoundError):
        return 0
