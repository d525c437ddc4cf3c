"""The target-value caches of the MEMIT, AlphaEdit and NSE repositories: one ``.npz`` a fact, made in batches.

Source: kmeng01/memit and jianghoucheng/AlphaEdit : experiments/evaluate.py, memit/memit_main.py. Their harness looks
for ``{model}_{ALG}/{dataset}_layer_{layer}_clamp_{clamp}_case_{case_id}.npz`` with one entry ``v_star`` (h,). Nothing
in that name says which target, prompt, settings or weights a value belongs to, so a stale file is used in silence.
Ours carry a digest of all that, in entries whose names begin with ``fastedit.`` (their reader passes them over), a
JSON file beside them says it in words, and files of other settings are never mixed in.
"""

from __future__ import annotations

import hashlib
import json
import os
import zipfile
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
from torch import Tensor

from .. import io
from ..errors import BaseMismatch, CorruptFile, InvalidFact
from ..facts import Fact
from ..models import fingerprint, tokenizer_digest
from ..models.runner import frozen
from ..progress import progress
from .locate_then_edit import LocateThenEdit
from .prompts import fact_rows

_FORMAT = "fastedit target values 1"


@dataclass(frozen=True)
class Written:
    """What :func:`write_targets` did.

    Attributes:
        directory: the folder with the files.
        made: files written now.
        found: files that were there from an earlier run.
        failed: by case, why a value could not be made; these have no file.
    """

    directory: Path
    made: list[Path]
    found: list[Path]
    failed: dict[str, str]


def target_file(
    directory: str | os.PathLike[str],
    model_name: str,
    algorithm: str,
    dataset: str,
    layer: int,
    clamp: float,
    case_id: str | int,
) -> Path:
    """Where the harness looks for the value of one fact.

    Args:
        directory: its ``KV_DIR``.
        model_name: as given to the harness; ``/`` becomes ``_``.
        algorithm: ``"MEMIT"`` for MEMIT, AlphaEdit and all variants of MEMIT, else ``"NSE"``.
        dataset: the harness's name of the data set, such as ``"mcf"``.
        layer: the layer at which the value lives, the last one edited.
        clamp: ``clamp_norm_factor``, in the shortest form: 0.75, 4.
        case_id: of the record.
    """
    folder = Path(directory) / f"{model_name.replace('/', '_')}_{algorithm}"
    return folder / f"{_stem(dataset, layer, clamp)}_case_{case_id}.npz"


def write_targets(
    editor: LocateThenEdit,
    facts: Sequence[Fact],
    directory: str | os.PathLike[str],
    *,
    model_name: str,
    algorithm: str,
    dataset: str,
    batch_size: int = 100,
    show_progress: bool | None = None,
) -> Written:
    """Optimise the target values of facts on the model as it is and write those that are not there yet.

    Each file is written whole, batch by batch, so an interrupted call goes on where it was.

    Args:
        editor: of the method whose targets are wanted; its parameters, contexts and profile decide.
        facts: each with a ``case_id`` of its own, or none: then its position counts.
        directory: see :func:`target_file`.
        model_name: likewise.
        algorithm: likewise.
        dataset: likewise.
        batch_size: facts optimised between two writes.
        show_progress: see :func:`fastedit.progress.progress`.

    Raises:
        InvalidFact: two facts have one ``case_id``.
        BaseMismatch: the folder holds values of this data set, layer and clamp that were made with another model,
            settings or facts, or by another program. Nothing is written.
        CorruptFile: a file there cannot be read.
    """
    params = editor.params
    layer, clamp = params.layers[-1], params.clamp
    cases = _cases(facts)
    files = {
        case: target_file(directory, model_name, algorithm, dataset, layer, clamp, case) for case in cases
    }
    folder = next(iter(files.values())).parent
    about_file = folder / f"{_stem(dataset, layer, clamp)}_fastedit.json"
    settings = _settings(editor, algorithm)
    if about_file.exists():
        _require_same_settings(about_file, settings)
    digest = hashlib.sha256(json.dumps(settings, sort_keys=True).encode()).hexdigest()
    found = [case for case, file in files.items() if file.exists()]
    for case in found:
        _require_same_value(files[case], digest, cases[case])
    io.atomic_write_json(about_file, settings)

    missing = [case for case in cases if case not in set(found)]
    made, failed = [], {}
    with progress(total=len(cases), desc="target values", unit="fact", show=show_progress) as bar:
        bar.update(len(found))
        for start in range(0, len(missing), batch_size):
            part = missing[start : start + batch_size]
            for case, value in zip(part, _values(editor, [cases[case] for case in part]), strict=True):
                if isinstance(value, str):
                    failed[case] = value
                else:
                    _write(files[case], value, digest, cases[case])
                    made.append(files[case])
            bar.update(len(part))
    return Written(folder, made, [files[case] for case in found], failed)


