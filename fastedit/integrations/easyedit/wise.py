"""Replacements for EasyEdit's WISE: the mask, the training of one edit, the merge, and the routing of an answer."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from ...editors.token_losses import token_nll
from ...ops import BitMask, masked_sgd_, route, routing_score, ties_merge
from ..locate import covering
from ..patching import Context, NotCovered, Point
from .frozen_blocks import FrozenBlocks, forward_replaced

_DECAY = 1e-5
_IGNORED = -100
_DRAWN = 1 << 22  # random numbers at a time


def generate_activation_mask(context: Context) -> Callable[..., None]:
    """The same entries from the same random numbers, as bool in the place of int64."""

    def generate(self: Any, mask_ratio: float) -> None:
        count = self.new_weight.numel()
        bound = mask_ratio / (mask_ratio + (1 - mask_ratio))  # as numpy.random.choice normalises
        mask = np.empty(count, dtype=bool)
        for start in range(0, count, _DRAWN):
            # the stream of numbers that EasyEdit draws from
            drawn = np.random.random_sample(min(_DRAWN, count - start))
            np.less(drawn, bound, out=mask[start : start + len(drawn)])
        self.weight_mask = torch.from_numpy(mask).to(self.new_weight.device)

    return generate


def edit(context: Context) -> Callable[..., None]:
    """``WISE.edit``: blocks below the memory run once, the head where a label is, the step in one pass."""

    def train(self: Any, config: Any, tokens: Any, act_mask: Any = None, deact_mask: Any = None) -> None:
        adapter, space = self.get_adapter_layer(), context.namespace
        if config.retrieve and adapter.merge_cnt > 0 and config.replay:
            raise NotCovered("replay of merged memories")
        if act_mask is None or hasattr(self.model.config, "batch_size"):
            raise NotCovered("no activation masks, or a batch size in the model's config")
        job = _Training(self, adapter, tokens)
        space["edit_history"].append([{name: value.to("cpu") for name, value in tokens.items()}, False])
        adapter.training = adapter.editing = True
        adapter.set_parameter_tunable()
        if adapter.editing_total_cnt % self.config.save_freq == 0:
            adapter.generate_activation_mask(self.config.mask_ratio)
        mask = BitMask.from_dense(adapter.weight_mask.to(adapter.new_weight.device).bool())
        meter = space["EarlyStopMeter"]()
        for step in range(config.n_iter):
            total, answers, routing, gradient = job.evaluate(config, act_mask, deact_mask)
            if meter.stop():
                adapter.save_editing_activation()
                break
            if step == config.n_iter - 1:
                adapter.save_editing_activation()
            if context.verbose:
                print(f"loss {total:.3f} = {answers:.3f} + {routing:.3f}")
            job.step(gradient, mask, config.edit_lr, self.config.norm_constraint)
            meter.update(total)
        adapter.editing = adapter.training = False
        adapter.editing_total_cnt += 1
        if self.config.save_freq is not None and adapter.editing_total_cnt % self.config.save_freq == 0:
            adapter.save_weight()
        if adapter.editing_total_cnt % self.config.merge_freq == 0:
            space["merge_group_edit_history"].append(space["edit_history"])
            space["edit_history"] = []
            adapter.merge_weight()

    return train


class _Training:
    """The rows of one edit: the last is the irrelevant one, all others carry the fact."""

    def __init__(self, wise: Any, adapter: Any, tokens: Any) -> None:
        self.wise, self.adapter = wise, adapter
        self.stored_in_out = adapter.bias is not None  # GPT-2's Conv1D, as the original tells
        fixed = FrozenBlocks(wise.model, adapter, tokens)
        self.runner = fixed.runner
        self.inputs = fixed.inputs_of(adapter)
        rows = len(self.inputs) - 1
        if rows < 1:
            raise NotCovered("there is no row with the fact")
        self.rows, self.run = rows, fixed.above(rows)
        with torch.no_grad():
            self.original = adapter.original_layer(self.inputs)
        self._find_labels(tokens["labels"])

    def _find_labels(self, labels: Tensor) -> None:
        """Places of the scored tokens, their labels and weights, with the original's denominators."""
        shifted = labels[: self.rows, 1:]
        last = (labels == _IGNORED).sum(-1)[: self.rows] - 2
        counted = torch.zeros_like(shifted, dtype=torch.bool)
        for number, start in enumerate(last.tolist()):
            counted[number, start:] = True
        row, column = (counted & (shifted != _IGNORED)).nonzero(as_tuple=True)
        self.places = row * labels.shape[1] + column
        self.labels = shifted[row, column]
        self.weights = 1.0 / (counted.sum(1).float()[row] * self.rows)

    def evaluate(self, config: Any, act_mask: Any, deact_mask: Any) -> tuple[float, float, float, Tensor]:
        """The losses (total, of the answers, of the routing) and the gradient of the memory's outputs."""
        with torch.no_grad():
            outputs = self.adapter.new_weight_forward(self.inputs)
        outputs = outputs.detach().requires_grad_()
        with torch.enable_grad(), forward_replaced(self.adapter, lambda *_: outputs[: self.rows]):
            hidden = self.run()[self.places.to(outputs.device)]
            loss = token_nll(self.runner.logits(hidden).float(), self.labels)
            answers = (loss * self.weights.to(loss)).sum()
            routing = self.wise._cal_activation_loss(
                self.original, outputs, config=config, act_mask=act_mask, deact_mask=deact_mask
            )
            total = answers + routing.to(answers.device)
            (gradient,) = torch.autograd.grad(total, outputs)
        self.adapter.original_layer_output = self.original
        self.adapter.new_weight_layer_output = outputs.detach()
        return total.item(), answers.item(), routing.item(), gradient

    def step(self, gradient: Tensor, mask: BitMask, lr: float, norm_constraint: Any) -> None:
        """SGD on the masked gradient, with decay of all entries, then the clamp: the original's order."""
        into = self.inputs.reshape(-1, self.inputs.shape[-1]).T
        out = gradient.reshape(-1, gradient.shape[-1]).T
        clamped = type(norm_constraint) is float
        masked_sgd_(
            self.adapter.new_weight.data,
            (into, out) if self.stored_in_out else (out, into),
            mask,
            lr,
            decay=_DECAY,
            clamp_to=self.adapter.weight.data if clamped else None,
            clamp=norm_constraint if clamped else None,
        )


