"""Names for models, weights and tokenizers by content, the same on every device."""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Iterator, Mapping
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor, nn

from .describe import text_config, unwrap

_SAMPLES = 1024
_CHUNK_BYTES = 1 << 24
_CONFIG_KEYS = (
    "hidden_size",
    "num_hidden_layers",
    "num_attention_heads",
    "num_key_value_heads",
    "vocab_size",
)
_PROBES = (
    "The capital of France is Paris.",
    "It's 1990;  naïve café, 東京 🙂\n\tdef f(x): return x+1",
    "a",
)


def fingerprint(model: nn.Module, *, originals: Mapping[str, Tensor] | None = None) -> str:
    """A short name for the model's weights: 32 hexadecimal digits, independent of device and device map.

    Covers the sizes in the config, the layer, shape and dtype of every parameter, and the exact bits of up
    to 1,024 elements of each, spread over the whole tensor. Another base model, another precision or a
    fine-tuned copy gives another fingerprint. A change confined to elements that are not sampled does not:
    edited matrices are therefore verified in full by :func:`weight_digest`. Of a parameter's name only the
    numbers count, because releases of transformers rename modules.

    Args:
        model: any model of transformers. Adapters inserted into it count as part of it.
        originals: tensors to use instead of the model's parameters of these names, such as the kept
            originals of edited matrices, to get the fingerprint of the model before its edits.

    Raises:
        ValueError: a parameter has no data (a model on the meta device), or ``originals`` names a
            parameter that the model does not have.
    """
    model = unwrap(model)
    originals = dict(originals or {})
    parts = []
    for name, parameter in model.named_parameters():
        tensor = originals.pop(name, parameter)
        if tensor.is_meta:
            tensor = _offloaded(model, name)
        digest = hashlib.sha256(_header(tensor, ".".join(re.findall(r"\d+", name))))
        digest.update(_bits(_sample(tensor.detach())))
        parts.append(digest.hexdigest())
    if originals:
        raise ValueError(f"the model has no parameters called {sorted(originals)}")
    content = json.dumps([_essentials(model), sorted(parts)], sort_keys=True)
    return hashlib.sha256(content.encode()).hexdigest()[:32]


def weight_digest(tensor: Tensor) -> str:
    """SHA-256 over dtype, shape and every bit of a tensor, in 64 hexadecimal digits.

    Independent of device, strides and ``requires_grad``. Zeros of different sign differ, as do NaNs.
    """
    tensor = tensor.detach()
    digest = hashlib.sha256(_header(tensor, ""))
    for chunk in _chunks(tensor):
        digest.update(_bits(chunk))
    return digest.hexdigest()


def tokenizer_digest(tokenizer: Any) -> str:
    """A short name for what a tokenizer does: 32 hexadecimal digits over its vocabulary and probe encodings.

    Independent of padding and truncation settings and of the class that implements it.
    """
    vocabulary = sorted(tokenizer.get_vocab().items(), key=lambda item: (item[1], item[0]))
    probes = [
        list(tokenizer(text, add_special_tokens=add)["input_ids"])
        for text in _PROBES
        for add in (True, False)
    ]
    content = json.dumps([vocabulary, probes], ensure_ascii=True).encode()
    return hashlib.sha256(content).hexdigest()[:32]


def _essentials(model: nn.Module) -> dict[str, Any]:
    config = text_config(model)
    return {"model_type": config.model_type, **{key: getattr(config, key, None) for key in _CONFIG_KEYS}}


def _header(tensor: Tensor, name: str) -> bytes:
    return f"{name}|{str(tensor.dtype).removeprefix('torch.')}|{tuple(tensor.shape)}|".encode()


def _sample(tensor: Tensor) -> Tensor:
    """Up to 1,024 elements spread over the tensor, the first and the last among them; copies nothing else."""
    count = tensor.numel()
    if count <= _SAMPLES:
        return tensor.reshape(-1)
    places = _places(count).to(tensor.device)
    if tensor.is_contiguous():
        return tensor.view(-1)[places]
    return tensor[torch.unravel_index(places, tensor.shape)]


@lru_cache(maxsize=64)
def _places(count: int) -> Tensor:
    """(1024,) int64: one element in each of 1,024 stretches of equal length of a flattened tensor.

    The place wanders from stretch to stretch, so that the samples of a matrix do not all fall into a few columns.
    """
    order = torch.arange(_SAMPLES, dtype=torch.int64, device="cpu")
    starts, ends = order * count // _SAMPLES, (order + 1) * count // _SAMPLES
    flat = starts + (order * 2654435761) % (ends - starts)
    flat[-1] = count - 1
    return flat


def _chunks(tensor: Tensor) -> Iterator[Tensor]:
    """The tensor's elements in row-major order, in pieces small enough to copy."""
    size = tensor.numel() * tensor.element_size()
    if tensor.dim() == 0 or size <= _CHUNK_BYTES:
        yield tensor
        return
    rows = max(1, _CHUNK_BYTES * tensor.shape[0] // size)
    for start in range(0, tensor.shape[0], rows):
        yield tensor[start : start + rows]


def _bits(tensor: Tensor) -> Any:
    """The tensor's bytes in row-major order."""
    flat = tensor.cpu().contiguous().reshape(-1)
    return flat.view(torch.uint8).numpy()


def _offloaded(model: nn.Module, name: str) -> Tensor:
    """A parameter that accelerate keeps in CPU memory or on disk."""
    owner, _, short = name.rpartition(".")
    hook = getattr(model.get_submodule(owner), "_hf_hook", None)
    for one in getattr(hook, "hooks", (hook,)):
        weights = getattr(one, "weights_map", None)
        if weights is not None and not (tensor := weights[short]).is_meta:
            return tensor
    raise ValueError(
        f"the parameter {name} has no data (it is on the meta device): load the model's weights first"
    )
