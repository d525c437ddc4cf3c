"""Lets repositories that are written for a GPU and for older libraries run on a processor; for both sides alike.

What it changes, and nothing else:

1. Devices. ``Tensor.cuda``, ``Module.cuda``, ``.to("cuda")`` and the factory functions with ``device="cuda"`` stay on
   the processor.
2. transformers. Slicing a ``BatchEncoding`` gives its encodings, as when these repositories were written; a config
   has ``n_embd`` and ``n_positions`` under whatever names its family has for them; blocks that are called with their
   hidden states by keyword get them by position, where the repositories' hooks look for them.
3. Modules that the repositories import and a run of their editing functions does not need (``datasets``, ``wandb``,
   ``nltk``, ...) are empty if they are not installed.
4. ``load_dataset`` gives the lines of a text file.
"""

from __future__ import annotations

import functools
import sys
import types
from collections.abc import Callable
from importlib.machinery import ModuleSpec
from pathlib import Path
from typing import Any

import torch

_FACTORIES = ("arange", "empty", "eye", "full", "ones", "tensor", "zeros")
_NOT_NEEDED = (
    "datasets", "higher", "hydra", "ipdb", "matplotlib", "matplotlib.style", "nltk", "sklearn", "sklearn.cluster",
    "sklearn.feature_extraction", "sklearn.feature_extraction.text", "sklearn.metrics", "wandb",
)  # fmt: skip


def install() -> None:
    """Make the changes, once and before anything of a repository is imported."""
    torch.Tensor.cuda = lambda self, *args, **kwargs: self  # type: ignore[method-assign, assignment]
    torch.nn.Module.cuda = lambda self, *args, **kwargs: self  # type: ignore[method-assign, assignment]
    for owner, name in (
        (torch.Tensor, "to"),
        (torch.nn.Module, "to"),
        *((torch, name) for name in _FACTORIES),
    ):
        setattr(owner, name, _on_processor(getattr(owner, name)))
    import transformers

    for name in _NOT_NEEDED:
        try:
            __import__(name)
        except ImportError:
            sys.modules[name] = _empty(name)
    _old_encodings()
    _positional_hidden_states(transformers)


def old_names(config: Any) -> None:
    """``n_embd`` and ``n_positions``, which the first repositories read from every config."""
    if not hasattr(config, "n_embd"):
        config.n_embd = config.hidden_size
    if not hasattr(config, "n_positions"):
        config.n_positions = config.max_position_embeddings


def texts_from(path: Path) -> Callable[..., dict[str, list[dict[str, str]]]]:
    """A ``load_dataset`` that gives the lines of a file, whatever it is asked for."""
    lines = [{"text": line} for line in path.read_text().splitlines() if line.strip()]
    return lambda *args, **kwargs: {"train": lines}


def _is_cuda(device: Any) -> bool:
    return str(device).startswith("cuda") if isinstance(device, (str, torch.device)) else False


def _on_processor(original: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(original)
    def call(*args: Any, **kwargs: Any) -> Any:
        args = tuple("cpu" if _is_cuda(each) else each for each in args)
        if _is_cuda(kwargs.get("device")):
            kwargs["device"] = "cpu"
        return original(*args, **kwargs)

    return call


class _Empty(types.ModuleType):
    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        return lambda *args, **kwargs: None


def _empty(name: str) -> types.ModuleType:
    module = _Empty(name)
    module.__spec__ = ModuleSpec(name, None)
    module.__path__ = []
    return module


def _old_encodings() -> None:
    from transformers.tokenization_utils_base import BatchEncoding

    original = BatchEncoding.__getitem__

    def item(self: Any, key: Any) -> Any:
        return self.encodings[key] if isinstance(key, slice) else original(self, key)

    BatchEncoding.__getitem__ = item  # type: ignore[method-assign]


def _positional_hidden_states(transformers: Any) -> None:
    from transformers.models.gptj.modeling_gptj import GPTJBlock

    def call(self: Any, *args: Any, hidden_states: Any = None, **kwargs: Any) -> Any:
        first = () if hidden_states is None else (hidden_states,)
        return torch.nn.Module.__call__(self, *first, *args, **kwargs)

    GPTJBlock.__call__ = call
