"""Running a script as the interpreter would, in another process."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

import fastedit
from fastedit.cli.main import main
from fastedit.errors import FasteditError
from fastedit.integrations.runner import child_command, run, split_command

SCRIPT = '''
"""A script."""
from __future__ import annotations

import sys

def shown(x: NotDefinedAnywhere) -> int:
    return x

if __name__ == "__main__":
    import helper
    print(sys.argv, __file__, __name__, helper.VALUE, sys.path[0], sys.modules["__main__"].shown(3))
    sys.exit(5)
'''


@pytest.fixture
def folder(tmp_path):
    (tmp_path / "pack").mkdir()
    (tmp_path / "pack" / "__init__.py").write_text("")
    (tmp_path / "pack" / "script.py").write_text(SCRIPT)
    (tmp_path / "pack" / "helper.py").write_text("VALUE = 'beside the script'\n")
    (tmp_path / "helper.py").write_text("VALUE = 'in the working directory'\n")
    return tmp_path


def accelerate(folder, *arguments):
    package = str(Path(fastedit.__file__).parents[1])
    environment = {**os.environ, "PYTHONPATH": package, "PYTHONDONTWRITEBYTECODE": "1", "PYTHONSAFEPATH": ""}
    line = [sys.executable, "-m", "fastedit", "accelerate", *arguments]
    return subprocess.run(line, cwd=folder, env=environment, capture_output=True, text=True)


@pytest.mark.slow
@pytest.mark.parametrize("command", [["-m", "pack.script"], ["pack/script.py"]], ids=["module", "file"])
def test_a_script_sees_what_it_sees_without_us(folder, command):
    environment = {**os.environ, "PYTHONSAFEPATH": ""}
    environment.pop("PYTHONPATH", None)
    plain = subprocess.run(
        [sys.executable, *command, "a", "--b"], cwd=folder, env=environment, capture_output=True, text=True
    )
    assert plain.returncode == 5, plain.stderr
    ours = accelerate(folder, "--report", "out.json", "--", sys.executable, *command, "a", "--b")
    assert ours.returncode == 5, ours.stderr
    assert ours.stdout == plain.stdout
    assert "no module of a project that is known was loaded" in ours.stderr
    assert json.loads((folder / "out.json").read_text())["replaced"] == {}


def test_the_report_also_comes_after_an_error(folder):
    (folder / "fails.py").write_text("raise RuntimeError('broken')\n")
    ours = accelerate(folder, "--json", "--", sys.executable, "fails.py")
    assert ours.returncode == 1
    assert "RuntimeError: broken" in ours.stderr
    assert (
        json.loads(ours.stderr[ours.stderr.index("{\n") : ours.stderr.index("}\nTraceback") + 1])["skipped"]
        == {}
    )


@pytest.mark.parametrize(
    ("command", "message"),
    [
        ([], "give the command that you would type"),
        (["--", "ls"], "give the command that you would type"),
        (["--", "python", "-c", "1"], "must run a script"),
        (["--", "/no/python3", "x.py"], "there is no interpreter /no/python3"),
    ],
)
def test_a_command_that_is_none_says_why(command, message, capsys):
    assert main(["accelerate", *command]) in (1, 2)
    assert message in capsys.readouterr().err


@pytest.mark.parametrize(
    ("command", "message"),
    [(["no_such.py"], "there is no script no_such.py"), (["-m", "no.such"], "there is no module no.such")],
    ids=["file", "module"],
)
def test_something_to_run_that_is_not_there_is_named(command, message):
    with pytest.raises(FasteditError, match=message):
        run(command)


def test_flags_of_the_interpreter_stay_with_it():
    parts = split_command(["python3", "-u", "-W", "ignore", "-m", "a.b", "-x"])
    assert parts == ("python3", ["-u", "-W", "ignore"], ["-m", "a.b", "-x"])
    line = child_command(*parts, {"fix": []})
    assert line[:5] == ["python3", "-u", "-W", "ignore", "-m"]
    assert line[-4:] == ["--", "-m", "a.b", "-x"]
