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
from collections import OrderedDict
from collections.abc import Callable, Mapping, Sequence
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
from .side_module import SideModule

FORMAT, VERSION = "fastedit-recipe", 1
SETTINGS, NETWORKS, ENCODER, TOKENIZER = "recipe.json", "recipe.safetensors", "encoder", "tokenizer"
_QUERIES, _PROMPTS = 4096, 256  # kept of each


def knowledge_text(prompt: str, answer: str) -> str:
    """A fact as the encoder reads it: prompt and answer, with one space between them."""
    return f"{prompt.rstrip(' ')} {answer.strip()}"


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
        self.centre: Tensor
        self.spread: Tensor
        self.register_buffer("centre", torch.zeros(4 * sizes.width))
        self.register_buffer("spread", torch.ones(4 * sizes.width))

    def standardise(self, statistics: Tensor) -> None:
        """Let both towers read (x − centre) / spread from now on, mean and deviation of (n, 4 width)."""
        deviation = statistics.std(0)
        self.centre.copy_(statistics.mean(0))
        self.spread.copy_(torch.where(deviation > 1e-6, deviation, 1.0))

    def keys(self, statistics: Tensor) -> Tensor:
        """(n, dim) of pooled states of knowledge (n, 4 width)."""
        out: Tensor = self.knowledge((statistics - self.centre) / self.spread)
        return out

    def queries(self, statistics: Tensor) -> Tensor:
        """(n, dim) of pooled states of prompts (n, 4 width)."""
        out: Tensor = self.query((statistics - self.centre) / self.spread)
        return out

    def prompts(self, keys: Tensor) -> Tensor:
        """(n, prompt_tokens, hidden) of keys (n, dim)."""
        out: Tensor = self.generator(keys)
        return out.reshape(len(keys), self.sizes.prompt_tokens, self.sizes.hidden)

    def sentinel_key(self, encoder: TextEncoder) -> Tensor:
        """(1, dim): the sentinel through the encoder's blocks and the knowledge tower."""
        return self.keys(encoder.statistics_of(self.sentinel).to(self.sentinel.dtype))

    def tensors(self) -> dict[str, Tensor]:
        """Weights and buffers by name, each once."""
        return {name: t.detach() for name, t in (*self.named_parameters(), *self.named_buffers())}


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
        self._known: dict[str, tuple[Any, Any]] = {}

    @property
    def digest(self) -> str:
        """32 hexadecimal digits: sizes, weights, encoder and base model.

        Keys of checkpoints with different digests cannot be compared.
        """
        return str(self._of_weights("digest", self._digest))

    def _digest(self) -> str:
        weights = sorted((name, weight_digest(tensor)) for name, tensor in self.networks.tensors().items())
        content = [asdict(self.networks.sizes), self.base, fingerprint(self.encoder.module), weights]
        return hashlib.sha256(json.dumps(content).encode()).hexdigest()[:32]

    @torch.no_grad()
    def keys(self, texts: Sequence[str]) -> Tensor:
        """(n, dim) fp32 on the CPU: keys of knowledge."""
        return self._through(self.networks.keys, texts)

    @torch.no_grad()
    def queries(self, texts: Sequence[str]) -> Tensor:
        """(n, dim) fp32 on the CPU: queries of prompts."""
        return self._through(self.networks.queries, texts)

    @torch.no_grad()
    def prompts(self, keys: Tensor) -> Tensor:
        """(n, prompt_tokens, hidden) fp32, of keys (n, dim)."""
        return self.networks.prompts(keys.to(self.networks.sentinel))

    @property
    def sentinel(self) -> Tensor:
        """(dim,) fp32 on the CPU: the sentinel's key; made anew whenever a weight that it comes from has changed."""
        found: Tensor = self._of_weights("sentinel", self._sentinel)
        return found

    @torch.no_grad()
    def _sentinel(self) -> Tensor:
        return self.networks.sentinel_key(self.encoder)[0].float().cpu()

    def _of_weights(self, name: str, make: Callable[[], Any]) -> Any:
        """What is computed from the weights, remembered as long as none of them changes."""
        weights = [*self.networks.tensors().values(), *self.encoder.module.parameters()]
        state = [(weight.data_ptr(), weight._version) for weight in weights]
        if name not in self._known or self._known[name][0] != state:
            self._known[name] = state, make()
        return self._known[name][1]

    def to(self, device: torch.device) -> None:
        """Move networks and encoder."""
        self.networks.to(device)
        self.encoder.module.to(device)

    def _through(self, tower: Callable[[Tensor], Tensor], texts: Sequence[str]) -> Tensor:
        return tower(self.encoder.statistics(texts).to(self.networks.sentinel)).float().cpu()


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
    made them. Any edit can be taken off. The facts lie in a :class:`fastedit.memory.fact_store.FactStore`, in main
    memory or, if ``params["store"]`` names a folder, there: then they outlive the edits of this process.
    """

    method = "recipe"
    settings = ("on_duplicate",)

    def __init__(
        self, d_in: int, d_out: int, params: Mapping[str, Any], profile: str = "clean", seed: int = 0
    ) -> None:
        super().__init__(d_in, d_out, params, profile, seed)
        if profile == "official":
            self.route_tokens = "all"
        self.parts: RecipeParts | None = None
        self._opened: FactStore | None = None
        self._groups: set[str] = set()
        self._queries: OrderedDict[str, Tensor] = OrderedDict()
        self._prompts: OrderedDict[int, Tensor] = OrderedDict()
        self._prompts_version = 0

    def attach_to(self, model: nn.Module) -> SideModule:
        """Stand beside a model; loads the checkpoint and opens the store if that was not done.

        Raises:
            FasteditError: something cannot be loaded, or the store is open elsewhere.
            BaseMismatch: the checkpoint is for another model, or the store was filled with another checkpoint.
        """
        if self.parts is None:
            self.parts = load_parts(self.params["checkpoint"], self.params["encoder"])
            require_model(self.parts, model, self.params["checkpoint"], self.params["same_weights"])
            self.parts.to(next(model.parameters()).device)
        if self.tokenizer is None:
            self.tokenizer = _own_tokenizer(self.params["checkpoint"])
        _ = self.store
        return super().attach_to(model)

    def detached(self) -> None:
        """Let go of the store's folder."""
        if self._opened is not None and self._opened.path is not None:
            self._opened.close()
            self._opened = None

    @property
    def store(self) -> FactStore:
        """The facts. What is changed here by hand is seen at once: raise :attr:`version` after it."""
        if self._opened is None:
            self._opened = self._open()
            self._groups = {entry.group for entry in self._opened.entries()}
        return self._opened

    @property
    def outlives_edits(self) -> bool:
        """Whether it has a folder of its own."""
        return bool(self.params["store"])

    def _open(self) -> FactStore:
        parts, index, policy = self._ready, self.params["index"], self.params["on_duplicate"]
        device = "cpu" if index.startswith("faiss") else parts.encoder.device
        options = {"stamp": parts.digest, "index": index, "on_duplicate": policy, "device": device}
        path = Path(self.params["store"])
        if self.params["store"] and path.is_dir() and any(path.iterdir()):
            return FactStore.open(path, **options)
        return FactStore(parts.networks.sizes.dim, path=path if self.params["store"] else None, **options)

    @property
    def _ready(self) -> RecipeParts:
        if self.parts is None:
            raise FasteditError("the RECIPE memory has no checkpoint yet: attach it to a model first")
        return self.parts

    # -- serving ------------------------------------------------------------------------------------

    def find(self, texts: list[str]) -> Decision:
        """The fact of the greatest inner product, if that is greater than the sentinel's.

        ``score`` is how much it is greater; −infinity where nothing is found.
        """
        parts = self._ready
        if not texts or not len(self.store):
            return Decision(
                torch.full((len(texts),), -1, dtype=torch.int64), score=torch.full((len(texts),), -torch.inf)
            )
        queries = self._encoded(texts)
        threshold = (queries.double() @ parts.sentinel.double()).float()
        ids, scores = self.store.search(queries, 1, threshold)
        return Decision(ids[:, 0], score=scores[:, 0] - threshold)

    def _encoded(self, texts: list[str]) -> Tensor:
        """(n, dim) queries of texts, which are remembered."""
        new = [text for text in texts if text not in self._queries]
        if new:
            self._queries.update(zip(new, self._ready.queries(new), strict=True))
        for text in texts:
            self._queries.move_to_end(text)
        found = torch.stack([self._queries[text] for text in texts])
        while len(self._queries) > _QUERIES:
            self._queries.popitem(last=False)
        return found

    def prepare(self, indices: Sequence[int]) -> None:
        """Make soft prompts of several entries in one pass of the generator."""
        if self._prompts_version != self.version:
            self._prompts.clear()
            self._prompts_version = self.version
        if new := [index for index in indices if index not in self._prompts]:
            self._prompts.update(zip(new, self._ready.prompts(self.store.keys(new)), strict=True))

    def prefix(self, index: int) -> Prefix:
        """The soft prompt that the generator makes of an entry's key; the latest used ones are remembered."""
        self.prepare([index])
        self._prompts.move_to_end(index)
        while len(self._prompts) > _PROMPTS:
            self._prompts.popitem(last=False)
        return Prefix(embeddings=self._prompts[index])

    # -- content ------------------------------------------------------------------------------------

    def add(self, edit: MemoryEdit) -> None:
        """Take in an edit's facts, unless the store's folder holds them already."""
        keys, parts = edit.content.get("keys"), self._ready
        if keys is None or keys.shape != (len(edit.facts), parts.networks.sizes.dim):
            raise CorruptFile(
                f"{edit!r} must hold a key of width {parts.networks.sizes.dim} for each of its facts"
            )
        if edit.about.get("checkpoint") != parts.digest:
            raise BaseMismatch(
                f"{edit!r} was made with another checkpoint ({edit.about.get('checkpoint')}) than "
                f"{self.params['checkpoint']!r} is now ({parts.digest}): make it again, or put the former one back"
            )
        store = self.store
        if edit.id not in self._groups:
            store.add(edit.facts, keys, group=edit.id)
            self._groups.add(edit.id)

    def remove(self, edit_id: str) -> None:
        """Take an edit's facts out; older ones with the same prompt answer again."""
        self.store.delete_group(edit_id)
        self._groups.discard(edit_id)

    def clear(self) -> None:
        """Forget all facts, in the store's folder too."""
        self.store.delete([entry.id for entry in self.store.entries()])
        self._groups.clear()

    def __getstate__(self) -> dict[str, Any]:
        state = {**self.__dict__, "_opened": None}
        if self._opened is not None:  # a copy holds the facts in main memory
            entries = list(self._opened.entries())
            state["_copied"] = entries, self._opened.keys([entry.id for entry in entries]).cpu()
            state["params"] = {**self.params, "store": ""}
        return state

    def __setstate__(self, state: dict[str, Any]) -> None:
        entries, keys = state.pop("_copied", ([], None))
        self.__dict__.update(state)
        self._prompts = OrderedDict()  # a copy counts its entries anew
        for row, entry in enumerate(entries):
            assert keys is not None
            self.store.add([entry.fact], keys[row : row + 1], group=entry.group)
        self._groups = {entry.group for entry in entries}

    # -- reports ------------------------------------------------------------------------------------

    @property
    def n_entries(self) -> int:
        """Facts held."""
        return 0 if self.parts is None else len(self.store)

    @property
    def n_bytes(self) -> int:
        """Bytes of the keys and what they are searched by; networks and encoder do not count."""
        return 0 if self.parts is None else self.store.n_bytes

    @property
    def prefill_flops(self) -> int:
        """Of the search and the query tower; the encoder's come on top."""
        if self.parts is None:
            return 0
        sizes = self.parts.networks.sizes
        return 2 * sizes.dim * (4 * sizes.width + sizes.dim + self.n_entries + 1)

    def owner(self, index: int) -> str | None:
        """The edit that an entry belongs to; None for one that is gone."""
        try:
            return self.store.entry(index).group or None
        except ValueError:
            return None


def _own_tokenizer(checkpoint: str) -> Any:
    from ..models.loading import load_tokenizer

    try:
        return load_tokenizer(str(Path(checkpoint) / TOKENIZER))
    except (OSError, ValueError):
        return None  # then it is looked for elsewhere
