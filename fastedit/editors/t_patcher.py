"""T-Patcher: a neuron in one MLP for each wrongly predicted token (Huang et al. 2023, arXiv 2301.09785).

A patch is a key k, a bias b and a value v. On every token it adds act(k · q + b) v to the MLP's output, where q is
the MLP's input and act the MLP's own nonlinearity; in a gated MLP the patch has no gate. A patch is trained to answer
at its own token, and to be quiet at remembered queries: tokens of ordinary text, and those of earlier edits.

Patches are no router. They look at every token, generated ones too, and what keeps an unrelated text as it was is
only that their activations are low there. With a ReLU such a token keeps its very bits. With GELU or SiLU the change
is as small as the nonlinearity is at a negative activation: at −10 that is 8e-23 for GELU and 5e-4 for SiLU, times
the patch's value.

Facts are edited one after the other, each on top of the patches before it. Taking an edit off takes off its patches,
exactly; those that were trained later stay as they are, and may answer otherwise without the ones beneath them.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ..errors import CorruptFile, NumericalError
from ..facts import Fact
from ..memory.base import Decision, Memory, Place, Routes
from ..memory.edit import MemoryEdit
from ..memory.patches import Patches, activation_loss, loudest, memory_loss, mlp_activation
from ..models.describe import ModelDescription, Projection
from ..models.fingerprint import fingerprint
from ..models.runner import BlockRunner
from ..models.tokens import pad_batch
from ..progress import progress
from ..stats.cache import neutral_texts
from ..stats.texts import hash_texts
from ..stats.tokens import TokenStream, pack
from .base import register_editor
from .memory_editor import Learned, MemoryEditor, TargetRow, UpperPass

_SMOOTHING = 0.1  # of labels, in the published task loss
_COPIES = 8  # of each example in the published batches, which its top-k counts
_CLIP = 5.0  # norm of the gradient
_IMPROVED = 1e-3  # by how much the loss on held-out memories must fall to go on
_HELD_OUT = 10  # one memory in so many is held out
_TEXT_LENGTH = 128  # tokens kept of a remembered text
_TOKENS_TOGETHER = 4096


@dataclass(frozen=True)
class TPatcherParams:
    """Hyper-parameters of T-Patcher. Defaults are those published for zsRE, where they say one.

    Attributes:
        layers: the block, one.
        lr: of Adam.
        weight_decay: of Adam.
        steps: at most, for each fact.
        check_every: steps between validations.
        check_from: steps before a validation may stop.
        max_patches: for each fact, at its first wrong tokens.
        amplify: what the factors of the values begin with.
        activation_weight: of l_a.
        memory_weight: of l_m1 + l_m2.
        activation_margin: of l_a.
        memory_margins: of l_m1 and l_m2.
        activation_k: how many activations count in l_a.
        memory_k: how many in each of l_m1 and l_m2.
        memory_size: remembered queries of ordinary text, at most.
    """

    layers: tuple[int, ...]
    lr: float = 0.01
    weight_decay: float = 0.01
    steps: int = 2000
    check_every: int = 25
    check_from: int = 100
    max_patches: int = 5
    amplify: float = 10.0
    activation_weight: float = 1.0
    memory_weight: float = 10.0
    activation_margin: float = 0.0
    memory_margins: tuple[float, float] = (3.0, -3.0)
    activation_k: int = 5
    memory_k: int = 1000
    memory_size: int = 40_000

    def __post_init__(self) -> None:
        counts = ("steps", "check_every", "max_patches", "activation_k", "memory_k", "memory_size")
        wrong = [f"{name} {getattr(self, name)}" for name in counts if getattr(self, name) < 1]
        if wrong:
            raise ValueError(f"expected positive numbers, got {', '.join(wrong)}")
        if len(self.memory_margins) != 2:
            raise ValueError(f"memory_margins must be two numbers, got {self.memory_margins}")

    @classmethod
    def defaults_for(cls, description: ModelDescription) -> dict[str, Any]:
        """The last layer, as published."""
        return {"layers": (description.n_layers - 1,)}


class TPatcherMemory(Memory):
    """Patches beside a whole MLP, and the queries that later edits leave alone.

    An edit's content, fp32: ``keys`` (n, d), ``bias`` (n,), ``values`` (n, d) and ``queries`` (m, d), the MLP's input
    at the tokens that predict the edit's targets.
    """

    method = "t-patcher"
    place: Place = "mlp"

    def __init__(
        self, d_in: int, d_out: int, params: Mapping[str, Any], profile: str = "clean", seed: int = 0
    ) -> None:
        super().__init__(d_in, d_out, params, profile, seed)
        self.clear()

    def clear(self) -> None:
        """Forget everything."""
        self.patches = Patches(self.d_in)
        self._queries: dict[str, Tensor] = {}

    def attached_to(self, model: Any, projection: Projection, layer: int) -> None:
        """Take over the MLP's nonlinearity."""
        self.activation = mlp_activation(model)

    @property
    def queries(self) -> list[Tensor]:
        """(m, d) for each edit, those that later edits leave alone."""
        return list(self._queries.values())

    # -- serving ------------------------------------------------------------------------------------

    def route(self, inputs: Tensor, outputs: Tensor, tokens: Tensor) -> Decision:
        """0 for every sample, since the patches see every token; the score is the prompt's highest activation."""
        n, device = len(inputs), inputs.device
        if not len(self.patches):
            return Decision(torch.full((n,), -1, device=device))
        highest = self.patches.activations(inputs).amax(-1).masked_fill(~tokens, -torch.inf).amax(1)
        return Decision(torch.zeros(n, dtype=torch.int64, device=device), score=highest)

    def apply(self, inputs: Tensor, outputs: Tensor, routes: Routes, tokens: Tensor | None) -> Tensor:
        """The outputs with what the patches add."""
        return self.patches.added_to(outputs, inputs, self.activation)

    # -- content ------------------------------------------------------------------------------------

    def add(self, edit: MemoryEdit) -> None:
        """Append an edit's patches."""
        content = edit.content
        n, d = len(content.get("bias", ())), self.d_in
        shapes = {"keys": (n, d), "bias": (n,), "values": (n, d)}
        wrong = [
            name for name, shape in shapes.items() if name not in content or content[name].shape != shape
        ]
        queries = content.get("queries")
        if wrong or queries is None or queries.shape[1:] != (d,):
            raise CorruptFile(
                f"{edit!r} must hold as many keys and values of {d} as biases, and queries of {d}; "
                f"{', '.join(wrong) or 'queries'} does not fit"
            )
        self.patches.append(content["keys"], content["bias"], content["values"], edit.id)
        self._queries[edit.id] = queries

    def remove(self, edit_id: str) -> None:
        """Take off an edit's patches; later ones stay as they were trained."""
        self.patches.remove(edit_id)
        del self._queries[edit_id]

    # -- reports ------------------------------------------------------------------------------------

    @property
    def n_entries(self) -> int:
        """Patches."""
        return len(self.patches)

    @property
    def n_bytes(self) -> int:
        """Bytes of the patches and of the queries kept for later edits."""
        return self.patches.n_bytes + sum(each.nbytes for each in self._queries.values())

    @property
    def token_flops(self) -> int:
        """Two products with a vector for each patch."""
        return 4 * self.d_in * len(self.patches)


