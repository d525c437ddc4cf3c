from __future__ import annotations

import copy
import json

import pytest
import torch

from fastedit import FasteditError
from fastedit.artefacts import Edit, LowRank, export_adapter, stack_of

peft = pytest.importorskip("peft")
pytestmark = pytest.mark.filterwarnings("ignore:.*is_gradient_checkpointing:FutureWarning")

IDS = torch.arange(24).reshape(2, 12)


def logits(model) -> torch.Tensor:
    with torch.no_grad():
        return model(IDS).logits


@pytest.mark.parametrize("kind", ["gpt2", "llama"])
@pytest.mark.parametrize("count", [1, 3])
def test_adapter_gives_the_logits_of_the_edited_model(kind, count, make_model, make_edit, tmp_path) -> None:
    model = make_model(kind)
    base = copy.deepcopy(model)
    plain_logits = logits(model)
    edits = []
    for seed in range(count):
        edit = make_edit(model, [(0, 1), (1, 2), (2,)][seed], rank=2 + seed, seed=seed, scale=0.3)
        stack_of(model).push(edit)
        edits.append(edit)
    out = edits[0].to_peft(tmp_path / "lora", model, others=edits[1:])
    adapted = peft.PeftModel.from_pretrained(base, out)
    edited = logits(model)
    assert (edited - plain_logits).abs().max() > 1e-3
    assert torch.allclose(logits(adapted), edited, atol=1e-5, rtol=1e-5)
    merged = adapted.merge_and_unload()
    assert torch.allclose(logits(merged), edited, atol=1e-5, rtol=1e-5)
    config = json.loads((out / "adapter_config.json").read_text())
    assert config["fan_in_fan_out"] is (kind == "gpt2")
    if count == 3:
        layers = [*sorted(config["rank_pattern"].values()), config["r"]]
        assert layers == [2, 5, 7]


def test_weights_without_change_are_left_out(make_model, make_edit, tmp_path) -> None:
    model = make_model("llama")
    edit = make_edit(model, (0, 1))
    name = edit.weight_names[1]
    edit.factors[name] = LowRank(torch.zeros(16, 0), torch.zeros(40, 0))
    stack_of(model).push(edit)
    config = json.loads((edit.to_peft(tmp_path / "lora") / "adapter_config.json").read_text())
    assert config["target_modules"] == ["model.layers.0.mlp.down_proj"]
    assert config["base_model_name_or_path"] is None


def test_what_lora_cannot_hold_is_refused(make_model, make_edit, tmp_path) -> None:
    model = make_model("llama", tie_word_embeddings=True)
    facts = make_edit(model).facts
    change = LowRank(torch.randn(50, 2), torch.randn(16, 2))
    tied = Edit(method="x", facts=facts, factors={"lm_head.weight": change})
    stack_of(model).push(tied)
    with pytest.raises(FasteditError, match=r"lm_head\.weight is tied to model\.embed_tokens\.weight"):
        tied.to_peft(tmp_path / "lora")
    name = "model.layers.0.mlp.down_proj.weight"
    dense = Edit(method="x", facts=facts, factors={}, dense={name: torch.randn(16, 40)})
    with pytest.raises(FasteditError, match="single elements"):
        dense.to_peft(tmp_path / "lora")
    with pytest.raises(FasteditError, match="never applied"):
        make_edit(model).to_peft(tmp_path / "lora")
    with pytest.raises(ValueError, match="at least one"):
        export_adapter([], tmp_path / "lora")
    assert not (tmp_path / "lora").exists()
