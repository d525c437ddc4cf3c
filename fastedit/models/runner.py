"""Running parts of a decoder: any span of blocks, on given hidden states, after a frozen prefix.

Every architecture builds its own masks, rotary tables and cache arguments. They are *recorded*, not
rebuilt here: the decoder is called once with its blocks replaced by stubs that keep the arguments they
are given, and afterwards the real blocks are called with these arguments and any hidden states. So the
one piece of code serves every architecture and every version of transformers.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from ..errors import UnsupportedModel
from .describe import ModelDescription, describe


class _Stop(Exception):
    """Ends a forward pass early, once everything wanted has been seen."""


@dataclass
class BlockCalls:
    """The arguments that the decoder gave each block for one batch of token rows.

    Attributes:
        embedded: (rows, length, hidden), the hidden states at the entry of the first block.
        arguments: per block, positional and keyword arguments without the hidden states.
    """

    embedded: Tensor
    arguments: list[tuple[tuple[Any, ...], dict[str, Any]]]


@dataclass
class Prefix:
    """Keys and values of frozen positions, right-aligned, per block.

    Attributes:
        states: per block (None where not kept) a pair (rows, heads, length, head size).
        mask: (rows, length) int64, 0 where a row is shorter than the longest.
    """

    states: list[tuple[Tensor, Tensor] | None]
    mask: Tensor

    @classmethod
    def before(cls, starts: Tensor, pairs: Sequence[tuple[Tensor, Tensor]], first: int) -> Prefix:
        """The positions before each row's start, of blocks ``first`` and up.

        Args:
            starts: (rows,) int64, where each row's live part begins.
            pairs: keys and values of whole rows, as :meth:`BlockRunner.record` returns them.
            first: lower blocks are left out.
        """
        width = max(int(starts.max()), 1)
        take = torch.arange(width, device=starts.device) - (width - starts[:, None])
        mask = (take >= 0).long()

        def align(tensor: Tensor) -> Tensor:
            columns = take.clamp(min=0).to(tensor.device)[:, None, :, None]
            return torch.gather(tensor, 2, columns.expand(-1, tensor.shape[1], -1, tensor.shape[3]))

        states = [
            None if i < first else (align(keys), align(values)) for i, (keys, values) in enumerate(pairs)
        ]
        return cls(states, mask)

    def select(self, rows: Tensor) -> Prefix:
        """The prefix of some of the rows."""
        kept = [
            None if pair is None else (pair[0][rows.to(pair[0].device)], pair[1][rows.to(pair[1].device)])
            for pair in self.states
        ]
        return Prefix(kept, self.mask[rows])


class BlockRunner:
    """Calls spans of a model's decoder blocks directly.

    The model is used as it is: current weights, its own dtype, device map and attention implementation.

    Args:
        model: a causal language model known to :func:`fastedit.models.describe`.
    """

    def __init__(self, model: nn.Module) -> None:
        self.model = model
        self.description: ModelDescription = describe(model)
        # transformers before 4.5x hands GPT-2 and a few others tuples instead of cache objects
        self.tuple_cache = getattr(model, "_supports_cache_class", True) is False
        self._returns: dict[bool, tuple[Any, ...] | None] = {}

    @property
    def device(self) -> torch.device:
        """Where token ids go."""
        return next(self.description.embeddings.parameters()).device

    # -- whole decoder ------------------------------------------------------------------------------

    @torch.no_grad()
    def record(
        self, ids: Tensor, mask: Tensor, positions: Tensor, hooks: Sequence[tuple[nn.Module, Any]] = ()
    ) -> tuple[Tensor, list[tuple[Tensor, Tensor]]]:
        """Run the decoder over whole rows, keeping every block's attention keys and values.

        Args:
            ids: (rows, length) int64, right padded.
            mask: (rows, length) int64, 1 at real tokens.
            positions: (rows, length) int64.
            hooks: (module, forward hook) pairs active during the pass.

        Returns:
            The hidden states after the final norm (rows, length, hidden), and per block the pair
            (rows, heads, length, head size).
        """
        with _hooked(hooks):
            if self.tuple_cache:
                out = self.description.decoder(
                    input_ids=ids, attention_mask=mask, position_ids=positions, use_cache=True
                )
                return out.last_hidden_state, [_checked_pair(pair) for pair in out.past_key_values]
            cache = _new_cache()
            out = self.description.decoder(
                input_ids=ids,
                attention_mask=mask,
                position_ids=positions,
                past_key_values=cache,
                use_cache=True,
            )
        return out.last_hidden_state, [cache.seen[i] for i in range(self.description.n_layers)]

    @torch.no_grad()
    def capture(
        self, ids: Tensor, mask: Tensor, positions: Tensor, prefix: Prefix | None = None
    ) -> BlockCalls:
        """Record the arguments of all blocks for these rows, without running any block.

        Args:
            ids: (rows, length) int64, the tokens to run.
            mask: (rows, prefix length + length) int64, 1 at real tokens.
            positions: (rows, length) int64, absolute.
            prefix: keys and values of the tokens before; None if the rows start here.
        """
        return self._capture(ids, mask, positions, None if prefix is None else self._frozen_cache(prefix))

    def _capture(self, ids: Tensor, mask: Tensor, positions: Tensor, cache: Any) -> BlockCalls:
        """The same, with a cache that is handed to the blocks."""
        rest = self._block_returns(cache is not None)
        arguments: list[tuple[tuple[Any, ...], dict[str, Any]]] = []
        embedded: list[Tensor] = []

        def stub(*args: Any, **kwargs: Any) -> Any:
            hidden, args, kwargs = _take_hidden(args, kwargs)
            embedded.append(hidden)
            arguments.append((args, kwargs))
            return hidden if rest is None else (hidden, *rest)

        given = {} if cache is None else {"past_key_values": cache}
        with _replaced_forward(self.description.blocks, stub):
            self.description.decoder(
                input_ids=ids,
                attention_mask=mask,
                position_ids=positions,
                use_cache=cache is not None,
                **given,
            )
        return BlockCalls(embedded[0], arguments)

    # -- blocks -------------------------------------------------------------------------------------

    def run(self, calls: BlockCalls, hidden: Tensor, start: int, stop: int) -> Tensor:
        """Run blocks ``start`` to ``stop - 1`` on ``hidden`` (rows, length, hidden) and return theirs."""
        for index in range(start, stop):
            args, kwargs = calls.arguments[index]
            out = self.description.blocks[index](hidden, *args, **kwargs)
            hidden = out[0] if isinstance(out, tuple) else out
        return hidden

    def states_at(
        self, calls: BlockCalls, hidden: Tensor, start: int, wanted: Tensor, seen: Tensor | None = None
    ) -> Tensor:
        """Run all blocks from ``start`` up and return what leaves the last one at some positions.

        The MLPs, which look at each position by itself, are run where that matters: in the last block at these
        positions, in the others at those that are seen.

        Args:
            calls: the blocks' arguments.
            hidden: (rows, length, hidden), at the entry of block ``start``; with ``start`` behind the last block,
                what left that.
            start: the first block to run.
            wanted: (m,) int64, distinct flat positions row · length + column.
            seen: (k,) int64, the flat positions that are wanted or that a wanted one sees; None for all.

        Returns:
            (m, hidden), before the final norm.
        """
        last = self.description.n_layers - 1
        with ExitStack() as stack:
            for layer in range(start, last + 1):
                positions = wanted if layer == last else seen
                if positions is not None:
                    stack.enter_context(self._mlp_only_at(layer, positions))
            hidden = self.run(calls, hidden, start, last + 1)
        return hidden.reshape(-1, hidden.shape[-1])[wanted.to(hidden.device)]

    def projection_input(self, calls: BlockCalls, hidden: Tensor, layer: int) -> Tensor:
        """Run block ``layer`` up to its MLP output projection and return the projection's input.

        Returns:
            (rows, length, d_in), the keys of all tokens in the model's dtype.
        """
        seen: list[Tensor] = []

        def keep(_module: nn.Module, args: tuple[Any, ...]) -> None:
            seen.append(args[0])
            raise _Stop

        handle = self.description.projection(layer).module.register_forward_pre_hook(keep)
        try:
            self.run(calls, hidden, layer, layer + 1)
        except _Stop:
            pass
        finally:
            handle.remove()
        return seen[0].reshape(*hidden.shape[:-1], -1)

    def logits(self, hidden: Tensor) -> Tensor:
        """Final norm and head on (positions, hidden) states that left the last block."""
        return self.description.logits(self.description.final_norm(hidden))

    # -- details ------------------------------------------------------------------------------------

    @contextmanager
    def _mlp_only_at(self, layer: int, wanted: Tensor) -> Iterator[None]:
        """Inside, the MLP of a block is run at these flat positions only and adds nothing elsewhere."""
        try:
            mlp = self.description.mlp(layer)
        except UnsupportedModel:  # its parts are not in a module of their own: it runs everywhere
            yield
            return
        whole = mlp.forward

        def forward(hidden: Tensor) -> Tensor:
            flat = hidden.reshape(-1, hidden.shape[-1])
            part: Tensor = whole(flat[wanted.to(flat.device)][None])
            out = part.new_zeros(len(flat), part.shape[-1]).index_copy(0, wanted.to(part.device), part[0])
            return out.reshape(*hidden.shape[:-1], -1)

        with _replaced_forward([mlp], forward):
            yield

    def _block_returns(self, with_cache: bool) -> tuple[Any, ...] | None:
        """What a block returns behind its hidden states: None for a bare tensor, else the tuple's rest."""
        if with_cache not in self._returns:
            found: list[Any] = []

            def look(_module: nn.Module, _args: Any, out: Any) -> None:
                found.append(out)

            ids = torch.zeros(1, 1, dtype=torch.long, device=self.device)
            with torch.no_grad(), _hooked([(self.description.blocks[0], look)]):
                cache = {} if self.tuple_cache or not with_cache else {"past_key_values": _new_cache()}
                self.description.decoder(input_ids=ids, use_cache=with_cache, **cache)
            self._returns[with_cache] = found[0][1:] if isinstance(found[0], tuple) else None
        return self._returns[with_cache]

    def _frozen_cache(self, prefix: Prefix) -> Any:
        some = next(pair for pair in prefix.states if pair is not None)
        pairs = [some if pair is None else pair for pair in prefix.states]
        if self.tuple_cache:
            return tuple(pairs)
        cache = _new_cache()
        for index, (keys, values) in enumerate(pairs):
            cache.update(keys, values, index)
        cache.frozen = True
        return cache


