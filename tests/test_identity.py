"""Another distribution with the same import name is noticed, and the message says how to mend it."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

import fastedit

SOURCE = Path(fastedit.__file__).parent


def overwritten(folder: Path, init: str) -> Path:
    """A copy of the package whose ``__init__.py`` another distribution has replaced."""
    package = folder / "fastedit"
    package.mkdir()
    for path in SOURCE.iterdir():
        if path.name not in ("__init__.py", "__pycache__"):
            (package / path.name).symlink_to(path)
    (package / "__init__.py").write_text(init)
    return folder


def python(code: str, folder: Path) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-c", f"import sys; sys.path.insert(0, {str(folder)!r}); {code}"],
        cwd=folder,
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )


@pytest.mark.parametrize(
    "code", ["import fastedit.ops", "from fastedit.cli.main import main", "import fastedit.models"]
)
def test_a_foreign_init_is_named_with_the_remedy(tmp_path: Path, code: str) -> None:
    folder = overwritten(tmp_path, "__version__ = '0.7.0'\n")
    result = python(code, folder)
    assert result.returncode != 0
    assert "does not belong to fastedit-llm" in result.stderr
    assert "pip uninstall" in result.stderr


def test_another_distribution_beside_ours_is_warned_about(tmp_path: Path) -> None:
    other = tmp_path / "pyfastedit-0.0.5.dist-info"
    other.mkdir()
    (other / "METADATA").write_text("Metadata-Version: 2.1\nName: pyfastedit\nVersion: 0.0.5\n")
    result = python("import fastedit; print(fastedit.Fact)", tmp_path)
    assert result.returncode == 0, result.stderr
    assert "pyfastedit also provides a package called fastedit" in result.stderr


def test_import_is_light(tmp_path: Path) -> None:
    """No transformers, no triton, no CUDA context, no subpackages."""
    code = (
        "import fastedit, sys, torch; heavy = {'transformers', 'triton', 'fastedit.editors', 'fastedit._C'}; "
        "assert not heavy & set(sys.modules), heavy & set(sys.modules); assert not torch.cuda.is_initialized()"
    )
    result = subprocess.run(
        [sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True, check=False
    )
    assert result.returncode == 0, result.stderr


def test_public_names_exist() -> None:
    for name in fastedit.__all__:
        assert getattr(fastedit, name) is not None
    with pytest.raises(AttributeError, match="no attribute 'nothing'"):
        fastedit.nothing  # noqa: B018
