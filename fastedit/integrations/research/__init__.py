"""The research repositories of ROME, MEMIT, AlphaEdit, NSE, EMMET and UltraEdit, accelerated as they are.

>>> from fastedit.integrations import research
>>> report = research.accelerate()  # in a script of the repository, before or after its imports  # doctest: +SKIP
>>> print(report)  # doctest: +SKIP
>>> report.restore()  # doctest: +SKIP

Or with no line at all: ``fastedit accelerate -- python -m experiments.evaluate ...``.
"""

from __future__ import annotations

from collections.abc import Collection
from pathlib import Path
from types import ModuleType

from ...io import read_json
from ..patching import accelerate_project
from ..report import Report
from . import contexts, memit, projector, rome, statistics, ultraedit

REPOSITORIES = (
    "kmeng01/rome",
    "kmeng01/memit",
    "jianghoucheng/AlphaEdit",
    "jianghoucheng/NSE",
    "scalable-model-editing/unified-model-editing",
    "XiaojieGu/UltraEdit",
)

# Files by which a folder is told from another with packages of the same names.
_MARKS = (
    ("rome/repr_tools.py", "util/nethook.py", "util/runningstats.py"),
    ("editor/ultraedit.py", "nets.py", "data/base.py"),
)

FIXES = {
    "memit_seq_cache": "MEMIT_seq: the keys of earlier batches reach the worker, which fails without them",
    "nse_raw_target": "targets made before the first edit get the leading space that the edit itself gives them",
    "nse_p_overflow": "NSE: where one neuron holds more than the wanted mass, it is chosen",
    "template_not_keyed": "context templates are sampled for each model, not once for the process",
    "ultra_floor_ceil": "UltraEdit: the gradients of a last micro-batch that is not full are used",
    "running_var": "UltraEdit: the running spread is that of the rows, also for a batch of one",
}

_POINTS = (*statistics.POINTS, *projector.POINTS, *rome.POINTS, *memit.POINTS, *ultraedit.POINTS)
_FIX_POINTS = {"template_not_keyed": contexts.POINTS, "running_var": ultraedit.FIX_POINTS}


def accelerate(*, fix: Collection[str] = (), verbose: bool = False) -> Report:
    """Put fastedit behind the functions of a research repository, in this process.

    Modules of the repository may be loaded already or later. Only versions that are known are touched; the report
    names what was left alone, and counts the calls that went to the original because their input is not covered.

    Args:
        fix: corrections of the published code, by name (:data:`FIXES`); without them its numbers are kept.
        verbose: print what the original prints, once for each request and layer instead of once a step.

    Returns:
        The report, which is also the way back (:meth:`Report.restore`) and a context manager.

    Raises:
        ValueError: a correction of an unknown name.
    """
    points = [*_POINTS, *(point for name in fix for point in _FIX_POINTS.get(name, ()))]
    return accelerate_project(
        "research repositories",
        points,
        read_json(Path(__file__).parent / "versions.json"),
        root=project_root,
        fix=fix,
        fixes=FIXES,
        verbose=verbose,
    )


def project_root(module: ModuleType) -> Path | None:
    """The folder of the repository that a module belongs to; None if it is none of :data:`REPOSITORIES`."""
    file = vars(module).get("__file__")
    if not isinstance(file, str):
        return None
    for folder in list(Path(file).resolve().parents)[:3]:
        if any(all((folder / mark).is_file() for mark in marks) for marks in _MARKS):
            return folder
    return None
