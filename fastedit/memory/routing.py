"""When routes are decided, and how they stay with their samples.

A route is decided once per sample, at *prefill*: the first call of the decoder that has no routes yet, with an
empty KV cache or without one. It looks at the real tokens of the prompt, wherever padding stands. The routes are kept
on the cache object and follow its rows: decode steps, ``reorder_cache``, ``batch_repeat_interleave``,
``batch_select_indices``, ``reset`` and copies. So one prompt is answered through one memory from the first generated
token to the last.

- Further calls with such a cache, of one token or of many (speculative decoding, another chunk of a long prompt),
  keep the routes. A prompt that comes in pieces is therefore routed by its first piece; call :func:`forget_routes` on
  the cache before the piece that shall decide, such as the one that holds the question.
- A cache that was filled without the memory has no routes: the next call decides, by its own tokens.
- A call without a cache is a prefill of its own. Its tokens may hold more than the prompt (teacher forcing, or
  generation with ``use_cache=False``): say inside :func:`prompts` how long the prompts are.
- Tuples in the place of cache objects (GPT-2 and others before transformers 4.50) carry no routes: the last prefill's
  serve if it had as many samples, so one generation at a time works. Beams share their prompt and so their route.
- A block that is called by itself, outside its decoder, sees no memory.
"""

from __future__ import annotations

import contextlib
import inspect
import threading
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from ..errors import FasteditError, UnsupportedModel
from ..models.describe import describe, unwrap
from .base import Memory, Routes, RouteTokens

if TYPE_CHECKING:
    from .side_module import SideModule

Key = tuple[str, str]  # the projection's name and the method
_ROUTES = "_fastedit_routes"


