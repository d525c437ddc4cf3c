"""What stands behind the replaced functions of EasyEdit's locate-then-edit methods: their rows, our engine.

Rows, positions and targets are made as EasyEdit makes them, token by token; then targets are optimised together on a
frozen prefix and keys are read in one sweep over the layers (:mod:`fastedit.editors.values`,
:mod:`fastedit.editors.sweep`). What that engine does not cover raises NotCovered before anything has changed.
"""

from __future__ import annotations

import weakref
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from ...editors.prompts import KL_PROMPT, FactRows
from ...editors.sweep import PromptSweep, weighted_mean
from ...editors.values import ValueObjective, Values, optimise_values
from ...errors import FasteditError
from ...facts import Fact
from ...models.describe import ModelDescription
from ...models.runner import BlockRunner, frozen
from ...models.tokens import TokenizedPrompt
from ...ops import CovarianceFactor
from ..patching import NotCovered

_PLAIN_HOOKS = ("transformers", "accelerate", "torch")
STOP_LOSS = 0.05


@dataclass(frozen=True)
class Request:
    """One request, as the original has rewritten it.

    Attributes:
        prompt: with one ``{}`` for the subject.
        subject: the words for it.
        target: as it is tokenised, with its leading space.
    """

    prompt: str
    subject: str
    target: str

    @property
    def fact(self) -> Fact:
        """The same as a fact."""
        return Fact(self.prompt, self.subject, self.target)


def runner_for(model: nn.Module, tok: Any, hparams: Any, layers: Sequence[int]) -> BlockRunner:
    """The model's blocks, if the engine covers this model, tokenizer and settings for these layers.

    Raises:
        NotCovered: it does not; says why.
    """
    if getattr(hparams, "fact_token", "subject_last") != "subject_last":
        raise NotCovered(f"fact_token {hparams.fact_token!r}, only 'subject_last' is covered")
    if tok.padding_side != "right":
        raise NotCovered("the tokenizer pads on the left")
    if model.training:
        raise NotCovered("the model is in training mode")
    try:
        runner = BlockRunner(model)
        description = runner.description
        for layer in layers:
            projection = description.projection(layer)
            _same_name("rewrite_module_tmp", hparams.rewrite_module_tmp.format(layer), projection.name)
            _same_name(
                "layer_module_tmp", hparams.layer_module_tmp.format(layer), description.block_names[layer]
            )
            _ = projection.weight  # raises if it is quantised
    except (FasteditError, IndexError) as error:
        raise NotCovered(f"the model is not covered: {error}") from None
    for name, module in model.named_modules():
        for hook in (*module._forward_hooks.values(), *module._forward_pre_hooks.values()):
            if not str(getattr(hook, "__module__", "")).startswith(_PLAIN_HOOKS):
                raise NotCovered(f"a hook on the module {name or type(model).__name__}")
    return runner


def require_head(model: nn.Module, description: ModelDescription, hparams: Any, layer: int) -> None:
    """NotCovered unless the loss that the original computes itself is that of the model's own logits."""
    if max(hparams.v_loss_layer, layer) != description.n_layers - 1:
        raise NotCovered(f"v_loss_layer {hparams.v_loss_layer} is not the last block")
    if description.logit_multiplier or description.logit_divisor or description.logit_softcap:
        raise NotCovered("the model scales or caps its logits, which the original's loss leaves out")
    try:
        norm, head = model.get_submodule(hparams.ln_f_module), model.get_submodule(hparams.lm_head_module)
    except AttributeError as error:
        raise NotCovered(str(error)) from None
    if norm is not description.final_norm or getattr(head, "weight", None) is not description.head.weight:
        raise NotCovered("ln_f_module or lm_head_module is not the model's final norm or output head")


def _same_name(setting: str, theirs: str, ours: str) -> None:
    if theirs != ours:
        raise NotCovered(f"{setting} names {theirs}, the block has {ours}")


# ---- rows -----------------------------------------------------------------------------------------------


def rows_of(
    tok: Any, request: Request, contexts: Sequence[str], *, drop_special: bool, length: int | None
) -> FactRows:
    """The token rows of one request.

    Args:
        tok: the tokenizer.
        request: the request.
        contexts: templates with one ``{}`` for the prompt; the first is the bare ``{}``.
        drop_special: leave out a BOS or UNK at the beginning of the target.
        length: the model's context length, or None.

    Raises:
        NotCovered: rows that the engine cannot run.
    """
    if not contexts or contexts[0] != "{}":
        raise NotCovered("the first context template is not the bare {}")
    target = list(tok.encode(request.target, add_special_tokens=False))
    if drop_special and target and target[0] in (tok.bos_token_id, tok.unk_token_id):
        target = target[1:]
    if not target:
        raise NotCovered(f"the target {request.target!r} has no tokens")
    continuation = tok.decode(target[:-1])
    templates = [context.format(request.prompt) for context in contexts]
    prompts = [_cut(_row(tok, template, request.subject)) for template in templates]
    targets = [_row(tok, template + continuation, request.subject) for template in templates]
    for row in targets:
        if len(row.ids) - len(target) < row.subject_last:
            raise NotCovered("a target's tokens begin before the subject ends")
        if length is not None and len(row.ids) > length:
            raise NotCovered("a prompt is longer than the model's context")
    return FactRows(prompts, targets, _cut(_row(tok, KL_PROMPT, request.subject)), target)


