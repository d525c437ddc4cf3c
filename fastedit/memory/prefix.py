"""Memories that put something in front of a text: a continuous prompt (RECIPE), or text (LTE, IKE).

A sample is routed once, at prefill, by the text of its prompt. What is put in front of it takes the earliest places
and attention is causal, so its keys and values depend on nothing else: they are computed once per entry, kept, and
put at the head of the KV cache of the samples that were routed to it. After that the model runs on the tokens that it
was given, and no others; what each call is told of its mask and positions is adapted, and that is all that later
tokens cost. Samples without a hit have the columns at the head masked. A batch without any hit is not touched. If
every sample of a batch has an entry of its own that was not read before, prefixes and texts are read in one pass.

Positions. Models with relative positions (rotary, ALiBi): the prefix has 0 to n − 1, the tokens follow it. Models
with a table of position embeddings: a continuous prompt carries none of them and the tokens keep their places; text
has places 0 to n − 1, and the tokens follow it. Special tokens (BOS) that both a text prefix and the prompt begin
with are read once, with the prefix; a continuous prompt stands before them.

Blocks with a sliding window count columns, padding too. There a prefix stands next to its text, in the columns of the
padding if the text is padded on the left.

Between calls the cache object gives its length without the prefix, and :meth:`crop` counts like that, so what
``generate()`` does by its lengths comes out right. A prefix goes in front of a whole text: a cache that holds tokens
before the route is decided is refused if there is a hit.

:func:`prefixed_states` is the same in one differentiable pass, for training; see also
:mod:`fastedit.memory.prefix_trees`.
"""

from __future__ import annotations

import inspect
import threading
from abc import abstractmethod
from collections import OrderedDict
from collections.abc import Mapping, Sequence, Sized
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import pad

from ..errors import FasteditError, UnsupportedModel
from ..models.describe import describe, unwrap
from ..models.runner import _checked_pair, _new_cache
from ..models.tokens import leading_specials
from .base import Decision, Memory, Routes
from .routing import Call, Key, Router, aside, hide_columns, router_of, routes_on
from .side_module import SideModule, sides_of


@dataclass(frozen=True)
class Prefix:
    """What is put in front of a sample; exactly one of the two.

    Attributes:
        ids: tokens, with the special tokens that the text begins with.
        embeddings: (n, D) floating, in the place of token embeddings.

    Raises:
        ValueError: both, none, or nothing in it.
    """

    ids: list[int] | None = None
    embeddings: Tensor | None = None

    def __post_init__(self) -> None:
        if (self.ids is None) == (self.embeddings is None):
            raise ValueError("a prefix is either ids or embeddings, exactly one of them")
        if self.embeddings is not None and self.embeddings.dim() != 2:
            raise ValueError(f"embeddings must have shape (n, D), got {tuple(self.embeddings.shape)}")
        if not len(self):
            raise ValueError("a prefix must hold at least one token")

    def __len__(self) -> int:
        return len(self.ids) if self.ids is not None else len(self.embeddings)  # type: ignore[arg-type]


class PrefixMemory(Memory):
    """A memory that finds, for the text of a prompt, what to put in front of it. It stands beside the whole model.

    Attributes:
        tokenizer: the base model's, which turns the prompts into text; looked for when the memory is attached, if
            it is None, in the folder ``params["tokenizer"]`` and in the model's own.
        kept_bytes: of prefixes' keys and values that are kept for the next prefill, the latest used ones.
    """

    kept_bytes: int = 1 << 28

    def __init__(
        self, d_in: int, d_out: int, params: Mapping[str, Any], profile: str = "clean", seed: int = 0
    ) -> None:
        super().__init__(d_in, d_out, params, profile, seed)
        self.tokenizer: Any = None

    @abstractmethod
    def find(self, texts: list[str]) -> Decision:
        """Decide what, if anything, is put in front of each text; called once per prefill.

        Args:
            texts: of the prompts, without special tokens; no text occurs twice.

        Returns:
            ``index`` (len(texts),) int64, the id of an entry or −1; ``score`` for reports.
        """

    @abstractmethod
    def prefix(self, index: int) -> Prefix:
        """What is put in front of a sample that was routed to entry ``index``."""

    def prepare(self, indices: Sequence[int]) -> None:
        """Make what :meth:`prefix` will be asked for next, if that is cheaper for all together; nothing by itself."""

    @abstractmethod
    def remove(self, edit_id: str) -> None:
        """Forget one edit."""

    def route(self, inputs: Tensor, outputs: Tensor, tokens: Tensor) -> Decision:
        """Decode the prompts and :meth:`find` their entries.

        Args:
            inputs: (B, T) token ids.
            outputs: not used.
            tokens: (B, T) bool, the prompts' tokens; a row without any has no entry.
        """
        texts = [
            self.tokenizer.decode(
                [i for i, is_prompt in zip(*row, strict=True) if is_prompt], skip_special_tokens=True
            )
            for row in zip(inputs.tolist(), tokens.tolist(), strict=True)
        ]
        places = {text: place for place, text in enumerate(dict.fromkeys(texts))}
        if not places:
            return Decision(torch.zeros(0, dtype=torch.int64, device=inputs.device))
        found = self.find(list(places))
        if found.index.shape != (len(places),):
            raise ValueError(
                f"find: index must have shape ({len(places)},), one entry per text, got {tuple(found.index.shape)}"
            )
        rows = torch.tensor([places[text] for text in texts], device=inputs.device)
        index = found.index.to(inputs.device)[rows]
        score = None if found.score is None else found.score.to(inputs.device)[rows]
        return Decision(torch.where(tokens.any(1), index, -1), score=score)

    def apply(self, inputs: Tensor, outputs: Tensor, routes: Routes, tokens: Tensor | None) -> Tensor:
        """The model's own outputs: what is in front of the sample has been read already."""
        return outputs

    def attach_to(self, model: nn.Module) -> SideModule:
        """Stand beside a model."""
        return attach_in_front(model, self)


