"""The second moment of one layer's keys, and the files it is kept in."""

from __future__ import annotations

import json
import os
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from ..errors import BaseMismatch, CorruptFile
from ..io import atomic_file
from ..models import describe, fingerprint
from . import npz

_FORMAT = "fastedit statistics 1"


@dataclass
class Statistics:
    """The uncentred second moment of the inputs of one layer's MLP output projection.

    Attributes:
        layer: number of the decoder block.
        module: full name of the projection, e.g. ``"model.layers.5.mlp.down_proj"``.
        second_moment: (d_in, d_in), float32 (float64 if collected so), on the CPU, exactly symmetric: the
            mean of k kᵀ over the tokens.
        count: number of tokens.
        meta: where it comes from: ``model_fingerprint``, ``tokenizer_hash``, ``texts_hash``, ``bos``,
            ``max_length``, versions. Read from another library's file it may be empty.
    """

    layer: int
    module: str
    second_moment: torch.Tensor
    count: int
    meta: dict[str, Any] = field(default_factory=dict)

    @property
    def d_in(self) -> int:
        """Width of the keys."""
        return self.second_moment.shape[0]

    def check(self, model: Any, *, base_fingerprint: str | None = None) -> None:
        """Raise unless these statistics belong to ``model``.

        Args:
            model: a causal language model.
            base_fingerprint: the fingerprint the model had before it was edited, if it was.

        Raises:
            BaseMismatch: the layer does not exist, its projection has another name or width, or the
                fingerprint is another. Statistics without a fingerprint are checked by width alone.
        """
        description = describe(model)
        if not 0 <= self.layer < description.n_layers:
            raise BaseMismatch(
                f"these statistics are of layer {self.layer}, the model has layers 0 to "
                f"{description.n_layers - 1}"
            )
        projection = description.projection(self.layer)
        if self.d_in != projection.d_in:
            raise BaseMismatch(
                f"statistics of layer {self.layer}: width {self.d_in}, but {projection.name} takes "
                f"{projection.d_in}; they were made on another model"
            )
        ours = self.meta.get("model_fingerprint")
        if ours is None:
            return
        theirs = base_fingerprint or fingerprint(model)
        if ours != theirs:
            raise BaseMismatch(
                f"statistics of layer {self.layer} were made on model {ours[:12]}, this is {theirs[:12]}: "
                "same shape, other weights. Collect statistics on this model, before any edit"
            )

    def save(self, path: str | os.PathLike[str]) -> Path:
        """Write one safetensors file, atomically, with everything else as JSON in its header."""
        path = Path(path)
        matrix = self.second_moment.detach().cpu().contiguous()
        header = {
            "format": _FORMAT,
            "layer": self.layer,
            "module": self.module,
            "count": self.count,
            "sha256": npz.matrix_hash(matrix.numpy()),
            "meta": self.meta,
        }
        with atomic_file(path) as temporary:
            save_file({"second_moment": matrix}, temporary, metadata={"fastedit": json.dumps(header)})
        return path

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> Statistics:
        """Read a file that :meth:`save` wrote.

        Raises:
            FileNotFoundError: there is no such file.
            CorruptFile: truncated, not such a file, a checksum that does not fit, or NaN inside.
        """
        path = Path(path)
        header = read_header(path)
        with _open(path) as file:
            matrix = file.get_tensor("second_moment")
        if npz.matrix_hash(matrix.numpy()) != header["sha256"]:
            raise CorruptFile(f"{path}: the matrix does not fit its checksum; collect the statistics again")
        npz.check_matrix(path, matrix, header["count"])
        return cls(header["layer"], header["module"], matrix, header["count"], header["meta"])

    def to_npz(self, path: str | os.PathLike[str], *, sample_size: int | None = 100_000) -> Path:
        """Write the file that ROME, MEMIT, AlphaEdit and EasyEdit read; see :mod:`fastedit.stats.npz`."""
        return npz.write(self, path, sample_size=sample_size)

    @classmethod
    def from_npz(cls, path: str | os.PathLike[str], *, layer: int | None = None) -> Statistics:
        """Read such a file, by whomever written; see :mod:`fastedit.stats.npz`."""
        return cls(**npz.read(path, layer=layer))


def layer_file(layer: int) -> str:
    """File name of one layer's statistics inside a folder: ``layer_005.safetensors``."""
    return f"layer_{layer:03d}.safetensors"


def save_directory(statistics: Mapping[int, Statistics], directory: str | os.PathLike[str]) -> list[Path]:
    """Write one file per layer into ``directory``; returns the files in the order of the layers."""
    return [statistics[layer].save(Path(directory) / layer_file(layer)) for layer in sorted(statistics)]


def load_directory(
    directory: str | os.PathLike[str], model: Any = None, layers: Iterable[int] | None = None
) -> dict[int, Statistics]:
    """Read statistics from a folder: ours, or else the ``.npz`` files of other libraries below it.

    Args:
        directory: the folder.
        model: if given, the statistics are checked against it; needed to find ``.npz`` files.
        layers: the layers wanted; by default all for which the folder holds a file of ours.

    Raises:
        FileNotFoundError: a layer wanted is not there.
        CorruptFile, BaseMismatch: as :meth:`Statistics.load` and :meth:`Statistics.check`.
    """
    folder = Path(directory)
    if layers is None:
        layers = sorted(int(file.stem.split("_")[1]) for file in folder.glob("layer_[0-9]*.safetensors"))
    loaded = {layer: _load_layer(folder, layer, model) for layer in layers}
    if not loaded:
        raise FileNotFoundError(f"{folder} holds no statistics (files named {layer_file(5)} or so)")
    base = fingerprint(model) if model is not None else None
    for statistics in loaded.values() if model is not None else ():
        statistics.check(model, base_fingerprint=base)
    return loaded


def _load_layer(folder: Path, layer: int, model: Any) -> Statistics:
    file = folder / layer_file(layer)
    if file.is_file():
        return Statistics.load(file)
    found: list[Path] = []
    if model is not None:
        found = sorted(folder.glob(f"**/{describe(model).projection(layer).name}_float*_mom2*.npz"))
    if not found:
        raise FileNotFoundError(f"no statistics of layer {layer} in {folder}: looked for {file.name}")
    if len(found) > 1:
        names = ", ".join(str(path.relative_to(folder)) for path in found)
        raise ValueError(f"several files in {folder} hold statistics of layer {layer}: {names}; keep one")
    return Statistics.from_npz(found[0], layer=layer)


def read_header(path: str | os.PathLike[str]) -> dict[str, Any]:
    """Everything in a file of :meth:`Statistics.save` but the matrix: layer, module, count, sha256, meta.

    Raises:
        FileNotFoundError: there is no such file.
        CorruptFile: truncated, or not such a file.
    """
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"there is no statistics file {path}")
    with _open(path) as file:
        header = json.loads((file.metadata() or {}).get("fastedit", "{}"))
        names = list(file.keys())
    missing = {"layer", "module", "count", "sha256", "meta"} - header.keys()
    if header.get("format") != _FORMAT or missing or names != ["second_moment"]:
        raise CorruptFile(f"{path}: expected the format {_FORMAT!r}, got {header.get('format')!r}")
    return header


@contextmanager
def _open(path: Path) -> Iterator[Any]:
    try:
        with safe_open(path, framework="pt") as file:
            yield file
    except (SafetensorError, json.JSONDecodeError, OSError) as error:
        raise CorruptFile(f"{path} is not a whole statistics file of fastedit ({error})") from None
