"""The ``.npz`` files of ROME, MEMIT, AlphaEdit and EasyEdit, both ways.

Source: kmeng01/memit and zjunlp/EasyEdit : rome/layer_stats.py, util/runningstats.py. Entries:
``mom2.constructor`` (text), ``mom2.count`` (number of tokens), ``mom2.mom2`` (d, d), the *sum* of k kᵀ, and
``sample_size``: their reader takes the file only if that equals the one it was asked for. No pickled
objects; None is one particular NaN. Entries whose names begin with ``fastedit.`` are ours; other readers
pass them over. They hold what the format lacks: tokenizer, texts, BOS policy, maximum length, a checksum.
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
import re
import struct
import zipfile
import zlib
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from ..errors import CorruptFile
from ..io import atomic_file

if TYPE_CHECKING:
    from .statistics import Statistics

logger = logging.getLogger(__name__)

_NONE = np.array(struct.unpack(">d", struct.pack(">Q", 0xFFF8000000000002))[0], dtype=np.float64)
_NAME = re.compile(r"(?P<module>.+)_float(?:16|32|64)_[a-z0-9_-]*mom2")


def npz_path(
    directory: str | os.PathLike[str],
    model_name: str,
    module: str,
    *,
    style: str = "easyedit",
    dataset: str = "wikipedia",
    precision: str = "float32",
    sample_size: int | None = 100_000,
) -> Path:
    """Where another library looks for the statistics of one layer.

    Args:
        directory: its ``stats_dir``.
        model_name: ``config._name_or_path`` of the model.
        module: full name of the projection.
        style: ``"easyedit"`` (EasyEdit, AlphaEdit and forks: the last component of the model's name) or
            ``"memit"`` (the first repositories: the whole name with ``/`` replaced by ``_``).
        dataset: ``"wikipedia"`` or ``"wikitext"``, as that library's hyper-parameters say.
        precision: ``"float32"`` or ``"float64"``, likewise.
        sample_size: number of documents, likewise; part of the name, or left out if None.
    """
    if style not in ("easyedit", "memit"):
        raise ValueError(f"style must be 'easyedit' or 'memit', got {style!r}")
    model = model_name.rsplit("/")[-1] if style == "easyedit" else model_name.replace("/", "_")
    suffix = "" if sample_size is None else f"_{sample_size}"
    return Path(directory) / model / f"{dataset}_stats" / f"{module}_{precision}_mom2{suffix}.npz"


def write(statistics: Statistics, path: str | os.PathLike[str], *, sample_size: int | None) -> Path:
    """Write one layer atomically: their reader stops the program at a truncated file.

    Args:
        statistics: the layer.
        path: where; see :func:`npz_path`. The matrix has the precision that the name states, or its own.
        sample_size: what their reader will be asked for; None stands for "all".
    """
    path = Path(path)
    precision = np.float64 if "_float64_" in path.name else np.float32 if "_float32_" in path.name else None
    total = statistics.second_moment.double().mul_(statistics.count).numpy()
    total = total.astype(precision or statistics.second_moment.numpy().dtype, copy=False)
    entries: dict[str, Any] = {
        "mom2.constructor": "util.runningstats.SecondMoment()",
        "mom2.count": statistics.count,
        "mom2.mom2": total,
        "sample_size": _NONE if sample_size is None else sample_size,
        "fastedit.layer": statistics.layer,
        "fastedit.module": statistics.module,
        "fastedit.meta": json.dumps(statistics.meta),
        "fastedit.sha256": matrix_hash(total),
    }
    with atomic_file(path) as temporary, open(temporary, "wb") as file:
        np.savez(file, **entries)
    return path


def read(path: str | os.PathLike[str], *, layer: int | None = None) -> dict[str, Any]:
    """Read one layer; returns the fields of :class:`Statistics`.

    Without our entries, the module is taken from the file's name and the layer from the module's, and a
    warning says that model, texts and tokenizer are not recorded.

    Raises:
        FileNotFoundError: there is no such file.
        CorruptFile: truncated, entries missing, a checksum that does not fit, or NaN inside.
    """
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"there is no statistics file {path}")
    entries = _entries(path)
    missing = {"mom2.count", "mom2.mom2"} - entries.keys()
    if missing:
        raise CorruptFile(f"{path}: no second moment inside, lacks {sorted(missing)}")
    total = entries["mom2.mom2"]
    if "fastedit.sha256" in entries and matrix_hash(total) != str(entries["fastedit.sha256"]):
        raise CorruptFile(f"{path}: the matrix does not fit its checksum; collect the statistics again")
    count = int(entries["mom2.count"])
    dtype = np.float64 if total.dtype == np.float64 else np.float32
    mean = torch.from_numpy((total.astype(np.float64) / max(count, 1)).astype(dtype))
    check_matrix(path, mean, count)
    return {**_origin(path, entries, layer), "second_moment": mean, "count": count}


def matrix_hash(matrix: np.ndarray) -> str:
    """Hexadecimal SHA-256 of the bytes of a matrix, row by row."""
    return hashlib.sha256(np.ascontiguousarray(matrix).data).hexdigest()


def check_matrix(path: Path, matrix: torch.Tensor, count: int) -> None:
    """Raise CorruptFile unless ``matrix`` can be a second moment over ``count`` tokens."""
    if matrix.dim() != 2 or matrix.shape[0] != matrix.shape[1]:
        raise CorruptFile(f"{path}: a second moment is square, this has shape {tuple(matrix.shape)}")
    if count < 1:
        raise CorruptFile(f"{path}: statistics over {count} tokens")
    if not torch.isfinite(matrix).all():
        raise CorruptFile(f"{path}: the matrix holds NaN or infinity; collect the statistics again")


def _entries(path: Path) -> dict[str, np.ndarray]:
    try:
        with open(path, "rb") as file:
            archive = np.load(file, allow_pickle=False)
            if isinstance(archive, np.ndarray):
                raise ValueError("it holds a single array")
            with archive:
                return {name: archive[name] for name in archive.files}
    except (zipfile.BadZipFile, zlib.error, ValueError, EOFError, OSError, KeyError, TypeError) as error:
        raise CorruptFile(f"{path} is not a whole .npz file ({error}); it may be truncated") from None


def _origin(path: Path, entries: dict[str, np.ndarray], layer: int | None) -> dict[str, Any]:
    if "fastedit.meta" in entries:
        return {
            "layer": int(entries["fastedit.layer"]),
            "module": str(entries["fastedit.module"]),
            "meta": json.loads(str(entries["fastedit.meta"])),
        }
    logger.warning(
        "%s does not say on which model, texts and tokenizer it was made (files of the same name differ "
        "between projects); only its width can be checked",
        path,
    )
    match = _NAME.match(path.name)
    module = match["module"] if match else ""
    numbers = [part for part in module.split(".") if part.isdigit()]
    if layer is None and not numbers:
        raise ValueError(f"{path}: the file name shows no layer; give layer=")
    return {"layer": int(numbers[0]) if layer is None else layer, "module": module, "meta": {}}
