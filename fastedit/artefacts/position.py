"""Whether an edit fits where it is to be applied."""

from __future__ import annotations

from collections.abc import Sequence

from ..errors import BaseMismatch
from .edit import Edit


def check_position(
    edit: Edit, name: str, digest: str, base_digest: str, beneath: Sequence[str], dtype: str
) -> None:
    """Make sure that a matrix is what an edit found when it was made.

    Args:
        edit: the edit.
        name: the weight.
        digest: of the matrix now.
        base_digest: of the matrix before the edits that are known to be on it.
        beneath: ids of those edits, oldest first.
        dtype: the matrix's dtype, for the message.

    Raises:
        BaseMismatch: the bits differ, and it is not the same base with the same edits on it either.
    """
    record = edit.matrices[name]
    if digest == record.before_digest:
        return
    if base_digest == record.base_digest and tuple(beneath) == record.beneath:
        return  # the same edits, computed on other hardware: equal up to rounding
    if dtype != record.dtype:
        what = f"it is {dtype} here and was {record.dtype}: load the model with dtype={record.dtype}"
    elif digest == record.after_digest:
        what = "it holds the result of this edit already"
    elif base_digest == record.base_digest:
        now, then = ", ".join(beneath) or "no edits", ", ".join(record.beneath) or "no edits"
        what = f"the edits on it are {now}, and were {then}: put the same edits on it first, in that order"
    else:
        what = "its bits are others: load the model that the edit was made on"
    raise BaseMismatch(
        f"{edit!r} does not fit this model. {name} is not as the edit found it: {what}. To apply it "
        "all the same, "
        "pass force=True (--force). Nothing was touched"
    )