# ------------------------------------------------------------------ keys and values of a prefix


@dataclass(frozen=True)
class Standing:
    """How a prefix stands in front of texts.

    Attributes:
        length: its tokens.
        shift: by how much the positions of the tokens behind it grow.
        leading: how many special tokens it brings that texts begin with too.
    """

    length: int
    shift: int
    leading: int

    @classmethod
    def of(cls, prefix: Prefix, leading: Sequence[int], absolute: bool) -> Standing:
        """Of a prefix, where texts begin with the tokens ``leading``; ``absolute``: positions have a table."""
        n = len(prefix)
        begins = leading if prefix.ids is not None and prefix.ids[: len(leading)] == list(leading) else ()
        return cls(n, 0 if absolute and prefix.ids is None else n - len(begins), len(begins))


@dataclass(frozen=True)
class ReadPrefix:
    """A prefix that the model has read.

    Attributes:
        states: of each block its keys and values, (2, heads, n, head size).
        standing: how it stands in front of texts.
    """

    states: list[Tensor]
    standing: Standing

    @property
    def n_bytes(self) -> int:
        """Bytes of the keys and values."""
        return sum(states.nbytes for states in self.states)


class ReadPrefixes:
    """The latest used prefixes that the model has read, up to a number of bytes."""

    def __init__(self) -> None:
        self._kept: OrderedDict[int, ReadPrefix] = OrderedDict()
        self._made_of: Any = None
        self._lock = threading.Lock()

    def __reduce__(self) -> Any:
        return ReadPrefixes, ()  # a copy of the model reads by itself

    def __len__(self) -> int:
        return len(self._kept)

    def get(self, indices: Sequence[int], made_of: Any) -> dict[int, ReadPrefix]:
        """Those of the entries that are kept; all are dropped if they were made of something else."""
        with self._lock:
            if made_of != self._made_of:
                self._kept.clear()
                self._made_of = made_of
            return {index: self._kept[index] for index in indices if index in self._kept}

    def put(self, used: Mapping[int, ReadPrefix], made_of: Any, limit: int) -> None:
        """Keep these as the latest used; the oldest go while all together exceed ``limit`` bytes."""
        with self._lock:
            if made_of != self._made_of:
                return
            for index, prefix in used.items():
                self._kept[index] = prefix
                self._kept.move_to_end(index)
            held = sum(prefix.n_bytes for prefix in self._kept.values())
            while held > limit:
                held -= self._kept.popitem(last=False)[1].n_bytes


def position_table(decoder: nn.Module) -> nn.Embedding | None:
    """The decoder's table of position embeddings; None if positions are relative.

    Raises:
        UnsupportedModel: it has one, but counts positions by itself.
    """
    tables = [getattr(decoder, name, None) for name in ("wpe", "embed_positions")]
    table = next((found for found in tables if isinstance(found, nn.Embedding)), None)
    if table is not None and "position_ids" not in _names(decoder):
        raise UnsupportedModel(
            f"{type(decoder).__name__} takes no position_ids, so nothing can be put in front of its texts"
        )
    return table


def _names(decoder: nn.Module) -> list[str]:
    return list(inspect.signature(decoder.forward).parameters)


def embed(decoder: Any, prefix: Prefix) -> Tensor:
    """(n, D) what the decoder is given for a prefix, in its dtype.

    Raises:
        ValueError: embeddings of another width.
    """
    embeddings = decoder.get_input_embeddings()
    if prefix.ids is not None:
        found: Tensor = embeddings(torch.tensor(prefix.ids, device=embeddings.weight.device))
        return found
    assert prefix.embeddings is not None
    if prefix.embeddings.shape[1] != embeddings.weight.shape[1]:
        raise ValueError(
            f"embeddings must have shape (n, {embeddings.weight.shape[1]}), got {tuple(prefix.embeddings.shape)}"
        )
    return placeless(decoder, prefix.embeddings.to(embeddings.weight))


