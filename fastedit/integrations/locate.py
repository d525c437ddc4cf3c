"""Locate-then-edit behind the drop-ins: the published code's own token rows, our optimiser, sweep and solvers.

Rows, target ids and the place of the subject are made the way the published code makes them, with its own look-up
function, so that a tokenizer's peculiarities have the same effect. Everything behind is that of
:mod:`fastedit.editors` with the official profile.
"""

from __future__ import annotations

import inspect
import weakref
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor, nn

from ..editors.base import editor_class
from ..editors.locate_then_edit import LayerMeasurement, LocateThenEdit
from ..editors.prompts import KL_PROMPT, FactRows
from ..editors.stopwatch import Stopwatch
from ..editors.sweep import PromptSweep
from ..editors.values import ValueObjective, Values, optimise_values
from ..errors import FasteditError
from ..facts import Fact
from ..models.describe import ModelDescription, describe
from ..models.runner import BlockRunner, frozen
from ..models.tokens import TokenizedPrompt
from ..ops import CovarianceFactor
from .patching import Context, NotCovered

Lookup = Callable[[list[str], list[str]], list[int]]


@dataclass(frozen=True)
class Request:
    """One fact, as the published code is given it.

    Attributes:
        prompt: with one ``{}`` for the subject.
        subject: what stands there.
        target: with its leading space, if it has one.
        case_id: names the file of its cached value.
    """

    prompt: str
    subject: str
    target: str
    case_id: Any = None


# -- what is covered ------------------------------------------------------------------------------------


def covered_model(
    model: nn.Module, tokenizer: Any, hparams: Any, layers: Sequence[int] | None = None
) -> ModelDescription:
    """The model's description, if our pipeline computes what the published code computes on it.

    Args:
        model: the project's.
        tokenizer: the project's.
        hparams: the project's.
        layers: the blocks that are edited or read; None for those of ``hparams``.

    Raises:
        NotCovered: with the reason.
    """
    try:
        description = describe(model)
        layers = list(hparams.layers if layers is None else layers)
        for layer in layers:
            name = f"{hparams.rewrite_module_tmp.format(layer)}.weight"
            projection = description.projection(layer)
            if name != projection.weight_name:
                raise NotCovered(f"{name} is not the MLP output projection {projection.weight_name}")
            if hparams.layer_module_tmp.format(layer) != description.block_names[layer]:
                raise NotCovered(f"{hparams.layer_module_tmp.format(layer)} is no block of this model")
            _ = projection.weight  # not quantised, not offloaded
    except (FasteditError, IndexError) as error:
        raise NotCovered(str(error)) from error
    if layers != sorted(set(layers)) or not layers:
        raise NotCovered(f"layers {layers} are not ascending")
    if hparams.fact_token != "subject_last":
        raise NotCovered(f"fact_token is {hparams.fact_token!r}, not 'subject_last'")
    if getattr(tokenizer, "padding_side", "right") != "right":
        raise NotCovered("the tokenizer pads on the left, where the published code's positions do not hold")
    if model.training:
        raise NotCovered("the model is in training mode")
    if any(module._forward_hooks or module._forward_pre_hooks for module in model.modules()):
        raise NotCovered("a module of the model has a forward hook")
    return description


def covered_value_loss(model: nn.Module, description: ModelDescription, hparams: Any, layer: int) -> None:
    """That the loss of the value of block ``layer`` is the model's own: last block, final norm, the bare head.

    Raises:
        NotCovered: with the reason.
    """
    last = max(hparams.v_loss_layer, layer)
    if last != description.n_layers - 1:
        raise NotCovered(
            f"v_loss_layer {hparams.v_loss_layer} is not the last block {description.n_layers - 1}"
        )
    modules = dict(model.named_modules())
    if modules.get(hparams.ln_f_module) is not description.final_norm:
        raise NotCovered(f"{hparams.ln_f_module} is not the final norm")
    head = modules.get(hparams.lm_head_module)
    weight = getattr(head, "weight", None)
    if not isinstance(weight, Tensor) or weight.data_ptr() != description.head.weight.data_ptr():  # type: ignore[operator]
        raise NotCovered(f"{hparams.lm_head_module} does not hold the weight of the output head")
    if getattr(head, "bias", None) is not getattr(description.head, "bias", None):
        raise NotCovered(f"{hparams.lm_head_module} lacks the output head's bias")
    if (description.logit_multiplier, description.logit_divisor, description.logit_softcap) != (None,) * 3:
        raise NotCovered("the model scales or caps its logits, which the published loss does not do")


