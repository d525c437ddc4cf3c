"""The registry of operations: which backend implements which op, for which device and dtype, or why not.

An op is declared once with :func:`define` (schema and fake implementation, as ``torch.ops.fastedit.<name>``)
and gets implementations with :func:`provide`, the preferred one first. Which of them serves is decided at
each call, inside the op, so a compiled graph follows a later :func:`use_backend` too:

- ``with use_backend("triton"):`` or the environment variable ``FASTEDIT_BACKEND``: that one, or
  :class:`fastedit.BackendUnavailable` with the reason;
- otherwise the first that can serve; ``torch`` always can. Stepping down to a backend expected to be more
  than twice as slow is logged once, at WARNING.
"""

from __future__ import annotations

import contextlib
import functools
import importlib
import logging
import os
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextvars import ContextVar
from dataclasses import dataclass, field
from types import ModuleType
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..errors import BackendUnavailable
from . import check as _check

NAMES = ("torch", "cpp", "triton", "cuda")
_DEVICES = {"torch": "any", "cpp": "cpu", "triton": "cuda", "cuda": "cuda"}
_MINIMUM_CAPABILITY = (8, 0)
_INTERPRETED = "Triton runs interpreted: for tests only"

_library = torch.library.Library("fastedit", "FRAGMENT")
_chosen: ContextVar[str | None] = ContextVar("fastedit_backend", default=None)


class Row(NamedTuple):
    """One line of :func:`table`."""

    op: str
    backend: str
    device: str
    available: bool
    reason: str


@dataclass(frozen=True)
class Provider:
    """One implementation of one op."""

    backend: str
    fn: Callable[..., Any]
    devices: tuple[str, ...]  # device types; () for any
    dtypes: frozenset[torch.dtype]  # of the tensor ``key``; empty for any
    key: int
    speed: float | Mapping[torch.dtype, float]  # expected, relative to the torch backend on that device
    symbol: str  # the function of fastedit._C that it calls, if any

    def absent(self, device: torch.device, explicit: bool) -> str:
        """Why this implementation is not there at all; empty if it is."""
        reason = missing(self.backend, device, explicit)
        if not reason and self.symbol and not hasattr(extension(), self.symbol):
            reason = f"this fastedit._C has no {self.symbol}: install fastedit again"
        return reason

    def refuses(self, tensors: Sequence[Tensor], explicit: bool) -> str:
        """Why this implementation cannot serve these tensors; empty if it can."""
        device = tensors[0].device
        if not explicit and self.devices and device.type not in self.devices:  # first: it loads nothing
            return f"takes {_check.one_of(self.devices)} tensors, got {device.type}"
        if reason := self.absent(device, explicit):
            return reason
        if self.devices and device.type not in self.devices and not (explicit and self.backend == "triton"):
            return f"takes {_check.one_of(self.devices)} tensors, got {device.type}"
        dtype = tensors[min(self.key, len(tensors) - 1)].dtype
        if self.dtypes and dtype not in self.dtypes:
            return f"does not take {_check.name_of(dtype)}"
        return ""

    def speed_for(self, tensors: Sequence[Tensor]) -> float:
        """Expected speed relative to the torch backend."""
        if isinstance(self.speed, Mapping):
            return self.speed.get(tensors[min(self.key, len(tensors) - 1)].dtype, 1.0)
        return self.speed


@dataclass
class Op:
    """A declared op: its overload, the names of its arguments, and who implements it."""

    name: str
    check: Callable[..., None] | None
    overload: Any = None
    arguments: tuple[str, ...] = ()
    defaults: tuple[Any, ...] = ()
    written: tuple[int, ...] = ()
    providers: list[Provider] = field(default_factory=list)
    last: str = ""


_ops: dict[str, Op] = {}


# ---- declaring ------------------------------------------------------------------------------------------


