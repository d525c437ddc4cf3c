"""What editing needs to know of each architecture: one row per family, keyed by ``config.model_type``.

A row holds dotted module paths of the Hugging Face implementation. Where releases of transformers differ,
several paths are given and the first that exists is used. To add an architecture, add a row here and a
tiny configuration to the tests; whether a weight is stored transposed is read off the module's type and
is not part of the row.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

Paths = str | tuple[str, ...]


@dataclass(frozen=True)
class Row:
    """One architecture family.

    Attributes:
        family: the row's name.
        blocks: path(s) of the list of decoder blocks; its parent is the model without its head.
        output: path of the MLP's output projection inside a block.
        norm: path(s) of the norm after the last block.
        head: path(s) of the output head.
        post_mlp_norm: path inside a block of the norm applied to the MLP's output before it joins the
            residual stream; None where there is none.
        parallel: whether attention and MLP read the same residual stream; may depend on the config.
        multiplier: name of the config entry that the logits are multiplied by.
        divisor: name of the config entry that the logits are divided by.
        softcap: name of the config entry ``c`` of ``logits = c tanh(logits / c)``.
        residual_multiplier: name of the config entry that scales what attention and MLP add to the
            residual stream.
    """

    family: str
    blocks: Paths
    output: str
    norm: Paths
    head: Paths = "lm_head"
    post_mlp_norm: str | None = None
    parallel: bool | Callable[[Any], bool] = False
    multiplier: str | None = None
    divisor: str | None = None
    softcap: str | None = None
    residual_multiplier: str | None = None


ROWS: dict[str, Row] = {}


def row(family: str, **fields: Any) -> None:
    """Add a family to the table."""
    ROWS[family] = Row(family, **fields)


def _llama_like(family: str, **fields: Any) -> None:
    """A family whose modules carry the names that Llama introduced."""
    row(
        family,
        **{
            "blocks": "model.layers",
            "output": "mlp.down_proj",
            "norm": "model.norm",
            "head": "lm_head",
            **fields,
        },
    )


def _gpt_like(family: str, **fields: Any) -> None:
    """A family whose modules carry the names that GPT-2 introduced."""
    row(
        family,
        **{
            "blocks": "transformer.h",
            "output": "mlp.c_proj",
            "norm": "transformer.ln_f",
            "head": "lm_head",
            **fields,
        },
    )


def _falcon_parallel(config: Any) -> bool:
    return bool(config.new_decoder_architecture or config.parallel_attn)


_gpt_like("gpt2")
_gpt_like("gpt_neo")
_gpt_like("gpt_bigcode")
_gpt_like("gptj", output="mlp.fc_out", parallel=True)
_gpt_like("codegen", output="mlp.fc_out", parallel=True)
_gpt_like("falcon", output="mlp.dense_4h_to_h", parallel=_falcon_parallel)
row(
    "gpt_neox",
    blocks="gpt_neox.layers",
    output="mlp.dense_4h_to_h",
    norm="gpt_neox.final_layer_norm",
    head=("embed_out", "lm_head"),
    parallel=lambda config: bool(config.use_parallel_residual),
)

_llama_like("llama")
_llama_like("mistral")
_llama_like("qwen2")
_llama_like("qwen3")
_llama_like("phi3")
_llama_like("olmo")
_llama_like("gemma")
_llama_like("smollm3")
_llama_like("starcoder2", output="mlp.c_proj")
_llama_like("phi", output="mlp.fc2", norm="model.final_layernorm", parallel=True)
_llama_like("stablelm", parallel=lambda config: bool(config.use_parallel_residual))
_llama_like("cohere", parallel=True, multiplier="logit_scale")
_llama_like("cohere2", parallel=True, multiplier="logit_scale")
_llama_like("granite", divisor="logits_scaling", residual_multiplier="residual_multiplier")
_llama_like("olmo2", post_mlp_norm="post_feedforward_layernorm")
_llama_like("olmo3", post_mlp_norm="post_feedforward_layernorm")
_llama_like("gemma2", post_mlp_norm="post_feedforward_layernorm", softcap="final_logit_softcapping")
_llama_like("gemma3_text", post_mlp_norm="post_feedforward_layernorm", softcap="final_logit_softcapping")
# The text part of the model that also reads images; its wrapper does not cap the logits.
row(
    "gemma3",
    blocks=("model.language_model.layers", "language_model.model.layers"),
    output="mlp.down_proj",
    norm=("model.language_model.norm", "language_model.model.norm"),
    head=("lm_head", "language_model.lm_head"),
    post_mlp_norm="post_feedforward_layernorm",
)