def _stem(dataset: str, layer: int, clamp: float) -> str:
    return f"{dataset}_layer_{layer}_clamp_{clamp:g}"


def _cases(facts: Sequence[Fact]) -> dict[str, Fact]:
    cases: dict[str, Fact] = {}
    for position, fact in enumerate(facts):
        case = str(position if fact.case_id is None else fact.case_id)
        if case in cases:
            raise InvalidFact(
                f"two facts have the case_id {case}, and a file holds one value: {cases[case].text!r} and "
                f"{fact.text!r}"
            )
        cases[case] = fact
    if not cases:
        raise InvalidFact("no facts were given: there are no target values to make")
    return cases


def _settings(editor: LocateThenEdit, algorithm: str) -> dict[str, Any]:
    """All that decides the values but the facts."""
    return {
        "format": _FORMAT,
        "algorithm": algorithm,
        "model": fingerprint(editor.model),
        "tokenizer": tokenizer_digest(editor.tokenizer),
        "objective": asdict(editor.objective()),
        "contexts": list(editor.contexts),
    }


def _require_same_settings(about_file: Path, settings: dict[str, Any]) -> None:
    before = io.read_json(about_file)
    changed = sorted(name for name in settings if before.get(name) != settings[name])
    if changed:
        raise BaseMismatch(
            f"{about_file.parent} holds target values that were made with another {' and '.join(changed)} (see "
            f"{about_file.name}): remove them, or choose another folder"
        )


def _values(editor: LocateThenEdit, facts: Sequence[Fact]) -> Iterator[Tensor | str]:
    """The target (h,) of each fact, or the reason why there is none."""
    with frozen(editor.model):
        rows = fact_rows(editor.tokenizer, facts, editor.contexts, editor.description.context_length)
        values = editor.targets(facts, rows)
    for position, target in enumerate(values.target):
        yield values.broken.get(position, target)


def _text(fact: Fact) -> str:
    return json.dumps([fact.prompt, fact.subject, fact.target])


def _write(path: Path, value: Tensor, digest: str, fact: Fact) -> None:
    entries: dict[str, Any] = {
        "v_star": value.float().cpu().numpy(),
        "fastedit.settings": digest,
        "fastedit.fact": _text(fact),
    }
    with io.atomic_file(path) as temporary, open(temporary, "wb") as file:
        np.savez(file, **entries)


def _require_same_value(path: Path, digest: str, fact: Fact) -> None:
    try:
        with np.load(path, allow_pickle=False) as archive:
            theirs = {name: str(archive[name]) for name in archive.files if name.startswith("fastedit.")}
    except (zipfile.BadZipFile, ValueError, EOFError, OSError) as error:
        raise CorruptFile(f"{path} is not a whole .npz file ({error}): remove it") from None
    if not theirs:
        raise BaseMismatch(f"{path} was made by another program, which does not say of what: remove it")
    if theirs.get("fastedit.settings") != digest:
        raise BaseMismatch(f"{path} was made with other settings: remove it, or choose another folder")
    if theirs.get("fastedit.fact") != _text(fact):
        raise BaseMismatch(f"{path} holds the value of {theirs.get('fastedit.fact')}, not of {_text(fact)}")