# -- token rows -----------------------------------------------------------------------------------------


def value_rows(
    tokenizer: Any,
    requests: Sequence[Request],
    contexts: Sequence[str],
    lookup: Lookup,
    trim: Callable[[list[int]], list[int]],
    context_length: int | None,
    *,
    special_tokens: bool = True,
) -> list[FactRows]:
    """All rows of each request, tokenised as the published code does.

    Args:
        tokenizer: the project's.
        requests: the facts.
        contexts: flat list of templates, the bare ``{}`` first.
        lookup: templates with one ``{}`` and subjects -> index of each subject's last token; the project's own.
        trim: what the published code does to a target's ids.
        context_length: the model's, or None.
        special_tokens: whether a target is tokenised with the special tokens that the tokenizer adds.

    Raises:
        NotCovered: an empty batch or target, or positions at which our rows would not be the published ones.
    """
    if not requests:
        raise NotCovered("there is no request")
    if not contexts or contexts[0] != "{}":
        raise NotCovered("the first context template is not the bare one")
    targets = [
        trim(list(tokenizer(request.target, add_special_tokens=special_tokens)["input_ids"]))
        for request in requests
    ]
    if not all(targets):
        raise NotCovered("a target has no tokens")
    templates, subjects = [], []
    for request, target in zip(requests, targets, strict=True):
        tail = tokenizer.decode(target[:-1])
        prompts = [context.format(request.prompt) for context in contexts]
        templates += [*prompts, *(prompt + tail for prompt in prompts), KL_PROMPT]
        subjects += [request.subject] * (2 * len(contexts) + 1)
    encoded = _encoded(tokenizer, templates, subjects, lookup)
    longest = max(len(row.ids) for row in encoded)
    if context_length is not None and longest > context_length:
        raise NotCovered(f"a prompt takes {longest} tokens, the model's context holds {context_length}")
    rows = []
    step = 2 * len(contexts) + 1
    for number, target in enumerate(targets):
        own = encoded[number * step : (number + 1) * step]
        for row in own[len(contexts) : -1]:
            if row.subject_last > len(row.ids) - len(target):
                raise NotCovered("the subject's last token is looked up behind the first token of the target")
        rows.append(
            FactRows(
                [_cut(row) for row in own[: len(contexts)]], own[len(contexts) : -1], _cut(own[-1]), target
            )
        )
    return rows


def prompt_rows(
    tokenizer: Any, templates: Sequence[str], subjects: Sequence[str], lookup: Lookup
) -> list[TokenizedPrompt]:
    """Prompts cut after the subject's last token, looked up as the published code does."""
    return [_cut(row) for row in _encoded(tokenizer, templates, subjects, lookup)]


def _encoded(
    tokenizer: Any, templates: Sequence[str], subjects: Sequence[str], lookup: Lookup
) -> list[TokenizedPrompt]:
    places = lookup(list(templates), list(subjects))
    texts = [template.format(subject) for template, subject in zip(templates, subjects, strict=True)]
    rows = []
    for ids, place in zip(tokenizer(texts)["input_ids"], places, strict=True):
        if not 0 <= place < len(ids):
            raise NotCovered("the subject's last token is looked up outside of its prompt")
        rows.append(TokenizedPrompt(list(ids), place))
    return rows


def _cut(row: TokenizedPrompt) -> TokenizedPrompt:
    return TokenizedPrompt(row.ids[: row.subject_last + 1], row.subject_last)