class RowEnds:
    """The last block for the ends of rows, differentiable.

    In the last block a position sees the others by their keys and values alone. These are computed for the positions
    before the ends, and all else for the ends.

    Args:
        runner: the model.
        ids, mask, positions: (rows, length) int64, as for :meth:`BlockRunner.capture`.
        start: the column where the ends begin, above 0 and the same for all rows.
    """

    @torch.no_grad()
    def __init__(self, runner: BlockRunner, ids: Tensor, mask: Tensor, positions: Tensor, start: int) -> None:
        self.runner, self.start, self.block = runner, start, runner.description.n_layers - 1
        self._mask, self._ids, self._positions = mask, ids[:, start:], positions[:, start:]
        self._seen = _new_cache()
        self._seen.stops = True
        before = (ids[:, :start], mask[:, :start], positions[:, :start])
        self._before = runner._capture(*before, self._seen)
        self._calls: BlockCalls | None = None
        self._cache: Any = None

    def run(self, hidden: Tensor) -> Tensor:
        """The block's output at the ends, of states (rows, length, hidden) at its entry."""
        with suppress(_Stop):
            self.runner.run(self._before, hidden[:, : self.start], self.block, self.block + 1)
        keys, values = self._seen.seen.pop(self.block)
        if self._calls is None:
            states = [None] * self.block + [(keys.detach(), values.detach())]
            self._cache = self.runner._frozen_cache(Prefix(states, self._mask[:, : self.start]))
            with torch.no_grad():
                self._calls = self.runner._capture(self._ids, self._mask, self._positions, self._cache)
        self._cache.seen[self.block] = keys, values
        return self.runner.run(self._calls, hidden[:, self.start :], self.block, self.block + 1)


