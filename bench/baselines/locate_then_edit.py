"""MEMIT, AlphaEdit, NSE, EMMET and ROME the way their published code works.

One request at a time, whole forward and backward passes over all its rows, the head on every token, one more pass
over the whole model for every layer and quantity, and dense d × d solves. Only what a layer and its weight are
called comes from fastedit.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from fastedit import Fact
from fastedit.models import describe

KL_PROMPT = "{} is a"
KEY_BATCH = 128


@dataclass
class Published:
    """A model, its tokenizer and the published hyper-parameters, with the time of each stage."""

    model: Any
    tokenizer: Any
    hparams: dict[str, Any]
    contexts: Sequence[str]
    covariance: dict[int, Tensor]
    seconds: dict[str, float] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.description = describe(self.model)
        self.layers = list(self.hparams["layers"])
        self.cache: dict[int, Tensor] = {}
        self.projectors: dict[int, Tensor] = {}
        for parameter in self.model.parameters():
            parameter.requires_grad_(False)
        self.tokenizer.padding_side = "right"
        if self.tokenizer.pad_token is None:
            self.tokenizer.pad_token = self.tokenizer.eos_token or self.tokenizer.unk_token

    @contextmanager
    def stage(self, name: str) -> Iterator[None]:
        start = time.perf_counter()
        yield
        self.seconds[name] = self.seconds.get(name, 0.0) + time.perf_counter() - start

    # -- pieces -----------------------------------------------------------------------------------------

    def tokens(self, texts: Sequence[str]) -> dict[str, Tensor]:
        batch = self.tokenizer(list(texts), return_tensors="pt", padding=True)
        return {name: batch[name].to(self.model.device) for name in ("input_ids", "attention_mask")}

    def subject_last(self, prompt: str, subject: str) -> int:
        """Index of the subject's last token in the encoding of the whole sentence."""
        before, after = prompt.split("{}")
        encoding = self.tokenizer(before + subject + after, return_offsets_mapping=True)
        end = len(before) + len(subject)
        return max(i for i, (a, b) in enumerate(encoding["offset_mapping"]) if b > a and a < end)

    def weight(self, layer: int) -> Tensor:
        """The edited weight, (d_out, d_in); adding to it in place changes the model."""
        projection = self.description.projection(layer)
        return projection.weight.data.T if projection.transposed else projection.weight.data

    def at(self, module: Any, of: str, texts: Sequence[str], indices: Sequence[int]) -> Tensor:
        """(texts, d): input or output of a module at one position of each text, by passes over the whole model."""
        found = []

        def keep(_module: Any, args: Any, out: Any) -> None:
            tensor = args[0] if of == "input" else (out[0] if isinstance(out, tuple) else out)
            found.append(tensor.detach().reshape(len(here), -1, tensor.shape[-1]))

        out = []
        handle = module.register_forward_hook(keep)
        try:
            for start in range(0, len(texts), KEY_BATCH):
                here = texts[start : start + KEY_BATCH]
                with torch.no_grad():
                    self.model(**self.tokens(here))
                states = found.pop()
                out += [states[i, indices[start + i]] for i in range(len(here))]
        finally:
            handle.remove()
        rows = torch.stack(out)
        return rows.to(torch.promote_types(rows.dtype, torch.float32))

    # -- targets ----------------------------------------------------------------------------------------

    def target(self, fact: Fact, layer: int, at_mlp: bool = False) -> tuple[Tensor, Tensor]:
        """Z = initial value + δ, and the initial value, of one request."""
        h = self.hparams
        ids = self.tokenizer(fact.target, add_special_tokens=False)["input_ids"]
        rewriting = [
            context.format(fact.prompt) + self.tokenizer.decode(ids[:-1]) for context in self.contexts
        ]
        prompts = [*rewriting, KL_PROMPT]
        inputs = self.tokens([prompt.format(fact.subject) for prompt in prompts])
        lengths = inputs["attention_mask"].sum(1).tolist()
        labels = torch.full((len(rewriting), inputs["input_ids"].shape[1]), -100, device=self.model.device)
        for row in range(len(rewriting)):
            labels[row, lengths[row] - len(ids) : lengths[row]] = labels.new_tensor(ids)
        places = [self.subject_last(prompt, fact.subject) for prompt in prompts]
        delta = torch.zeros(self.description.hidden_size, device=self.model.device, requires_grad=True)
        optimiser = torch.optim.Adam([delta], lr=h["v_lr"])
        initial: list[Tensor] = []
        last_output: list[Tensor] = []
        reference = None

        def insert(_module: Any, _args: Any, out: Any) -> Any:
            hidden = out[0] if isinstance(out, tuple) else out
            if not initial:
                initial.append(hidden[0, places[0]].detach().clone())
            hidden = hidden.clone()
            for row, place in enumerate(places):
                hidden[row, place] = (hidden[row, place] + delta).to(hidden.dtype)
            return (hidden, *out[1:]) if isinstance(out, tuple) else hidden

        def keep(_module: Any, _args: Any, out: Any) -> None:
            last_output[:] = [out[0] if isinstance(out, tuple) else out]

        edited = self.description.projection(layer).module if at_mlp else self.description.blocks[layer]
        handles = [edited.register_forward_hook(insert)]
        handles.append(self.description.blocks[-1].register_forward_hook(keep))
        try:
            for step in range(h["v_num_grad_steps"]):
                optimiser.zero_grad()
                logits = self.model(**inputs, use_cache=False).logits
                neutral = F.log_softmax(logits[-1:, places[-1]], dim=1)
                if reference is None:
                    reference = neutral.detach().clone()
                if at_mlp:
                    log_p = F.log_softmax(logits[: len(rewriting)], dim=2)
                else:
                    hidden = self.description.final_norm(last_output[0][: len(rewriting)])
                    log_p = F.log_softmax(self.description.logits(hidden), dim=2)
                picked = log_p.gather(2, labels.clamp(min=0)[:, :, None])[:, :, 0]
                nll = (-(picked * (labels != -100)).sum(1) / len(ids)).mean()
                kl = h["kl_factor"] * F.kl_div(reference, neutral, log_target=True, reduction="batchmean")
                loss = nll + kl + h["v_weight_decay"] * delta.norm() / initial[0].norm() ** 2
                if loss.item() < 5e-2 or step == h["v_num_grad_steps"] - 1:
                    break
                loss.backward()
                optimiser.step()
                limit = h["clamp_norm_factor"] * initial[0].norm()
                if delta.norm() > limit:
                    with torch.no_grad():
                        delta[...] = delta * limit / delta.norm()
        finally:
            for handle in handles:
                handle.remove()
        return initial[0] + delta.detach(), initial[0]

    # -- keys and states --------------------------------------------------------------------------------

    def keys(self, facts: Sequence[Fact], layer: int) -> Tensor:
        """(d_in, n): half the bare prompt's key, half the mean over the other contexts."""
        prompts = [context.format(fact.prompt) for fact in facts for context in self.contexts]
        subjects = [fact.subject for fact in facts for _ in self.contexts]
        texts = [prompt.format(subject) for prompt, subject in zip(prompts, subjects, strict=True)]
        places = [self.subject_last(p, s) for p, s in zip(prompts, subjects, strict=True)]
        rows = self.at(self.description.projection(layer).module, "input", texts, places)
        rows = rows.view(len(facts), len(self.contexts), -1)
        return (0.5 * rows[:, 0] + 0.5 * rows[:, 1:].mean(1)).T

    def states(self, facts: Sequence[Fact]) -> Tensor:
        """(h, n): the last edited block's output under the bare prompts."""
        texts = [fact.prompt.format(fact.subject) for fact in facts]
        places = [self.subject_last(fact.prompt, fact.subject) for fact in facts]
        return self.at(self.description.blocks[self.layers[-1]], "output", texts, places).T

    # -- methods ----------------------------------------------------------------------------------------

    def spread(self, facts: Sequence[Fact], solve: Callable[[int, Tensor, Tensor], Tensor]) -> None:
        """Targets one by one, then layer by layer: keys, residuals, a dense solve, the update."""
        with self.stage("targets"):
            targets = torch.stack([self.target(fact, self.layers[-1])[0] for fact in facts], 1)
        for index, layer in enumerate(self.layers):
            with self.stage("keys"):
                keys = self.keys(facts, layer)
                residual = (targets - self.states(facts)) / (len(self.layers) - index)
            with self.stage("solve"):
                update = solve(layer, keys, residual)
            with self.stage("apply"):
                self.weight(layer).add_(update.to(self.weight(layer).dtype))

    def remember(self, facts: Sequence[Fact]) -> None:
        """The second set of key passes, for the cache of earlier edits."""
        for layer in self.layers:
            with self.stage("keys"):
                keys = self.keys(facts, layer)
            with self.stage("state"):
                self.cache[layer] = self.cached(layer) + keys @ keys.T

    def cached(self, layer: int) -> Tensor:
        if layer not in self.cache:
            self.cache[layer] = torch.zeros_like(self.covariance[layer])
        return self.cache[layer]

    def memit(self, facts: Sequence[Fact]) -> None:
        weight = self.hparams["mom2_update_weight"]

        def solve(layer: int, keys: Tensor, residual: Tensor) -> Tensor:
            keys, residual = keys.double(), residual.double()
            solved = torch.linalg.solve(weight * self.covariance[layer].double() + keys @ keys.T, keys)
            return residual @ solved.T

        self.spread(facts, solve)

    def alphaedit(self, facts: Sequence[Fact]) -> None:
        def solve(layer: int, keys: Tensor, residual: Tensor) -> Tensor:
            projector = self.projectors[layer]
            system = projector @ (keys @ keys.T + self.cached(layer))
            system = system + self.hparams["L2"] * torch.eye(len(keys), device=keys.device)
            return torch.linalg.solve(system, projector @ keys @ residual.T).T

        self.spread(facts, solve)
        self.remember(facts)

    def project(self) -> None:
        """AlphaEdit's projectors, once."""
        for layer, matrix in self.covariance.items():
            vectors, values, _ = torch.linalg.svd(matrix, full_matrices=False)
            small = vectors[:, values < self.hparams["nullspace_threshold"]]
            self.projectors[layer] = small @ small.T

    def nse(self, facts: Sequence[Fact], targets: Tensor) -> None:
        """Targets (h, n) come from :meth:`targets_of`, on the original weights."""
        h = self.hparams
        for sweep in range(h["max_iterations"]):
            with self.stage("keys"):
                distance = (targets - self.states(facts)).norm(dim=0)
            active = [i for i, far in enumerate(distance.tolist()) if h["alpha"] < far < h["upper_bound"]]
            if not active or sweep == h["max_iterations"] - 1:
                break
            chosen = [facts[i] for i in active]
            for index, layer in enumerate(self.layers):
                with self.stage("keys"):
                    keys = self.keys(chosen, layer)
                    residual = (targets[:, active] - self.states(chosen)) / (len(self.layers) - index)
                with self.stage("solve"):
                    scores = keys.abs().sum(1)
                    order = scores.argsort(descending=True)
                    running = scores[order].cumsum(0)
                    neurons = order[running <= h["neuron_threshold"] * scores.sum()]
                    inside = keys[neurons].double()
                    matrix = h["mom2_update_weight"] * self.covariance[layer].double()
                    matrix = (matrix + self.cached(layer).double())[neurons][:, neurons]
                    solved = torch.linalg.solve(matrix + inside @ inside.T, inside)
                    update = residual.double() @ solved.T
                with self.stage("apply"):
                    self.weight(layer)[:, neurons] += update.to(self.weight(layer).dtype)
        self.remember(facts)

    def targets_of(self, facts: Sequence[Fact]) -> Tensor:
        """(h, n)."""
        with self.stage("targets"):
            return torch.stack([self.target(fact, self.layers[-1])[0] for fact in facts], 1)

    def rome(self, facts: Sequence[Fact]) -> None:
        (layer,) = self.layers
        module = self.description.projection(layer).module
        for fact in facts:
            with self.stage("keys"):
                prompts = [context.format(fact.prompt) for context in self.contexts]
                texts = [prompt.format(fact.subject) for prompt in prompts]
                places = [self.subject_last(prompt, fact.subject) for prompt in prompts]
                key = self.at(module, "input", texts, places).mean(0)
            with self.stage("solve"):
                inverse = self.inverse(layer)
                direction = inverse @ key
                direction = direction / direction.norm()
            with self.stage("targets"):
                target, _ = self.target(fact, layer, at_mlp=True)
            with self.stage("keys"):
                bare = [fact.prompt.format(fact.subject)]
                place = [self.subject_last(fact.prompt, fact.subject)]
                input_there = self.at(module, "input", bare, place)[0]
                output_there = self.at(module, "output", bare, place)[0]
            with self.stage("apply"):
                value = (target - output_there) / torch.dot(input_there, direction)
                self.weight(layer).add_(torch.outer(value, direction).to(self.weight(layer).dtype))

    def inverse(self, layer: int) -> Tensor:
        """C⁻¹ in float32, once for each layer."""
        if layer not in self.projectors:
            self.projectors[layer] = torch.linalg.inv(self.covariance[layer])
        return self.projectors[layer]