# -- values ---------------------------------------------------------------------------------------------


def objective_of(hparams: Any, layer: int, *, at_mlp: bool = False) -> ValueObjective:
    """The loss that a project's hyper-parameters describe."""
    return ValueObjective(
        layer=layer,
        at_mlp=at_mlp,
        steps=hparams.v_num_grad_steps,
        lr=hparams.v_lr,
        clamp=hparams.clamp_norm_factor,
        weight_decay=hparams.v_weight_decay,
        kl_factor=hparams.kl_factor,
    )


def optimised(
    model: nn.Module, requests: Sequence[Request], rows: Sequence[FactRows], objective: ValueObjective
) -> Values:
    """Target values of all requests together; like the published loop, leaves no parameter asking for gradients.

    Raises:
        NotCovered: a loss that stops being finite, or a model that our runner cannot run.
    """
    with covering(), frozen(model):
        facts = [Fact(each.prompt, each.subject, each.target) for each in requests]
        values = optimise_values(BlockRunner(model), facts, rows, objective, show_progress=False)
    if values.broken:
        raise NotCovered(f"the loss of {facts[min(values.broken)].text!r} stops being finite")
    model.requires_grad_(False)
    return values


def describe_optimisation(requests: Sequence[Request], values: Values) -> list[str]:
    """What the published loop prints, for the last evaluation of each request."""
    lines = []
    count = (~values.losses[:, :, 0].isnan()).sum(1)
    for number, request in enumerate(requests):
        total, nll, kl, decay = (round(x, 3) for x in values.losses[number, count[number] - 1].tolist())
        chance = torch.exp(-values.losses[number, count[number] - 1, 1]).item()
        lines.append(f"loss {total} = {nll} + {kl} + {decay} avg prob of [{request.target}] {chance}")
        norms = (values.initial[number].norm(), values.shift[number].norm(), values.target[number].norm())
        lines.append("Init norm {} | Delta norm {} | Target norm {}".format(*(float(n) for n in norms)))
    return lines


# -- keys -----------------------------------------------------------------------------------------------


def keys_at(model: nn.Module, prompts: Sequence[TokenizedPrompt], layer: int) -> Tensor:
    """(prompts, d_in) fp32: inputs of the block's output projection at each prompt's last token."""
    with covering(), frozen(model):
        return PromptSweep(BlockRunner(model), prompts, layer).keys()


# -- ROME -----------------------------------------------------------------------------------------------


def left_vector(
    model: nn.Module, prompts: Sequence[TokenizedPrompt], layer: int, inverse: Tensor | None
) -> Tensor:
    """C⁻¹k̄ / ‖C⁻¹k̄‖, (d_in,), k̄ the mean key of the prompts; with no inverse, k̄ / ‖k̄‖."""
    u = keys_at(model, prompts, layer).mean(0)
    if inverse is not None:
        u = inverse @ u.to(inverse)
    return u / u.norm()


def right_vector(
    context: Context,
    model: nn.Module,
    hparams: Any,
    layer: int,
    request: Request,
    rows: Sequence[FactRows],
    bare: Sequence[TokenizedPrompt],
    left: Tensor,
) -> Tensor:
    """(v* - W k) / ⟨k, u⟩, (d_out,): v* optimised at the MLP's output, k the key of the bare prompt.

    Raises:
        NotCovered: ``hparams.mlp_module_tmp`` names something else, or the MLP's output goes through a norm.
    """
    description, name = describe(model), hparams.mlp_module_tmp.format(layer)
    with covering():
        is_mlp = dict(model.named_modules()).get(name) is description.mlp(layer)
    if not is_mlp or description.post_mlp_norm(layer) is not None:
        raise NotCovered(f"{name} is not what the block adds to its stream")
    values = optimised(model, [request], rows, objective_of(hparams, layer, at_mlp=True))
    with covering(), frozen(model):
        sweep = PromptSweep(BlockRunner(model), bare, layer)
        key, output = sweep.keys()[0], sweep.projected(layer)[0]
    target, divisor = values.target[0], torch.dot(key, left.to(key))
    right = (target - output.to(target.device)) / divisor.to(target.device)
    if context.verbose:
        print(*describe_optimisation([request], values), sep="\n")
        print(f"Division Factor: {float(divisor)}", f"Right vector norm: {right.norm()}", sep="\n")
    return right