def placeless(decoder: nn.Module, prompts: Tensor) -> Tensor:
    """Continuous prompts (..., D), less the position embedding that the decoder adds at place 0."""
    table = position_table(decoder)
    if table is None:
        return prompts
    return prompts - table.weight[getattr(table, "offset", 0)].to(prompts)


@torch.inference_mode(False)
@torch.no_grad()
def read(model: nn.Module, prefixes: Sequence[Prefix], leading: Sequence[int]) -> list[ReadPrefix]:
    """Run the decoder on prefixes, all in one pass without any memory.

    Args:
        model: the model.
        prefixes: at least one.
        leading: the special tokens that texts begin with.
    """
    description = describe(model)
    decoder: Any = description.decoder
    given = [embed(decoder, prefix) for prefix in prefixes]
    width = max(map(len, given))
    inputs = torch.stack([pad(each, (0, 0, 0, width - len(each))) for each in given])
    places = torch.arange(width, device=inputs.device).repeat(len(given), 1)
    absolute = position_table(decoder) is not None
    if absolute:
        places[[prefix.ids is None for prefix in prefixes]] = 0
    with aside(model):
        states = _states(decoder, inputs, places)
    _require_all(states, description.n_layers)
    standings = [Standing.of(prefix, leading, absolute) for prefix in prefixes]
    return [
        ReadPrefix([pair[:, row, :, : standing.length].clone() for pair in states], standing)
        for row, standing in enumerate(standings)
    ]


def _require_all(states: Sized, n_layers: int) -> None:
    if len(states) != n_layers:
        raise UnsupportedModel(
            f"a prefix needs keys and values in all {n_layers} blocks, found them in {len(states)}"
        )


def _states(decoder: Any, inputs: Tensor, places: Tensor) -> list[Tensor]:
    """(2, rows, heads, T, head size) of every block, for inputs (rows, T, D) and their positions."""
    mask = torch.ones(inputs.shape[:2], dtype=torch.int64, device=inputs.device)
    options: dict[str, Any] = {"inputs_embeds": inputs, "attention_mask": mask, "use_cache": True}
    if "position_ids" in _names(decoder):
        options["position_ids"] = places
    if takes_tuples(decoder):
        out = decoder.forward(**options, return_dict=True)
        return [torch.stack(_checked_pair(pair)) for pair in out.past_key_values]
    cache = _new_cache()
    decoder.forward(**options, past_key_values=cache, return_dict=True)
    return [torch.stack(cache.seen[layer]) for layer in sorted(cache.seen)]


def takes_tuples(decoder: nn.Module) -> bool:
    """Whether this version of transformers hands the model tuples in the place of cache objects."""
    return getattr(decoder, "_supports_cache_class", True) is False


# ------------------------------------------------------------------ beside a model


@dataclass(frozen=True)
class PrefixRoutes(Routes):
    """Routes whose payload (B, 4) int64 says how a sample's columns lie, see :data:`_IN_FRONT` and the others.

    Attributes:
        repeats: whether some prompts may begin with special tokens that their prefix has brought already.
    """

    repeats: bool = False


_IN_FRONT, _SHIFT, _REPEATED, _MOVED = range(4)
"""Tokens in front of the sample; what its positions grow by; tokens of its own that are masked, since the prefix has
brought them; columns that the prefix stands to the right of the cache's head, to be next to the text."""


