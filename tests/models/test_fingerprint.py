from __future__ import annotations

import hashlib
import os
import subprocess
import sys
from types import SimpleNamespace

import pytest
import torch
from model_configs import tiny_config, tiny_model, tiny_tokenizer
from torch import nn

from fastedit.models import describe, fingerprint, tokenizer_digest, weight_digest
from fastedit.models.fingerprint import _sample


@pytest.mark.parametrize("family", ["gpt2", "llama", "gemma2", "falcon"])
def test_same_model_same_fingerprint(family):
    assert fingerprint(tiny_model(family)) == fingerprint(tiny_model(family))
    assert len(fingerprint(tiny_model(family))) == 32


def test_fingerprints_differ_between_models():
    models = [tiny_model(family) for family in ("gpt2", "llama", "llama_tied_square", "mistral")]
    models += [
        tiny_model("llama", seed=1),
        tiny_model("llama", torch.bfloat16),
        tiny_model("llama", torch.float16),
    ]
    assert len({fingerprint(model) for model in models}) == len(models)


def test_fingerprint_sees_an_edit_and_its_undoing():
    model = tiny_model("llama")
    before = fingerprint(model)
    projection = describe(model).projection(1)
    weight = projection.weight
    original = weight.detach().clone()
    with torch.no_grad():
        weight += 1e-3 * torch.outer(torch.randn(projection.d_out), torch.randn(projection.d_in))
    assert fingerprint(model) != before
    assert fingerprint(model, originals={projection.weight_name: original}) == before
    with torch.no_grad():
        weight.copy_(original)
    assert fingerprint(model) == before


def test_unsampled_change_is_left_to_weight_digest():
    model = tiny_model("llama", intermediate_size=512)
    projection = describe(model).projection(0)
    before, digest = fingerprint(model), weight_digest(projection.weight)
    probe = torch.arange(projection.weight.numel()).reshape(projection.weight.shape)
    missed = sorted(set(range(probe.numel())) - set(_sample(probe).tolist()))[0]
    with torch.no_grad():
        projection.weight.view(-1)[missed] += 1
    assert fingerprint(model) == before
    assert weight_digest(projection.weight) != digest


def test_fingerprint_sees_swapped_blocks():
    model = tiny_model("llama")
    before = fingerprint(model)
    layers = model.model.layers
    layers[0], layers[1] = layers[1], layers[0]
    assert fingerprint(model) != before


def test_originals_of_unknown_name_are_refused():
    with pytest.raises(ValueError, match="nothing"):
        fingerprint(tiny_model("llama"), originals={"nothing": torch.zeros(1)})


def test_model_without_data_is_refused():
    import transformers

    with torch.device("meta"):
        model = transformers.AutoModelForCausalLM.from_config(tiny_config("llama"))
    with pytest.raises(ValueError, match="meta device"):
        fingerprint(model)


def test_fingerprint_of_offloaded_model():
    accelerate = pytest.importorskip("accelerate")
    model = tiny_model("llama")
    before = fingerprint(model)
    accelerate.cpu_offload(model, execution_device=torch.device("cpu"))
    assert fingerprint(model) == before


def test_fingerprint_is_independent_of_strides():
    model = tiny_model("llama")
    before = fingerprint(model)
    weight = model.lm_head.weight
    weight.data = weight.data.T.contiguous().T
    assert not weight.is_contiguous()
    assert fingerprint(model) == before


def test_fingerprint_is_the_same_everywhere():
    """A fixed value: stored edits and statistics are found again by it."""
    model = nn.Sequential(nn.Linear(100, 30), nn.LayerNorm(30))
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(torch.arange(parameter.numel()).reshape(parameter.shape) / 64)
    model.config = SimpleNamespace(model_type="linear", hidden_size=100)
    assert fingerprint(model) == "4204e991bca4af596f7a19df88c7a1cf"


@pytest.mark.gpu
def test_fingerprint_is_independent_of_device():
    model = tiny_model("llama", torch.bfloat16)
    before, digest = fingerprint(model), weight_digest(model.lm_head.weight)
    model.cuda()
    assert fingerprint(model) == before
    assert weight_digest(model.lm_head.weight) == digest


@pytest.mark.parametrize(
    "shape", [(), (0,), (3,), (1023,), (1024,), (1025,), (7, 1), (97, 1031), (3, 5, 700)]
)
def test_sample_is_spread_over_the_tensor(shape):
    count = torch.Size(shape).numel()
    values = _sample(torch.arange(count).reshape(shape)).tolist()
    assert len(values) == min(count, 1024)
    assert values == sorted(values)
    assert len(set(values)) == len(values)
    if count:
        assert (values[0], values[-1]) == (0, count - 1)
    if len(shape) == 2 and count > 10_000:
        assert len({value % shape[1] for value in values}) > 500  # columns
        assert {value // shape[1] for value in values} == set(range(shape[0]))  # rows


@pytest.mark.parametrize(
    "dtype", [torch.float32, torch.float64, torch.bfloat16, torch.float16, torch.int8], ids=str
)
def test_weight_digest_is_of_exact_bits(dtype):
    tensor = torch.arange(-30, 30).reshape(6, 10).to(dtype)
    digest = weight_digest(tensor)
    assert len(digest) == 64
    assert weight_digest(tensor.T.contiguous().T) == digest
    assert weight_digest(torch.nn.Parameter(tensor, requires_grad=False)) == digest
    assert weight_digest(tensor.reshape(10, 6)) != digest
    changed = tensor.clone()
    changed[5, 9] += 1
    assert weight_digest(changed) != digest


def test_weight_digest_formula():
    tensor = torch.tensor([[1.5, -0.0]])
    expected = hashlib.sha256(b"|float32|(1, 2)|" + tensor.numpy().tobytes()).hexdigest()
    assert weight_digest(tensor) == expected
    assert weight_digest(torch.tensor([[1.5, 0.0]])) != expected


def test_weight_digest_does_not_depend_on_chunks(monkeypatch):
    module = sys.modules["fastedit.models.fingerprint"]
    tensor = torch.randn(37, 11)
    whole = weight_digest(tensor)
    for size in (1, 44, 100, 1000):
        monkeypatch.setattr(module, "_CHUNK_BYTES", size)
        assert weight_digest(tensor) == whole == weight_digest(tensor.T.contiguous().T)


def test_weight_digest_of_empty_and_scalar():
    assert weight_digest(torch.zeros(0, 4)) != weight_digest(torch.zeros(4, 0))
    assert weight_digest(torch.tensor(1.0)) != weight_digest(torch.tensor([1.0]))


def test_tokenizer_digest():
    tokenizer = tiny_tokenizer()
    digest = tokenizer_digest(tokenizer)
    assert len(digest) == 32
    tokenizer(["a", "longer text"], padding=True, truncation=True, max_length=4)
    assert tokenizer_digest(tokenizer) == digest == tokenizer_digest(tiny_tokenizer())
    assert tokenizer_digest(tiny_tokenizer(add_bos=True)) != digest
    tokenizer.add_tokens(["<fact>"])
    assert tokenizer_digest(tokenizer) != digest


def test_import_does_not_load_transformers():
    code = "import sys, fastedit.models; print('transformers' in sys.modules)"
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(path for path in sys.path if path)}
    run = subprocess.run(
        [sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=True
    )
    assert run.stdout.strip() == "False"
