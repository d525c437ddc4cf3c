"""AlphaEdit's null-space projectors: made as thin factors, given out dense, recognised when they come back."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from ...ops import Projector
from ..locate import covering
from ..patching import Context, NotCovered, Point
from .statistics import expecting

_PROBES = 4
_AGREE = 1e-4
_AMBIGUOUS = 1e-6
_made: dict[str, Projector] = {}  # by module name, the latest; recognised by what they do


def get_project(context: Context) -> Callable[..., Any]:
    """``get_project`` of the AlphaEdit repository: P of one layer, (d, d) float32 on the CPU."""

    def project(model: nn.Module, tok: Any, layer: int, hparams: Any) -> Tensor:
        name = hparams.rewrite_module_tmp.format(layer)
        names = [hparams.rewrite_module_tmp.format(each) for each in hparams.layers]
        with expecting(model, names):
            moment = context.namespace["get_cov"](
                model, tok, name, hparams.mom2_dataset, hparams.mom2_n_samples, hparams.mom2_dtype
            )
        return null_space(context, name, moment, float(hparams.nullspace_threshold))

    return project


def null_space(context: Context, name: str, moment: Tensor, threshold: float) -> Tensor:
    """P of the module ``name``, (d, d) float32 on the CPU, from C; its thin form is remembered.

    Raises:
        NotCovered: C is not finite.
    """
    if not bool(moment.isfinite().all()):
        raise NotCovered(f"the statistics of {name} are not finite")
    with covering():
        values, vectors = torch.linalg.eigh(moment.double())
        projector = Projector.from_spectrum(values.clamp(min=0), vectors, threshold)
    near = int(((values.abs() - threshold).abs() <= _AMBIGUOUS * threshold).sum())
    if near:
        context.note(
            f"{near} eigenvalues of {name} are within {_AMBIGUOUS:g} of nullspace_threshold: on which side they "
            "fall is a matter of rounding, in the original too"
        )
    if context.verbose:
        print(projector.dimension)
    _made[name] = projector
    return dense(projector).float().cpu()


def dense(projector: Projector) -> Tensor:
    """P as a (d, d) float64 matrix."""
    product = projector.vectors @ projector.vectors.T
    if not projector.removed:
        return product
    product.neg_().diagonal().add_(1.0)
    return product


def recalled_projector(name: str, matrix: Tensor, device: torch.device) -> Projector:
    """The thin form of a layer's P (d, d): the one that was given out for this layer, or found from the matrix.

    Raises:
        NotCovered: the matrix is no orthogonal projector.
    """
    matrix = matrix.to(device)
    probes = torch.randn(len(matrix), _PROBES, generator=torch.Generator().manual_seed(0)).to(device)
    image = (matrix.float() @ probes).double()
    known = _made.get(name)
    fits = known is not None and known.vectors.device == device and len(known.vectors) == len(matrix)
    if known is not None and fits and _agree(known, probes, image):
        return known
    projector = thin(matrix)
    if not _agree(projector, probes, image):
        raise NotCovered(f"P of {name} is no orthogonal projector")
    return projector


def thin(matrix: Tensor) -> Projector:
    """The thinner side of a (d, d) projector, from its products with random columns (Halko et al. 2011).

    The matrix is not checked: for one that is no projector the result does something else.
    """
    d = len(matrix)
    kept = min(max(round(float(matrix.diagonal().double().sum())), 0), d)
    removed = d - kept <= kept
    columns = torch.randn(d, d - kept if removed else kept, generator=torch.Generator().manual_seed(1))
    columns = columns.to(matrix.device, torch.float64)
    for _ in range(2):  # the second pass makes up for columns that happened to be nearly dependent
        image = (matrix.float() @ columns.float()).double()
        columns = torch.linalg.qr(columns - image if removed else image).Q
    return Projector(columns, removed=removed)


def _agree(projector: Projector, probes: Tensor, image: Tensor) -> bool:
    return bool((projector(probes) - image).norm() <= _AGREE * probes.norm())


POINTS = (Point("experiments.evaluate:get_project", get_project),)