class PrefixSide(SideModule):
    """A memory that puts something in front of a model's texts.

    Attributes:
        model: the base model.
        read: the prefixes that it has read.
    """

    memory: PrefixMemory

    def __init__(self, model: nn.Module, memory: PrefixMemory, router: Router) -> None:
        super().__init__(memory, None, "", router)
        self.model = model
        self.read = ReadPrefixes()
        self._names = _names(describe(model).decoder)
        self._n_places = n_places(model)
        self._windowed = has_windows(describe(model).decoder)

    @property
    def key(self) -> Key:
        """What routes are kept under."""
        return "", self.memory.method

    # -- hooks on the decoder -----------------------------------------------------------------------

    @torch.compiler.disable
    def begin(
        self, decoder: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[tuple[Any, ...], dict[str, Any]] | None:
        """Forward pre-hook, after the router's: decides at a prefill; tells the decoder what is in front."""
        call = self.router.call
        if call is None:
            return None
        given = {**dict(zip(self._names, args, strict=False)), **kwargs}
        wanted = given.get("past_key_values") is not None or _wants_cache(decoder, given)
        routes: Any = call.routes(self.key, self.memory)
        first: FirstPass | None = None
        if routes is None:
            if not self.enabled:
                return None
            routes, first = self._prefill(call, decoder, given, not torch.is_grad_enabled())
        if not routes.width:
            return None
        cache = given["past_key_values"]
        if not isinstance(cache, (tuple, list)):
            hide_columns(cache, 0)
            call.noted[_NOTED] = (cache, routes.width, wanted, first)
        self._adapt(call, given, routes, 0 if first else _length(cache) - routes.width)
        if first is not None:
            first.begin(decoder, given)
        return (), given

    @torch.compiler.disable
    def end(self, decoder: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], out: Any) -> Any:
        """Forward hook, before the router's: outside of calls the cache does not count the prefix."""
        call = self.router.call
        if call is None or _NOTED not in call.noted:
            return None
        cache, width, wanted, first = call.noted.pop(_NOTED)
        cache.__dict__.pop("update", None)
        if first is not None and out is None:  # the call failed, and the cache has nothing in front
            routes_on(cache).pop(self.key, None)
            return None
        hide_columns(cache, width)
        if first is not None:
            _require_all(first.seen, describe(self.model).n_layers)
            self.read.put(first.read(), first.source, self.memory.kept_bytes)
            out = _behind(out, width)
        return out if wanted else _without(cache, out)

    # -- prefill ------------------------------------------------------------------------------------

    @torch.no_grad()
    def _prefill(
        self, call: Call, decoder: nn.Module, given: dict[str, Any], serving: bool
    ) -> tuple[PrefixRoutes, FirstPass | None]:
        """Decide the routes; if there is a hit, ``given`` gets a cache with the prefixes in it.

        Where all prefixes are new, and nothing asks for gradients (``serving``), the cache is empty and they are to
        be read with the texts.
        """
        ids, memory = given.get("input_ids"), self.memory
        if ids is None:
            raise UnsupportedModel(
                f"a {memory.method} memory reads prompts, so it needs input_ids, got inputs_embeds"
            )
        decision = memory.route(ids, ids, call.tokens(memory.route_tokens, ids.device))
        found = Routes.of(decision, memory.version)
        routes = PrefixRoutes(found.index, found.used, None, found.score, found.version)
        first: FirstPass | None = None
        if routes.used:
            self._require_place(decoder, given)
            source = (memory.version, made_of(decoder))
            read = self.read.get(routes.used, source)
            if not read and serving and found.all_routed and self._can_join(decoder, given):
                leading, absolute = leading_specials(memory.tokenizer), position_table(decoder) is not None
                prefixes = self._prefixes(routes.used)
                standings = [Standing.of(prefix, leading, absolute) for prefix in prefixes]
                first = FirstPass(routes, prefixes, standings, source)
            else:
                self._read(decoder, routes.used, read, source)
                standings = [read[index].standing for index in routes.used]
            routes = replace(
                routes,
                payload=self._payload(call, ids, routes, standings),
                width=max(standing.length for standing in standings),
                repeats=any(standing.leading for standing in standings),
            )
            if first is None:
                given["past_key_values"] = self._filled(decoder, given, routes, read)
            else:
                given["past_key_values"] = first.cache(decoder, given)
                routes_on(given["past_key_values"])[self.key] = routes
        self.router.note(self.key, routes, call)
        return routes, first

    def _can_join(self, decoder: Any, given: Mapping[str, Any]) -> bool:
        """Whether nothing else counts the columns of this call."""
        cache, config = given.get("past_key_values"), decoder.config
        asked = ("output_hidden_states", "output_attentions")
        return (
            len(self.router.sides) == 1
            and not (self._windowed or takes_tuples(decoder) or decoder.training)
            and (cache is None or hasattr(cache, "update"))
            and given.get("token_type_ids") is None
            and not any(given.get(name) or getattr(config, name, False) for name in asked)
        )

    def _require_place(self, decoder: Any, given: Mapping[str, Any]) -> None:
        """Make sure that something can be put in front of this call's texts."""
        method, cache, mask = self.memory.method, given.get("past_key_values"), given.get("attention_mask")
        if getattr(decoder.config, "cache_implementation", None) == "hybrid":
            raise UnsupportedModel(
                f"this release of transformers gives {type(decoder).__name__} KV caches of fixed length only, and a "
                f"{method} memory needs one that can grow: install a newer transformers"
            )
        if cache is not None and _is_fixed(cache):
            raise UnsupportedModel(
                f"a {method} memory needs a KV cache that can grow by what it puts in front, got "
                f"{type(cache).__name__}: use a DynamicCache, the default of generate()"
            )
        if cache is not None and _length(cache):
            raise FasteditError(
                f"a {method} memory puts something in front of whole texts, but the KV cache holds "
                f"{_length(cache)} tokens from before the memory's first call: begin with an empty cache"
            )
        self._require_plain(mask)
        if decoder.training and getattr(decoder, "gradient_checkpointing", False):
            raise UnsupportedModel(
                f"a {method} memory does not work with gradient checkpointing in training mode, which lets no KV "
                "cache into the blocks: call model.eval() first"
            )

    def _require_plain(self, mask: Any) -> None:
        if mask is not None and not (isinstance(mask, Tensor) and mask.dim() == 2):
            came = f"shape {tuple(mask.shape)}" if isinstance(mask, Tensor) else type(mask).__name__
            raise UnsupportedModel(
                f"a {self.memory.method} memory needs an attention_mask of shape (batch, length), got {came}"
            )

    def _read(
        self, decoder: nn.Module, indices: tuple[int, ...], found: dict[int, ReadPrefix], source: Any
    ) -> None:
        """Add to those ``found`` what they lack."""
        new = [index for index in indices if index not in found]
        if new:
            leading = leading_specials(self.memory.tokenizer)
            states = read(self.model, self._prefixes(new), leading)
            found.update(zip(new, states, strict=True))
        if not decoder.training:  # dropout: another time, other keys
            self.read.put(found, source, self.memory.kept_bytes)

    def _prefixes(self, indices: Sequence[int]) -> list[Prefix]:
        self.memory.prepare(indices)
        return [self.memory.prefix(index) for index in indices]

    def _payload(self, call: Call, ids: Tensor, routes: PrefixRoutes, standings: list[Standing]) -> Tensor:
        table = [[standing.length, standing.shift, standing.leading, 0] for standing in standings]
        payload = torch.tensor([*table, [0, 0, 0, 0]], device=ids.device)[_rows(routes)]
        real = call.tokens("all", ids.device)
        if any(standing.leading for standing in standings):
            own = n_leading(ids, real, leading_specials(self.memory.tokenizer))
            brought = payload[:, _REPEATED].clone()
            payload[:, _REPEATED] = own.minimum(brought)
            payload[:, _SHIFT] += brought - payload[:, _REPEATED]
        if self._windowed:
            first = real.long().argmax(1) + payload[:, _REPEATED]
            payload[:, _MOVED] = torch.where(payload[:, _IN_FRONT] > 0, first, 0)
        return payload

    def _filled(
        self,
        decoder: nn.Module,
        given: Mapping[str, Any],
        routes: PrefixRoutes,
        read: Mapping[int, ReadPrefix],
    ) -> Any:
        """A cache with every sample's prefix in it: the one that was given, or a new one."""
        assert routes.payload is not None
        rows = _rows(routes).tolist()
        blocks = zip(*(read[index].states for index in routes.used), strict=True)
        states = [_columns(each, rows, routes.width) for each in blocks]
        moved = routes.payload[:, _MOVED] if self._windowed else None
        if moved is not None and not moved.any():
            moved = None
        head = states if moved is None else [_moved(each, moved, each.shape[3]) for each in states]
        cache: Any = given.get("past_key_values")
        if takes_tuples(decoder) and not hasattr(cache, "update"):
            return tuple((each[0], each[1]) for each in head)
        if not hasattr(cache, "update"):
            cache = _empty_cache(decoder)
        for layer, each in enumerate(head):
            cache.update(each[0], each[1], layer)
        routes_on(cache)[self.key] = routes
        if moved is not None:
            _put_into_padding(cache, states, moved)
        return cache

    # -- every call ---------------------------------------------------------------------------------

    def _adapt(self, call: Call, given: dict[str, Any], routes: PrefixRoutes, past: int) -> None:
        """Put the prefix into a call's mask, (B, width + past + T), and its positions, (B, T)."""
        assert routes.payload is not None
        (n_rows, length), mask, width = call.size, given.get("attention_mask"), routes.width
        tokens = given["input_ids"] if given.get("input_ids") is not None else given["inputs_embeds"]
        device = tokens.device
        self._require_plain(mask)
        if mask is None:
            mask = torch.ones((n_rows, past + length), dtype=torch.int64, device=device)
        payload = routes.payload.to(device)
        if "position_ids" in self._names:
            given["position_ids"] = _places(given.get("position_ids"), mask, payload, past, length)
            self._require_room(given["position_ids"], width + past + length)
        if given.get("cache_position") is not None:
            given["cache_position"] = given["cache_position"] + width
        if routes.repeats:
            mask = mask * (mask.cumsum(1) > payload[:, _REPEATED, None]).to(mask)
        if self._windowed:
            columns = torch.arange(width + past + length, device=device)
            stop = (width + payload[:, _MOVED])[:, None]
            in_front = (columns < stop) & (columns >= stop - payload[:, _IN_FRONT, None])
            given["attention_mask"] = pad(mask, (width, 0)).masked_fill(in_front, 1)
        else:
            head = torch.arange(width, 0, -1, device=device) <= payload[:, _IN_FRONT, None]
            given["attention_mask"] = torch.cat((head.to(mask), mask), 1)

    def _require_room(self, places: Tensor, columns: int) -> None:
        if self._n_places is None or columns <= self._n_places or int(places.max()) < self._n_places:
            return
        raise ValueError(
            f"what the {self.memory.method} memory puts in front and the text take {int(places.max()) + 1} "
            f"positions, the model has {self._n_places}"
        )


