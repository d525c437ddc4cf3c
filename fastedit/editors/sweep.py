"""Keys and hidden states of a batch of facts, read while the layers are edited from bottom to top.

Every prompt is cut after its subject's last token, which is exact in a causal model, and its hidden
states are kept at the entry of the layer that is edited next. Each block is therefore run once to read
its keys and once more, with its new weight, to move on (LTE 5.3); the published code runs the whole model
for every layer instead.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from ..models.runner import BlockCalls, BlockRunner
from ..models.tokens import TokenizedPrompt, pad_batch

_TOKENS_PER_CHUNK = 16384


@dataclass
class _Chunk:
    calls: BlockCalls
    states: Tensor
    last: Tensor

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
        self.layer = 0
        self._prompts = list(prompts)
        longest = max(len(prompt.ids) for prompt in prompts)
        self._size = max(1, _TOKENS_PER_CHUNK // longest)
        self._chunks = [self._chunk(prompts[i : i + self._size]) for i in range(0, len(prompts), self._size)]
        self.advance(layer)

    @property
    def rows(self) -> int:
        """Number of prompts."""
        return len(self._prompts)

    @torch.no_grad()
    def branch(self, rows: Sequence[int]) -> PromptSweep:
        """A sweep over some of the rows, in the order given, that goes on from here by itself."""
        other = PromptSweep(self.runner, [self._prompts[row] for row in rows])
        for number, chunk in enumerate(other._chunks):
            here = [self._row(row) for row in rows[number * other._size :][: other._size]]
            chunk.states = pad_sequence(here, batch_first=True)
        other.layer = self.layer
        return other

    def _row(self, row: int) -> Tensor:
        """(tokens, hidden) states of one row."""
        chunk, place = divmod(row, self._size)
        return self._chunks[chunk].states[place, : len(self._prompts[row].ids)]

    def _chunk(self, prompts: Sequence[TokenizedPrompt]) -> _Chunk:
        padded = pad_batch([prompt.ids for prompt in prompts], pad_id=0)
        ids, mask, positions = (tensor.to(self.runner.device) for tensor in padded)
        calls = self.runner.capture(ids, mask, positions)
        last = torch.tensor([prompt.subject_last for prompt in prompts], device=ids.device)
        return _Chunk(calls, calls.embedded, last)

    @torch.no_grad()
    def advance(self, layer: int) -> None:
        """Run all blocks below ``layer`` that have not been run, with the weights they have now."""
        for chunk in self._chunks:
            chunk.states = self.runner.run(chunk.calls, chunk.states, self.layer, layer)
        self.layer = max(self.layer, layer)

    @torch.no_grad()
    def keys(self) -> Tensor:
        """(rows, d_in) fp32: inputs of the current block's output projection at the subject's last token."""
        keys = [
            chunk.at_last(self.runner.projection_input(chunk.calls, chunk.states, self.layer))
            for chunk in self._chunks
        ]
        return torch.cat(keys).float().to(self.runner.device)

    @torch.no_grad()
    def outputs(self, layer: int) -> Tensor:
        """(rows, hidden) fp32: output of block ``layer`` at the subject's last token, weights as they are."""
        states = [
            chunk.at_last(self.runner.run(chunk.calls, chunk.states, self.layer, layer + 1))
            for chunk in self._chunks
        ]
        return torch.cat(states).float().to(self.runner.device)

    @torch.no_grad()
    def projected(self, layer: int) -> Tensor:
        """(rows, d_out) fp32: what block ``layer``'s output projection puts out at the subject's last token.

        The blocks from the current one up to it are run with the weights they have now.
        """
        projection = self.runner.description.projection(layer).module
        outputs = []
        for chunk in self._chunks:
            states = self.runner.run(chunk.calls, chunk.states, self.layer, layer)
            keys = chunk.at_last(self.runner.projection_input(chunk.calls, states, layer))
            outputs.append(projection(keys))
        return torch.cat(outputs).float().to(self.runner.device)


def weighted_mean(rows: Tensor, weights: Sequence[float]) -> Tensor:
    """(facts · contexts, d) -> (facts, d): the contexts' mean with the given weights, in fp32."""
    shaped = rows.view(-1, len(weights), rows.shape[-1])
    return torch.einsum("fcd,c->fd", shaped, torch.tensor(weights, dtype=rows.dtype, device=rows.device))
