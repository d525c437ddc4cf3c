"""One case of a check: arguments of an op, and what the float64 reference says about the result."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor

from ..errors import BackendUnavailable

BF16, FP16, FP32, FP64 = torch.bfloat16, torch.float16, torch.float32, torch.float64
NAN, INF = float("nan"), float("inf")


@dataclass(frozen=True)
class Case:
    """One case of an op.

    Attributes:
        op: the op's name in :mod:`fastedit.ops`.
        name: what is special about the case.
        dtype: of the op's main argument.
        needs: what of the op it uses beyond its plain call, such as ``"mask"`` or ``"views"``.
        body: takes the function, a device, and whether float32 products may be three TF32 ones; raises
            AssertionError if the function is wrong.
    """

    op: str
    name: str
    dtype: torch.dtype
    needs: frozenset[str]
    body: Callable[[Callable[..., Any], torch.device, bool], None]

    def __str__(self) -> str:
        return f"{self.op}-{name_of(self.dtype)}-{self.name}".replace(" ", "_")

    def check(
        self, function: Callable[..., Any], device: torch.device | str = "cpu", *, tf32x3: bool | None = None
    ) -> None:
        """Call a function with this case's arguments and compare.

        Args:
            function: takes what the function of this name in :mod:`fastedit.ops` takes.
            device: where the arguments are.
            tf32x3: accept what three TF32 products reach in place of one of float32, on a GPU's matrix unit; None:
                on a GPU.

        Raises:
            AssertionError: a wrong result, or an exception; names the case.
            fastedit.BackendUnavailable: raised by the function; it passes.
        """
        device = torch.device(device)
        try:
            self.body(function, device, device.type != "cpu" if tf32x3 is None else tf32x3)
        except BackendUnavailable:
            raise
        except AssertionError as error:
            raise AssertionError(f"{self} on {device}: {error}") from None
        except Exception as error:
            raise AssertionError(f"{self} on {device}: {type(error).__name__}: {error}") from error


def case(
    op: str, name: str, dtype: torch.dtype, body: Callable[..., None], needs: str = "", /, **arguments: Any
) -> Case:
    """A case whose body takes further arguments; ``needs`` are words."""
    return Case(op, name, dtype, frozenset(needs.split()), partial(body, **arguments))


def name_of(dtype: torch.dtype) -> str:
    """``"float32"`` for torch.float32."""
    return str(dtype).removeprefix("torch.")


def normal(
    *shape: int, dtype: torch.dtype = FP32, device: torch.device | str = "cpu", seed: int = 0
) -> Tensor:
    """Standard normal numbers, the same on every device."""
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).to(dtype).to(device)


def relative_error(out: Tensor, reference: Tensor) -> float:
    """‖out − reference‖ / ‖reference‖ in float64 on the CPU (0 for two empty or zero tensors)."""
    out, reference = out.detach().cpu().double(), reference.cpu().double()
    scale = reference.norm().item()
    error = (out - reference).norm().item()
    return error / scale if scale else error


def require(condition: bool | Tensor, what: str) -> None:
    """Raise AssertionError(what) unless the condition holds."""
    if not bool(condition):
        raise AssertionError(what)


def require_close(out: Tensor, reference: Tensor, tolerance: float, what: str = "the result") -> None:
    """Raise AssertionError unless shapes agree and the relative error is at most the tolerance; NaN is wrong."""
    require(
        out.shape == reference.shape, f"{what} has shape {tuple(out.shape)}, not {tuple(reference.shape)}"
    )
    error = relative_error(out, reference)
    require(error <= tolerance, f"{what} has a relative error of {error:.1e}, allowed are {tolerance:.1e}")


def require_same(out: Tensor, reference: Tensor, what: str = "the result") -> None:
    """Raise AssertionError unless shape, dtype and values are those of the reference, NaN at the same places."""
    out = out.detach().cpu()
    require(
        out.shape == reference.shape, f"{what} has shape {tuple(out.shape)}, not {tuple(reference.shape)}"
    )
    require(
        out.dtype == reference.dtype, f"{what} must be {name_of(reference.dtype)}, not {name_of(out.dtype)}"
    )
    differ = (out != reference) & ~((out != out) & (reference != reference))
    require(
        not differ.any(), f"{what} differs from the reference at {int(differ.sum())} of {out.numel()} places"
    )


@contextmanager
def untouched(**tensors: Tensor | None) -> Iterator[None]:
    """Raise AssertionError if one of these has changed at the end."""
    before = {name: tensor.clone() for name, tensor in tensors.items() if tensor is not None}
    yield
    for name, copy in before.items():
        now = tensors[name]
        assert now is not None
        same = (now == copy) | ((now != now) & (copy != copy))
        require(same.all(), f"{name} was changed")


@contextmanager
def surrounded(
    rows: int, columns: int, dtype: torch.dtype, device: torch.device, step: int = 1
) -> Iterator[Tensor]:
    """A (rows, columns) view into a larger tensor of NaN, its columns ``step`` apart; what is around must stay."""
    store = torch.full((rows + 4, step * columns + 6), NAN, dtype=dtype, device=device)
    view = store[2 : 2 + rows, 3 : 3 + step * columns : step]
    yield view
    view.fill_(NAN)
    require(store.isnan().all(), "something outside of the view was written")