_NOTED = "prefix"


class FirstPass:
    """Prefixes that are read in the same pass as the texts behind them, one for each row.

    Args:
        routes: which entry each row has.
        prefixes: of ``routes.used``.
        standings: of ``routes.used``.
        source: what the prefixes' keys and values depend on.

    Attributes:
        seen: keys and values that each block has handed to the cache, (B, heads, columns, head size).
    """

    def __init__(
        self, routes: Routes, prefixes: Sequence[Prefix], standings: Sequence[Standing], source: Any
    ) -> None:
        rows = _rows(routes).tolist()
        self.prefixes, self.standings = [prefixes[row] for row in rows], [standings[row] for row in rows]
        self.entries, self.source = [routes.used[row] for row in rows], source
        self.width = max(standing.length for standing in standings)
        self.seen: dict[int, tuple[Tensor, Tensor]] = {}

    def cache(self, decoder: Any, given: Mapping[str, Any]) -> Any:
        """The call's cache, or a new one; until its own ``update`` is given back, what it is handed is noted."""
        cache: Any = given.get("past_key_values")
        cache = _empty_cache(decoder) if cache is None else cache
        update = cache.update

        def noting(keys: Tensor, values: Tensor, layer_idx: int, *args: Any, **kwargs: Any) -> Any:
            self.seen[layer_idx] = (keys, values)
            return update(keys, values, layer_idx, *args, **kwargs)

        cache.update = noting
        return cache

    def begin(self, decoder: Any, given: dict[str, Any]) -> None:
        """Put the prefixes in front of a call's tokens; mask and positions of the tokens are right already."""
        tokens = decoder.get_input_embeddings()(given.pop("input_ids"))
        lengths = [standing.length for standing in self.standings]
        front = [
            pad(embed(decoder, prefix), (0, 0, self.width - n, 0))
            for prefix, n in zip(self.prefixes, lengths, strict=True)
        ]
        given["inputs_embeds"] = torch.cat((torch.stack(front), tokens), 1)
        if (places := given.get("position_ids")) is not None:
            before = torch.arange(self.width) - torch.tensor([self.width - n for n in lengths])[:, None]
            if position_table(decoder) is not None:
                before[[prefix.ids is None for prefix in self.prefixes]] = 0
            given["position_ids"] = torch.cat((before.clamp(min=0).to(places), places), 1)
        if given.get("cache_position") is not None:
            columns = given["inputs_embeds"].shape[1]
            given["cache_position"] = torch.arange(columns, device=given["cache_position"].device)

    @torch.inference_mode(False)
    @torch.no_grad()
    def read(self) -> dict[int, ReadPrefix]:
        """The prefixes, as they were read, by entry."""
        found = {}
        for row, (entry, standing) in enumerate(zip(self.entries, self.standings, strict=True)):
            part = slice(self.width - standing.length, self.width)
            pairs = (self.seen[layer] for layer in sorted(self.seen))
            states = [torch.stack((keys[row, :, part], values[row, :, part])) for keys, values in pairs]
            found[entry] = ReadPrefix(states, standing)
        return found