def define(
    name: str,
    schema: str,
    fake: Callable[..., Any] | None = None,
    *,
    check: Callable[..., None] | None = None,
) -> None:
    """Declare ``torch.ops.fastedit.<name>``.

    Args:
        name: the op's name, with a trailing underscore if it works in place.
        schema: arguments and results, ``"(Tensor(a!) cov, Tensor x) -> ()"``; written arguments are marked.
        fake: the implementation on fake tensors; None for an op that returns nothing.
        check: validates the arguments by their metadata; runs before every call, real or fake.
    """
    op = Op(name, check)
    _library.define(name + schema)
    overload = getattr(torch.ops.fastedit, name).default
    arguments = overload._schema.arguments
    op.overload = overload
    op.arguments = tuple(a.name for a in arguments)
    op.defaults = tuple(a.default_value for a in arguments)
    op.written = tuple(
        i for i, a in enumerate(arguments) if a.alias_info is not None and a.alias_info.is_write
    )

    def run(*args: Any, **kwargs: Any) -> Any:
        return _run(op, _complete(op, args, kwargs))

    def run_fake(*args: Any, **kwargs: Any) -> Any:
        args = _complete(op, args, kwargs)
        if op.check is not None:
            op.check(*args)
        return None if fake is None else fake(*args)

    _library.impl(name, run, "CompositeExplicitAutograd")
    torch.library.register_fake(f"fastedit::{name}", run_fake, lib=_library)
    _ops[name] = op


def provide(
    name: str,
    backend: str,
    fn: Callable[..., Any],
    *,
    device: str | Sequence[str] = (),
    dtypes: Sequence[torch.dtype] = (),
    key: int = 0,
    speed: float | Mapping[torch.dtype, float] = 1.0,
    symbol: str = "",
) -> None:
    """Register ``fn`` as the implementation of op ``name`` by ``backend``; call in order of preference.

    Args:
        name: an op declared with :func:`define`.
        backend: one of ``NAMES``.
        fn: takes the op's arguments by position; they are checked already. Imports what it needs when called.
        device: the device types it serves; empty for all.
        dtypes: the dtypes it takes for the op's tensor number ``key``; empty for all.
        key: which of the op's tensor arguments ``dtypes`` and ``speed`` are about.
        speed: expected speed relative to the ``torch`` backend on that device, by dtype or one number for
            all; decides only whether a fallback is worth a warning.
        symbol: the function of ``fastedit._C`` that it calls; one that an older build lacks is a reason.
    """
    _known(backend)
    devices = (device,) if isinstance(device, str) else tuple(device)
    _ops[name].providers.append(Provider(backend, fn, devices, frozenset(dtypes), key, speed, symbol))


# ---- calling --------------------------------------------------------------------------------------------


def call(name: str, *args: Any) -> Any:
    """Call op ``name`` through the dispatcher; torch.compile records it as one node."""
    return _ops[name].overload(*args)


def check(name: str, *args: Any) -> None:
    """Run the checks of op ``name`` without calling it: for all items of a list before the first write."""
    op = _ops[name]
    args = _complete(op, args, {})
    if op.check is not None:
        op.check(*args)
    if op.written and not torch.compiler.is_compiling():  # needs addresses; the op looks again when it runs
        _refuse_overlap(op, args)


def choose(name: str, *tensors: Tensor) -> str:
    """The backend that serves op ``name`` for these tensors, here and now.

    Raises:
        BackendUnavailable: the backend chosen by name cannot.
    """
    return _select(_ops[name], tensors).backend


def served(name: str) -> str:
    """The backend that served the latest call of op ``name`` in this process; empty before the first."""
    return _ops[name].last


@contextlib.contextmanager
def use_backend(name: str) -> Iterator[None]:
    """Within this context every op is served by backend ``name``, or raises BackendUnavailable.

    >>> with use_backend("torch"):
    ...     pass

    Raises:
        ValueError: ``name`` is no backend.
    """
    token = _chosen.set(_known(name))
    try:
        yield
    finally:
        _chosen.reset(token)


def requested() -> str | None:
    """The backend chosen by name: :func:`use_backend` first, then ``FASTEDIT_BACKEND``; None if automatic."""
    name = _chosen.get()
    if name is not None:
        return name
    name = os.environ.get("FASTEDIT_BACKEND", "")
    return None if name in ("", "auto") else _known(name, "FASTEDIT_BACKEND")


def table() -> list[Row]:
    """Every op × backend: whether it is available on this machine, and the reason if it is not."""
    importlib.import_module("fastedit.ops")
    rows = []
    for name in sorted(_ops):
        for backend in NAMES:
            device = _DEVICES[backend]
            reason = "not implemented"
            for provider in _ops[name].providers:
                if provider.backend == backend:
                    reason = provider.absent(torch.device("cpu" if device == "any" else device), False)
            rows.append(Row(name, backend, device, not reason, reason))
    return rows


