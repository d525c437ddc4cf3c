"""Computing an edit while weights change, with nothing left behind if it fails."""

from __future__ import annotations

from collections.abc import Iterable
from types import TracebackType

from torch import Tensor, nn

from ..errors import FasteditError
from .edit import Edit
from .stack import stack_of
from .weights import copy_of, locate, uninterrupted, write


class Transaction:
    """Change some weights while an edit is computed; in the end it is applied whole, or not at all.

    >>> with Transaction(model, names) as transaction:       # doctest: +SKIP
    ...     ...                                              # compute factors, changing these weights at will
    ...     edit = transaction.commit(Edit(method="memit", facts=facts, factors=factors))

    Entering saves exact copies of the named matrices. :meth:`commit` puts them back and applies the factors
    (:meth:`EditStack.push`), so the result depends on the factors only. Leaving without a commit, by an
    exception or Ctrl-C too, puts the copies back.

    Args:
        model: the model.
        weight_names: checkpoint names of the weights that may change.

    Raises:
        BaseMismatch: on entering: something else changed one of the weights since the last edit.
    """

    def __init__(self, model: nn.Module, weight_names: Iterable[str]) -> None:
        self._stack = stack_of(model)
        self._places = {name: locate(self._stack.model, name) for name in weight_names}
        self._copies: dict[str, Tensor] = {}
        self._digests: dict[str, str] = {}
        self._open = False

    def __enter__(self) -> Transaction:
        stack = self._stack
        stack._lock.acquire()
        try:
            self._digests = stack._digests(self._places.values())
            stack._check_unchanged(self._digests)
            self._copies = {
                place.parameter_name: copy_of(place, stack.originals_on) for place in self._places.values()
            }
        except BaseException:
            stack._lock.release()
            raise
        self._open = True
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        try:
            self.rollback()
        finally:
            self._stack._lock.release()

    def before(self, name: str) -> Tensor:
        """The named weight as it was on entering, (d_out, d_in); not to be written to."""
        place = self._places[name]
        copy = self._copies[place.parameter_name]
        return copy.T if place.transposed else copy

    def rollback(self) -> None:
        """Put the copies back and end the transaction; does nothing after a commit."""
        if self._open:
            self._restore()
            self._open = False
            self._copies = {}

    def commit(self, edit: Edit) -> Edit:
        """Put the copies back, apply ``edit`` and end the transaction; returns the edit.

        Raises:
            ValueError: the edit changes a weight that the transaction did not name.
            FasteditError: the transaction has ended.
        """
        if not self._open:
            raise FasteditError("commit: the transaction has ended")
        extra = [name for name in edit.weight_names if name not in self._places]
        if extra:
            raise ValueError(
                f"commit: the edit changes {extra}, the transaction is about {list(self._places)}"
            )
        with uninterrupted():
            self._restore()
            known = {
                place.parameter_name: self._digests[place.parameter_name]
                for name, place in self._places.items()
                if name in edit.weight_names
            }
            self._stack._push(edit, False, known, self._copies)
            self._open = False
            self._copies = {}
        return edit

    def _restore(self) -> None:
        with uninterrupted():
            for place in self._places.values():
                write(place.parameter, self._copies[place.parameter_name])