def _places(places: Tensor | None, mask: Tensor, payload: Tensor, past: int, length: int) -> Tensor:
    """(B, T) positions of a call's tokens: as given, or as the model would count, plus what is in front of them.

    Models count columns; samples with something in front of them count their real tokens, so that padding does not
    come between.
    """
    if places is None:
        columns = torch.arange(past, past + length, device=payload.device).expand(len(payload), -1)
        counted = (mask.long().cumsum(1)[:, -length:] - 1).clamp(min=0)
        places = torch.where(payload[:, _IN_FRONT, None] > 0, counted, columns)
    return places + payload[:, _SHIFT, None]


def _columns(states: Sequence[Tensor], rows: Sequence[int], width: int) -> Tensor:
    """(2, B, heads, width, head size): of each row the states of its entry, at the right; zeros where it has none."""
    missing = [width - each.shape[2] for each in states]
    padded = [pad(each, (0, 0, n, 0)) if n else each for each, n in zip(states, missing, strict=True)]
    nothing = torch.zeros_like(padded[0])
    return torch.stack([padded[row] if row < len(padded) else nothing for row in rows], 1)


def _moved(states: Tensor, columns: Tensor, length: int, start: int = 0) -> Tensor:
    """States (2, B, heads, width, head size) moved to the right by each row's ``columns``, seen from ``start`` on.

    Returns:
        (2, B, heads, length, head size), zeros where there are none.
    """
    width = states.shape[3]
    source = torch.arange(start, start + length, device=states.device) - columns.to(states.device)[:, None]
    inside = ((source >= 0) & (source < width))[None, :, None, :, None]
    source = source.clamp(0, width - 1)[None, :, None, :, None]
    found = states.gather(3, source.expand(2, -1, states.shape[2], -1, states.shape[4]))
    return found * inside


