"""An edit of a memory as a thing: what was learned, for which model, to apply, revert, save and load.

It has the face of :class:`fastedit.Edit`. The base weights stay as they are, so there is nothing to merge: a memory
edit cannot be exported as weights or as an adapter. Its content is in ``memory.safetensors``, beside ``edit.json``.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, ClassVar

from torch import Tensor, nn

from ..artefacts.applied import Applied
from ..artefacts.edit import _now, _versions
from ..artefacts.plain import plain
from ..artefacts.safetensors_file import explained, read_tensors, write_tensors
from ..artefacts.storage import MEMORY_FORMAT, seal, unseal
from ..errors import BaseMismatch, CorruptFile, FasteditError
from ..facts import Fact
from ..io import atomic_directory, read_json
from ..models.describe import ModelDescription, Projection, describe, unwrap
from ..models.fingerprint import fingerprint, weight_digest

VERSION = 1
_JSON, _TENSORS = "edit.json", "memory.safetensors"


@dataclass(frozen=True)
class Base:
    """What an edit was made on.

    Attributes:
        fingerprint: of the whole model.
        weight: name of the projection's weight.
        digest: of all its bits.
        shape: (d_out, d_in).
        dtype: such as ``"bfloat16"``.
    """

    fingerprint: str
    weight: str
    digest: str
    shape: tuple[int, int]
    dtype: str

    @classmethod
    def of(cls, model: nn.Module, layer: int | None) -> Base:
        """The present state of a model and its block ``layer``; the last block if a memory has none."""
        projection = projection_of(describe(model), layer)
        weight = projection.weight
        return cls(
            fingerprint(model),
            projection.weight_name,
            weight_digest(weight),
            (projection.d_out, projection.d_in),
            str(weight.dtype).removeprefix("torch."),
        )


def projection_of(description: ModelDescription, layer: int | None) -> Projection:
    """The projection by which the model of an edit is recognised: its block's, or the last block's."""
    return description.projection(description.n_layers - 1 if layer is None else layer)


@dataclass(eq=False)
class MemoryEdit(Applied):
    """A batch of facts in a memory beside one projection, or beside the whole model.

    Attributes:
        method: name of the editing method.
        facts: the batch.
        layer: the block whose output projection it stands beside; None if it answers for the whole model.
        tensors: what was learned, by name, on the CPU; None once a later edit has carried it on.
        about: what else the method keeps of it; anything JSON can hold.
        params: the method's hyper-parameters.
        seed: of everything sampled.
        profile: ``"clean"``, ``"official"`` or ``"paper"``.
        base: what it was made on.
        beneath: ids of the edits that were in the memory when it was made, oldest first.
        measured: what was measured; may be added to later, it is not part of the edit's identity.
        created: UTC time, ISO 8601.
        versions: of the libraries that made it.
    """

    method: str
    facts: list[Fact]
    layer: int | None
    tensors: dict[str, Tensor] | None
    about: dict[str, Any]
    params: dict[str, Any]
    seed: int
    profile: str
    base: Base
    beneath: tuple[str, ...] = ()
    measured: dict[str, Any] = field(default_factory=dict)
    created: str = field(default_factory=_now)
    versions: dict[str, str] = field(default_factory=_versions)
    _id: str = field(default="", repr=False)

    factors: ClassVar[dict[str, Any]] = {}  # what asks for the changes of weights finds none

    def __post_init__(self) -> None:
        if self.tensors is not None:
            self.tensors = {name: t.detach().cpu().contiguous() for name, t in self.tensors.items()}
        self.params, self.about = plain(self.params), plain(self.about)

    # -- what it is ---------------------------------------------------------------------------------

    @property
    def id(self) -> str:
        """Twelve hexadecimal digits by content: method, facts, settings, what was learned and time of making.

        It stays when an edit beneath is taken out of the content.
        """
        if not self._id:
            facts = [fact.as_dict() for fact in self.facts]
            head = [
                self.method,
                facts,
                self.layer,
                self.params,
                self.about,
                self.seed,
                self.profile,
                self.created,
            ]
            digest = hashlib.sha256(json.dumps(head, sort_keys=True).encode())
            for name, tensor in sorted(self.content.items()):
                digest.update(f"{name}:{weight_digest(tensor)}".encode())
            self._id = digest.hexdigest()[:12]
        return self._id

    @property
    def content(self) -> dict[str, Tensor]:
        """What was learned.

        Raises:
            FasteditError: it was carried on by later edits and is not kept any more.
        """
        if self.tensors is None:
            raise FasteditError(
                f"{self!r} is not kept by itself any more: later edits of the {self.method} memory were trained on "
                "top of it and hold all of it. Save the newest one"
            )
        return self.tensors

    @property
    def released(self) -> bool:
        """Whether its content is not kept any more."""
        return self.tensors is None

    def release(self) -> None:
        """Drop the content, which later edits have carried on."""
        _ = self.id
        self.tensors = None

    def take_over(self, content: tuple[dict[str, Tensor], dict[str, Any]], without: MemoryEdit) -> None:
        """Hold what :meth:`fastedit.memory.Memory.without` left of a memory; the id stays."""
        _ = self.id
        self.tensors, self.about = content
        self.beneath = tuple(each for each in self.beneath if each != without.id)

    @property
    def place(self) -> str:
        """What the memory stands beside, in words."""
        return "the whole model" if self.layer is None else self.base.weight

    @property
    def weight_names(self) -> list[str]:
        """The weights it changes: none."""
        return []

    @property
    def rank(self) -> int:
        """Of its change of the weights: 0."""
        return 0

    @property
    def size_bytes(self) -> int:
        """Bytes of its content; 0 once released."""
        return sum(tensor.nbytes for tensor in (self.tensors or {}).values())

    def as_dict(self) -> dict[str, Any]:
        """Everything but tensors, as JSON can hold it."""
        return plain(
            {
                "id": self.id,
                "method": self.method,
                "facts": [fact.as_dict() for fact in self.facts],
                "layer": self.layer,
                "about": self.about,
                "params": self.params,
                "seed": self.seed,
                "profile": self.profile,
                "base": asdict(self.base),
                "beneath": self.beneath,
                "measured": self.measured,
                "created": self.created,
                "versions": self.versions,
            }
        )

    def __repr__(self) -> str:
        count = f"{len(self.facts)} fact{'s' * (len(self.facts) != 1)}"
        return f"MemoryEdit({self._id or 'new'}: {self.method}, {count}, beside {self.place})"

    # -- on a model ---------------------------------------------------------------------------------

    def apply(self, model: nn.Module, *, force: bool = False) -> MemoryEdit:
        """Put the edit into the model's memory of this method, on top of what is there.

        Args:
            model: the model it was made on; a memory is attached if it has none.
            force: apply it to another base as well, if the shapes fit; what the facts become is not known.

        Returns:
            The edit itself.

        Raises:
            BaseMismatch: the model is another one, or the memory there has other settings.
            FasteditError: it is there already, or it would replace edits that it does not hold.
        """
        self._check_base(model, force)
        self._join(model, force)
        return self

    def _join(self, model: nn.Module, force: bool = False) -> None:
        """Put the edit on top of the model's memory, which is known to be on the right base."""
        from ..editors.memory_editor import memory_for
        from .side_module import attach, detach, find_side

        side = find_side(model, self.layer, self.method)
        fresh = side is None
        if side is None:
            side = attach(model, self.layer, memory_for(self, projection_of(describe(model), self.layer)))
        try:
            require_compatible(self, side.edits, force)
            side.push(self)
        except BaseException:
            if fresh:
                detach(model, side)
            raise
        self._note(model, applied=True)

    def revert(self, model: nn.Module | None = None) -> None:
        """Take the edit out of the memory; the last one takes the memory off the model.

        Args:
            model: None takes the one model it is applied to.

        Raises:
            FasteditError: it is applied to no model or to several, or the method cannot take it off by itself.
        """
        from .side_module import detach, find_side

        model = self._only_model() if model is None else unwrap(model)
        side = find_side(model, self.layer, self.method)
        if side is None or all(edit.id != self.id for edit in side.edits):
            raise FasteditError(f"{self!r} is not on this model: nothing to revert")
        if len(side.edits) == 1 and not side.memory.outlives_edits:
            removed = side.edits[0]
            detach(model, side)
        else:
            removed = side.remove(self.id)
        for edit in (self, removed):
            edit._note(model, applied=False)

    def _check_base(self, model: nn.Module, force: bool) -> None:
        description = describe(model)
        if self.layer is not None and self.layer >= description.n_layers:
            raise BaseMismatch(
                f"{self!r} is for block {self.layer}, the model has blocks 0 to {description.n_layers - 1}"
            )
        projection = projection_of(description, self.layer)
        shape = (projection.d_out, projection.d_in)
        if shape != self.base.shape:
            raise BaseMismatch(
                f"{self!r} is for a projection of shape {self.base.shape} (d_out, d_in), {projection.name} is {shape}"
            )
        if force:
            return
        now = Base.of(model, self.layer)
        if now.fingerprint == self.base.fingerprint and now.digest == self.base.digest:
            return
        if now.dtype != self.base.dtype:
            what = f"it is {now.dtype} and was {self.base.dtype}: load it with dtype={self.base.dtype}"
        else:
            what = (
                "its weights are others: load the model that the edit was made on, with the same edits on it"
            )
        raise BaseMismatch(
            f"{self!r} does not fit this model: {what}. To apply it all the same, pass force=True (--force). "
            "Nothing was touched"
        )

    # -- on disk ------------------------------------------------------------------------------------

    def save(self, directory: str | Path, *, overwrite: bool = False) -> Path:
        """Write the edit as one directory, whole or not at all.

        Args:
            directory: where; must not exist or be empty unless ``overwrite``.
            overwrite: replace what is there.

        Raises:
            FasteditError: its content was carried on by later edits; the disk is full.
            FileExistsError: there is something already.
        """
        content = self.content
        directory = Path(directory)
        with explained(directory), atomic_directory(directory, overwrite=overwrite) as temporary:
            write_tensors(temporary / _TENSORS, content)
            seal(temporary, MEMORY_FORMAT, VERSION, self.as_dict())
        return directory

    def to_peft(self, directory: str | Path, model: Any = None, *, others: Iterable[Any] = ()) -> Path:
        """Refuse: a memory is no change of weights."""
        raise cannot_merge([self])


