"""A small project on disk, written for these tests, in the style of the repositories that fastedit accelerates."""

import itertools
import sys
import textwrap
from pathlib import Path

import pytest

FILES = {
    "solver.py": """
        def scale(x):
            return 2 * x

        def solve(x, extra=0):
            # a comment that does not count
            return scale(x) + extra
    """,
    "main.py": """
        from .solver import solve
        from . import solver

        CACHE = {}
        TABLE = {"solve": solve, "pair": ("name", solve)}

        def execute(x):
            return solve(x) + 1

        class Editor:
            def step(self, x):
                return x + 10
    """,
}
_NUMBER = itertools.count()


@pytest.fixture
def project(tmp_path, monkeypatch):
    """A function that writes the project under a fresh package name and returns the name; cleaned up afterwards."""
    monkeypatch.syspath_prepend(str(tmp_path))
    before = set(sys.modules)

    def write(files: dict[str, str] | None = None) -> str:
        name = f"fake_project_{next(_NUMBER)}"
        (tmp_path / name).mkdir()
        (tmp_path / name / "__init__.py").write_text("")
        for file, text in {**FILES, **(files or {})}.items():
            (tmp_path / name / file).write_text(textwrap.dedent(text).lstrip("\n"))
        return name

    write.folder = tmp_path  # type: ignore[attr-defined]
    yield write
    for name in set(sys.modules) - before:
        if name.startswith("fake_project_"):
            del sys.modules[name]


def folder_of(module) -> Path:
    """The folder of the project that a module of it belongs to."""
    return Path(module.__file__).parent
