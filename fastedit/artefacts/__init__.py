"""An edit as a thing: apply, revert, save, load and export it, on live models and on model directories.

>>> edit = editor.edit(facts)                                       # doctest: +SKIP
>>> edit.save("france-lyon")                                        # doctest: +SKIP
>>> fastedit.load_edit("france-lyon").apply(model)                  # doctest: +SKIP
>>> stack_of(model).edits                                           # doctest: +SKIP
"""

from __future__ import annotations

from .adapter import export_adapter
from .edit import Edit, MatrixRecord
from .factors import Change, LowRank
from .on_disk import apply_to_directory, export, list_directory, revert_directory
from .stack import EditStack, stack_of
from .storage import load_edit, save_edit
from .transaction import Transaction

__all__ = [
    "Change",
    "Edit",
    "EditStack",
    "LowRank",
    "MatrixRecord",
    "Transaction",
    "apply_to_directory",
    "export",
    "export_adapter",
    "list_directory",
    "load_edit",
    "revert_directory",
    "save_edit",
    "stack_of",
]