def _row(tok: Any, template: str, subject: str) -> TokenizedPrompt:
    """The ids of a filled template, and the place where EasyEdit finds the subject's last token."""
    if template.count("{}") != 1:
        raise NotCovered("a prompt does not have exactly one {}")
    before = template.split("{}")[0]
    ids = list(tok(template.format(subject))["input_ids"])
    last = len(tok.encode(before + subject)) - 1
    if last >= len(ids):
        raise NotCovered("the subject's last token lies outside of the prompt")
    return TokenizedPrompt(ids, last)


def _cut(row: TokenizedPrompt) -> TokenizedPrompt:
    return TokenizedPrompt(row.ids[: row.subject_last + 1], row.subject_last)


# ---- targets --------------------------------------------------------------------------------------------


def optimise(
    runner: BlockRunner,
    requests: Sequence[Request],
    rows: Sequence[FactRows],
    hparams: Any,
    layer: int,
    *,
    at_mlp: bool = False,
) -> Values:
    """The requests' target values on the weights as they are, all optimised together.

    Like the original it leaves no parameter of the model asking for a gradient.

    Raises:
        NotCovered: a loss that stops being finite.
    """
    objective = ValueObjective(
        layer=layer,
        at_mlp=at_mlp,
        steps=hparams.v_num_grad_steps,
        lr=hparams.v_lr,
        clamp=hparams.clamp_norm_factor,
        weight_decay=hparams.v_weight_decay,
        kl_factor=hparams.kl_factor,
        stop_loss=STOP_LOSS,
    )
    try:
        facts = [request.fact for request in requests]
    except FasteditError as error:
        raise NotCovered(str(error)) from None
    with frozen(runner.model):
        values = optimise_values(runner, facts, rows, objective, show_progress=False)
    if values.broken:
        raise NotCovered("the loss of a target stopped being finite")
    runner.model.requires_grad_(False)
    return values


def target_in(values: Values, dtype: torch.dtype) -> Tensor:
    """(n, h) in the model's dtype, rounded as the original rounds."""
    return values.initial.to(dtype) + values.shift.to(dtype)


# ---- keys and residuals ---------------------------------------------------------------------------------


def group_weights(groups: Sequence[Sequence[str]]) -> list[float]:
    """Weights of the contexts in a key: the mean over groups of the mean over each group's templates."""
    return [1.0 / (len(groups) * len(group)) for group in groups for _ in group]


class Insertion:
    """Keys and what the targets still lack, layer by layer from the bottom, while weights are changed.

    Args:
        runner: the model.
        rows: of the requests.
        weights: of the contexts in a key.
        layers: the layers that will be asked for, ascending.
    """

    def __init__(
        self, runner: BlockRunner, rows: Sequence[FactRows], weights: Sequence[float], layers: Sequence[int]
    ) -> None:
        self.weights, self.last = weights, layers[-1]
        with frozen(runner.model):
            self.sweep = PromptSweep(runner, [prompt for row in rows for prompt in row.prompts], layers[0])
            self.bare = self.sweep.branch(range(0, self.sweep.rows, len(weights)))

    def at(self, layer: int) -> tuple[Tensor, Tensor]:
        """Keys (d, n) averaged over contexts, and the present states (h, n) at the last layer; fp32."""
        self.sweep.advance(layer)
        self.bare.advance(layer)
        keys = weighted_mean(self.sweep.keys(), self.weights)
        return keys.T.contiguous(), self.bare.outputs(self.last).T


@contextmanager
def put_back(parameters: Mapping[str, nn.Parameter]) -> Iterator[None]:
    """Afterwards the parameters have the bits they had."""
    before = {name: parameter.detach().clone() for name, parameter in parameters.items()}
    try:
        yield
    finally:
        with torch.no_grad():
            for name, parameter in parameters.items():
                parameter.copy_(before[name])


class Factors:
    """Cholesky factors of covariances that the original keeps, one for each matrix and weight, made once."""

    def __init__(self) -> None:
        self._kept: dict[tuple[int, Any], tuple[Any, int, CovarianceFactor]] = {}

    def get(
        self, moment: Tensor, weight: float, device: torch.device, *, added: float = 0.0, layer: int = 0
    ) -> CovarianceFactor:
        """The factor of weight · moment + added · I on ``device``; made anew if the matrix was changed since.

        Raises:
            NotCovered: the matrix cannot be factored.
        """
        key = id(moment), (weight, added, str(device))
        kept = self._kept.get(key)
        if kept is not None and kept[0]() is moment and kept[1] == moment._version:
            return kept[2]
        matrix = moment.to(device).double()
        if added:
            matrix = matrix.clone()
            matrix.diagonal().add_(added / weight)
        try:
            factor = CovarianceFactor(matrix, weight, layer=layer)
        except FasteditError as error:
            raise NotCovered(str(error)) from None
        self._kept[key] = weakref.ref(moment), moment._version, factor
        return factor
