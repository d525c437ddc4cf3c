"""Which living models an edit is applied to: mixed into the edits of weights and of memories."""

from __future__ import annotations

import weakref
from dataclasses import dataclass, field
from typing import Any

from torch import nn

from ..errors import FasteditError
from ..models.describe import unwrap


@dataclass(eq=False, kw_only=True)
class Applied:
    """An edit that knows its models, by weak references; a copy of it, or one read from a file, has none."""

    _models: list[weakref.ref[nn.Module]] = field(default_factory=list, init=False, repr=False)

    def applied_to(self) -> list[nn.Module]:
        """The living models it is applied to."""
        models = [model for ref in self._models if (model := ref()) is not None]
        self._models = [weakref.ref(model) for model in models]
        return models

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_models": []}

    def _only_model(self) -> nn.Module:
        models = self.applied_to()
        if len(models) != 1:
            count = "no model" if not models else f"{len(models)} models"
            raise FasteditError(f"{self!r} is applied to {count}: name the model, edit.revert(model)")
        return models[0]

    def _note(self, model: nn.Module, applied: bool) -> None:
        model = unwrap(model)
        others = [other for other in self.applied_to() if other is not model]
        self._models = [weakref.ref(one) for one in [*others, *([model] if applied else [])]]
