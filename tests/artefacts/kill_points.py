"""Run one action on copies of a model directory, killed at every point where it changes the file system.

Called by test_on_disk.py as a program of its own, which has one thread and so may fork:
``python kill_points.py WORKSPACE MODEL EDIT ACTION SIGNAL``, with the signal to send. Each child is stopped at
its nth audit event on files; the copies are left in WORKSPACE, named by n, for the test to look at.
"""

from __future__ import annotations

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
        if event == "open" and not (isinstance(args[2], int) and args[2] & WRITING):
            return
        if event in EVENTS and str(args[0]).startswith(str(model)):
            count += 1
            if count == stop:
                os.kill(os.getpid(), number)

    sys.addaudithook(hook)
    try:
        act(action, model, edit)
    except KeyboardInterrupt:
        os._exit(130)
    os._exit(0)


def main() -> None:
    workspace, model, edit = (Path(argument) for argument in sys.argv[1:4])
    action, number = sys.argv[4], signal.Signals[sys.argv[5]]
    torch.set_num_threads(1)
    import fastedit.artefacts

    assert fastedit.artefacts.load_edit(edit)
    for stop in range(1, 1000):
        copy = workspace / f"{stop:03d}"
        shutil.copytree(model, copy)
        pid = os.fork()
        if pid == 0:
            child(action, copy, edit, stop, number)
        status = os.waitpid(pid, 0)[1]
        if os.WIFEXITED(status) and os.WEXITSTATUS(status) == 0:
            break
        assert os.WIFSIGNALED(status) or os.WEXITSTATUS(status) == 130, status


if __name__ == "__main__":
    main()
