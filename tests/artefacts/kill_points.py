"""Run actions on copies of a model directory, killed at every point where they change the file system.

Called by test_on_disk.py as a program of its own, which has one thread and so may fork. Standard input holds
JSON: a list of ``{"workspace", "model", "edit", "action", "signal"}``. For each, a child gets the signal at its
nth audit event that changes files, n = 1, 2, ... until one ends by itself. The copies are left in the
workspace, named by n, for the test to look at; the finished one is called ``done``.
"""

from __future__ import annotations

import json
import os
import shutil
import signal
import sys
from pathlib import Path

import torch

EVENTS = ("open", "os.rename", "os.remove", "os.mkdir", "os.rmdir", "os.chmod")
WRITING = os.O_WRONLY | os.O_RDWR | os.O_CREAT


def act(action: str, model: Path, edit: Path) -> None:
    from fastedit.artefacts import apply_to_directory, revert_directory

    if action == "apply":
        apply_to_directory(edit, model)
    else:
        revert_directory(model, action)


def child(action: str, model: Path, edit: Path, stop: int, number: int) -> None:
    count = 0

    def hook(event: str, args: tuple) -> None:
        nonlocal count
        if event not in EVENTS or not str(args[0]).startswith(str(model)):
            return
        if event == "open" and not (isinstance(args[2], int) and args[2] & WRITING):
            return
        count += 1
        if count == stop:
            os.kill(os.getpid(), number)

    sys.addaudithook(hook)
    try:
        act(action, model, edit)
    except KeyboardInterrupt:
        os._exit(130)
    os._exit(0)


def kill_everywhere(workspace: Path, model: Path, edit: Path, action: str, number: int) -> None:
    for stop in range(1, 1000):
        copy = workspace / f"{stop:03d}"
        shutil.copytree(model, copy)
        pid = os.fork()
        if pid == 0:
            child(action, copy, edit, stop, number)
        status = os.waitpid(pid, 0)[1]
        if os.WIFEXITED(status) and os.WEXITSTATUS(status) == 0:
            copy.rename(workspace / "done")
            return
        if not os.WIFSIGNALED(status) and os.WEXITSTATUS(status) != 130:
            raise SystemExit(f"{action} in {copy} ended with status {status}")


def main() -> None:
    torch.set_num_threads(1)
    import fastedit.artefacts

    for job in json.load(sys.stdin):
        workspace, model, edit = (Path(job[name]) for name in ("workspace", "model", "edit"))
        fastedit.artefacts.load_edit(edit)  # so that children need not import anything
        workspace.mkdir(parents=True)
        kill_everywhere(workspace, model, edit, job["action"], signal.Signals[job["signal"]])


if __name__ == "__main__":
    signal.signal(signal.SIGINT, signal.default_int_handler)  # programs started in the background ignore it
    main()