def _put_into_padding(cache: Any, states: list[Tensor], moved: Tensor) -> None:
    """Let padding on the left of a call hold the prefixes, until the cache's own ``update`` is given back.

    Blocks with a window count columns, so a prefix must be next to its text. What a block hands to the cache for
    columns of padding is replaced by the keys and values of the prefix.
    """
    update = cache.update

    def replacing(keys: Tensor, values: Tensor, layer_idx: int, *args: Any, **kwargs: Any) -> Any:
        length, width = keys.shape[-2], states[layer_idx].shape[3]
        padding = torch.arange(length, device=keys.device) < moved.to(keys.device)[:, None]
        ours = _moved(states[layer_idx], moved, length, width).to(keys.dtype)
        keys, values = torch.where(padding[:, None, :, None], ours, torch.stack((keys, values)))
        return update(keys, values, layer_idx, *args, **kwargs)

    cache.update = replacing


def _rows(routes: Routes) -> Tensor:
    """(B,) the place of each row's index in ``routes.used``, −1 turned into the place behind the last."""
    used = torch.tensor(routes.used, device=routes.index.device)
    place = torch.searchsorted(used, routes.index)
    return torch.where(routes.index >= 0, place, len(routes.used))


def n_leading(ids: Tensor, real: Tensor, leading: Sequence[int]) -> Tensor:
    """(B,) with how many of the special tokens ``leading`` each row's real tokens begin."""
    place = real.long().cumsum(1) * real - 1
    going = torch.ones(len(ids), dtype=torch.bool, device=ids.device)
    count = torch.zeros(len(ids), dtype=torch.int64, device=ids.device)
    for position, token in enumerate(leading):
        going = going & ((place == position) & (ids == token)).any(1)
        count += going
    return count


def _length(cache: Any) -> int:
    if isinstance(cache, (tuple, list)):
        return int(cache[0][0].shape[-2]) if cache else 0
    return int(cache.get_seq_length())


def _wants_cache(decoder: Any, given: Mapping[str, Any]) -> bool:
    """Whether a call that was given no cache wants one back."""
    use_cache = given.get("use_cache")
    return bool(decoder.config.use_cache if use_cache is None else use_cache)


def _behind(out: Any, width: int) -> Any:
    """What a decoder returned, less the states of the first columns."""
    if isinstance(out, tuple):
        return out[0][:, width:], *out[1:]
    out.last_hidden_state = out.last_hidden_state[:, width:]
    return out


def _without(cache: Any, out: Any) -> Any:
    """What a decoder returned, less a cache that nobody asked for."""
    if isinstance(out, tuple):
        return tuple(part for part in out if part is not cache)
    if out is not None:
        out.past_key_values = None
    return out


def _is_fixed(cache: Any) -> bool:
    """Whether a cache was made for a fixed number of tokens."""
    if isinstance(cache, (tuple, list)):
        return False
    if hasattr(cache, "is_compileable"):
        return bool(cache.is_compileable)
    limit = getattr(cache, "get_max_length", None) or getattr(cache, "get_max_cache_shape", None)
    return limit is not None and limit() is not None


def _empty_cache(decoder: Any) -> Any:
    """A cache object as the decoder would make it."""
    from transformers import DynamicCache

    if "config" in inspect.signature(DynamicCache.__init__).parameters:
        return DynamicCache(config=decoder.config)
    return DynamicCache()


def made_of(decoder: nn.Module) -> tuple[Any, ...]:
    """What the keys and values of a prefix depend on: other weights, adapters or precision give another value.

    Runs at every prefill with a hit, so it walks over the modules by itself, which is several times faster.
    """
    weights: list[Any] = []
    modules: list[Any] = [decoder]
    while modules:
        state = modules.pop().__dict__
        for weight in state["_parameters"].values():
            if weight is not None:
                version = 0 if weight.is_inference() else weight._version
                weights.append((weight.data_ptr() if type(weight) is nn.Parameter else id(weight), version))
        if "_disable_adapters" in state:  # a layer of PEFT
            weights.append((str(state.get("_active_adapter")), state["_disable_adapters"]))
        modules.extend(module for module in state["_modules"].values() if module is not None)
    device = next(decoder.parameters()).device.type
    autocast = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else None
    return tuple(weights), autocast


def n_places(model: nn.Module) -> int | None:
    """How many positions a model has tables for; None if it has none."""
    description = describe(model)
    table = position_table(description.decoder)
    if table is not None:
        return table.num_embeddings - int(getattr(table, "offset", 0))
    for module in description.blocks[0].modules():
        sines = module.__dict__.get("embed_positions", module._buffers.get("embed_positions"))
        if isinstance(sines, Tensor):
            return len(sines)
    return None


