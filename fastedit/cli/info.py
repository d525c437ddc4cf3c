"""``fastedit info``: versions, devices, and which backend serves which operation."""

from __future__ import annotations

import argparse
import platform
from importlib import metadata
from typing import Any

from .._version import __version__
from . import common
from ._table import table

_EXAMPLES = """\
  fastedit info
  fastedit info --json | jq '.operations[] | select(.available | not)'
"""
_LIBRARIES = ("torch", "transformers", "triton", "numpy", "safetensors", "peft", "accelerate", "faiss-cpu")


def add_parser(subparsers: Any) -> None:
    """Add the subcommand to the parser of ``fastedit``."""
    parser = common.subcommand(
        subparsers,
        "info",
        "show versions, devices and the available kernels",
        "Show versions, devices, editing methods, and for each operation the backends that can run it here, "
        "with the reason for each one that cannot.",
        _EXAMPLES,
    )
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    """Do what the arguments say; returns the exit status."""
    value = collect()
    common.emit(value, _text(value), args.json)
    return 0


def collect() -> dict[str, Any]:
    """Everything that ``fastedit info`` shows, as plain values."""
    from ..editors import methods
    from ..ops import backend

    return {
        "fastedit": __version__,
        "python": platform.python_version(),
        "platform": platform.platform(),
        "libraries": {name: _version(name) for name in _LIBRARIES},
        "devices": _devices(),
        "methods": methods(),
        "operations": [row._asdict() for row in backend.table()],
    }


def _version(name: str) -> str | None:
    try:
        return metadata.version(name)
    except metadata.PackageNotFoundError:
        return None


def _devices() -> list[str]:
    import torch

    devices = [f"cpu, {torch.get_num_threads()} threads"]
    if torch.cuda.is_available():
        for index in range(torch.cuda.device_count()):
            properties = torch.cuda.get_device_properties(index)
            memory = properties.total_memory / 2**30
            devices.append(f"cuda:{index}, {properties.name}, {memory:.0f} GiB")
    return devices


def _text(value: dict[str, Any]) -> str:
    libraries = ", ".join(f"{name} {version or '-'}" for name, version in value["libraries"].items())
    rows = [
        (row["op"], row["backend"], row["device"], "yes" if row["available"] else "no", row["reason"])
        for row in value["operations"]
    ]
    return "\n".join(
        [
            f"fastedit {value['fastedit']} on Python {value['python']}, {value['platform']}",
            f"libraries: {libraries}",
            f"devices:   {'; '.join(value['devices'])}",
            f"methods:   {', '.join(value['methods'])}",
            "",
            table(("operation", "backend", "device", "available", "reason if not"), rows),
        ]
    )