def inverse_moment(context: Context) -> Callable[..., Tensor]:
    """``get_inv_cov``: C⁻¹ (d, d) float32 by a Cholesky factor in float64, kept in the project's own cache."""
    unified = context.version.startswith("scalable-model-editing/")
    signature = inspect.signature(context.original)

    def get_inv_cov(*args: Any, **kwargs: Any) -> Tensor:
        bound = signature.bind(*args, **kwargs)
        bound.apply_defaults()
        call = SimpleNamespace(**bound.arguments)
        if unified and (call.constraint_rome or call.hparams.dynamic):
            raise NotCovered("constraint_rome or dynamic")
        space, name = context.namespace, call.layer_name
        cache, key = space["inv_mom2_cache"], (call.model.config._name_or_path.replace("/", "_"), name)
        if key not in cache:
            with_hparams = hasattr(call, "hparams") and not unified
            stat = space["layer_stats"](
                call.model,
                call.tok,
                name,
                call.hparams.stats_dir if with_hparams else space["STATS_DIR"],
                call.mom2_dataset,
                to_collect=["mom2"],
                sample_size=call.mom2_n_samples,
                precision=call.mom2_dtype,
                **({"hparams": call.hparams} if with_hparams else {}),
            )
            moment = (stat[0] if unified else stat).mom2.moment()
            factor, info = torch.linalg.cholesky_ex(
                moment.to(call.model.get_submodule(name).weight.device).double()
            )
            if int(info):
                raise NotCovered(f"the statistics of {name} are not positive definite")
            cache[key] = torch.cholesky_inverse(factor).float()
        return cache[key]

    return get_inv_cov


# -- writing --------------------------------------------------------------------------------------------


@dataclass
class Written:
    """What was written into one layer.

    Attributes:
        layer: the block.
        keys: (d_in, n) fp32.
        residual: (d_out, n), fp32: what the values lacked, shared over the layers left.
        left: (d_out, n), fp64.
        right: (d_in, n), fp64; Δ = left rightᵀ.
        share: layers over which the residual was spread.
    """

    layer: int
    keys: Tensor
    residual: Tensor
    left: Tensor
    right: Tensor
    share: int