def has_windows(decoder: Any) -> bool:
    """Whether some blocks may see the latest tokens only."""
    return any(getattr(decoder.config, name, None) for name in ("sliding_window", "window_size"))


def attach_in_front(model: nn.Module, memory: PrefixMemory) -> PrefixSide:
    """Let a memory put something in front of a model's texts.

    Raises:
        FasteditError: one does already, or the memory's tokenizer cannot be found.
        UnsupportedModel: positions of the model's tokens cannot be said.
    """
    model = unwrap(model)
    for side in sides_of(model):
        if isinstance(side, PrefixSide):
            raise FasteditError(
                f"the model has a {side.memory.method} memory already, and only one can put something in front of "
                "its texts: take that one off first"
            )
    decoder = describe(model).decoder
    position_table(decoder)
    if memory.tokenizer is None:
        memory.tokenizer = _own_tokenizer(model, memory)
    router = router_of(model, make=True)
    assert router is not None
    side = PrefixSide(model, memory, router)
    decoder.register_forward_pre_hook(side.begin, with_kwargs=True)
    decoder.register_forward_hook(side.end, prepend=True, with_kwargs=True, always_call=True)
    router.sides.append(side)
    return side


def _own_tokenizer(model: nn.Module, memory: PrefixMemory) -> Any:
    from ..models.loading import first_tokenizer

    places = [memory.params.get("tokenizer"), getattr(model, "name_or_path", "")]
    tokenizer = first_tokenizer(places)
    if tokenizer is None:
        raise FasteditError(
            f"a {memory.method} memory reads text, so it needs the model's tokenizer, which is in none of "
            f"{[place for place in places if place]}: name its folder, edit.params['tokenizer'] = ..., or set "
            "the memory's tokenizer"
        )
    return tokenizer


# ------------------------------------------------------------------ training


def prefixed_states(
    model: nn.Module, ids: Tensor, mask: Tensor | None, prompts: Tensor, hit: Tensor | None = None
) -> Tensor:
    """Final hidden states of texts that have continuous prompts in front of them, in one differentiable pass.

    The same as serving gives, for every architecture. No memory of the model answers.

    Args:
        model: the model, as it is: gradients flow through it to ``prompts``, and to its weights if they ask for them.
        ids: (B, T) int64, padded on the right.
        mask: (B, T), 1 at real tokens; None if nothing is padding. States at padding mean nothing.
        prompts: (B, n, D), any floating dtype; cast to the model's.
        hit: (B,) bool, the rows that have their prompt in front of them; the others run without. None is all.

    Returns:
        (B, T, D) states after the final norm at the tokens of ``ids``; the logits are
        ``describe(model).logits(states)``.

    Raises:
        ValueError: shapes that do not fit, padding on the left.
    """
    decoder: Any = describe(model).decoder
    embeddings = decoder.get_input_embeddings()
    (n_rows, length), device = ids.shape, embeddings.weight.device
    d_model = embeddings.weight.shape[1]
    if prompts.dim() != 3 or prompts.shape[::2] != (n_rows, d_model):
        raise ValueError(f"prompts must have shape ({n_rows}, n, {d_model}), got {tuple(prompts.shape)}")
    if mask is not None and (mask.shape != ids.shape or bool((mask[:, 1:] > mask[:, :-1]).any())):
        raise ValueError("prefixed_states: mask must be of the shape of ids, and rows padded on the right")
    if hit is not None and hit.shape != (n_rows,):
        raise ValueError(f"hit must have shape ({n_rows},), got {tuple(hit.shape)}")
    n = prompts.shape[1]
    hits = torch.ones(n_rows, dtype=torch.bool) if hit is None else hit.bool()
    hits = hits.to(device)
    tokens = embeddings(ids.to(device))
    whole = torch.cat((placeless(decoder, prompts.to(tokens)), tokens), 1)
    columns = torch.arange(n + length, device=device)
    # Rows without a prompt begin with their tokens and end in padding, which nothing real attends to.
    start = torch.where(hits, 0, n)[:, None]
    if hit is not None:
        order = (columns + start) % (n + length)
        whole = whole.gather(1, order[..., None].expand_as(whole))
    options: dict[str, Any] = {}
    if position_table(decoder) is not None:
        places = torch.where(hits[:, None], (columns - n).clamp(min=0), columns.clamp(max=length - 1))
        options["position_ids"] = places
    with aside(model):
        out = decoder.forward(
            inputs_embeds=whole,
            attention_mask=torch.ones(whole.shape[:2], dtype=torch.int64, device=device),
            use_cache=False,
            return_dict=True,
            **options,
        )
    states: Tensor = out.last_hidden_state
    if hit is None:
        return states[:, n:]
    at = torch.arange(length, device=states.device) + torch.where(hits, n, 0).to(states.device)[:, None]
    return states.gather(1, at[..., None].expand(-1, -1, states.shape[-1]))