def require_compatible(edit: MemoryEdit, there: Sequence[MemoryEdit], force: bool) -> None:
    """Make sure that an edit can join others of its method at its place.

    Raises:
        FasteditError: it is among them, or (unless ``force``) would replace some that it does not hold.
        BaseMismatch: they have other settings.
    """
    from ..editors.memory_editor import memory_class

    kind = memory_class(edit.method)
    if any(other.id == edit.id for other in there):
        raise FasteditError(f"{edit!r} is in this memory already")
    for other in there[-1:]:
        names = [name for name in kind.settings if other.params[name] != edit.params[name]]
        if names or other.profile != edit.profile:
            theirs, ours = (
                {"profile": e.profile, **{name: e.params[name] for name in names}} for e in (other, edit)
            )
            raise BaseMismatch(
                f"the {edit.method} memory beside {edit.place} has the settings {theirs}, {edit!r} has {ours}: "
                "make both alike, or revert what is there"
            )
    lost = [other.id for other in there if other.id not in edit.beneath]
    if kind.whole_state and lost and not force:
        raise FasteditError(
            f"{edit!r} holds the whole {edit.method} memory and would replace {', '.join(lost)}, which it was not "
            "trained on top of: revert those first"
        )


def cannot_merge(edits: Iterable[MemoryEdit]) -> FasteditError:
    """The error that says that memory edits cannot be exported as weights."""
    named = ", ".join({edit.id: repr(edit) for edit in edits}.values())
    return FasteditError(
        f"{named}: a memory decides for each prompt whether it answers, so it cannot be merged into weights or a "
        "LoRA adapter. Save the model with fastedit.save_model(model, directory) and load it with fastedit.load_model"
    )


def load_memory_edit(directory: str | Path) -> MemoryEdit:
    """Read a memory edit; see :func:`fastedit.load_edit`."""
    directory = Path(directory)
    if not (directory / _JSON).is_file():
        raise CorruptFile(f"there is no edit in {directory}: it has no {_JSON}")
    content = read_json(directory / _JSON)
    unseal(content, directory, MEMORY_FORMAT, VERSION, _TENSORS)
    try:
        base = {**content["base"], "shape": tuple(content["base"]["shape"])}
        return MemoryEdit(
            method=content["method"],
            facts=[Fact(**fields) for fields in content["facts"]],
            layer=content["layer"],
            tensors=read_tensors(directory / _TENSORS),
            about=content["about"],
            params=content["params"],
            seed=content["seed"],
            profile=content["profile"],
            base=Base(**base),
            beneath=tuple(content["beneath"]),
            measured=content["measured"],
            created=content["created"],
            versions=content["versions"],
            _id=content["id"],
        )
    except (KeyError, TypeError, ValueError) as error:
        raise CorruptFile(f"{directory / _JSON} does not describe a memory edit: {error}") from error