@contextmanager
def frozen(model: nn.Module) -> Iterator[None]:
    """Evaluation mode with no parameter asking for gradients; both are put back on exit.

    In float32 and float64, a GELU that transformers writes as eight operations runs as torch's one, which is the same
    up to rounding.
    """
    training = {module: module.training for module in model.modules()}
    wanting = [parameter for parameter in model.parameters() if parameter.requires_grad]
    model.eval()
    for parameter in wanting:
        parameter.requires_grad_(False)
    single = next(model.parameters()).dtype in (torch.float32, torch.float64)
    gelus = [module for module in model.modules() if single and type(module).__name__ == "NewGELUActivation"]
    try:
        with _replaced_forward(gelus, partial(functional.gelu, approximate="tanh")):
            yield
    finally:
        for parameter in wanting:
            parameter.requires_grad_(True)
        for module, mode in training.items():
            module.training = mode


def _checked_pair(pair: Any) -> tuple[Tensor, Tensor]:
    if isinstance(pair, Tensor) or len(pair) != 2 or pair[0].dim() != 4:
        raise UnsupportedModel(
            "this version of transformers keeps this model's attention keys and values in a layout of its own: "
            "install transformers 4.50 or newer"
        )
    return pair[0], pair[1]


def _take_hidden(
    args: tuple[Any, ...], kwargs: dict[str, Any]
) -> tuple[Tensor, tuple[Any, ...], dict[str, Any]]:
    if args:
        return args[0], args[1:], kwargs
    rest = dict(kwargs)
    return rest.pop("hidden_states"), (), rest


