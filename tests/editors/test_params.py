"""The packaged hyper-parameters are ones that their methods accept."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

import fastedit.editors
from fastedit.editors import methods
from fastedit.editors.base import editor_class
from fastedit.editors.params import from_mapping
from fastedit.io import read_json
from fastedit.models.table import ROWS

FOLDER = Path(fastedit.editors.__file__).parent / "params"
FILES = sorted(path.stem for path in FOLDER.glob("*.json"))


def test_every_file_belongs_to_a_method() -> None:
    used = {editor_class(method).params_file or method for method in methods()}
    assert set(FILES) <= used


@pytest.mark.parametrize("file", FILES)
def test_every_entry_is_accepted(file: str) -> None:
    kinds = {editor_class(m).Params for m in methods() if (editor_class(m).params_file or m) == file}
    for key, values in read_json(FOLDER / f"{file}.json").items():
        family, shape = key.split("/")
        assert family in ROWS
        match = re.fullmatch(r"(\d+)x(\d+)x(\d+)", shape)
        assert match
        for kind in kinds:
            params = from_mapping(kind, values)
            modules = getattr(params, "modules", {"": getattr(params, "layers", ())})
            layers = [layer for chosen in modules.values() for layer in chosen]
            assert layers
            assert max(layers) < int(match[1])
