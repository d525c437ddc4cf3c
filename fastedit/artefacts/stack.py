"""The edits on a live model, in order, with the exact bits from before the first of them.

Rule: at any time an edited matrix equals :func:`fastedit.artefacts.render.render` of its original and the
edits on it, bit for bit. So edits come off in any order, and taking all of them off gives back the original
bits, which subtracting could not.

Memory: one copy of each edited matrix in its own dtype (on the CPU unless ``originals_on="model"``), the
factors of all edits (CPU), and, for a bfloat16 or float16 matrix with two or more edits on it, a float32
master on the matrix's device (``masters=False`` saves it, and small sequential changes get lost in rounding).
"""

from __future__ import annotations

import logging
import threading
import weakref
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor, nn

from ..errors import BaseMismatch, FasteditError, NumericalError
from ..models.describe import unwrap
from ..models.fingerprint import fingerprint, weight_digest
from ..progress import progress
from .edit import Edit, MatrixRecord
from .position import check_position
from .render import HALF, Update, advance_, chosen_backend, digests, render, settle, working_copy
from .weights import Located, Place, copy_of, locate, uninterrupted, write

logger = logging.getLogger(__name__)

_stacks: weakref.WeakKeyDictionary[nn.Module, EditStack] = weakref.WeakKeyDictionary()


@dataclass
class _Matrix:
    """One edited matrix: its original, the updates on it, and the digest of what it holds now."""

    original: Tensor
    base_digest: str
    digest: str
    updates: list[Update] = field(default_factory=list)
    master: Tensor | None = None  # of the present state, if it is worth keeping
    seen: dict[tuple[str, ...], str] = field(default_factory=dict)  # digests of former states, by edits on it

    @property
    def ids(self) -> tuple[str, ...]:
        return tuple(update.edit_id for update in self.updates)


def stack_of(
    model: nn.Module, *, originals_on: Place | None = None, masters: bool | None = None
) -> EditStack:
    """The stack of edits on a model, made at first use.

    Wrappers (PEFT, ``torch.compile``) are looked through. The stack lives as long as the model, follows it
    through ``model.to(device)``, and is not copied with it.

    Args:
        model: the model.
        originals_on: ``"cpu"`` (default) or ``"model"``: beside the weights, faster and in device memory.
        masters: keep float32 masters of half-precision matrices (default true).

    Raises:
        ValueError: an option that differs from that of a stack which holds edits.
    """
    model = unwrap(model)
    stack = _stacks.get(model)
    if stack is None:
        stack = _stacks[model] = EditStack(model)
    stack._configure(originals_on, masters)
    return stack