@contextmanager
def _hooked(hooks: Sequence[tuple[nn.Module, Any]]) -> Iterator[None]:
    handles = [module.register_forward_hook(hook) for module, hook in hooks]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


@contextmanager
def _replaced_forward(modules: Sequence[nn.Module], forward: Any) -> Iterator[None]:
    kept = [module.__dict__.get("forward") for module in modules]
    for module in modules:
        module.__dict__["forward"] = forward
    try:
        yield
    finally:
        for module, old in zip(modules, kept, strict=True):
            if old is None:
                del module.__dict__["forward"]
            else:
                module.__dict__["forward"] = old


def _new_cache() -> Any:
    """A cache that remembers what it was given, and ends the pass if it ``stops``.

    Once ``frozen`` it appends without storing.
    """
    global _CACHE_CLASS
    if _CACHE_CLASS is None:
        from transformers import DynamicCache

        class FreezableCache(DynamicCache):
            frozen = False
            stops = False

            def __init__(self) -> None:
                super().__init__()
                self.seen: dict[int, tuple[Tensor, Tensor]] = {}

            def update(
                self, key_states: Tensor, value_states: Tensor, layer_idx: int, *args: Any, **kwargs: Any
            ) -> tuple[Tensor, Tensor]:
                if not self.frozen:
                    self.seen[layer_idx] = (key_states, value_states)
                    if self.stops:
                        raise _Stop
                    return super().update(key_states, value_states, layer_idx, *args, **kwargs)
                keys, values = self.seen[layer_idx]
                return torch.cat((keys, key_states), -2), torch.cat((values, value_states), -2)

        _CACHE_CLASS = FreezableCache
    return _CACHE_CLASS()


_CACHE_CLASS: Any = None
