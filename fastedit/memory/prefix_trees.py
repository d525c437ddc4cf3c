"""Texts behind continuous prompts in one differentiable pass that reads what they have in common once, for training.

A prompt and the texts behind it are a tree: texts that begin alike share a branch. The trees stand side by side in
a few rows of about the same length, hardly any padding between them, and a token sees its ancestors only. So the
states are those of :func:`fastedit.memory.prefix.prefixed_states` on a row for each text, which is what runs where a
model leaves no choice of what a token sees.
"""

from __future__ import annotations

import inspect
import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from ..models.describe import describe
from ..models.runner import BlockRunner
from ..models.tokens import pad_batch
from .prefix import placeless, position_table, prefixed_states
from .routing import aside


def states_behind(
    model: nn.Module,
    texts: Sequence[Sequence[int]],
    places: Sequence[range],
    prompts: Tensor | None = None,
    of: Sequence[int] | None = None,
) -> list[Tensor]:
    """Final hidden states at some tokens of texts that have continuous prompts in front of them.

    No memory of the model answers. The last block's MLP runs at these tokens only.

    Args:
        model: the model, as it is: gradients flow through it to ``prompts``.
        texts: ids, none of them empty.
        places: the tokens of each text whose states are wanted.
        prompts: (m, n, D), any floating dtype; cast to the model's. None: nothing is in front.
        of: which prompt each text has in front of it; not used without prompts.

    Returns:
        For each text (len(places), D), after the final norm.
    """
    of = list(range(len(texts))) if prompts is None or of is None else of
    decoder: Any = describe(model).decoder
    embeddings = decoder.get_input_embeddings().weight
    if prompts is None:
        prompts = embeddings.new_zeros(len(texts), 0, embeddings.shape[1])
    groups: list[list[int]] = [[] for _ in prompts]
    for text, number in enumerate(of):
        groups[number].append(text)
    n = prompts.shape[1]
    trees = [Tree.of([texts[text] for text in group], n) for group in groups]
    rows = side_by_side([len(tree.parents) for tree in trees], embeddings.shape[1])
    width = max(sum(len(trees[number].parents) for number in row) for row in rows)
    if width > _free_width(model):
        return _one_by_one(model, texts, places, prompts, of)
    start = dict[int, int]()
    for line, row in enumerate(rows):
        at = line * width
        for number in row:
            start[number] = at
            at += len(trees[number].parents)
    whole, seen, positions = _laid_out(decoder, trees, start, (len(rows), width), prompts)
    paths = {
        text: [start[number] + node for node in path]
        for number, group in enumerate(groups)
        for text, path in zip(group, trees[number].paths, strict=True)
    }
    scored = [[paths[text][place] for place in wanted] for text, wanted in enumerate(places)]
    device = whole.device
    wanted = torch.tensor(sorted({place for each in scored for place in each}), device=device)
    states = _run(model, whole, seen, positions, wanted)
    return [states[torch.tensor(each, dtype=torch.int64, device=states.device)] for each in scored]


@dataclass(frozen=True)
class Tree:
    """Texts behind one prompt; nodes are its n vectors and then tokens, parents before their children.

    Attributes:
        tokens: id of each node; 0 of the prompt's.
        parents: of each node; −1 of the first.
        paths: for each text the nodes of its tokens.
    """

    tokens: list[int]
    parents: list[int]
    paths: list[list[int]]

    @classmethod
    def of(cls, texts: Sequence[Sequence[int]], n: int) -> Tree:
        """The tree of texts behind a prompt of ``n`` vectors."""
        tokens, parents, paths = [0] * n, list(range(-1, n - 1)), []
        found: dict[tuple[int, int], int] = {}
        for ids in texts:
            node, path = n - 1, []
            for token in ids:
                child = found.setdefault((node, token), len(tokens))
                if child == len(tokens):
                    tokens.append(token)
                    parents.append(node)
                node = child
                path.append(node)
            paths.append(path)
        return cls(tokens, parents, paths)

    @property
    def seen(self) -> Tensor:
        """(nodes, nodes) bool: what each node sees, itself and its ancestors."""
        seen = torch.eye(len(self.parents), dtype=torch.bool)
        for node, parent in enumerate(self.parents):
            if parent >= 0:
                seen[node] |= seen[parent]
        return seen


def side_by_side(sizes: Sequence[int], d_model: int) -> list[list[int]]:
    """Divide trees over rows for the least work: long rows need little padding, short ones little attention.

    A block of width D costs 12 D² a token, and the products with T keys and values 2 T D. Numbers of rows that are
    powers of two are tried.

    Returns:
        For each row the numbers of its trees.
    """
    layouts = (_balanced(sizes, 1 << power) for power in range(len(sizes).bit_length()))

    def work(rows: list[list[int]]) -> int:
        width = max(sum(sizes[number] for number in row) for row in rows)
        return len(rows) * width * (6 * d_model + width)

    return min(layouts, key=work)