class EditStack:
    """The edits on one model. Get it from :func:`stack_of`."""

    def __init__(self, model: nn.Module) -> None:
        self._model = weakref.ref(model)
        self._edits: list[Edit] = []
        self._matrices: dict[str, _Matrix] = {}  # by the parameter's first name
        self._lock = threading.RLock()
        self._base_fingerprint = ""
        self.originals_on: Place = "cpu"
        self.masters = True

    # -- looking ------------------------------------------------------------------------------------

    @property
    def model(self) -> nn.Module:
        """The model.

        Raises:
            FasteditError: it does not exist any more.
        """
        model = self._model()
        if model is None:
            raise FasteditError("the model of this stack does not exist any more")
        return model

    @property
    def edits(self) -> tuple[Edit, ...]:
        """The edits on the model, oldest first."""
        return tuple(self._edits)

    def __len__(self) -> int:
        return len(self._edits)

    def __contains__(self, edit: object) -> bool:
        return isinstance(edit, Edit) and any(other.id == edit.id for other in self._edits)

    def original(self, weight_name: str) -> Tensor | None:
        """The bits of a weight before the first edit on it, as stored and not to be changed; None if unedited."""
        matrix = self._matrices.get(locate(self.model, weight_name).parameter_name)
        return None if matrix is None else matrix.original

    @property
    def memory_bytes(self) -> int:
        """Bytes of originals, masters and factors."""
        tensors = [t for m in self._matrices.values() for t in (m.original, m.master) if t is not None]
        return sum(t.numel() * t.element_size() for t in tensors) + sum(e.size_bytes for e in self._edits)

    def base_fingerprint(self) -> str:
        """Fingerprint of the model as it was before the edits on it."""
        if not self._base_fingerprint or not self._edits:
            originals = {name: matrix.original for name, matrix in self._matrices.items()}
            self._base_fingerprint = fingerprint(self.model, originals=originals)
        return self._base_fingerprint

    def check(self, names: Iterable[str] | None = None) -> None:
        """Make sure that the edited matrices hold the bits that the stack left in them.

        Args:
            names: parameter names; None checks all edited matrices.

        Raises:
            BaseMismatch: something else changed one of them.
        """
        wanted = [n for n in (self._matrices if names is None else names) if n in self._matrices]
        self._check_unchanged(self._digests(locate(self.model, name) for name in wanted))

    def before(self, edit: Edit) -> dict[str, Tensor]:
        """Weight name → the bits, on the CPU, that it has with only the edits beneath this one on it."""
        with self._lock:
            self._require(edit)
            result = {}
            for name in edit.weight_names:
                located = locate(self.model, name)
                matrix = self._matrices[located.parameter_name]
                beneath = matrix.updates[: matrix.ids.index(edit.id)]
                result[name] = self._render(located, matrix.original, beneath)[0].cpu().contiguous()
            return result

    # -- changing -----------------------------------------------------------------------------------

    def push(self, edit: Edit, *, force: bool = False) -> None:
        """Apply an edit on top of those that are on the model.

        A new edit gets its records (:attr:`Edit.matrices`, :attr:`Edit.base_fingerprint`); one that has
        records must fit: its matrices hold the bits that it found when it was made, or the same base with
        the same edits on it.

        Args:
            edit: the edit; cannot be on the model already.
            force: skip the check that base and position fit.

        Raises:
            BaseMismatch: it does not fit, or something else changed the matrices since the last edit.
            NumericalError: the factors or the result are not finite.
            FasteditError: it is on the model already. In every case the model keeps its bits.
        """
        with self._lock:
            self._push(edit, force, None, None)

    def remove(self, edit: Edit) -> None:
        """Take one edit off, wherever it is; those above it are applied again.

        Raises:
            FasteditError: it is not on the model.
            BaseMismatch: something else changed the matrices. Nothing is touched then.
        """
        with self._lock:
            if edit not in self and self._restore_foreign(edit):
                return
            self._require(edit)
            self._keep([other for other in self._edits if other.id != edit.id])

    def remove_last(self, k: int = 1) -> None:
        """Take the last ``k`` edits off; ValueError if there are fewer."""
        with self._lock:
            if not 0 <= k <= len(self._edits):
                raise ValueError(f"remove_last: k must be 0 to {len(self._edits)}, got {k}")
            self._keep(self._edits[: len(self._edits) - k])

    def clear(self) -> None:
        """Take all edits off: the model has its original bits."""
        with self._lock:
            self._keep([])

    def forget(self) -> None:
        """Take the weights as they are for the new base: their edits cannot be reverted any more."""
        with self._lock:
            for edit in self._edits:
                edit._note(self.model, applied=False)
            self._edits.clear()
            self._matrices.clear()
            self._base_fingerprint = ""

    # -- pushing ------------------------------------------------------------------------------------

    def _push(
        self, edit: Edit, force: bool, known: Mapping[str, str] | None, copies: Mapping[str, Tensor] | None
    ) -> None:
        places = self._places(edit)
        current = dict(known) if known is not None else self._digests(places.values())
        self._check_unchanged(current)
        base, before = self._fingerprints()
        if edit.matrices and not force:
            self._check_fits(edit, places, current, base, before)
        fresh = {
            place.parameter_name: self._fresh(place, current[place.parameter_name], copies)
            for place in places.values()
            if place.parameter_name not in self._matrices
        }
        updates = self._updates(edit, places)
        results: dict[str, Tensor | None] = {}
        with uninterrupted():
            try:
                for name, place in places.items():
                    matrix = self._matrices.get(place.parameter_name) or fresh[place.parameter_name]
                    results[place.parameter_name] = self._apply(name, place, matrix, updates[name])
                after = self._digests(places.values())
            except BaseException:
                for place in places.values():
                    if place.parameter_name in fresh:
                        write(place.parameter, fresh[place.parameter_name].original)
                    else:
                        self._rewrite(place, self._matrices[place.parameter_name])
                raise
            self._matrices.update(fresh)
            if not edit.matrices:
                edit.base_fingerprint, edit.before_fingerprint = base, before
                edit.matrices = {
                    name: self._record(place, updates[name], after) for name, place in places.items()
                }
            for name, place in places.items():
                matrix = self._matrices[place.parameter_name]
                matrix.updates.append(updates[name])
                matrix.digest = matrix.seen[matrix.ids] = after[place.parameter_name]
                matrix.master = results[place.parameter_name] if len(matrix.updates) > 1 else None
            self._edits.append(edit)
            edit._note(self.model, applied=True)
        self._base_fingerprint = base

    def _places(self, edit: Edit) -> dict[str, Located]:
        """Where the edit's weights are; everything that can be wrong with the edit itself is found here."""
        if edit in self:
            raise FasteditError(f"{edit!r} is on this model already")
        places = {name: locate(self.model, name) for name in edit.weight_names}
        seen: dict[str, str] = {}
        for name, place in places.items():
            if place.parameter_name in seen:
                raise ValueError(f"{seen[place.parameter_name]} and {name} are one tied weight: name it once")
            seen[place.parameter_name] = name
            change = edit.change(name)
            if change.shape != place.shape:
                raise BaseMismatch(
                    f"the change of {name} has shape {change.shape}, the model's weight is {place.shape} "
                    "(d_out, d_in): apply the edit to the model it was made on"
                )
            if not change.is_finite():
                raise NumericalError(f"the change of {name} is not finite: nothing was applied")
        return places

    def _fingerprints(self) -> tuple[str, str]:
        base = self.base_fingerprint()
        return base, fingerprint(self.model) if self._edits else base

    def _updates(self, edit: Edit, places: Mapping[str, Located]) -> dict[str, Update]:
        result = {}
        for name, place in places.items():
            change = edit.change(name)
            record = edit.matrices.get(name)
            parameter = place.parameter
            dtype = torch.float32 if self.masters and parameter.dtype in HALF else parameter.dtype
            like = torch.empty(0, 0, dtype=dtype, device=parameter.device)
            backend = chosen_backend(change, like, record.backend if record else "")
            result[name] = Update(edit.id, change, backend, str(parameter.device))
        return result

    def _apply(self, name: str, place: Located, matrix: _Matrix, update: Update) -> Tensor | None:
        """Write one more update into the weight; returns the new master, if there is one."""
        parameter = place.parameter
        half = self.masters and parameter.dtype in HALF
        try:
            if half and matrix.master is None:
                result, master = self._render(place, matrix.original, [*matrix.updates, update])
            else:
                if half and matrix.master is not None:
                    work, matrix.master = matrix.master, None  # a failure makes it again from the original
                else:
                    work = working_copy(parameter, parameter.device, False)
                work = advance_(work, update, transposed=place.transposed).to(parameter.device)
                result, master = settle(work, parameter.dtype)
        except NumericalError as error:
            raise NumericalError(f"{name}: {error}") from None
        write(parameter, result)
        return master

    def _record(self, place: Located, update: Update, after: Mapping[str, str]) -> MatrixRecord:
        matrix = self._matrices[place.parameter_name]
        return MatrixRecord(
            shape=place.shape,
            dtype=str(place.parameter.dtype).removeprefix("torch."),
            transposed=place.transposed,
            base_digest=matrix.base_digest,
            before_digest=matrix.digest,
            after_digest=after[place.parameter_name],
            beneath=matrix.ids,
            backend=update.backend,
            device=torch.device(update.device).type,
            masters=self.masters and place.parameter.dtype in HALF,
            aliases=place.aliases if len(place.aliases) > 1 else (),
        )

    # -- checking -----------------------------------------------------------------------------------

    def _digests(self, places: Iterable[Located]) -> dict[str, str]:
        return digests({place.parameter_name: place.parameter for place in places})

    def _check_unchanged(self, current: Mapping[str, str]) -> None:
        for name, digest in current.items():
            matrix = self._matrices.get(name)
            if matrix is not None and digest != matrix.digest:
                raise BaseMismatch(
                    f"{name} was changed by something else since the last edit, so the edits on it "
                    "can neither "
                    "be reverted nor added to. Undo that change, or accept the weights as they are with "
                    "stack_of(model).forget(). Nothing was touched"
                )

    def _check_fits(
        self, edit: Edit, places: Mapping[str, Located], current: Mapping[str, str], base: str, before: str
    ) -> None:
        for name, place in places.items():
            matrix = self._matrices.get(place.parameter_name)
            stored_digest = current[place.parameter_name]
            dtype = str(place.parameter.dtype).removeprefix("torch.")
            base_digest, ids = (matrix.base_digest, matrix.ids) if matrix else (stored_digest, ())
            check_position(edit, name, stored_digest, base_digest, ids, dtype)
        if base != edit.base_fingerprint and before != edit.before_fingerprint:
            raise BaseMismatch(
                f"{edit!r} was made on another model: its own matrices are the same here, others are not "
                f"(fingerprint {edit.base_fingerprint}, this model {base}). Load the model it was "
                "made on, or "
                "pass force=True to apply it all the same"
            )

    def _require(self, edit: Edit) -> None:
        if edit not in self:
            on = ", ".join(other.id for other in self._edits) or "none"
            raise FasteditError(
                f"{edit!r} is not on this model; on it: {on}. An edit that is in the files of a model directory "
                "is taken out with `fastedit revert MODEL_DIR`"
            )

    # -- removing -----------------------------------------------------------------------------------

    def _keep(self, kept: Sequence[Edit]) -> None:
        ids = {edit.id for edit in kept}
        states: dict[str, tuple[Located, _Matrix]] = {}
        for name, matrix in self._matrices.items():
            remaining = [update for update in matrix.updates if update.edit_id in ids]
            if len(remaining) < len(matrix.updates):
                states[name] = locate(self.model, name), replace(matrix, updates=remaining, master=None)
        self._check_unchanged(self._digests(place for place, _ in states.values()))
        with uninterrupted():
            try:
                for name, (place, matrix) in progress(states.items(), desc="applying the other edits again"):
                    self._take_off(name, place, matrix)
            except BaseException:
                for name, (place, _) in states.items():
                    self._rewrite(place, self._matrices[name])
                raise
            for name, (_, matrix) in states.items():
                if matrix.updates:
                    self._matrices[name] = matrix
                else:
                    del self._matrices[name]
            for edit in self._edits:
                if edit.id not in ids:
                    edit._note(self.model, applied=False)
            self._edits = list(kept)
            if not self._edits:
                self._base_fingerprint = ""

    def _take_off(self, name: str, place: Located, matrix: _Matrix) -> None:
        """Write the matrix with its remaining updates only."""
        result, master = self._render(place, matrix.original, matrix.updates)
        write(place.parameter, result)
        matrix.master = master if len(matrix.updates) > 1 else None
        matrix.digest = matrix.base_digest if not matrix.updates else weight_digest(result)
        if matrix.seen.get(matrix.ids, matrix.digest) != matrix.digest:
            logger.warning("%s: computing its edits again gave other bits than the first time", name)

    def _rewrite(self, place: Located, matrix: _Matrix) -> None:
        """Put the present state of a matrix into the weight again."""
        matrix.master = None
        write(place.parameter, self._render(place, matrix.original, matrix.updates)[0])

    def _restore_foreign(self, edit: Edit) -> bool:
        """Undo an edit that came with the model's files, from the originals saved with the edit."""
        if not edit.matrices or edit._originals is None or self._edits:
            return False
        places = {name: locate(self.model, name) for name in edit.weight_names}
        current = self._digests(places.values())
        if any(current[p.parameter_name] != edit.matrices[name].after_digest for name, p in places.items()):
            return False
        originals = edit._originals.load()
        with uninterrupted():
            for name, place in places.items():
                write(place.parameter, originals[name])
        return True

    # -- small things -------------------------------------------------------------------------------

    def _render(
        self, place: Located, original: Tensor, updates: Sequence[Update]
    ) -> tuple[Tensor, Tensor | None]:
        return render(
            original,
            updates,
            transposed=place.transposed,
            device=place.parameter.device,
            masters=self.masters,
        )

    def _fresh(self, place: Located, digest: str, copies: Mapping[str, Tensor] | None) -> _Matrix:
        original = copy_of(place, self.originals_on) if copies is None else copies[place.parameter_name]
        return _Matrix(original, digest, digest, seen={(): digest})

    def _configure(self, originals_on: Place | None, masters: bool | None) -> None:
        for name, value in (("originals_on", originals_on), ("masters", masters)):
            if value is None or value == getattr(self, name):
                continue
            if self._edits:
                raise ValueError(
                    f"{name} cannot become {value!r} while edits are on the model: remove them first"
                )
            if name == "originals_on" and value not in ("cpu", "model"):
                raise ValueError(f"originals_on must be 'cpu' or 'model', got {value!r}")
            setattr(self, name, value)