@dataclass
class _Training:
    """What the patches of one fact are trained on.

    Attributes:
        upper: the fact's row, run up to the MLP.
        outputs: (1, length, d), what the MLP puts out with the patches there are.
        own: (n, d), the queries at the wrong tokens.
        memories: (m, d), to be left alone.
        held_out: (m', d), to decide when to stop.
    """

    upper: UpperPass
    outputs: Tensor
    own: Tensor
    memories: Tensor
    held_out: Tensor


@register_editor("t-patcher")
class TPatcher(MemoryEditor):
    """Adds a neuron for each wrongly predicted target token of a fact; facts that are right are left alone.

    In ``clean``, margins count and the task loss is the mean over the target's tokens. ``official`` does what the
    published code does for sequences: its margins are all 0, since it never hands them on; labels are smoothed by
    0.1; and every loss counts each example eight times before it takes the largest. Whether a fact is answered is
    told from the tokens that are most probable after its right beginning, which all agree with the target just where
    greedy generation gives it; the published code generates with beams.

    Args:
        model: see :class:`fastedit.editors.Editor`.
        tokenizer: see there.
        texts: ordinary text to leave alone; None takes the packaged neutral text. Its first
            ``memory_size`` tokens count, without the first of each text.
        **options: see there.
    """

    Params = TPatcherParams
    memory_class = TPatcherMemory

    def __init__(
        self, model: Any, tokenizer: Any, *, texts: Iterable[str] | None = None, **options: Any
    ) -> None:
        super().__init__(model, tokenizer, **options)
        self.activation = mlp_activation(model)
        self.texts = neutral_texts() if texts is None else list(texts)
        self._remembered: tuple[str, Tensor] | None = None

    def learn(self, facts: list[Fact], rows: list[TargetRow], memory: Memory) -> Learned:
        """Patch the facts one after the other."""
        assert isinstance(memory, TPatcherMemory)
        device = next(self.projection.module.parameters()).device
        remembered = self.remembered().to(device)
        held_out = max(1, len(remembered) // _HELD_OUT)
        edited = [queries.to(device).float() for queries in memory.queries]
        patches = Patches(memory.d_in)
        patches.append(memory.patches.keys, memory.patches.bias, memory.patches.values, "before")
        before = len(patches)
        measured = []
        with progress(total=len(rows), desc="training patches", unit="fact", show=self.progress) as bar:
            for fact, row in zip(facts, rows, strict=True):
                upper, queries, outputs = self._run(row, patches)
                with torch.no_grad():
                    wrong = _wrong(upper, upper.log_probabilities(outputs))[: self.params.max_patches]
                about: dict[str, Any] = {"patches": len(wrong), "steps": 0, "right": not wrong}
                if wrong:
                    memories = torch.cat((remembered[:-held_out], *edited))
                    unseen = torch.cat((remembered[-held_out:], *edited))
                    training = _Training(upper, outputs, queries[wrong], memories, unseen)
                    trained, about = self._train(training, about, before, len(patches))
                    if not all(part.isfinite().all() for part in trained):
                        raise NumericalError(
                            f"the patches of {fact.text!r} stopped being finite: lower lr, or use a wider dtype"
                        )
                    patches.append(*trained, owner="batch")
                measured.append(about)
                edited.append(queries)
                bar.update()
        tensors = {
            "keys": patches.keys[before:].clone(),
            "bias": patches.bias[before:].clone(),
            "values": patches.values[before:].clone(),
            "queries": torch.cat(edited[len(memory.queries) :]),
        }
        about = {"texts": hash_texts(self.texts), "remembered": len(remembered)}
        return Learned(tensors, about, {"facts": measured})

    # -- what is left alone -------------------------------------------------------------------------

    def remembered(self) -> Tensor:
        """(m, d) fp32, contiguous: the MLP's input at the tokens of ordinary text.

        Raises:
            ValueError: the texts hold fewer than two tokens to remember.
        """
        now = fingerprint(self.model)
        if self._remembered is None or self._remembered[0] != now:
            queries = text_queries(
                self.runner, self.tokenizer, self.texts, self.layer, self.params.memory_size
            )
            if len(queries) < 2:
                raise ValueError(f"texts must hold at least two tokens to remember, got {len(queries)}")
            self._remembered = now, queries
        return self._remembered[1]

    # -- a fact -------------------------------------------------------------------------------------

    def _run(self, row: TargetRow, patches: Patches) -> tuple[UpperPass, Tensor, Tensor]:
        """A row run up to the MLP, its queries (targets, d) where the target is predicted, fp32, and its outputs."""
        last = self.layer == self.description.n_layers - 1
        start = row.key if last else 0  # above the last block tokens do not see each other
        upper = UpperPass(self.runner, [row], self.layer, [start], place="mlp")
        outputs = upper.outputs
        if len(patches):
            outputs = patches.added_to(outputs, upper.inputs, self.activation)
        first = row.key - start
        return upper, upper.inputs[0, first : first + len(row.target)].float(), outputs

    # -- training -----------------------------------------------------------------------------------

    def _train(
        self, training: _Training, about: dict[str, Any], before: int, number: int
    ) -> tuple[tuple[Tensor, Tensor, Tensor], dict[str, Any]]:
        """Keys (n, d), bias (n,) and values (n, d) of one fact's patches, and what was measured."""
        p = self.params
        n, d = training.own.shape
        device = training.own.device
        generator = torch.Generator().manual_seed(self.seed * 1_000_003 + number)
        keys = training.own / training.own.norm(dim=-1, keepdim=True).square()
        values = torch.randn(n, d, generator=generator).to(device)
        bias, factors = torch.zeros(n, device=device), torch.full((n, d), p.amplify, device=device)
        # one tensor, since what Adam costs is its calls
        flat = torch.cat([each.flatten() for each in (keys, bias, values, factors)]).requires_grad_()
        optimiser = torch.optim.Adam([flat], lr=p.lr, weight_decay=p.weight_decay)
        schedule = torch.optim.lr_scheduler.ReduceLROnPlateau(
            optimiser, factor=0.5, patience=1, threshold=0.05
        )
        unseen: list[float] = []
        step = 0
        while step < p.steps:
            optimiser.zero_grad()
            with torch.enable_grad():
                task, quiet = self._losses(training, _parts(flat, n), training.memories)
                (task + quiet).backward()
            torch.nn.utils.clip_grad_norm_(flat, _CLIP)
            optimiser.step()
            step += 1
            if step % p.check_every == 0 and self._settled(
                training, _parts(flat.detach(), n), step, schedule, unseen
            ):
                break
        trained = _parts(flat.detach(), n)
        with torch.no_grad():
            loss, log_p = self._task_loss(training, trained)
        right = not _wrong(training.upper, log_p)
        about = {**about, "steps": step, "right": right, "loss_after": float(loss)}
        keys, bias, values, factors = trained
        return (keys, bias, values * factors), about

    @torch.no_grad()
    def _settled(
        self, training: _Training, trained: Sequence[Tensor], step: int, schedule: Any, unseen: list[float]
    ) -> bool:
        """Lower the rate if the loss stays. Whether the fact is right and held-out memories improve no more."""
        loss, log_p = self._task_loss(training, trained)
        schedule.step(loss)
        if step <= self.params.check_from or _wrong(training.upper, log_p):
            return False
        unseen.append(float(self._memory_loss(training, trained, training.held_out)))
        best = 0
        for i, loss_there in enumerate(unseen):
            if loss_there < unseen[best] - _IMPROVED:
                best = i
        return best < len(unseen) - 1

    def _losses(
        self, training: _Training, trained: Sequence[Tensor], memories: Tensor
    ) -> tuple[Tensor, Tensor]:
        """The task loss, and the weighted losses of activations."""
        p = self.params
        own = _own(training, trained)
        margin, _, copies = self._profile
        quiet = p.activation_weight * activation_loss(own, margin, p.activation_k, copies)
        quiet = quiet + p.memory_weight * self._memory_loss(training, trained, memories)
        return self._task_loss(training, trained)[0], quiet

    def _memory_loss(self, training: _Training, trained: Sequence[Tensor], memories: Tensor) -> Tensor:
        _, margins, copies = self._profile
        k = self.params.memory_k
        remembered = loudest(memories, trained[0], trained[1], -(-k // copies))
        return memory_loss(remembered, _own(training, trained), margins, k, copies)

    def _task_loss(self, training: _Training, trained: Sequence[Tensor]) -> tuple[Tensor, Tensor]:
        """The loss of the answer, and what it is of: log-probabilities (targets, vocabulary)."""
        log_p = training.upper.log_probabilities(self._patched(training, trained))
        picked = -log_p.gather(1, training.upper.target.to(log_p.device)[:, None]).mean()
        if self.profile != "official":
            return picked, log_p
        return (1 - _SMOOTHING) * picked - _SMOOTHING * log_p.mean(), log_p

    def _patched(self, training: _Training, trained: Sequence[Tensor]) -> Tensor:
        """The MLP's outputs with the patches in training."""
        keys, bias, values, factors = trained
        queries = training.upper.inputs.float()
        hidden = self.activation(torch.nn.functional.linear(queries, keys, bias))
        return training.outputs + hidden @ (values * factors)

    @property
    def _profile(self) -> tuple[float, tuple[float, float], int]:
        """Margin of the activation, margins of memories, and how often each example counts."""
        if self.profile == "official":
            return 0.0, (0.0, 0.0), _COPIES
        first, second = self.params.memory_margins
        return self.params.activation_margin, (first, second), 1


def _parts(flat: Tensor, n: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Views of n patches in training: keys (n, d), bias (n,), values (n, d) and their factors (n, d)."""
    nd = (len(flat) - n) // 3
    keys, bias, values, factors = flat.split((nd, n, nd, nd))
    return keys.view(n, -1), bias, values.view(n, -1), factors.view(n, -1)


def _wrong(upper: UpperPass, log_p: Tensor) -> list[int]:
    """Which tokens of the target are not the most probable ones by log_p (targets, vocabulary)."""
    said = log_p.argmax(-1)
    return (said != upper.target.to(said.device)).nonzero().flatten().tolist()


def _own(training: _Training, trained: Sequence[Tensor]) -> Tensor:
    """(n,), each patch's activation at its own token."""
    return (training.own * trained[0]).sum(-1) + trained[1]


@torch.no_grad()
def text_queries(runner: BlockRunner, tokenizer: Any, texts: Iterable[str], layer: int, limit: int) -> Tensor:
    """(m, d) fp32, at most ``limit``: a block's MLP input at the tokens of texts, without the first of each."""
    description = runner.description
    longest = min(_TEXT_LENGTH, description.context_length or _TEXT_LENGTH)
    stream = TokenStream(
        texts,
        tokenizer,
        n_tokens=None,
        max_length=longest,
        group_tokens=_TOKENS_TOGETHER,
        add_special_tokens=True,
    )
    found = [torch.empty(0, description.hidden_size, device=runner.device)]

    def keep(_module: object, args: tuple[Tensor, ...], _out: object) -> None:
        counted = mask.clone()
        counted[:, 0] = 0
        queries = args[0].reshape(*ids.shape, -1)
        found.append(queries[counted.bool().to(queries.device)].float().to(found[0].device))

    handle = description.mlp(layer).register_forward_hook(keep)
    try:
        for group in stream.groups():
            for batch in pack(group, _TOKENS_TOGETHER):
                ids, mask, positions = (t.to(runner.device) for t in pad_batch(batch, pad_id=0))
                description.decoder(
                    input_ids=ids, attention_mask=mask, position_ids=positions, use_cache=False
                )
            if sum(map(len, found)) >= limit:
                break
    finally:
        handle.remove()
    return torch.cat(found)[:limit]
