"""The null-space projectors that AlphaEdit and SPHERE read, ``null_space_project.pt``.

Source: jianghoucheng/AlphaEdit : experiments/evaluate.py, zjunlp/EasyEdit : alphaedit/AlphaEdit_main.py. P of a layer
projects on the directions in which its second moment C has a singular value below an absolute threshold; the file
holds all layers as one float32 tensor (L, d, d). They take an SVD of C in float32; here it is one symmetric
eigendecomposition in float64, which gives the same projector.
"""

from __future__ import annotations

import os
import tempfile
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from ..errors import NumericalError
from ..io import atomic_file

_NEAR = 1e-6


@dataclass(frozen=True)
class NullSpace:
    """What the projector of one layer is.

    Attributes:
        layer: the block.
        width: d.
        kept: directions that P keeps, its rank.
        ambiguous: eigenvalues within a relative 1e-6 of the threshold: on which side they fall is up to rounding,
            and with it the rank.
        nearest: the eigenvalue closest to the threshold.
    """

    layer: int
    width: int
    kept: int
    ambiguous: int
    nearest: float


def projector(second_moment: Tensor, threshold: float, layer: int) -> tuple[Tensor, NullSpace]:
    """P (d, d) float32, on the device of C, and what it is.

    Args:
        second_moment: (d, d) C, symmetric.
        threshold: directions with an eigenvalue below it are kept.
        layer: named in messages.

    Raises:
        NumericalError: C is not finite.
    """
    if not bool(second_moment.isfinite().all()):
        raise NumericalError(f"the statistics of layer {layer} are not finite: collect them again")
    matrix = second_moment.double()
    values, vectors = torch.linalg.eigh((matrix + matrix.T) / 2)
    del matrix
    kept = int((values < threshold).sum())
    about = NullSpace(
        layer=layer,
        width=len(values),
        kept=kept,
        ambiguous=int(((values - threshold).abs() <= _NEAR * threshold).sum()),
        nearest=float(values[(values - threshold).abs().argmin()]),
    )
    if 2 * kept <= len(values):
        basis = vectors[:, :kept]
        return (basis @ basis.T).float(), about
    basis = vectors[:, kept:]
    product = (basis @ basis.T).neg_()
    product.diagonal().add_(1)
    return product.float(), about


def write_null_spaces(
    path: str | os.PathLike[str],
    layers: Iterable[int],
    second_moment: Callable[[int], Tensor],
    threshold: float,
) -> list[NullSpace]:
    """Write the projectors of ``layers`` as one file, atomically.

    One layer is in memory at a time; the others wait in a temporary file beside ``path``, of the final size.

    Args:
        path: the file to write.
        layers: in the order in which the reader has them in its ``layers``.
        second_moment: C (d, d) of a layer, on the device that is to do the work.
        threshold: see :func:`projector`.

    Raises:
        ValueError: layers of different widths, or a threshold that is not positive.
        NumericalError: see :func:`projector`.
    """
    if not threshold > 0:
        raise ValueError(f"the threshold must be positive, got {threshold}")
    layers = list(layers)
    found: list[NullSpace] = []
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.NamedTemporaryFile(dir=path.parent, prefix=f".{path.name}.", suffix=".tmp") as scratch:
        stack: Tensor | None = None
        for position, layer in enumerate(layers):
            one, about = projector(second_moment(layer), threshold, layer)
            if stack is None:
                shape = (len(layers), about.width, about.width)
                stack = torch.from_file(scratch.name, shared=True, size=_numel(shape)).view(shape)
            if about.width != stack.shape[1]:
                raise ValueError(
                    f"layers {layers[0]} and {layer} have keys of width {stack.shape[1]} and {about.width}: "
                    "they do not fit into one file"
                )
            stack[position] = one
            found.append(about)
        if stack is None:
            raise ValueError("no layers were given")
        with atomic_file(path) as temporary:
            torch.save(stack, temporary)
    return found


def _numel(shape: tuple[int, ...]) -> int:
    count = 1
    for size in shape:
        count *= size
    return count
