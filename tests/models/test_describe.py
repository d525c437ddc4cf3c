from __future__ import annotations

import gc
import weakref
from functools import lru_cache

import pytest
import torch
from model_configs import FAMILIES, HIDDEN, LAYERS, VOCABULARY, randomised, tiny_config, tiny_model
from torch import nn

from fastedit.errors import UnsupportedModel
from fastedit.models import describe
from fastedit.models.table import ROWS

# Kept for the tests that change nothing in a model.
shared_model = lru_cache(maxsize=None)(tiny_model)
IDS = torch.tensor([[5, 17, 250, 3, 99, 31], [1, 2, 3, 4, 5, 6]])


class Record:
    """Inputs and outputs of a module during one forward pass."""

    def __init__(self, module: nn.Module):
        self.handle = module.register_forward_hook(self)

    def __call__(self, module, inputs, output):
        self.input = inputs[0].detach() if inputs else None  # some blocks get their input by keyword
        # A copy: Falcon adds attention's output to the MLP's in place.
        self.output = (output[0] if isinstance(output, tuple) else output).detach().clone()


def forward(model, *modules):
    records = [Record(module) for module in modules]
    with torch.no_grad():
        result = model(IDS)
    for record in records:
        record.handle.remove()
    return result, records


@pytest.mark.parametrize("family", FAMILIES)
def test_parts_known_family(family):
    model = shared_model(family)
    description = describe(model)
    assert description.family == model.config.model_type
    assert (description.n_layers, description.hidden_size) == (LAYERS, HIDDEN)
    assert len(description.blocks) == len(description.block_names) == LAYERS
    for layer, name in enumerate(description.block_names):
        assert model.get_submodule(name) is description.blocks[layer]
        projection = description.projection(layer)
        assert model.get_submodule(projection.name) is projection.module
        assert model.get_parameter(projection.weight_name) is projection.weight
        assert description.parameter(projection.weight_name) is projection.weight
        assert projection.d_out == HIDDEN
    assert description.embeddings is model.get_input_embeddings()
    assert description.head is model.get_output_embeddings()
    assert description.context_length is None or description.context_length >= 128


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_orientation_weight_times_input_is_output(family, dtype):
    model = shared_model(family, dtype)
    description = describe(model)
    for layer in range(LAYERS):
        projection = description.projection(layer)
        _, (record,) = forward(model, projection.module)
        weight = projection.weight.detach().double()
        assert weight.shape == (
            (projection.d_in, projection.d_out)
            if projection.transposed
            else (projection.d_out, projection.d_in)
        )
        expected = record.input.double() @ (weight if projection.transposed else weight.T)
        if projection.module.bias is not None:
            expected = expected + projection.module.bias.detach().double()
        error = (record.output.double() - expected).norm() / expected.norm()
        assert record.output.shape == (*IDS.shape, HIDDEN)
        assert error < {torch.float32: 1e-6, torch.bfloat16: 8e-3, torch.float16: 1e-3}[dtype]


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_logits_of_decoder_equal_model(family, dtype):
    model = shared_model(family, dtype)
    description = describe(model)
    with torch.no_grad():
        expected = model(IDS).logits
        hidden = description.decoder(input_ids=IDS, attention_mask=torch.ones_like(IDS), use_cache=False)
        logits = description.logits(hidden.last_hidden_state)
    assert logits.shape == (*IDS.shape, VOCABULARY)
    tolerance = 1e-5 if dtype == torch.float32 else 2e-2
    torch.testing.assert_close(logits.float(), expected.float(), rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("family", FAMILIES)
def test_final_norm_of_last_block_is_last_hidden_state(family):
    model = shared_model(family)
    description = describe(model)
    with torch.no_grad():
        records = [Record(description.blocks[-1])]
        last = description.decoder(input_ids=IDS).last_hidden_state
        records[0].handle.remove()
        torch.testing.assert_close(description.final_norm(records[0].output), last)


@pytest.mark.parametrize("family", FAMILIES)
def test_attention_projection_ends_the_attention(family):
    """It is the last linear layer of the part of the block that is called attention, and that part's output."""
    model = shared_model(family)
    description = describe(model)
    for layer, block in enumerate(description.blocks):
        (attention,) = (
            child
            for name, child in block.named_children()
            if "att" in name and any(parameter.dim() == 2 for parameter in child.parameters())
        )
        _, (inner, outer) = forward(model, description.attention_projection(layer), attention)
        assert inner.output.shape == (*IDS.shape, HIDDEN)
        assert torch.equal(inner.output, outer.output)
    with pytest.raises(IndexError, match=f"0 to {LAYERS - 1}"):
        description.attention_projection(LAYERS)


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("layer", [0, LAYERS - 1])
def test_residual_stream_adds_mlp_output(family, layer):
    """Block output = input + attention + scale · norm(MLP output), with attention seen apart from the MLP."""
    model = shared_model(family)
    description = describe(model)
    block, projection = description.blocks[layer], description.projection(layer)
    _, (whole, mlp) = forward(model, block, projection.module)
    zeroed = projection.module.register_forward_hook(lambda module, inputs, output: torch.zeros_like(output))
    _, (without,) = forward(model, block)
    zeroed.remove()
    norm = description.post_mlp_norm(layer)
    with torch.no_grad():
        joined = mlp.output if norm is None else norm(mlp.output)
        nothing = 0.0 if norm is None else norm(torch.zeros_like(mlp.output))
    contribution = description.residual_scale * (joined - nothing)
    torch.testing.assert_close(whole.output - without.output, contribution, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("family", FAMILIES)
def test_parallel_attention_by_numbers(family):
    """In a parallel block the MLP's input does not depend on what attention computed."""
    model = shared_model(family)
    description = describe(model)
    block, projection = description.blocks[0], description.projection(0)
    attention = next(
        m for n, m in block.named_children() if n in ("attn", "self_attn", "attention", "self_attention")
    )
    _, (before,) = forward(model, projection.module)

    def silence(module, inputs, output):
        return (
            (torch.zeros_like(output[0]), *output[1:])
            if isinstance(output, tuple)
            else torch.zeros_like(output)
        )

    handle = attention.register_forward_hook(silence)
    _, (after,) = forward(model, projection.module)
    handle.remove()
    assert torch.equal(before.input, after.input) == description.parallel_attention


def test_every_row_has_a_tiny_model():
    known = set()
    for family in FAMILIES:
        try:
            known.add(tiny_config(family).model_type)
        except pytest.skip.Exception:
            known.add(family)
    assert set(ROWS) - known <= {"gemma3", "gemma3_text"}  # the wrapper has a test of its own


@pytest.mark.parametrize("family", FAMILIES)
def test_structure_agrees_with_table(family, monkeypatch):
    model = shared_model(family)
    by_row = describe(model)
    monkeypatch.delitem(ROWS, model.config.model_type)
    if model.config.model_type in ("cohere", "cohere2", "granite"):
        with pytest.raises(UnsupportedModel, match="scales logits or residual stream"):
            describe(model)
        return
    found = describe(model)
    assert found.family == "by structure"
    for name in (
        "blocks",
        "block_names",
        "final_norm",
        "head",
        "decoder",
        "output_path",
        "post_mlp_norm_path",
    ):
        assert getattr(found, name) == getattr(by_row, name), name
    assert found.parallel_attention == by_row.parallel_attention
    assert found.logit_softcap == by_row.logit_softcap


def test_unknown_layout_names_what_was_looked_for():
    import transformers

    config = transformers.OPTConfig(
        vocab_size=64,
        hidden_size=32,
        num_hidden_layers=2,
        ffn_dim=64,
        num_attention_heads=2,
        word_embed_proj_dim=32,
    )
    with pytest.raises(UnsupportedModel, match=r"'opt'.*looked for a ModuleList.*model\.decoder\.layers"):
        describe(transformers.OPTForCausalLM(config))


@pytest.mark.parametrize("name", ["Mixtral", "Qwen2Moe"])
def test_mixture_of_experts_is_refused(name):
    import transformers

    config = getattr(transformers, f"{name}Config")(
        vocab_size=64,
        hidden_size=32,
        intermediate_size=32,
        moe_intermediate_size=32,
        shared_expert_intermediate_size=32,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=2,
    )
    config.num_local_experts = config.num_experts = 4
    with pytest.raises(UnsupportedModel, match="mixture of experts"):
        describe(getattr(transformers, f"{name}ForCausalLM")(config))


def test_model_without_head_is_refused():
    with pytest.raises(UnsupportedModel, match="AutoModelForCausalLM"):
        describe(tiny_model("llama").model)
    with pytest.raises(UnsupportedModel, match="expected a transformers model"):
        describe(nn.Linear(2, 2))


def test_encoder_decoder_is_refused():
    import transformers

    config = transformers.T5Config(vocab_size=32, d_model=16, d_kv=8, d_ff=16, num_layers=2, num_heads=2)
    with pytest.raises(UnsupportedModel, match="encoder-decoder"):
        describe(transformers.T5ForConditionalGeneration(config))


def test_layer_out_of_range():
    description = describe(tiny_model("llama"))
    for layer in (-1, LAYERS):
        with pytest.raises(IndexError, match=f"0 to {LAYERS - 1}"):
            description.projection(layer)
        with pytest.raises(IndexError):
            description.post_mlp_norm(layer)
    with pytest.raises(KeyError, match=r"model\.layers\.0\.mlp\.down_proj\.weight"):
        description.parameter("lm_head.weight")


def test_weight_of_quantised_model_is_refused():
    model = tiny_model("llama")
    projection = describe(model).projection(1)
    whole = projection.module.weight
    projection.module.weight = nn.Parameter(torch.zeros(whole.shape, dtype=torch.int8), requires_grad=False)
    description = describe(model)
    assert description.projection(1).d_in == 64
    with pytest.raises(
        UnsupportedModel, match=r"model\.layers\.1\.mlp\.down_proj\.weight.*int8.*without quantisation"
    ):
        _ = description.projection(1).weight
    torch.nn.utils.parametrizations.weight_norm(description.projection(2).module)
    with pytest.raises(UnsupportedModel, match="plain"):
        _ = description.projection(2).weight


def test_projection_of_unknown_kind_is_refused():
    model = tiny_model("llama")

    class QuantLinear(nn.Module):
        pass

    model.model.layers[0].mlp.down_proj = QuantLinear()
    with pytest.raises(UnsupportedModel, match="QuantLinear, neither Linear nor Conv1D"):
        describe(model).projection(0)


def test_model_on_meta_device_is_described():
    import transformers

    with torch.device("meta"):
        model = transformers.AutoModelForCausalLM.from_config(tiny_config("llama"))
    assert describe(model).projection(0).weight.is_meta


def test_description_follows_replaced_head():
    model = tiny_model("llama")
    before = describe(model).head
    model.resize_token_embeddings(VOCABULARY + 8)
    description = describe(model)
    assert description.head is model.lm_head is not before
    assert description.embeddings is model.get_input_embeddings()


def test_description_does_not_keep_model_alive():
    model = tiny_model("llama")
    description = describe(model)
    gone = weakref.ref(model)
    del model
    gc.collect()
    assert gone() is None
    assert description.n_layers == LAYERS


@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated")
@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_peft_wrapped_model(family):
    peft = pytest.importorskip("peft")
    model = tiny_model(family)
    plain = describe(model)
    name, weight = plain.projection(1).weight_name, plain.projection(1).weight
    target = name.split(".")[-2]
    config = peft.LoraConfig(
        r=2, target_modules=[target], fan_in_fan_out=family == "gpt2", init_lora_weights=False
    )
    wrapped = peft.get_peft_model(model, config)
    description = describe(wrapped)
    projection = description.projection(1)
    assert projection.weight_name == name
    assert projection.weight is weight is description.parameter(name)
    assert projection.transposed == (family == "gpt2")
    with torch.no_grad():
        expected = wrapped(input_ids=IDS).logits
        hidden = description.decoder(input_ids=IDS).last_hidden_state
        torch.testing.assert_close(description.logits(hidden), expected)


def test_compiled_and_parallel_wrappers():
    model = tiny_model("llama")
    assert describe(torch.compile(model, backend="eager")).head is model.lm_head
    assert describe(nn.DataParallel(model)).head is model.lm_head


def test_offloaded_by_accelerate():
    accelerate = pytest.importorskip("accelerate")
    model = tiny_model("llama")
    with torch.no_grad():
        expected = model(IDS).logits
    accelerate.cpu_offload(model, execution_device=torch.device("cpu"))
    description = describe(model)
    with torch.no_grad():
        hidden = description.decoder(input_ids=IDS).last_hidden_state
        torch.testing.assert_close(description.logits(hidden), expected)
    with pytest.raises(UnsupportedModel, match=r"offloaded.*device_map"):
        _ = description.projection(0).weight


def test_gemma3_with_images():
    import transformers

    if not hasattr(transformers, "Gemma3Config"):
        pytest.skip(f"transformers {transformers.__version__} has no Gemma3Config")
    text = tiny_config("gemma3").to_dict()
    vision = {
        "hidden_size": 16,
        "intermediate_size": 16,
        "num_hidden_layers": 5,
        "num_attention_heads": 2,
        "image_size": 28,
        "patch_size": 14,
    }
    config = transformers.Gemma3Config(text_config=text, vision_config=vision, mm_tokens_per_image=4)
    model = randomised(transformers.Gemma3ForConditionalGeneration(config), 0).eval()
    description = describe(model)
    assert description.family == "gemma3"
    assert (description.n_layers, description.hidden_size) == (LAYERS, HIDDEN)
    assert description.post_mlp_norm(0) is not None
    with torch.no_grad():
        hidden = description.decoder(input_ids=IDS).last_hidden_state
        torch.testing.assert_close(description.logits(hidden), model(input_ids=IDS).logits)
