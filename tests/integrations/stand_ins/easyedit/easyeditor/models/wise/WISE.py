"""WISE, trained by whole passes and routed by whole outputs."""

import copy

import numpy as np
import torch
import torch.nn.functional as F
from transformers.activations import ACT2FN

from .merge.gta import GTA
from .utils import EarlyStopMeter, EditingMeanAct

merge_dict = {"ties": GTA("magnitude", "sum", normalize=True)}
edit_history = []
merge_group_edit_history = []


def euc(query, key, config, act_mask=None, infer=False):
    act = ACT2FN[config.hidden_act]
    distance = (act(key) - act(query)).norm(dim=-1)
    if infer and distance.size(1) > 100:
        return distance.max(1).values.mean()
    return distance.mean(-1) if act_mask is None else (distance * act_mask).sum(1) / act_mask.sum(1)


class WISE(torch.nn.Module):
    def __init__(self, config, model, layer):
        super().__init__()
        self.config, self.model, self.layer = config, model, layer
        model.requires_grad_(False)
        owner, _, self.layer_name = layer.rpartition(".")
        self.edit_module = model.get_submodule(owner)
        setattr(self.edit_module, self.layer_name, WISEAdapter(config, model.get_submodule(layer)))

    def get_adapter_layer(self):
        return getattr(self.edit_module, self.layer_name)

    def edit(self, config, tokens, act_mask=None, deact_mask=None):
        global edit_history
        edit_history.append([{key: value.to("cpu") for key, value in tokens.items()}, False])
        adapter = self.get_adapter_layer()
        adapter.training = adapter.editing = True
        adapter.set_parameter_tunable()
        if adapter.editing_total_cnt % self.config.save_freq == 0:
            adapter.generate_activation_mask(self.config.mask_ratio)
        meter = EarlyStopMeter()
        last = (tokens["labels"] == -100).sum(-1) - 1
        optimizer = torch.optim.SGD([adapter.new_weight], config.edit_lr, weight_decay=1e-5)
        for step in range(config.n_iter):
            loss = self._cal_ft_loss(tokens, last) + self._cal_activation_loss(
                adapter.original_layer_output, adapter.new_weight_layer_output, config, act_mask, deact_mask
            )
            if meter.stop():
                adapter.save_editing_activation()
                break
            if step == config.n_iter - 1:
                adapter.save_editing_activation()
            optimizer.zero_grad()
            loss.backward()
            adapter.mask_new_weight_gradient()
            optimizer.step()
            meter.update(loss.item())
            if type(self.config.norm_constraint) is float:
                self._norm_constraint(self.config.norm_constraint)
        adapter.editing = adapter.training = False
        adapter.editing_total_cnt += 1
        if adapter.editing_total_cnt % self.config.save_freq == 0:
            adapter.save_weight()
        if adapter.editing_total_cnt % self.config.merge_freq == 0:
            merge_group_edit_history.append(edit_history)
            edit_history = []
            adapter.merge_weight()

    def _norm_constraint(self, norm_constraint):
        adapter = self.get_adapter_layer()
        with torch.no_grad():
            low, high = adapter.weight - norm_constraint, adapter.weight + norm_constraint
            adapter.new_weight[...] = adapter.new_weight.clamp(low, high)

    def _cal_ft_loss(self, tokens, last_prompt_token_loc):
        logits = self.model(**tokens).logits[:-1, :-1]
        labels = tokens["labels"][:-1, 1:]
        loss = F.cross_entropy(logits.transpose(1, 2), labels, reduction="none")
        mask = torch.zeros_like(loss, dtype=torch.bool)
        for row, place in enumerate(last_prompt_token_loc[:-1]):
            mask[row, place - 1 :] = True
        return ((loss * mask).sum(1) / mask.sum(1)).mean()

    def _cal_activation_loss(self, original, new, config=None, act_mask=None, deact_mask=None):
        inside, outside = euc(original[:-1], new[:-1], config), euc(original[-1:], new[-1:], config)
        parts = (outside[:, None] - inside + config.gamma, outside - config.alpha, config.beta - inside)
        return sum(part[part > 0].mean() if bool((part > 0).any()) else torch.tensor(0.0) for part in parts)


class WISEAdapter(torch.nn.Module):
    def __init__(self, config, layer):
        super().__init__()
        self.config, self.layer, self.weight = config, layer, layer.weight
        self.new_weight = copy.deepcopy(layer.weight)
        self.original_layer = copy.deepcopy(layer)
        self.bias = layer.bias if "gpt2" in config.model_name else None
        self.memory_weight, self.memory_mean_act, self.acts = [], [], []
        self.editing_mean_act = EditingMeanAct()
        self.training = self.editing = False
        self.editing_total_cnt = self.merge_cnt = 0

    def set_parameter_tunable(self):
        self.new_weight.requires_grad = True

    def save_weight(self):
        self.memory_weight.append(copy.deepcopy(self.new_weight))
        self.new_weight = copy.deepcopy(self.original_layer.weight)
        self.memory_mean_act.append(self.editing_mean_act)
        self.editing_mean_act = EditingMeanAct()

    def merge_weight(self):
        number = len(self.memory_weight)
        merged = merge_dict["ties"].execute(
            [1.0 / number] * number, self.original_layer.weight, self.memory_weight, densities=0.53
        )
        self.memory_weight = [merged.detach()]
        self.memory_mean_act = [EditingMeanAct(min(each.min_act() for each in self.memory_mean_act))]
        self.merge_cnt += 1

    def save_editing_activation(self):
        scope = euc(self.original_layer_output[:-1], self.new_weight_layer_output[:-1], self.config)
        self.acts.append(scope.mean().item())
        self.editing_mean_act.update(scope.mean().item())

    def generate_activation_mask(self, mask_ratio):
        drawn = np.random.choice([1, 0], size=self.new_weight.numel(), p=[mask_ratio, 1 - mask_ratio])
        self.weight_mask = torch.from_numpy(drawn)

    def new_weight_forward(self, input):
        if self.bias is None:
            return F.linear(input, self.new_weight)
        return input @ self.new_weight + self.bias

    def mask_new_weight_gradient(self):
        grad = self.new_weight.grad
        self.new_weight.grad = (grad.flatten() * self.weight_mask).view_as(grad)

    def forward(self, *args):
        base, new = self.original_layer(*args), self.new_weight_forward(*args)
        if self.editing:
            self.original_layer_output, self.new_weight_layer_output = base, new
            return new
        limit = self.editing_mean_act.min_act() * self.config.act_ratio
        distance = euc(base, new, self.config, infer=True).mean()
        if not self.config.retrieve:
            merged = self.layer(*args)
            other = euc(base, merged, self.config, infer=True)
            if other.item() < limit and distance.item() < limit:
                return base
            return merged if other.item() > distance.item() else new
        out = base if distance.item() < limit else new
        for weight, mean in zip(self.memory_weight, self.memory_mean_act):
            memory = F.linear(*args, weight)
            other = euc(base, memory, self.config, infer=True)
            if other > distance and other > mean.min_act() * self.config.act_ratio:
                out, distance = memory, other
        return out