def _known(name: str, source: str = "use_backend") -> str:
    if name not in NAMES:
        raise ValueError(f"{source}: backend must be {_check.one_of(NAMES)}, got {name!r}")
    return name


def _complete(op: Op, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> tuple[Any, ...]:
    """All arguments by position: torch drops trailing ones that equal their default."""
    missing_names = op.arguments[len(args) :]
    if not missing_names:
        return args
    rest = zip(missing_names, op.defaults[len(args) :], strict=True)
    return (*args, *(kwargs.get(name, default) for name, default in rest))


def _tensors(args: Sequence[Any]) -> list[tuple[int, Tensor]]:
    """The tensors among the arguments, lists opened, each with the number of its argument."""
    found: list[tuple[int, Tensor]] = []
    for i, arg in enumerate(args):
        if isinstance(arg, Tensor):
            found.append((i, arg))
        elif isinstance(arg, (list, tuple)):
            found.extend((i, item) for item in arg if isinstance(item, Tensor))
    return found


def _refuse_overlap(op: Op, args: Sequence[Any]) -> None:
    written: list[tuple[str, Tensor]] = []
    read: list[tuple[str, Tensor]] = []
    for i, arg in enumerate(args):
        into = written if i in op.written else read
        if isinstance(arg, Tensor):
            into.append((op.arguments[i], arg))
        elif isinstance(arg, (list, tuple)):
            into.extend((f"{op.arguments[i]}[{k}]", t) for k, t in enumerate(arg) if isinstance(t, Tensor))
    _check.no_overlap(op.name, written, read)


def _run(op: Op, args: tuple[Any, ...]) -> Any:
    if op.check is not None:
        op.check(*args)
    if op.written:
        _refuse_overlap(op, args)
    tensors = _tensors(args)
    provider = _select(op, [t for _, t in tensors])
    op.last = provider.backend
    device = tensors[0][1].device.type
    if torch.is_autocast_enabled(device):
        with torch.autocast(device, enabled=False):  # it would lower the precision of our products
            result = provider.fn(*args)
    else:
        result = provider.fn(*args)
    for i, tensor in tensors:
        if i in op.written and not tensor.is_inference():
            torch.autograd.graph.increment_version(tensor)
    return result


def _select(op: Op, tensors: Sequence[Tensor]) -> Provider:
    name = requested()
    if name is not None:
        reason = "not implemented"
        for provider in op.providers:
            if provider.backend == name:
                reason = provider.refuses(tensors, explicit=True)
                if not reason:
                    return provider
        can = [p.backend for p in op.providers if not p.refuses(tensors, explicit=False)]
        raise BackendUnavailable(
            f"{op.name}: backend {name!r} was chosen by name and cannot serve: {reason}. "
            f"Able to: {', '.join(dict.fromkeys(can)) or 'none'}"
        )
    skipped: list[tuple[Provider, str]] = []
    for provider in op.providers:
        reason = provider.refuses(tensors, explicit=False)
        if not reason:
            if skipped:
                _explain(op, provider, skipped, tensors)
            return provider
        skipped.append((provider, reason))
    raise BackendUnavailable(
        f"{op.name}: no backend serves {tensors[0].device.type} tensors of "
        f"{', '.join(dict.fromkeys(_check.name_of(t.dtype) for t in tensors))}: "
        + "; ".join(f"{p.backend}: {reason}" for p, reason in skipped)
    )


def _explain(
    op: Op, serving: Provider, skipped: list[tuple[Provider, str]], tensors: Sequence[Tensor]
) -> None:
    device = tensors[0].device.type
    for provider, reason in skipped:
        if provider.devices and device not in provider.devices:
            continue  # made for another kind of device: nothing is lost here
        ratio = provider.speed_for(tensors) / serving.speed_for(tensors)
        if ratio > 2:
            _check.once(
                logging.WARNING,
                f"{op.name}: {serving.backend} serves on {device}, about {ratio:.0f} times slower than "
                f"{provider.backend}, which cannot: {reason}",
            )
            return


# ---- what this machine has ------------------------------------------------------------------------------


@functools.cache
def extension() -> ModuleType | str:
    """The compiled module ``fastedit._C``, or the reason why there is none."""
    try:
        module = importlib.import_module("fastedit._C")
        if not hasattr(module, "info"):
            return "fastedit._C belongs to another version: install fastedit again"
        if not _is_beside(module):
            return f"fastedit._C is of another installation, {module.__file__}: install fastedit again"
        return module
    except ModuleNotFoundError as error:
        if error.name == "fastedit._C":
            return "fastedit._C was not built (no C++ compiler at install time)"
        return f"fastedit._C does not load: {error}"
    except ImportError as error:
        return f"fastedit._C does not load: {error}"


def _is_beside(module: ModuleType) -> bool:
    """Whether the compiled module lies in this package's folder: an editable install lends it to other copies."""
    package = sys.modules["fastedit"].__file__
    if package is None or module.__file__ is None:
        return True
    return os.path.samefile(os.path.dirname(package), os.path.dirname(module.__file__))


def compiled() -> ModuleType:
    """The compiled module ``fastedit._C``, for implementations that are only chosen where it is there.

    Raises:
        BackendUnavailable: it is not; says why.
    """
    module = extension()
    if isinstance(module, str):
        raise BackendUnavailable(module)
    return module


@functools.cache
def missing(backend: str, device: torch.device, explicit: bool = False) -> str:
    """Why ``backend`` cannot serve on ``device``, whatever the op; empty if it can.

    ``explicit`` says that it was chosen by name: only then does Triton's interpreter serve.
    """
    if backend == "torch":
        return ""
    if backend == "cpp":
        module = extension()
        return module if isinstance(module, str) else ""
    return _missing_cuda(device) if backend == "cuda" else _missing_triton(device, explicit)


def _no_device() -> str:
    if torch.cuda.is_available():
        return ""
    if os.path.exists("/proc/driver/nvidia/version") and torch.version.cuda is None:
        return "this torch was built without CUDA"
    return "no usable AMD GPU on this machine" if torch.version.hip else "no NVIDIA driver on this machine"


def _missing_cuda(device: torch.device) -> str:
    module = extension()
    if isinstance(module, str):
        return module
    info = module.info()
    if not info["cuda_built"]:
        return "built without CUDA kernels (no nvcc at build time)"
    if torch.version.hip:
        return "built for NVIDIA GPUs; this torch drives AMD ones"
    if not info["cuda_available"]:
        return str(info["cuda_reason"]) or "no NVIDIA driver on this machine"
    return _no_device()


def _missing_triton(device: torch.device, explicit: bool) -> str:
    try:
        importlib.import_module("triton")
    except ImportError as error:
        return "triton is not installed" if isinstance(error, ModuleNotFoundError) else f"triton: {error}"
    try:
        common = importlib.import_module("fastedit.kernels.common")
    except ImportError as error:
        return f"the Triton kernels do not load: {error}"
    if common.is_interpreted():
        return "" if explicit else _INTERPRETED
    if device.type == "cpu":
        return "Triton has no CPU compiler; TRITON_INTERPRET=1 interprets, for tests only"
    if reason := _no_device():
        return reason
    capability = torch.cuda.get_device_capability(device)
    if capability < _MINIMUM_CAPABILITY and not torch.version.hip:
        return f"needs compute capability 8.0 or newer, this GPU has {capability[0]}.{capability[1]}"
    return ""


@contextlib.contextmanager
def full_float32() -> Iterator[None]:
    """float32 products of torch in full precision here, whatever the program has set (TF32, bfloat16)."""
    homes: list[Any] = [torch.backends.cuda.matmul, getattr(torch.backends.mkldnn, "matmul", None)]
    if all(hasattr(home, "fp32_precision") for home in homes):  # torch >= 2.9
        before = [(home, home.fp32_precision) for home in homes]
        lowered = [(home, value) for home, value in before if value not in ("none", "ieee")]
        try:
            for home, _ in lowered:
                home.fp32_precision = "ieee"
            yield
        finally:
            for home, value in lowered:
                home.fp32_precision = value
        return
    level = torch.get_float32_matmul_precision()
    try:
        if level != "highest":
            torch.set_float32_matmul_precision("highest")
        yield
    finally:
        if level != "highest":
            torch.set_float32_matmul_precision(level)
