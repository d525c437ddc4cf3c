"""RECIPE beside a whole model: facts as keys, and a short soft prompt in front of what asks for one.

Chen et al. 2024 (arXiv 2405.03279). A fact, prompt and answer, is read by a text encoder and becomes a key r. A
prompt becomes a query u by another tower on the same encoder. The nearest key by inner product answers if it beats
the sentinel's: ⟨u, r⟩ > ⟨u, r_Θ⟩. Then the prompt vectors that the generator makes of the key are put in front of the
prompt; otherwise the model runs as it is. See :mod:`fastedit.memory.prefix` for what happens under ``generate()``.

The four networks are trained once for a model by :mod:`fastedit.editors.recipe_training`. A checkpoint is a folder:
``recipe.json`` (sizes, and what it was trained with), ``recipe.safetensors`` (towers, generator, sentinel),
``tokenizer/`` (the base model's, which reads ids) and ``encoder/``, if the encoder was trained as well.
"""

from __future__ import annotations

import hashlib
import json
import math
from collections import OrderedDict
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..artefacts.safetensors_file import read_tensors, write_tensors
from ..errors import BaseMismatch, CorruptFile, FasteditError
from ..io import atomic_write_json, read_json
from ..models.describe import describe
from ..models.fingerprint import fingerprint, weight_digest
from .base import Decision
from .edit import MemoryEdit
from .encoder import TextEncoder
from .fact_store import FactStore
from .prefix import Prefix, PrefixMemory

FORMAT, VERSION = "fastedit-recipe", 1
SETTINGS, NETWORKS, ENCODER, TOKENIZER = "recipe.json", "recipe.safetensors", "encoder", "tokenizer"
_QUERIES, _PROMPTS = 4096, 256  # kept of each


# ------------------------------------------------------------------ networks


