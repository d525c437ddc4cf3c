"""EasyEdit (zjunlp/EasyEdit) on fastedit's kernels: one call before or after it is imported.

>>> from fastedit.integrations import easyedit  # doctest: +SKIP
>>> report = easyedit.accelerate()  # doctest: +SKIP

Its functions are replaced in versions that are known; its settings, caches and files stay where they are and mean
what they meant.
"""

from __future__ import annotations

import importlib
import os
import sys
from collections.abc import Collection
from pathlib import Path
from types import ModuleType

import torch

from ..patching import Point, accelerate_project
from ..report import Report
from . import grace, memit, rome, statistics, ultraedit, wise
from .versions import KNOWN

_BLOCKING = "CUDA_LAUNCH_BLOCKING"
_PACKAGE = "easyeditor"
_MODELS = f"{_PACKAGE}.models"


_TRAINING = ("WISE.edit", "GRACE.edit")


def _points(training: bool) -> list[Point]:
    parts = (statistics, memit, rome, wise, grace, ultraedit)
    points = [point for part in parts for point in part.points(_MODELS)]
    return [point for point in points if training or point.attribute not in _TRAINING]


def accelerate(*, training: bool = False, fix: Collection[str] = (), verbose: bool = False) -> Report:
    """Import EasyEdit and replace what is known of it.

    Importing EasyEdit sets ``CUDA_LAUNCH_BLOCKING=1`` for the whole process, which makes every kernel wait for the
    one before. Unless you had set the variable yourself it is removed again; CUDA reads it when it starts, so call
    this before anything uses the GPU.

    Args:
        training: replace the training of WISE and GRACE too. Each step is the original's to rounding, but runs of
            many steps amplify rounding, so that the weights at the end may differ by more than 1e-3 of their change,
            as they do between two machines.
        fix: names of corrections of its defects; there are none yet, its numbers are kept.
        verbose: print once for each layer and request what the original prints for each step.

    Returns:
        What was replaced, what was left alone and why, and what fell back; ``restore()`` undoes it all. It is a
        context manager too.

    Raises:
        ImportError: EasyEdit's folder is not on the path, or does not load.
        ValueError: a correction that there is none of.
    """
    notes = _import()
    points = _points(training)
    report = accelerate_project("EasyEdit", points, KNOWN, root=_root, fix=fix, fixes=(), verbose=verbose)
    report.notes += notes
    if not training:
        report.notes.append(
            "training of WISE and GRACE is the original's; accelerate(training=True) replaces it"
        )
    return report


def _import() -> list[str]:
    """Load the package without its environment variable; what the user should know of that."""
    if _PACKAGE in sys.modules:
        if _BLOCKING in os.environ:
            return [
                f"EasyEdit was imported before, and {_BLOCKING} is set: call accelerate() first, so that kernels "
                "need not wait for each other"
            ]
        return []
    own, running = os.environ.get(_BLOCKING), torch.cuda.is_initialized()
    importlib.import_module(_PACKAGE)
    if own is not None:
        os.environ[_BLOCKING] = own
        return [f"{_BLOCKING}={own} was set by you and is kept"]
    if os.environ.pop(_BLOCKING, None) is None:
        return []
    if torch.cuda.is_initialized() and not running:
        return [
            f"CUDA was started while EasyEdit was imported and has read {_BLOCKING}: kernels wait for each other"
        ]
    return [f"{_BLOCKING}, which EasyEdit sets, was removed"]


def _root(module: ModuleType) -> Path | None:
    """The package's folder, if the module lies in one that looks like EasyEdit's."""
    for folder in Path(module.__file__ or "").resolve().parents:
        if folder.name == _PACKAGE and (folder / "util" / "alg_dict.py").is_file():
            return folder
    return None
