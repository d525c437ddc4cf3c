"""A whole editor in the manner of MEMIT at one layer, on nothing but torch, transformers and fastedit.ops.

python examples/closed_form_editor.py MODEL "The capital of {} is" France " Rome" < any_text.txt
"""

import sys

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from fastedit.ops import CovarianceAccumulator, CovarianceFactor, low_rank_update_


class ClosedFormEditor:
    """W += R Kᵀ (λC + K Kᵀ)⁻¹ at an MLP's output projection: keys K of the facts, the changes R they need there."""

    def __init__(self, model, tokenizer, texts, layer=1, weight=20.0):
        self.model, self.tokenizer = model.requires_grad_(False), tokenizer
        self.projection = model.get_submodule(f"model.layers.{layer}.mlp.down_proj")
        moment = CovarianceAccumulator(self.projection.in_features)
        with self.projection.register_forward_pre_hook(lambda _, args: moment.add(args[0])):
            for text in texts:
                model(**tokenizer(text, return_tensors="pt"))
        self.factor = CovarianceFactor(moment.result() / moment.count, weight)

    def edit(self, facts):
        """Write (prompt with {}, subject, target) facts; earlier ones count among what must stay."""
        keys, changes = map(torch.stack, zip(*[self.locate(*fact) for fact in facts], strict=True))
        low_rank_update_(self.projection.weight, changes.T, self.factor.regularised(keys.T))
        self.factor.append(keys.T)

    def locate(self, prompt, subject, target, steps=25, rate=0.5):
        """A fact's key (d_in,), and the change (d_out,) of the projection's output by which the target is said."""
        said = self.tokenizer(prompt.format(subject)).input_ids
        wanted = self.tokenizer(target, add_special_tokens=False).input_ids
        place = len(self.tokenizer(prompt.split("{}")[0] + subject).input_ids) - 1
        ids, seen = torch.tensor([said + wanted]), {}
        change = torch.zeros(self.projection.out_features, requires_grad=True)

        def add_change(_, args, output):
            seen["key"] = args[0][0, place].detach()
            return output + (change * (torch.arange(ids.shape[1]) == place)[:, None]).to(output)

        optimiser = torch.optim.Adam([change], lr=rate)
        with torch.enable_grad(), self.projection.register_forward_hook(add_change):
            for _ in range(steps):
                logits = self.model(ids).logits[0, len(said) - 1 : -1]
                loss = torch.nn.functional.cross_entropy(logits, ids[0, len(said) :])
                (change.grad,) = torch.autograd.grad(loss, change)
                optimiser.step()
        return seen["key"], change.detach()


if __name__ == "__main__":
    folder, *fact = sys.argv[1:]
    model, tokenizer = (auto.from_pretrained(folder) for auto in (AutoModelForCausalLM, AutoTokenizer))
    ClosedFormEditor(model, tokenizer, filter(str.strip, sys.stdin)).edit([fact])
    prompt = tokenizer(fact[0].format(fact[1]), return_tensors="pt")
    print(tokenizer.decode(model.generate(**prompt, max_new_tokens=8)[0]))
