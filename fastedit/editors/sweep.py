"""Keys and hidden states of a batch of facts, read while the layers are edited from bottom to top.

Every prompt is cut after its subject's last token, which is exact in a causal model, and its hidden
states are kept at the entry of the layer that is edited next. Each block is therefore run once to read
its keys and once more, with its new weight, to move on (LTE 5.3); the published code runs the whole model
for every layer instead. Contexts and whatever else several prompts begin with are run once for all of them.
"""

from __future__ import annotations

from collections.abc import Sequence
from copy import copy
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from ..models.runner import BlockCalls, BlockRunner, SharedStarts
from ..models.tokens import TokenizedPrompt, pad_batch, shared_starts

_TOKENS_PER_CHUNK = 16384


@dataclass
class _Chunk:
    """Some of the rows; ``begun`` takes, by layer, the keys and values of what they begin with, the starts ``of``."""

    calls: BlockCalls
    states: Tensor
    last: Tensor
    of: Tensor
    begun: dict[int, tuple[Tensor, Tensor]]

    def at_last(self, states: Tensor) -> Tensor:
        last = self.last.to(states.device)
        return states[torch.arange(len(last), device=states.device), last]


class PromptSweep:
    """Hidden states of rows of prompts, moved upwards block by block with the model's current weights.

    Args:
        runner: the model, frozen and in evaluation mode.
        prompts: rows cut after the subject's last token.
        layer: the first block that will be asked for; all below it are run at once.
    """

    def __init__(self, runner: BlockRunner, prompts: Sequence[TokenizedPrompt], layer: int = 0) -> None:
        self.runner = runner
        limits = [0 if runner.tuple_cache else prompt.subject_last for prompt in prompts]
        starts, of = shared_starts([prompt.ids for prompt in prompts], limits)
        self._open(prompts, starts, of)
        self.advance(layer)

    @torch.no_grad()
    def _open(self, prompts: Sequence[TokenizedPrompt], starts: list[list[int]], of: list[int]) -> None:
        self.layer = 0
        self._prompts, self._start_ids, self._of = list(prompts), starts, of
        self._starts = SharedStarts(self.runner, starts) if len(starts) > 1 else None
        self._start_states = None if self._starts is None else self._starts.calls.embedded
        longest = max(len(self._behind(row)) for row in range(self.rows))
        self._size = max(1, _TOKENS_PER_CHUNK // longest)
        self._chunks = [
            self._chunk(range(i, min(i + self._size, self.rows))) for i in range(0, self.rows, self._size)
        ]

    @property
    def rows(self) -> int:
        """Number of prompts."""
        return len(self._prompts)

    @torch.no_grad()
    def branch(self, rows: Sequence[int]) -> PromptSweep:
        """A sweep over some of the rows, in the order given, that goes on from here by itself."""
        other = copy(self)
        other._open([self._prompts[row] for row in rows], self._start_ids, [self._of[row] for row in rows])
        for number, chunk in enumerate(other._chunks):
            here = [self._states_of(row) for row in rows[number * other._size :][: other._size]]
            chunk.states = pad_sequence(here, batch_first=True)
        other.layer, other._start_states = self.layer, self._start_states
        return other

    def _behind(self, row: int) -> list[int]:
        """The ids of a row behind what it shares with others."""
        return self._prompts[row].ids[len(self._start_ids[self._of[row]]) :]

    def _states_of(self, row: int) -> Tensor:
        """(tokens, hidden) states of one row, behind what it shares with others."""
        chunk, place = divmod(row, self._size)
        return self._chunks[chunk].states[place, : len(self._behind(row))]

    def _chunk(self, rows: Sequence[int]) -> _Chunk:
        padded = pad_batch([self._behind(row) for row in rows], pad_id=0)
        ids, mask, positions = (tensor.to(self.runner.device) for tensor in padded)
        of = torch.tensor([self._of[row] for row in rows], device=ids.device)
        last = torch.tensor([len(self._behind(row)) - 1 for row in rows], device=ids.device)
        if self._starts is None:
            calls = self.runner.capture(ids, mask, positions)
            return _Chunk(calls, calls.embedded, last, of, {})
        calls, begun = self._starts.capture(ids, mask, positions, of)
        return _Chunk(calls, calls.embedded, last, of, begun)

    def _begin(self, layer: int, states: Tensor | None) -> Tensor | None:
        """Show the rows what they begin with at a block; takes the starts' states before it, gives those after."""
        if self._starts is None or states is None:
            return None
        states, prefix = self._starts.run(layer, states)
        for chunk in self._chunks:
            pair = prefix.select(chunk.of).states[0]
            assert pair is not None
            chunk.begun[layer] = pair
        return states

    def _run(self, stop: int) -> tuple[Tensor | None, list[Tensor]]:
        """States of the starts and of the chunks at the entry of block ``stop``."""
        begun, states = self._start_states, [chunk.states for chunk in self._chunks]
        for layer in range(self.layer, stop):
            begun = self._begin(layer, begun)
            for number, chunk in enumerate(self._chunks):
                states[number] = self.runner.run(chunk.calls, states[number], layer, layer + 1)
        return begun, states

    @torch.no_grad()
    def advance(self, layer: int) -> None:
        """Run all blocks below ``layer`` that have not been run, with the weights they have now."""
        self._start_states, states = self._run(layer)
        for chunk, here in zip(self._chunks, states, strict=True):
            chunk.states = here
        self.layer = max(self.layer, layer)

    @torch.no_grad()
    def keys(self) -> Tensor:
        """(rows, d_in) fp32: inputs of the current block's output projection at the subject's last token."""
        self._begin(self.layer, self._start_states)
        return self._keys(self.layer, [chunk.states for chunk in self._chunks]).float().to(self.runner.device)

    def _keys(self, layer: int, states: Sequence[Tensor]) -> Tensor:
        return torch.cat(
            [
                chunk.at_last(self.runner.projection_input(chunk.calls, here, layer))
                for chunk, here in zip(self._chunks, states, strict=True)
            ]
        )

    @torch.no_grad()
    def outputs(self, layer: int) -> Tensor:
        """(rows, hidden) fp32: output of block ``layer`` at the subject's last token, weights as they are."""
        _, states = self._run(layer + 1)
        found = [chunk.at_last(here) for chunk, here in zip(self._chunks, states, strict=True)]
        return torch.cat(found).float().to(self.runner.device)

    @torch.no_grad()
    def projected(self, layer: int) -> Tensor:
        """(rows, d_out) fp32: what block ``layer``'s output projection puts out at the subject's last token.

        The blocks from the current one up to it are run with the weights they have now.
        """
        begun, states = self._run(layer)
        self._begin(layer, begun)
        projection = self.runner.description.projection(layer).module
        return projection(self._keys(layer, states)).float().to(self.runner.device)


def weighted_mean(rows: Tensor, weights: Sequence[float]) -> Tensor:
    """(facts · contexts, d) -> (facts, d): the contexts' mean with the given weights, in fp32."""
    shaped = rows.view(-1, len(weights), rows.shape[-1])
    return torch.einsum("fcd,c->fd", shaped, torch.tensor(weights, dtype=rows.dtype, device=rows.device))
