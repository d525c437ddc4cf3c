"""An edit as a thing: what was changed, by what, on which model; to apply, revert, save, load and export."""

from __future__ import annotations

import functools
import hashlib
import json
import platform
from collections.abc import Iterable
from dataclasses import asdict, dataclass, field
from datetime import datetime, timezone
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from .._version import __version__
from ..errors import BaseMismatch
from ..facts import Fact
from ..models.fingerprint import weight_digest
from .applied import Applied
from .factors import Change, LowRank
from .plain import plain

if TYPE_CHECKING:
    from .storage import Originals


@dataclass(frozen=True)
class MatrixRecord:
    """Where and how an edit was first applied to one matrix.

    Attributes:
        shape: (d_out, d_in).
        dtype: of the stored weight, such as ``"bfloat16"``.
        transposed: the weight is stored (d_in, d_out).
        base_digest: of the matrix before the first edit on its model.
        before_digest: right before this edit.
        after_digest: right after it.
        beneath: ids of the edits that were on the matrix already, oldest first.
        backend: the backend that computed the update; empty for a dense change.
        device: the kind of device it ran on.
        masters: half-precision weights had float32 masters.
        aliases: all names of the weight, if it is tied to others.
    """

    shape: tuple[int, int]
    dtype: str
    transposed: bool
    base_digest: str
    before_digest: str
    after_digest: str
    beneath: tuple[str, ...]
    backend: str
    device: str
    masters: bool
    aliases: tuple[str, ...] = ()

    @classmethod
    def from_dict(cls, fields: dict[str, Any]) -> MatrixRecord:
        """Read back what ``dataclasses.asdict`` gave."""
        lists = {name: tuple(fields[name]) for name in ("shape", "beneath", "aliases")}
        return cls(**{**fields, **lists})


@functools.cache
def _library_versions() -> dict[str, str]:
    return {
        "fastedit": __version__,
        "torch": str(torch.__version__),
        "transformers": version("transformers"),
        "python": platform.python_version(),
    }


def _versions() -> dict[str, str]:
    return dict(_library_versions())


def _now() -> str:
    return datetime.now(timezone.utc).isoformat(timespec="microseconds")