def _balanced(sizes: Sequence[int], count: int) -> list[list[int]]:
    """Trees over so many rows: the largest first, each into the shortest row."""
    rows: list[list[int]] = [[] for _ in range(count)]
    lengths = [0] * count
    for number in sorted(range(len(sizes)), key=lambda number: -sizes[number]):
        shortest = lengths.index(min(lengths))
        rows[shortest].append(number)
        lengths[shortest] += sizes[number]
    return rows


def _laid_out(
    decoder: Any, trees: Sequence[Tree], start: dict[int, int], size: tuple[int, int], prompts: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """What the decoder is given of trees that begin at these places of the flattened rows.

    Returns:
        (rows, width, D) in the place of embeddings; (rows, 1, width, width) bool, what each token sees; (rows,
        width) int64 positions. Padding sees itself.
    """
    (lines, width), n = size, prompts.shape[1]
    ids = torch.zeros(lines * width, dtype=torch.int64)
    positions = torch.zeros(lines * width, dtype=torch.int64)
    seen = torch.eye(width, dtype=torch.bool).repeat(lines, 1, 1)
    absolute = position_table(decoder) is not None
    slots: list[int] = []
    for number, tree in enumerate(trees):
        at, length, sees = start[number], len(tree.parents), tree.seen
        line, column = divmod(at, width)
        ids[at : at + length] = torch.tensor(tree.tokens)
        seen[line, column : column + length, column : column + length] = sees
        depth = sees.sum(1) - 1
        positions[at : at + length] = (depth - n).clamp(min=0) if absolute else depth
        slots += range(at, at + n)
    embeddings = decoder.get_input_embeddings()
    device = embeddings.weight.device
    whole = embeddings(ids.to(device))
    given = placeless(decoder, prompts.to(whole)).reshape(-1, whole.shape[1])
    whole = whole.index_copy(0, torch.tensor(slots, dtype=torch.int64, device=device), given)
    return (
        whole.reshape(lines, width, -1),
        seen[:, None].to(device),
        positions.reshape(lines, width).to(device),
    )


def _run(model: nn.Module, whole: Tensor, seen: Tensor, positions: Tensor, wanted: Tensor) -> Tensor:
    """(rows · width, D) after the final norm; right at the ``wanted`` places of the flattened rows."""
    runner = BlockRunner(model)
    description = runner.description
    decoder: Any = description.decoder
    mask = torch.zeros(seen.shape, dtype=whole.dtype, device=whole.device)
    mask.masked_fill_(~seen, torch.finfo(whole.dtype).min)
    with aside(model), _shown(description.blocks, mask):
        with runner._mlp_only_at(description.n_layers - 1, wanted):
            out = decoder.forward(
                inputs_embeds=whole,
                attention_mask=torch.ones(whole.shape[:2], dtype=torch.int64, device=whole.device),
                position_ids=positions,
                use_cache=False,
                return_dict=True,
            )
    return out.last_hidden_state.reshape(-1, whole.shape[2])


@contextmanager
def _shown(blocks: Sequence[nn.Module], mask: Tensor) -> Iterator[None]:
    """Inside, blocks are given this attention mask, numbers to add, instead of the decoder's."""
    names = list(inspect.signature(blocks[0].forward).parameters)

    def exchange(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        given = {**dict(zip(names, args, strict=False)), **kwargs}
        hidden = given.pop(names[0])
        return (hidden,), {**given, "attention_mask": mask.to(hidden.device)}

    handles = [block.register_forward_pre_hook(exchange, with_kwargs=True) for block in blocks]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def _free_width(model: nn.Module) -> float:
    """Up to which number of columns what a token sees can be chosen; 0 if it cannot."""
    description = describe(model)
    decoder: Any = description.decoder
    config = decoder.config
    able = (
        getattr(config, "_attn_implementation", None) in ("sdpa", "eager")
        and not getattr(config, "alibi", False)
        and "position_ids" in inspect.signature(decoder.forward).parameters
        and "attention_mask" in inspect.signature(description.blocks[0].forward).parameters
    )
    windows = [
        getattr(config, name, None) for name in ("sliding_window", "window_size", "attention_chunk_size")
    ]
    return min((window for window in windows if window), default=math.inf) if able else 0


def _one_by_one(
    model: nn.Module,
    texts: Sequence[Sequence[int]],
    places: Sequence[range],
    prompts: Tensor,
    of: Sequence[int],
) -> list[Tensor]:
    """The same with a row for each text."""
    decoder: Any = describe(model).decoder
    device = decoder.get_input_embeddings().weight.device
    ids, mask, _ = (t.to(device) for t in pad_batch(texts, 0))
    states = prefixed_states(model, ids, mask, prompts[torch.tensor(of, device=prompts.device)])
    return [row[place.start : place.stop] for row, place in zip(states, places, strict=True)]
