"""Hyper-parameters: published values by method and model, defaults by depth, files of the user."""

from __future__ import annotations

import dataclasses
import logging
from collections.abc import Mapping
from pathlib import Path
from typing import Any, TypeVar

from ..io import read_json
from ..models.describe import ModelDescription

logger = logging.getLogger(__name__)

P = TypeVar("P")
_FOLDER = Path(__file__).parent / "params"


def architecture_key(description: ModelDescription) -> str:
    """Name of a model's shape in the parameter files: family/blocks × hidden × MLP width.

    GPT-2 XL is ``"gpt2/48x1600x6400"``.
    """
    return f"{description.family}/{description.n_layers}x{description.hidden_size}x{description.projection(0).d_in}"


def resolve_params(
    file: str, kind: type[P], description: ModelDescription, given: P | Mapping[str, Any] | str | Path | None
) -> P:
    """Hyper-parameters of a method for a model.

    The order is: what the user gave (an object, a mapping that overrides single values, or a JSON file),
    over the published values for this model's shape, over the method's defaults for its depth and width.

    Args:
        file: name of the method's file of published values.
        kind: the method's parameter class.
        description: the model.
        given: what the user gave.

    Raises:
        ValueError: an unknown name, or a layer that the model does not have.
    """
    if isinstance(given, kind):
        return _checked(given, description)
    if isinstance(given, (str, Path)):
        given = read_json(given)
    if given is None:
        given = {}
    if not isinstance(given, Mapping):
        raise TypeError(
            f"params must be {kind.__name__}, a mapping or a JSON file, got {type(given).__name__}"
        )
    values = _published(file, description)
    if values is None:
        values = kind.defaults_for(description)  # type: ignore[attr-defined]
        chosen = {name: value for name, value in values.items() if name not in given}
        if chosen:
            logger.info(
                "no published %s settings for %s: chosen by its shape: %s",
                file,
                architecture_key(description),
                chosen,
            )
    values = {**values, **given}
    return _checked(from_mapping(kind, values), description)


def from_mapping(kind: type[P], values: Mapping[str, Any]) -> P:
    """Build a parameter dataclass; an unknown name raises ValueError and lists the known ones."""
    known = {field.name: field for field in dataclasses.fields(kind)}  # type: ignore[arg-type]
    unknown = sorted(set(values) - set(known))
    if unknown:
        raise ValueError(f"{kind.__name__} has no {', '.join(unknown)}; it has {', '.join(known)}")
    values = {name: tuple(value) if isinstance(value, list) else value for name, value in values.items()}
    return kind(**values)


def _published(file: str, description: ModelDescription) -> dict[str, Any] | None:
    path = _FOLDER / f"{file}.json"
    if not path.exists():
        return None
    return read_json(path).get(architecture_key(description))


def _checked(params: P, description: ModelDescription) -> P:
    if not hasattr(params, "layers"):
        return params  # the editor itself looks at the modules it is given
    layers = params.layers
    if not layers or sorted(set(layers)) != list(layers):
        raise ValueError(f"layers must be ascending and without repeats, got {layers}")
    if layers[0] < 0 or layers[-1] >= description.n_layers:
        raise ValueError(f"layers {layers}: the model has blocks 0 to {description.n_layers - 1}")
    return params