@dataclass(eq=False)
class Edit(Applied):
    """A batch of facts written into a model, in factored form.

    An editor makes one with its facts and factors and hands it to :meth:`Transaction.commit`, which fills in
    everything about the model (``base_fingerprint``, ``matrices``).

    Attributes:
        method: name of the editing method.
        facts: the batch.
        factors: weight name → what is added to that weight.
        params: the method's hyper-parameters; anything JSON can hold, other values become text.
        seed: of everything sampled.
        profile: ``"clean"``, ``"official"`` or ``"paper"``.
        dense: weight name → dense change (d_out, d_in), for methods whose change has no low rank.
        measured: what was measured; may be added to later, it is not part of the edit's identity.
        extras: further tensors of the method, kept beside the factors.
        base_fingerprint: of the model before its first edit.
        before_fingerprint: of the model right before this edit.
        matrices: weight name → where and how the edit was first applied; empty until it is committed.
        created: UTC time, ISO 8601.
        versions: of the libraries that made it.

    Raises:
        ValueError: neither factors nor dense changes, or both of different shape for one weight.
    """

    method: str
    facts: list[Fact]
    factors: dict[str, LowRank]
    params: dict[str, Any] = field(default_factory=dict)
    seed: int = 0
    profile: str = "clean"
    dense: dict[str, Tensor] = field(default_factory=dict)
    measured: dict[str, Any] = field(default_factory=dict)
    extras: dict[str, Tensor] = field(default_factory=dict)
    base_fingerprint: str = ""
    before_fingerprint: str = ""
    matrices: dict[str, MatrixRecord] = field(default_factory=dict)
    created: str = field(default_factory=_now)
    versions: dict[str, str] = field(default_factory=_versions)
    _id: str = field(default="", repr=False)
    _originals: Originals | None = field(default=None, repr=False)

    def __post_init__(self) -> None:
        if not self.factors and not self.dense:
            raise ValueError(
                "Edit: an edit must change at least one weight; factors and dense are both empty"
            )
        self.factors = {name: factors.to("cpu") for name, factors in self.factors.items()}
        self.dense = {name: delta.detach().float().cpu().contiguous() for name, delta in self.dense.items()}
        self.extras = {name: extra.detach().cpu().contiguous() for name, extra in self.extras.items()}
        self.params = plain(self.params)
        for name in self.factors.keys() & self.dense.keys():
            if self.factors[name].shape != tuple(self.dense[name].shape):
                raise ValueError(
                    f"Edit: the dense change of {name} must have shape {self.factors[name].shape} like its "
                    f"factors, got {tuple(self.dense[name].shape)}"
                )

    # -- what it is ---------------------------------------------------------------------------------

    @property
    def id(self) -> str:
        """Twelve hexadecimal digits by content: method, facts, settings, factors and time of making."""
        if not self._id:
            head = json.dumps(
                [
                    self.method,
                    [f.as_dict() for f in self.facts],
                    self.params,
                    self.seed,
                    self.profile,
                    self.created,
                ],
                sort_keys=True,
            )
            digest = hashlib.sha256(head.encode())
            for name in self.weight_names:
                low_rank, dense = self.change(name)
                tensors = [] if low_rank is None else [low_rank.left, low_rank.right]
                for tensor in [*tensors, *([] if dense is None else [dense])]:
                    digest.update(f"{name}:{weight_digest(tensor)}".encode())
            self._id = digest.hexdigest()[:12]
        return self._id

    @property
    def weight_names(self) -> list[str]:
        """The weights it changes."""
        return list(dict.fromkeys([*self.factors, *self.dense]))

    def change(self, name: str) -> Change:
        """What it adds to one weight."""
        return Change(self.factors.get(name), self.dense.get(name))

    @property
    def rank(self) -> int:
        """The largest rank of its factors; 0 if it has dense changes only."""
        return max((factors.rank for factors in self.factors.values()), default=0)

    @property
    def size_bytes(self) -> int:
        """Bytes of its factors, dense changes and extras."""
        tensors = [*self.dense.values(), *self.extras.values()]
        return sum(f.size_bytes for f in self.factors.values()) + sum(
            t.numel() * t.element_size() for t in tensors
        )

    def norms(self) -> dict[str, float]:
        """Frobenius norm of the change of each weight."""
        result = {}
        for name in self.weight_names:
            low_rank, dense = self.change(name)
            if dense is None:
                result[name] = low_rank.norm() if low_rank is not None else 0.0
            else:
                whole = dense.double() + (low_rank.dense().double() if low_rank is not None else 0)
                result[name] = float(whole.norm())
        return result

    @property
    def base_digests(self) -> dict[str, str]:
        """Digest of each weight before the first edit on its model."""
        return {name: record.base_digest for name, record in self.matrices.items()}

    @property
    def before_digests(self) -> dict[str, str]:
        """Digest of each weight right before this edit."""
        return {name: record.before_digest for name, record in self.matrices.items()}

    @property
    def after_digests(self) -> dict[str, str]:
        """Digest of each weight right after this edit."""
        return {name: record.after_digest for name, record in self.matrices.items()}

    def as_dict(self) -> dict[str, Any]:
        """Everything but tensors, as JSON can hold it."""
        return plain(
            {
                "id": self.id,
                "method": self.method,
                "facts": [fact.as_dict() for fact in self.facts],
                "params": self.params,
                "seed": self.seed,
                "profile": self.profile,
                "base_fingerprint": self.base_fingerprint,
                "before_fingerprint": self.before_fingerprint,
                "matrices": {name: asdict(record) for name, record in self.matrices.items()},
                "measured": self.measured,
                "created": self.created,
                "versions": self.versions,
            }
        )

    def __repr__(self) -> str:
        return (
            f"Edit({self.id}: {self.method}, {len(self.facts)} fact{'s' * (len(self.facts) != 1)}, "
            f"{len(self.weight_names)} matri{'x' if len(self.weight_names) == 1 else 'ces'}, rank "
            f"{self.rank})"
        )

    # -- on a model ---------------------------------------------------------------------------------

    def apply(self, model: nn.Module, *, force: bool = False) -> Edit:
        """Add the edit to a model, on top of the edits that are on it.

        Args:
            model: the model it was made on, with the same edits on the same matrices beneath.
            force: apply it to another base, or at another place among other edits, as well: the factors are
                added as they are, and what the facts become is not known.

        Returns:
            The edit itself.

        Raises:
            BaseMismatch: the model is another one; names the first matrix that differs.
            NumericalError: the result is not finite. The model keeps its weights in either case.
        """
        from .stack import stack_of

        stack_of(model).push(self, force=force)
        return self

    def revert(self, model: nn.Module | None = None) -> None:
        """Take the edit off a model: former bits, exactly, with later edits applied again.

        An edit that was loaded from disk and finds its own result in a model without a record of it (a
        full export, say) restores the bits from before itself, from the originals saved with it.

        Args:
            model: None takes the one model it is applied to.

        Raises:
            FasteditError: it is applied to no model, or to several.
            BaseMismatch: the weights were changed by something else since.
        """
        from .stack import stack_of

        if model is None:
            model = self._only_model()
        stack_of(model).remove(self)

    # -- on disk ------------------------------------------------------------------------------------

    def save(self, directory: str | Path, *, keep_originals: bool = True, overwrite: bool = False) -> Path:
        """Write the edit as one directory; see :func:`fastedit.artefacts.storage.save_edit`."""
        from .storage import save_edit

        return save_edit(self, directory, keep_originals=keep_originals, overwrite=overwrite)

    def to_peft(self, directory: str | Path, model: Any = None, *, others: Iterable[Edit] = ()) -> Path:
        """Write the edit as a LoRA adapter; see :func:`fastedit.artefacts.adapter.export_adapter`."""
        from .adapter import export_adapter

        return export_adapter([self, *others], directory, model)

    def originals(self) -> dict[str, Tensor]:
        """The bits of its matrices from right before it, as stored, on the CPU.

        Raises:
            BaseMismatch: it is applied to no living model and was saved without originals.
        """
        from .stack import stack_of

        for model in self.applied_to():
            return stack_of(model).before(self)
        if self._originals is not None:
            return self._originals.load()
        raise BaseMismatch(
            f"{self!r} is applied to no model and was saved without originals, so the former bits of its "
            "matrices are not known: apply it first"
        )