class Call:
    """One call of the decoder: the shape of its tokens, and the routes that are known or decided in it."""

    def __init__(
        self,
        size: tuple[int, int],
        mask: Any,
        past: int,
        lengths: Tensor | None,
        known: dict[Key, Routes],
        decided: dict[Key, Routes],
    ) -> None:
        self.size, self.past = size, past
        self.known = known  # before this call
        self.decided = decided  # where routes are put; the cache's own, if there is a cache
        self.noted: dict[str, Any] = {}  # what a memory keeps for the end of this call
        self._mask, self._lengths = mask, lengths

    def routes(self, key: Key, memory: Memory) -> Routes | None:
        """The stored routes of a memory; None if this call has to decide.

        Raises:
            FasteditError: the memory was changed since they were decided.
            ValueError: they are of another number of samples.
        """
        routes = None if memory.route_scope == "per_call" else self.known.get(key)
        if routes is None:
            return None
        if routes.version != memory.version:
            raise FasteditError(
                f"the {key[1]} memory at {key[0]} was changed since this KV cache was filled: begin with a new cache"
            )
        if len(routes.index) != self.size[0]:
            raise ValueError(
                f"the KV cache holds routes of {len(routes.index)} samples, this call has {self.size[0]}: change "
                "the cache's rows by its own methods, or begin with a new cache"
            )
        return routes

    def ids(self, method: str) -> Tensor:
        """(B, T) the token ids of this call.

        Raises:
            UnsupportedModel: it was given embeddings.
        """
        ids: Tensor | None = self.noted.get("ids")
        if ids is None:
            raise UnsupportedModel(f"{method} reads prompts, so it needs input_ids, got inputs_embeds")
        return ids

    def tokens(self, which: RouteTokens, device: torch.device) -> Tensor:
        """(B, T) bool: the real tokens of this call, or those of the prompt among them."""
        real = real_tokens(self._mask, self.size, self.past, device)
        if which == "all" or self._lengths is None:
            return real
        lengths = self._lengths.to(device)
        if (
            len(lengths) and self.size[0] % len(lengths) == 0
        ):  # beams and returned sequences stand side by side
            lengths = lengths.repeat_interleave(self.size[0] // len(lengths))
        if len(lengths) != self.size[0]:
            raise ValueError(
                f"prompts: {len(lengths)} lengths were given, the call has {self.size[0]} samples"
            )
        return real & (real.long().cumsum(1) <= lengths[:, None])


class Router:
    """Follows the calls of one decoder, for all memories of its model. Made by :func:`router_of`."""

    def __init__(self, decoder: nn.Module) -> None:
        self.sides: list[SideModule] = []
        self.lengths: Tensor | None = None
        self.last: dict[Key, Routes] = {}
        self._names = list(inspect.signature(decoder.forward).parameters)
        self._calls: dict[int, Call] = {}

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_calls": {}}  # a copy is not being called

    @property
    def call(self) -> Call | None:
        """The call that this thread is in."""
        return self._calls.get(threading.get_ident())

    # -- hooks on the decoder -----------------------------------------------------------------------

    @torch.compiler.disable
    def begin(self, decoder: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """Forward pre-hook."""
        given = {**dict(zip(self._names, args, strict=False)), **kwargs}
        tokens = given.get("input_ids")
        if tokens is None:
            tokens = given.get("inputs_embeds")
        if tokens is None:
            return
        cache = given.get("past_key_values")
        known: dict[Key, Routes] = {}
        decided: dict[Key, Routes] = {}
        mask = given.get("attention_mask")
        past = 0
        if isinstance(cache, (tuple, list)):
            if cache:
                past = int(cache[0][0].shape[-2])
                known = {key: r for key, r in self.last.items() if len(r.index) == tokens.shape[0]}
        elif cache is not None:
            decided = routes_on(cache)
            known = dict(decided)
            if not known and mask is not None and not _is_plain(mask):
                past = int(cache.get_seq_length())  # where this call's columns are in the mask
        if not known:
            self.last = {}
        size = (tokens.shape[0], tokens.shape[1])
        call = Call(size, mask, past, self.lengths, known, decided)
        call.noted["ids"] = given.get("input_ids")
        self._calls[threading.get_ident()] = call
        for side in self.sides:
            call.routes(side.key, side.memory)  # raises before any block runs

    @torch.compiler.disable
    def end(self, decoder: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], out: Any) -> None:
        """Forward hook; a cache that the decoder made itself gets the routes."""
        call = self._calls.pop(threading.get_ident(), None)
        if call is not None:
            _put_on_cache(call, getattr(out, "past_key_values", None))

    def hook(self, module: nn.Module) -> None:
        """Follow the calls of a module."""
        module.register_forward_pre_hook(self.begin, with_kwargs=True)
        module.register_forward_hook(self.end, with_kwargs=True, always_call=True)

    # -- reports ------------------------------------------------------------------------------------

    def note(self, key: Key, routes: Routes, call: Call) -> None:
        """Keep routes that were decided in a call."""
        call.decided[key] = routes
        self.last[key] = routes


def router_of(model: nn.Module, *, make: bool = False) -> Router | None:
    """The router of a model's decoder, if it has one; ``make`` puts one there."""
    decoder = describe(model).decoder
    router = router_at(decoder)
    if router is None and make:
        router = Router(decoder)
        router.hook(decoder)
    return router


def routers_of(model: nn.Module) -> list[Router]:
    """The routers of a model: its decoder's, and that of the memories that answer for the whole model."""
    found = (router_at(module) for module in (describe(model).decoder, unwrap(model)))
    return [router for router in found if router is not None]


def router_at(module: nn.Module) -> Router | None:
    """The router whose hooks are on this very module."""
    for hook in module._forward_pre_hooks.values():
        if isinstance(found := getattr(hook, "__self__", None), Router):
            return found
    return None


@contextlib.contextmanager
def aside(model: nn.Module) -> Iterator[None]:
    """Inside, the parts of a model that this thread calls by ``forward`` see no memory, even in a call of its own."""
    thread = threading.get_ident()
    calls = [(router._calls, router._calls.pop(thread, None)) for router in routers_of(model)]
    try:
        yield
    finally:
        for held, call in calls:
            if call is not None:
                held[thread] = call


def unhook(model: nn.Module, owner: object) -> None:
    """Take the hooks that are methods of ``owner`` off all modules of a model."""
    for module in unwrap(model).modules():
        for hooks in (module._forward_pre_hooks, module._forward_hooks):
            for number, hook in list(hooks.items()):
                if getattr(hook, "__self__", None) is owner:
                    del hooks[number]
                    for flags in (
                        module._forward_pre_hooks_with_kwargs,
                        module._forward_hooks_with_kwargs,
                        module._forward_hooks_always_called,
                    ):
                        flags.pop(number, None)


@contextlib.contextmanager
def prompts(model: nn.Module, lengths: Sequence[int] | Tensor) -> Iterator[None]:
    """Inside, the first ``lengths[i]`` real tokens of sample i are its prompt, and only they decide its route.

    For calls whose tokens hold more than the prompt: scoring an answer by teacher forcing, generating without a
    cache. Does nothing for a model without memories.

    Args:
        model: the model.
        lengths: (B,); a call may have a multiple of B rows, each sample's side by side (beams).
    """
    try:
        routers = routers_of(model)
    except UnsupportedModel:
        routers = []
    before = [router.lengths for router in routers]
    for router in routers:
        router.lengths = torch.as_tensor(lengths, dtype=torch.int64)
    try:
        yield
    finally:
        for router, was in zip(routers, before, strict=True):
            router.lengths = was


# ------------------------------------------------------------------ routes on a cache


class _Routed:
    """Mixed into the class of a cache object: its routes follow its rows, and it may hide columns at its head."""

    _fastedit_hidden = 0

    def get_seq_length(self, *args: Any, **kwargs: Any) -> Any:
        length = super().get_seq_length(*args, **kwargs)  # type: ignore[misc]
        return length - self._fastedit_hidden if self._fastedit_hidden else length

    def crop(self, *args: Any, **kwargs: Any) -> Any:
        hidden, self._fastedit_hidden = self._fastedit_hidden, 0
        (length,) = (*args, *kwargs.values())  # newer releases of transformers take tokens to remove, below 0
        if length >= 0 and "max_length" in inspect.signature(super().crop).parameters:  # type: ignore[misc]
            length += hidden
        try:
            return super().crop(length)  # type: ignore[misc]
        finally:
            self._fastedit_hidden = hidden

    def reorder_cache(self, beam_idx: Tensor) -> Any:
        self._each_route("select", beam_idx)
        return super().reorder_cache(beam_idx)  # type: ignore[misc]

    def batch_select_indices(self, indices: Tensor) -> Any:
        self._each_route("select", indices)
        return super().batch_select_indices(indices)  # type: ignore[misc]

    def batch_repeat_interleave(self, repeats: int) -> Any:
        self._each_route("repeat", repeats)
        return super().batch_repeat_interleave(repeats)  # type: ignore[misc]

    def reset(self) -> Any:
        getattr(self, _ROUTES).clear()
        self._fastedit_hidden = 0
        return super().reset()  # type: ignore[misc]

    def _each_route(self, change: str, argument: Any) -> None:
        routes: dict[Key, Routes] = getattr(self, _ROUTES)
        for key, kept in routes.items():
            routes[key] = getattr(kept, change)(argument)


_routed: dict[type, type] = {}  # class of caches -> the same with _Routed mixed in


def _follow_rows(cache: Any) -> None:
    kind = type(cache)
    if kind not in _routed:
        _routed[kind] = type(kind.__name__, (_Routed, kind), {"__module__": kind.__module__})
    cache.__class__ = _routed[kind]


def routes_on(cache: Any) -> dict[Key, Routes]:
    """The routes kept on a cache object; from now on they follow its rows."""
    routes = getattr(cache, _ROUTES, None)
    if routes is None:
        routes = {}
        setattr(cache, _ROUTES, routes)
        _follow_rows(cache)
    return routes


def _put_on_cache(call: Call, cache: Any) -> None:
    """Give a cache that the call itself made, if it made one, the routes that were decided in the call."""
    if cache is not None and not isinstance(cache, (tuple, list)):
        routes = routes_on(cache)
        routes.update({key: kept for key, kept in call.decided.items() if key not in routes})


def hide_columns(cache: Any, n: int) -> None:
    """Let a cache object that carries routes give its length, and crop, without its first ``n`` columns."""
    cache._fastedit_hidden = n


def forget_routes(cache: Any) -> None:
    """Let the next call with this cache decide anew, by its own tokens; what was put in front stays there."""
    routes: dict[Key, Routes] = getattr(cache, _ROUTES, None) or {}
    for key in [key for key, kept in routes.items() if not kept.width]:
        del routes[key]


# ------------------------------------------------------------------ masks


def _is_plain(mask: Any) -> bool:
    return isinstance(mask, Tensor) and mask.dim() == 2


def real_tokens(mask: Any, size: tuple[int, int], past: int, device: torch.device) -> Tensor:
    """(B, T) bool, the tokens of a call that are not padding.

    Args:
        mask: the decoder's ``attention_mask``: None (all are real), (B, past + T) with 1 at real tokens, or the
            (B, 1, T, keys) masks that generation prepares, as bool or as numbers to add; or a dictionary of such.
        size: (B, T).
        past: tokens in the cache before the call.
        device: of the result.

    Raises:
        UnsupportedModel: a mask of another kind.
    """
    if isinstance(mask, dict):
        mask = mask.get("full_attention", next(iter(mask.values()), None))
    if mask is None:
        return torch.ones(size, dtype=torch.bool, device=device)
    if not isinstance(mask, Tensor) or mask.dim() not in (2, 4):
        came = f"shape {tuple(mask.shape)}" if isinstance(mask, Tensor) else type(mask).__name__
        raise UnsupportedModel(
            f"a memory needs an attention_mask of shape (batch, length) to find the prompt's tokens, got {came}"
        )
    if mask.dim() == 2:
        return mask[:, mask.shape[1] - size[1] :].to(device).bool().expand(size)
    attended = mask if mask.dtype == torch.bool else mask >= 0  # a token that nothing attends to is padding
    return attended.any(2)[:, 0, past : past + size[1]].to(device).expand(size)


def last_token(tokens: Tensor) -> Tensor:
    """(B,) the column of each row's last marked token; 0 in a row without any."""
    return (tokens * torch.arange(tokens.shape[1], device=tokens.device)).argmax(1)
