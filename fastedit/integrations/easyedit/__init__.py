"""EasyEdit (zjunlp/EasyEdit) on fastedit's kernels: one call before or after it is imported.

>>> from fastedit.integrations import easyedit  # doctest: +SKIP
>>> report = easyedit.accelerate()  # doctest: +SKIP

Its functions are replaced in versions that are known; its settings, caches and files stay where they are and mean what
they meant. Replaced are ``layer_stats``; ``execute_memit``, ``execute_emmet``, ``execute_AlphaEdit``; ``compute_z`` of
these and ROME's ``compute_u`` and ``compute_v``; ``get_project``; WISE's mask, training and merge; GRACE's training and
look-up; UltraEdit's solve.
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
from . import locate, statistics
from .versions import KNOWN

_BLOCKING = "CUDA_LAUNCH_BLOCKING"
_PACKAGE = "easyeditor"
_MODELS = f"{_PACKAGE}.models"

# What the engine does in place of EasyEdit's chain of helpers.
_REPRESENTATIONS = ("repr_tools.get_reprs_at_idxs", "repr_tools.get_words_idxs_in_templates")
_TARGETS = tuple(
    f"compute_z.{name}" for name in ("find_fact_lookup_idx", "get_module_input_output_at_words")
) + tuple(f"compute_z.{name}" for name in _REPRESENTATIONS)
_BATCH = ("compute_z", "compute_ks", *_TARGETS, "upd_matrix_match_shape", "get_cov")


def _points() -> list[Point]:
    memit, emmet, alphaedit, rome = (f"{_MODELS}.{name}" for name in ("memit", "emmet", "alphaedit", "rome"))
    ours = [
        Point(f"{rome}.layer_stats:layer_stats", statistics.layer_stats),
        Point(f"{_MODELS}.r_rome.layer_stats:layer_stats", statistics.layer_stats),
        Point(f"{memit}.memit_main:execute_memit", locate.execute_memit, _BATCH),
        Point(f"{emmet}.emmet_main:execute_emmet", locate.execute_emmet, _BATCH),
        Point(f"{alphaedit}.AlphaEdit_main:execute_AlphaEdit", locate.execute_alphaedit, _BATCH),
        Point(f"{rome}.compute_u:compute_u", locate.compute_u, _REPRESENTATIONS),
        Point(
            f"{rome}.compute_v:compute_v",
            locate.compute_v,
            ("find_fact_lookup_idx", "get_module_input_output_at_word", *_REPRESENTATIONS),
        ),
    ]
    for package in (memit, emmet, alphaedit, f"{_MODELS}.SPHERE"):
        ours.append(
            Point(
                f"{package}.compute_z:compute_z",
                locate.compute_z,
                ("find_fact_lookup_idx", *_REPRESENTATIONS),
            )
        )
    for main in (f"{alphaedit}.AlphaEdit_main", f"{_MODELS}.SPHERE.SPHERE_main"):
        ours.append(Point(f"{main}:get_project", locate.get_project, ("get_cov",)))
    return ours


def accelerate(*, fix: Collection[str] = (), verbose: bool = False) -> Report:
    """Import EasyEdit and replace what is known of it.

    Importing EasyEdit sets ``CUDA_LAUNCH_BLOCKING=1`` for the whole process, which makes every kernel wait for the one
    before. Unless you had set the variable yourself it is removed again; CUDA reads it when it starts, so call this
    before anything uses the GPU.

    Args:
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
    report = accelerate_project("EasyEdit", _points(), KNOWN, root=_root, fix=fix, fixes=(), verbose=verbose)
    report.notes += notes
    return report


def _import() -> list[str]:
    """Load the package without its environment variable; what the user should know of that."""
    if _PACKAGE in sys.modules:
        if _BLOCKING in os.environ:
            return [
                f"EasyEdit was imported before, and {_BLOCKING} is set: call accelerate() first, so that kernels need "
                "not wait for each other"
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
