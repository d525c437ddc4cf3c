"""fastedit: fast knowledge editing for causal language models.

>>> import fastedit
>>> editor = fastedit.editor("memit", model, tokenizer)                      # doctest: +SKIP
>>> edit = editor.edit([fastedit.Fact("The capital of {} is", "France", "Lyon")])  # doctest: +SKIP
>>> edit.revert()                                                            # doctest: +SKIP

Importing the package starts no CUDA context, compiles nothing, downloads nothing and does not import
transformers; subpackages load on first use.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

DISTRIBUTION = "fastedit-llm"  # what makes this package ours; see _identity.py

import torch as _torch  # noqa: E402, F401  first, so that its OpenMP runtime is the one in use

from ._version import __version__  # noqa: E402
from .errors import (  # noqa: E402
    BackendUnavailable,
    BaseMismatch,
    CorruptFile,
    FasteditError,
    InvalidFact,
    NumericalError,
    UnsupportedModel,
)
from .facts import Fact  # noqa: E402

if TYPE_CHECKING:
    from .artefacts import Edit, load_edit
    from .editors import editor
    from .memory.directory import load_model, save_model
    from .memory.edit import MemoryEdit
    from .ops.backend import use_backend

_LAZY = {
    "Edit": ".artefacts",
    "MemoryEdit": ".memory.edit",
    "load_edit": ".artefacts",
    "load_model": ".memory.directory",
    "editor": ".editors",
    "save_model": ".memory.directory",
    "use_backend": ".ops.backend",
}
_SUBPACKAGES = (
    "artefacts",
    "data",
    "demo",
    "editors",
    "evaluation",
    "integrations",
    "kernels",
    "memory",
    "models",
    "ops",
    "stats",
)

__all__ = [
    "BackendUnavailable",
    "BaseMismatch",
    "CorruptFile",
    "Edit",
    "Fact",
    "FasteditError",
    "InvalidFact",
    "MemoryEdit",
    "NumericalError",
    "UnsupportedModel",
    "__version__",
    "editor",
    "load_edit",
    "load_model",
    "save_model",
    "use_backend",
]


def __getattr__(name: str) -> Any:
    if name in _LAZY:
        return getattr(importlib.import_module(_LAZY[name], __name__), name)
    if name in _SUBPACKAGES:
        return importlib.import_module(f".{name}", __name__)
    raise AttributeError(f"module 'fastedit' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted({*__all__, *_SUBPACKAGES})