_LONG = 100  # tokens above which the original takes the greatest distance of a text instead of the mean


def forward(context: Context) -> Callable[..., Tensor]:
    """``WISEAdapter.forward``: distances of all memories in one pass, then one product with the weight chosen.

    One route for the whole batch, as the original has it.
    """

    def routed(self: Any, *args: Any) -> Tensor:
        if self.editing:
            self.new_weight_layer_output = self.new_weight_forward(*args)
            self.original_layer_output = self.original_layer(*args)
            return self.new_weight_layer_output
        base, bias, transposed = self.original_layer.weight, self.original_layer.bias, self.bias is not None
        if self.config.retrieve:
            memories, rule = [self.new_weight, *self.memory_weight], "retrieve"
            means = [self.editing_mean_act, *self.memory_mean_act]
        else:
            memories, rule = [self.layer.weight, self.new_weight], "merge"
            means = [self.editing_mean_act]
        _require_plain(self, args, memories, rule)
        with covering(), torch.no_grad():
            try:
                scores = routing_score(
                    args[0], base, memories, self.config.hidden_act, transposed=transposed, bias=bias
                )
            except (TypeError, ValueError) as error:
                raise NotCovered(str(error)) from error
            limits = torch.tensor([each.min_act() * self.config.act_ratio for each in means]).to(scores)
            # of a batch: the mean over all tokens, or the mean of the texts' greatest distances
            long = args[0].shape[1] > _LONG
            scores = scores.amax(1).mean(0)[None] if long else scores.flatten(0, 1)
            index, _ = route(scores, limits if len(limits) > 1 else limits[0], rule=rule)
        chosen = int(index)
        if chosen < 0:
            return self.original_layer(*args)
        if rule == "merge":
            return self.layer(*args) if chosen == 0 else self.new_weight_forward(*args)
        return self.new_weight_forward(*args) if chosen == 0 else F.linear(args[0], memories[chosen])

    return routed


def _require_plain(adapter: Any, args: tuple[Any, ...], memories: list[Tensor], rule: str) -> None:
    """That the distances are those of one batch of one text, or of long texts, in float32.

    Raises:
        NotCovered: else.
    """
    if len(args) != 1 or args[0].dim() != 3:
        raise NotCovered("an input that is not (rows, length, width)")
    dtypes = {each.dtype for each in (args[0], adapter.original_layer.weight, *memories)}
    if dtypes != {torch.float32}:
        raise NotCovered("weights of 16 bits, whose rounded outputs are part of the original's distances")
    if args[0].shape[0] != 1 and args[0].shape[1] <= _LONG and (rule == "merge" or len(memories) > 1):
        raise NotCovered("a batch of several texts, which the original does not route")
    bias = getattr(adapter.original_layer, "bias", None)
    if bias is not None and (adapter.bias is None or (rule == "retrieve" and len(memories) > 1)):
        raise NotCovered("memories of a layer with a bias, which the original leaves out")


def execute_merge(context: Context) -> Callable[..., Tensor]:
    """``GTA.execute`` as TIES: trim, elect and sum in two passes."""

    def execute(self: Any, weights: Any, base: Tensor, tensors: Any, densities: Any, **_: Any) -> Tensor:
        if (self.sparsify_method, self.consensus_method, self.normalize) != ("magnitude", "sum", True):
            raise NotCovered("a merge other than TIES")
        if not tensors or not isinstance(weights, list) or len(weights) != len(tensors):
            raise NotCovered("weights and tensors that do not fit")
        if densities < 1 and int(densities * base.numel()) < 1:
            raise NotCovered("a density that keeps nothing")
        given = [tensor.detach().to(base.device) for tensor in tensors]
        with covering():
            return ties_merge(given, [float(weight) for weight in weights], float(densities), base.detach())

    return execute


def points(models: str) -> list[Point]:
    """The points in EasyEdit's package of methods."""
    module = f"{models}.wise.WISE"
    used = (
        "euc",
        "EarlyStopMeter.stop",
        "EarlyStopMeter.update",
        "WISE._cal_ft_loss",
        "WISE._cal_activation_loss",
        "WISE._norm_constraint",
        *(
            f"WISEAdapter.{name}"
            for name in (
                "forward",
                "new_weight_forward",
                "mask_new_weight_gradient",
                "save_editing_activation",
                "set_parameter_tunable",
            )
        ),
    )
    return [
        Point(f"{module}:WISEAdapter.generate_activation_mask", generate_activation_mask),
        Point(
            f"{module}:WISEAdapter.forward",
            forward,
            ("euc", "WISEAdapter.new_weight_forward", "EditingMeanAct.min_act"),
        ),
        Point(f"{module}:WISE.edit", edit, used),
        Point(
            f"{models}.wise.merge.gta:GTA.execute",
            execute_merge,
            ("get_mask", "get_task_vectors", "magnitude"),
        ),
    ]