@dataclass(frozen=True)
class RecipeSizes:
    """Sizes of the networks.

    Attributes:
        width: of the encoder's states; four of them are pooled.
        dim: d, of keys and queries.
        hidden: D, of the language model's states.
        prompt_tokens: n, vectors of a prompt.
        sentinel_tokens: vectors that the sentinel is made of.
        tied_towers: knowledge and queries share one tower.
    """

    width: int
    dim: int
    hidden: int
    prompt_tokens: int = 3
    sentinel_tokens: int = 10
    tied_towers: bool = False

    def __post_init__(self) -> None:
        for name in ("width", "dim", "hidden", "prompt_tokens", "sentinel_tokens"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be positive, got {getattr(self, name)}")


class Residual(nn.Module):
    """x + ReLU(A x + b)."""

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.linear = nn.Linear(dim, dim)

    def forward(self, x: Tensor) -> Tensor:
        """(..., dim) of (..., dim)."""
        return x + F.relu(self.linear(x))


class RecipeNetworks(nn.Module):
    """Towers, prompt generator and sentinel; the encoder is beside them.

    Args:
        sizes: see :class:`RecipeSizes`.
    """

    def __init__(self, sizes: RecipeSizes) -> None:
        super().__init__()
        self.sizes = sizes
        self.knowledge = nn.Sequential(nn.Linear(4 * sizes.width, sizes.dim), Residual(sizes.dim))
        self.query = (
            self.knowledge
            if sizes.tied_towers
            else nn.Sequential(nn.Linear(4 * sizes.width, sizes.dim), Residual(sizes.dim))
        )
        self.generator = nn.Sequential(
            Residual(sizes.dim), nn.Linear(sizes.dim, sizes.prompt_tokens * sizes.hidden)
        )
        self.sentinel = nn.Parameter(torch.empty(1, sizes.sentinel_tokens, sizes.width).uniform_(-0.05, 0.05))

    def prompts(self, keys: Tensor) -> Tensor:
        """(n, prompt_tokens, hidden) of keys (n, dim)."""
        out: Tensor = self.generator(keys)
        return out.reshape(len(keys), self.sizes.prompt_tokens, self.sizes.hidden)

    def sentinel_key(self, encoder: TextEncoder) -> Tensor:
        """(1, dim): the sentinel through the encoder's blocks and the knowledge tower."""
        out: Tensor = self.knowledge(encoder.statistics_of(self.sentinel).to(self.sentinel.dtype))
        return out

    def tensors(self) -> dict[str, Tensor]:
        """Weights by name, each once."""
        return {name: parameter.detach() for name, parameter in self.named_parameters()}


# ------------------------------------------------------------------ checkpoints


@dataclass
class RecipeParts:
    """What RECIPE has beside the base model.

    Attributes:
        networks: fp32, frozen.
        encoder: frozen.
        base: fingerprint of the model that they were trained for.
        tokenizer: the base model's.
    """

    networks: RecipeNetworks
    encoder: TextEncoder
    base: str
    tokenizer: Any = None

    def __post_init__(self) -> None:
        self.networks.eval().requires_grad_(False)
        self._sentinel: tuple[Any, Tensor] | None = None

    @property
    def digest(self) -> str:
        """32 hexadecimal digits: sizes, weights, encoder and base model. Keys of another digest cannot be compared."""
        weights = sorted((name, weight_digest(tensor)) for name, tensor in self.networks.tensors().items())
        content = [asdict(self.networks.sizes), self.base, fingerprint(self.encoder.module), weights]
        return hashlib.sha256(json.dumps(content).encode()).hexdigest()[:32]

    @torch.no_grad()
    def keys(self, texts: Sequence[str]) -> Tensor:
        """(n, dim) fp32 on the CPU: keys of knowledge."""
        return self._through(self.networks.knowledge, texts)

    @torch.no_grad()
    def queries(self, texts: Sequence[str]) -> Tensor:
        """(n, dim) fp32 on the CPU: queries of prompts."""
        return self._through(self.networks.query, texts)

    @torch.no_grad()
    def prompts(self, keys: Tensor) -> Tensor:
        """(n, prompt_tokens, hidden) fp32, of keys (n, dim)."""
        return self.networks.prompts(keys.to(self.networks.sentinel))

    @property
    def sentinel(self) -> Tensor:
        """(dim,) fp32 on the CPU: the sentinel's key; made anew whenever a weight that it comes from has changed."""
        weights = [*self.networks.parameters(), *self.encoder.module.parameters()]
        state = [(weight.data_ptr(), weight._version) for weight in weights]
        if self._sentinel is None or self._sentinel[0] != state:
            with torch.no_grad():
                self._sentinel = state, self.networks.sentinel_key(self.encoder)[0].float().cpu()
        return self._sentinel[1]

    def to(self, device: torch.device) -> None:
        """Move networks and encoder."""
        self.networks.to(device)
        self.encoder.module.to(device)

    def _through(self, tower: nn.Module, texts: Sequence[str]) -> Tensor:
        statistics = self.encoder.statistics(texts).to(self.networks.sentinel)
        out: Tensor = tower(statistics)
        return out.float().cpu()


def write_checkpoint(
    folder: Path,
    networks: RecipeNetworks,
    encoder: TextEncoder,
    encoder_name: str,
    base: str,
    tokenizer: Any,
    training: Mapping[str, Any],
) -> None:
    """Write a checkpoint into a folder that exists.

    Args:
        folder: where.
        networks: their weights.
        encoder: its weights are written if ``encoder_name`` is empty, else its digest only.
        encoder_name: the folder, hub name or package that it was loaded from, if it was not trained.
        base: fingerprint of the model that this was trained for.
        tokenizer: the base model's.
        training: a report, kept with it.
    """
    content = {
        "format": FORMAT,
        "version": VERSION,
        "sizes": asdict(networks.sizes),
        "base": base,
        "encoder": {"name": encoder_name, "digest": fingerprint(encoder.module)},
        "training": dict(training),
    }
    if not encoder_name:
        encoder.module.save_pretrained(folder / ENCODER)  # type: ignore[operator]
        encoder.tokenizer.save_pretrained(folder / ENCODER)
    tokenizer.save_pretrained(folder / TOKENIZER)
    write_tensors(folder / NETWORKS, networks.tensors())
    atomic_write_json(folder / SETTINGS, content)


def load_parts(folder: str | Path, encoder: str = "") -> RecipeParts:
    """Read a checkpoint.

    Args:
        folder: what training wrote.
        encoder: where the encoder is, if the checkpoint does not hold it and it is elsewhere than in training.

    Raises:
        FasteditError: there is no checkpoint, or its encoder cannot be loaded.
        CorruptFile: a file is damaged.
        BaseMismatch: the encoder is another one than in training.
    """
    folder = Path(folder)
    if not (folder / SETTINGS).is_file():
        raise FasteditError(
            f"there is no RECIPE checkpoint in {folder}, it has no {SETTINGS}: make one for your model with "
            "fastedit train recipe"
        )
    content = read_json(folder / SETTINGS)
    if not isinstance(content, dict) or (content.get("format"), content.get("version")) != (FORMAT, VERSION):
        raise CorruptFile(f"{folder / SETTINGS} does not describe a RECIPE checkpoint of version {VERSION}")
    try:
        name, digest, base = content["encoder"]["name"], content["encoder"]["digest"], content["base"]
        networks = RecipeNetworks(RecipeSizes(**content["sizes"]))
        networks.load_state_dict(_with_ties(networks, read_tensors(folder / NETWORKS)))
    except (KeyError, TypeError, ValueError, RuntimeError) as error:
        raise CorruptFile(f"the RECIPE checkpoint in {folder} is damaged: {error}") from error
    reader = TextEncoder.load(encoder or name or folder / ENCODER)
    if (found := fingerprint(reader.module)) != digest:
        raise BaseMismatch(
            f"the checkpoint {folder} was trained with another text encoder than {encoder or name or ENCODER} is "
            f"now: expected {digest}, got {found}"
        )
    return RecipeParts(networks, reader, base)


def _with_ties(networks: RecipeNetworks, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """A state dict from tensors that are each named once."""
    if not networks.sizes.tied_towers:
        return dict(tensors)
    shared = {
        name.replace("knowledge", "query", 1): tensor
        for name, tensor in tensors.items()
        if name.startswith("knowledge.")
    }
    return {**tensors, **shared}


def require_model(parts: RecipeParts, model: nn.Module, checkpoint: str, same_weights: bool) -> None:
    """Make sure that a checkpoint is for this model.

    Args:
        parts: the checkpoint.
        model: the base model.
        checkpoint: its folder, for the message.
        same_weights: whether the model must be the very one; else only its width counts.

    Raises:
        BaseMismatch: it is not.
    """
    width = describe(model).hidden_size
    if parts.networks.sizes.hidden != width:
        raise BaseMismatch(
            f"the checkpoint {checkpoint} makes prompts of width {parts.networks.sizes.hidden}, the model's states "
            f"have {width}: it was trained for another model"
        )
    if same_weights and parts.base != fingerprint(model):
        raise BaseMismatch(
            f"the checkpoint {checkpoint} was trained for another model, or for this one with other weights or in "
            "another precision: train one for it, or take it all the same with params={'same_weights': False}"
        )


# ------------------------------------------------------------------ the memory


class RecipeMemory(PrefixMemory):
    """Facts by their keys, and the checkpoint that reads prompts and makes soft prompts.

    An edit's content: ``keys`` (n, dim) fp32, a row per fact, and in ``about`` the digest of the ``checkpoint`` that
    made them. Any edit can be taken off.
    """

    method = "recipe"
    settings = ("checkpoint", "store", "on_duplicate")