@dataclass
class Writer:
    """An editor of ours that writes into a project's model, layer by layer, and keeps no record of edits.

    Attributes:
        editor: its method and settings.
        written: one entry for each layer and sweep of the latest call.
    """

    editor: LocateThenEdit
    written: list[Written] = field(default_factory=list)

    @classmethod
    def of(
        cls,
        method: str,
        model: nn.Module,
        tokenizer: Any,
        hparams: Any,
        contexts: Sequence[str],
        **params: Any,
    ) -> Writer:
        """Make one; ``params`` are those of the method besides the family's.

        Raises:
            NotCovered: settings that our editor does not take.
        """
        shared = {
            "layers": tuple(hparams.layers),
            "steps": hparams.v_num_grad_steps,
            "lr": hparams.v_lr,
            "clamp": hparams.clamp_norm_factor,
            "weight_decay": hparams.v_weight_decay,
            "kl_factor": hparams.kl_factor,
        }
        try:
            made: Any = editor_class(method)
            editor = made(
                model,
                tokenizer,
                params={**shared, **params},
                profile="official",
                progress=False,
                contexts=contexts,
                statistics={},
            )
        except ValueError as error:
            raise NotCovered(str(error)) from error
        writer = cls(editor)
        editor.solve = writer._recording(editor.solve)
        return writer

    def _recording(self, solve: Callable[[LayerMeasurement], tuple[Tensor, Tensor]]) -> Callable[..., Any]:
        def recorded(measured: LayerMeasurement) -> tuple[Tensor, Tensor]:
            left, right = solve(measured)
            layers = self.editor.params.layers
            share = len(layers) - layers.index(measured.layer)
            self.written.append(
                Written(
                    measured.layer, measured.keys, measured.residual, left.double(), right.double(), share
                )
            )
            return left, right

        return recorded

    def set_factor(self, layer: int, factor: CovarianceFactor) -> None:
        """Use this factor of the layer's statistics."""
        self.editor._factors[layer] = factor

    def write(self, rows: Sequence[FactRows], values: Values) -> dict[int, Tensor]:
        """Write values into the live weights; returns, by layer, the keys (d_in, n) under the weights written."""
        self.written = []
        parts: dict[str, list[tuple[Tensor, Tensor]]] = {name: [] for name in self.editor.weight_names}
        with frozen(self.editor.model):
            return self.editor.write(rows, values, parts, Stopwatch(), [{} for _ in rows])

    def describe(self, before: Mapping[str, float]) -> list[str]:
        """What the published code prints for each layer; ``before`` has the norms of the old weights, by name."""
        lines = []
        for each in self.written:
            name = self.editor.description.projection(each.layer).weight_name
            # ‖A Bᵀ‖² = ⟨AᵀA, BᵀB⟩
            norm = ((each.left.T @ each.left) * (each.right.T @ each.right)).sum().clamp(min=0).sqrt()
            lines += [
                f"\n\nLAYER {each.layer}\n",
                f"Writing {each.keys.shape[1]} key/value pair(s) into layer {each.layer}",
                f"z error {float(each.residual.norm(dim=0).mean() * each.share)}",
                f"orig norm {before[name]}",
                f"upd norm {float(norm)}",
            ]
        return lines


@contextmanager
def covering() -> Iterator[None]:
    """Our errors become :class:`NotCovered`: the original may not share them."""
    try:
        yield
    except FasteditError as error:
        raise NotCovered(str(error)) from error


@contextmanager
def kept_weights(weights: Mapping[str, Tensor], *, undo: bool) -> Iterator[dict[str, Tensor]]:
    """Copies of weights, by name; their bits go back on any error, and on success too if ``undo``.

    Raises:
        NotCovered: in the place of an error of ours, which the original may not share.
    """
    before = {name: weight.detach().clone() for name, weight in weights.items()}
    done = False
    try:
        with covering():
            yield before
        done = True
    finally:
        if undo or not done:
            with torch.no_grad():
                for name, weight in weights.items():
                    weight.copy_(before[name])


# -- factors of statistics ------------------------------------------------------------------------------


class FactorCache:
    """Factors of λC, kept as long as the tensor C that they were made from lives unchanged."""

    def __init__(self) -> None:
        self._entries: dict[tuple[Any, ...], tuple[weakref.ref[Tensor], CovarianceFactor]] = {}

    def get(
        self,
        moment: Tensor,
        weight: float,
        *,
        ridge: float = 0.0,
        layer: int,
        device: torch.device,
        keep_matrix: bool = False,
    ) -> CovarianceFactor:
        """The factor of weight · C + ridge · I, on ``device``; whoever appends keys to it keeps a cache of his own.

        Raises:
            NotCovered: it cannot be factored.
        """
        self._entries = {key: entry for key, entry in self._entries.items() if entry[0]() is not None}
        key = (id(moment), moment._version, weight, ridge, str(device), keep_matrix)
        if key not in self._entries:
            matrix = moment.to(device)
            if ridge:
                matrix = matrix.to(torch.float64, copy=True)
                matrix.diagonal().add_(ridge / weight)
            with covering():
                factor = CovarianceFactor(matrix, weight, layer=layer, keep_matrix=keep_matrix)
            self._entries[key] = weakref.ref(moment), factor
        return self._entries[key][1]
