"""What an editor carries from batch to batch, on disk: so that a sequence of edits can go on in another process.

A state belongs to one model with certain edits on it. It is one directory, whole or absent: ``state.json`` says
whose it is, ``state.safetensors`` holds the tensors.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from ..artefacts.plain import plain
from ..artefacts.safetensors_file import read_tensors, write_tensors
from ..artefacts.weights import locate
from ..errors import BaseMismatch, CorruptFile
from ..io import atomic_directory, atomic_write_json, read_json, sha256_file
from ..models.describe import unwrap
from ..models.fingerprint import weight_digest

FORMAT = "fastedit-editor-state"
VERSION = 1
_JSON, _TENSORS = "state.json", "state.safetensors"


@dataclass(frozen=True)
class State:
    """What is written and read.

    Attributes:
        method: the editor's.
        params: its hyper-parameters.
        profile: its profile.
        digests: weight name -> digest of the bits that the model has now.
        tensors: by name.
        about: anything else that JSON can hold.
    """

    method: str
    params: dict[str, Any]
    profile: str
    digests: dict[str, str]
    tensors: dict[str, Tensor]
    about: dict[str, Any]


def digests_of(model: nn.Module, weight_names: list[str]) -> dict[str, str]:
    """By weight name, the digest of its present bits."""
    return {name: weight_digest(locate(unwrap(model), name).parameter.detach()) for name in weight_names}


def write_state(state: State, directory: str | Path) -> Path:
    """Write a state, replacing an older one there; a crash leaves the older one."""
    directory = Path(directory)
    if directory.exists() and not (directory / _JSON).exists() and any(directory.iterdir()):
        raise FileExistsError(f"{directory} holds something other than an editor's state")
    with atomic_directory(directory, overwrite=True) as temporary:
        write_tensors(temporary / _TENSORS, state.tensors)
        content = {
            "format": FORMAT,
            "version": VERSION,
            "method": state.method,
            "params": plain(state.params),
            "profile": state.profile,
            "digests": state.digests,
            "about": plain(state.about),
            "sha256": sha256_file(temporary / _TENSORS),
        }
        atomic_write_json(temporary / _JSON, content)
    return directory


def read_state(directory: str | Path) -> State:
    """Read a state.

    Raises:
        CorruptFile: there is none, or a file is truncated or damaged; names the file.
    """
    directory = Path(directory)
    if not (directory / _JSON).is_file():
        raise CorruptFile(f"there is no editor's state in {directory}: it has no {_JSON}")
    content = read_json(directory / _JSON)
    if (
        not isinstance(content, Mapping)
        or content.get("format") != FORMAT
        or content.get("version") != VERSION
    ):
        raise CorruptFile(f"{directory / _JSON} is no editor's state of version {VERSION}")
    path = directory / _TENSORS
    if not path.is_file() or sha256_file(path) != content["sha256"]:
        raise CorruptFile(f"{path} is missing, truncated or damaged: its checksum does not fit")
    fields = ("method", "params", "profile", "digests", "about")
    return State(**{name: content[name] for name in fields}, tensors=read_tensors(path))


def require_fit(state: State, method: str, params: Any, profile: str, model: nn.Module) -> None:
    """Make sure that a state belongs to this editor and to the model as it is.

    Raises:
        BaseMismatch: it belongs to another method or other settings, or the weights are not those it was saved
            with; names the first difference.
    """
    for name, saved, now in (
        ("method", state.method, method),
        ("profile", state.profile, profile),
        ("params", state.params, plain(vars(params))),
    ):
        if saved != now:
            raise BaseMismatch(f"the saved state has {name} {saved}, this editor has {now}")
    present = digests_of(model, list(state.digests))
    for name, digest in state.digests.items():
        if present[name] != digest:
            raise BaseMismatch(
                f"{name} does not have the bits that it had when the state was saved: load the model with the same "
                "edits on it"
            )
