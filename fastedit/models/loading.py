"""Loading models and tokenizers from folders or the Hugging Face hub, with errors that say what is wrong."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import Any

from ..errors import FasteditError

DTYPES = ("auto", "float32", "bfloat16", "float16", "float64")


def load_model(name: str, dtype: str = "auto", device: str = "auto") -> tuple[Any, Any]:
    """Load a model, in evaluation mode and with the memories in its folder, and its tokenizer.

    Args:
        name: a folder or a name on the Hugging Face hub.
        dtype: one of ``DTYPES``.
        device: ``"auto"`` (a GPU if there is one), ``"map"`` (accelerate's device map), or a torch device.

    Raises:
        FasteditError: there is no such model, or it cannot be loaded; says why.
    """
    import torch
    import transformers

    version = tuple(int(part) for part in transformers.__version__.split(".")[:2])
    wanted = dtype if dtype == "auto" else getattr(torch, dtype)
    options: dict[str, Any] = {"dtype" if version >= (4, 56) else "torch_dtype": wanted}
    if device == "map":
        options["device_map"] = "auto"
    if Path(name).is_dir() and not (Path(name) / "config.json").exists():
        raise FasteditError(f"{name} holds no config.json: it is not the folder of a model")
    transformers.utils.logging.disable_progress_bar()
    try:
        tokenizer = load_tokenizer(name)
        model: Any = transformers.AutoModelForCausalLM.from_pretrained(name, **options)
    except (OSError, ValueError, ImportError) as error:
        raise FasteditError(f"cannot load the model {name}: {error}") from error
    if device != "map":
        automatic = "cuda" if torch.cuda.is_available() else "cpu"
        model.to(automatic if device == "auto" else device)
    if Path(name).is_dir():
        from ..memory.directory import attach_saved

        attach_saved(model, name)
    return model.eval(), tokenizer


def first_tokenizer(places: Iterable[str | None]) -> Any:
    """The tokenizer in the first of some folders that holds one; None if none does. Empty names are left out."""
    for place in places:
        if place and Path(place).is_dir():
            try:
                return load_tokenizer(place)
            except (OSError, ValueError):
                continue
    return None


def load_tokenizer(name: str) -> Any:
    """Load a model's tokenizer; one that was saved by a newer transformers is read from its tokenizer.json.

    Raises:
        OSError, ValueError: there is none, or it cannot be read.
    """
    import transformers

    try:
        return transformers.AutoTokenizer.from_pretrained(name)
    except ValueError:
        # Older versions do not know the class name that version 5 writes for the same file.
        if not (Path(name) / "tokenizer.json").exists():
            raise
        return transformers.PreTrainedTokenizerFast.from_pretrained(name)


def model_folder(name: str) -> Path:
    """The folder with a model's files: the one given, or where the hub's copy is kept.

    Raises:
        FasteditError: it is neither a folder nor in the local cache.
    """
    if Path(name).is_dir():
        return Path(name)
    from transformers.utils import cached_file

    try:
        found = cached_file(name, "config.json")
    except OSError as error:
        raise FasteditError(f"the files of {name} are not on this machine: {error}") from error
    return Path(str(found)).parent
