"""What every editing method shares: the registry of methods and the editor's interface."""

from __future__ import annotations

import importlib
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any, Literal, TypeVar

from torch import Tensor, nn

from ..artefacts import Edit
from ..facts import Fact
from ..models.describe import describe
from .params import resolve_params
from .state import State, digests_of, read_state, require_fit, write_state

Profile = Literal["clean", "official", "paper"]
PROFILES: tuple[Profile, ...] = ("clean", "official", "paper")

# Module of each method; a module registers its editor when it is imported.
_METHODS = {
    "rome": "rome",
    "r-rome": "r_rome",
    "p-rome": "p_rome",
    "memit": "memit",
    "memit-cache": "memit_cache",
    "emmet": "emmet",
    "pmet": "pmet",
    "alphaedit": "alphaedit",
    "nse": "nse",
    "ultraedit": "ultraedit",
    "ft": "fine_tune",
    "ft-l": "fine_tune",
    "ft-m": "fine_tune",
    "wise": "wise",
    "grace": "grace",
    "defer": "defer",
    "serac": "serac",
    "recipe": "recipe",
    "t-patcher": "t_patcher",
    "melo": "melo",
    "ike": "ike",
    "lte": "lte",
    "rase": "rase",
    "rase_rome": "rase",
}
_EDITORS: dict[str, type[Editor]] = {}

E = TypeVar("E", bound="type[Editor]")


class Editor(ABC):
    """Writes facts into one model; call :meth:`edit` again for sequential editing.

    Args:
        model: a causal language model; its weights change when facts are edited.
        tokenizer: its tokenizer, with character offsets.
        params: hyper-parameters: an object of ``Params``, a mapping of some of its values, a JSON file, or
            None for the published ones (by depth for other models).
        profile: ``"clean"``, ``"official"`` or ``"paper"``, where they differ.
        seed: of everything that is sampled.
        progress: show progress bars; None shows them on a terminal only.
    """

    method: str
    Params: type[Any]
    params_file = ""  # of published values, if it is another method's

    def __init__(
        self,
        model: nn.Module,
        tokenizer: Any,
        *,
        params: Any = None,
        profile: Profile = "clean",
        seed: int = 0,
        progress: bool | None = None,
    ) -> None:
        if profile not in PROFILES:
            raise ValueError(f"profile must be one of {', '.join(PROFILES)}, got {profile!r}")
        self.model = model
        self.tokenizer = tokenizer
        self.description = describe(model)
        self.params = resolve_params(self.params_file or self.method, self.Params, self.description, params)
        self.profile: Profile = profile
        self.seed = seed
        self.progress = progress

    def save_state(self, directory: str | Path) -> Path:
        """Write what is carried from batch to batch, to go on in another process with the same edited model.

        Args:
            directory: where; an older state there is replaced, whole or not at all.

        Returns:
            The directory.
        """
        tensors, about = self._state()
        digests = digests_of(self.model, self.weight_names)
        state = State(self.method, dict(vars(self.params)), self.profile, digests, tensors, about)
        return write_state(state, directory)

    def load_state(self, directory: str | Path) -> None:
        """Go on from :meth:`save_state`.

        Batches that it brings can only be taken off together with the model they are in.

        Raises:
            BaseMismatch: the state is of another method or other settings, or the model does not have the bits
                it had then. Nothing changes.
            CorruptFile: a file is missing or damaged. Nothing changes.
        """
        state = read_state(directory)
        require_fit(state, self.method, self.params, self.profile, self.model)
        self._load_state(state.tensors, state.about)

    @property
    def weight_names(self) -> list[str]:
        """Names of the weights that the editor may change; a saved state belongs to their bits."""
        return []

    def _state(self) -> tuple[dict[str, Tensor], dict[str, Any]]:
        """Tensors and anything else that is carried from batch to batch; nothing, unless a family has something."""
        return {}, {}

    def _load_state(self, tensors: Mapping[str, Tensor], about: Mapping[str, Any]) -> None:
        """Take over what :meth:`_state` gave."""
        if tensors or about:
            raise ValueError(
                f"{self.method} carries nothing from batch to batch, got {sorted([*tensors, *about])}"
            )

    @abstractmethod
    def edit(self, facts: Iterable[Fact | Mapping[str, Any]]) -> Edit:
        """Write a batch of facts into the model and return what was done.

        The batch is applied whole, or the model keeps exactly the weights it had.

        Raises:
            InvalidFact: a fact cannot be edited; named, before any weight changes.
        """


def register_editor(name: str) -> Callable[[E], E]:
    """Class decorator: make an editor known under ``name``."""

    def add(cls: E) -> E:
        cls.method = name
        _EDITORS[name] = cls
        return cls

    return add


def methods() -> list[str]:
    """Names of all editing methods."""
    return sorted({*_METHODS, *_EDITORS})


def editor(method: str, model: nn.Module, tokenizer: Any, **options: Any) -> Editor:
    """Make an editor.

    >>> editor("memit", model, tokenizer).edit(facts)  # doctest: +SKIP

    Args:
        method: one of :func:`methods`.
        model: the model to edit.
        tokenizer: its tokenizer.
        **options: see :class:`Editor` and the method's own class.

    Raises:
        ValueError: an unknown method or parameter.
        fastedit.UnsupportedModel: the model's layout is not known.
    """
    return editor_class(method)(model, tokenizer, **options)


def editor_class(method: str) -> type[Editor]:
    """The class behind a method's name; ValueError lists the known ones."""
    if method not in _EDITORS and method in _METHODS:
        importlib.import_module(f".{_METHODS[method]}", __package__)
    if method not in _EDITORS:
        raise ValueError(f"there is no method {method!r}; there are {', '.join(methods())}")
    return _EDITORS[method]
