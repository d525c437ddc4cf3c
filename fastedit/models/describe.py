"""The parts of a causal language model that editors touch, found by table row or by structure."""

from __future__ import annotations

import operator
import re
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from ..errors import UnsupportedModel
from .table import ROWS, Paths, Row

EDITABLE_DTYPES = (torch.float64, torch.float32, torch.bfloat16, torch.float16)

# Paths inside a block of the attention's output projection; the first that exists is it.
ATTENTION_OUTPUTS = (
    "self_attn.o_proj",
    "self_attn.out_proj",
    "self_attn.dense",
    "self_attention.dense",
    "attention.dense",
    "attn.c_proj",
    "attn.out_proj",
    "attn.attention.out_proj",
)


@dataclass(frozen=True, eq=False)
class Projection:
    """The output projection of one block's MLP: the matrix that editors change.

    Attributes:
        name: dotted name in the model, as in its checkpoint, e.g. ``"model.layers.3.mlp.down_proj"``.
        module: the module to hook; its input is the MLP's hidden activation (..., d_in), its output
            (..., d_out) what the MLP computes. An adapter wrapped around the projection is part of it.
        transposed: the weight is stored (d_in, d_out) as in GPT-2's ``Conv1D``, not (d_out, d_in).
        d_in: width of the MLP.
        d_out: hidden size of the model.
    """

    name: str
    module: nn.Module
    transposed: bool
    d_in: int
    d_out: int

    @property
    def weight_name(self) -> str:
        """Name of the weight in the model's checkpoint."""
        return f"{self.name}.weight"

    @property
    def weight(self) -> nn.Parameter:
        """The stored weight: (d_out, d_in), or (d_in, d_out) if ``transposed``.

        Raises:
            UnsupportedModel: the weight is quantised, computed from other tensors, or offloaded, so that
                changing it in place would not change the model.
        """
        weight: Any = getattr(_innermost(self.module), "weight", None)
        if type(weight) is not nn.Parameter or weight.dtype not in EDITABLE_DTYPES:
            came = type(weight).__name__ + (f" of {weight.dtype}" if isinstance(weight, Tensor) else "")
            raise UnsupportedModel(
                f"{self.weight_name} must be a plain float64, float32, bfloat16 or float16 parameter to be "
                f"edited, got {came}: load the model without quantisation, edit it, and quantise afterwards"
            )
        if weight.is_meta and hasattr(self.module, "_hf_hook"):
            raise UnsupportedModel(
                f"{self.weight_name} is offloaded to CPU memory or disk by its device map: load the model "
                "with a device_map that keeps the blocks to be edited on a device"
            )
        return weight


@dataclass(frozen=True, eq=False, repr=False)
class ModelDescription:
    """What editors need to know of a model. Made by :func:`describe`; holds modules, never copies of data.

    Attributes:
        family: name of the table's row, or ``"by structure"``.
        model_type: the config's ``model_type``.
        blocks: the decoder blocks in order; each maps the residual stream (batch, time, hidden_size).
        block_names: their dotted names, e.g. ``"model.layers.3"``.
        final_norm: the norm after the last block.
        head: the output head, a linear map from hidden size to vocabulary.
        embeddings: the token embeddings.
        decoder: the model without its head; called with ``input_ids``, ``attention_mask``,
            ``position_ids``, ``past_key_values``, ``use_cache`` it returns ``last_hidden_state`` after the
            final norm.
        hidden_size: width of the residual stream.
        n_layers: number of blocks.
        context_length: number of positions the model is made for; None if its config does not say.
        parallel_attention: attention and MLP of a block read the same residual stream.
        residual_scale: factor on the MLP's output when it joins the residual stream (1.0 but for Granite).
    """

    family: str
    model_type: str
    blocks: list[nn.Module]
    block_names: list[str]
    final_norm: nn.Module
    head: nn.Module
    embeddings: nn.Module
    decoder: nn.Module
    hidden_size: int
    n_layers: int
    context_length: int | None
    parallel_attention: bool
    residual_scale: float
    output_path: str
    post_mlp_norm_path: str | None
    logit_multiplier: float | None
    logit_divisor: float | None
    logit_softcap: float | None

    def __repr__(self) -> str:
        return (
            f"ModelDescription({self.model_type!r}, family={self.family!r}, n_layers={self.n_layers}, "
            f"hidden_size={self.hidden_size}, output={self.block_names[0]}.{self.output_path})"
        )

    def projection(self, layer: int) -> Projection:
        """The MLP output projection of block ``layer``, counted from 0.

        Raises:
            IndexError: no such block.
            UnsupportedModel: the projection is neither a linear layer nor a ``Conv1D``.
        """
        block = self.blocks[self._checked(layer)]
        module = _find(block, self.output_path)
        name = f"{self.block_names[layer]}.{self.output_path}"
        if module is None:
            raise UnsupportedModel(f"the block {self.block_names[layer]} has no {self.output_path}")
        transposed, d_in, d_out = _orientation(_innermost(module), name)
        return Projection(name, module, transposed, d_in, d_out)

    def mlp(self, layer: int) -> nn.Module:
        """The MLP of block ``layer``; called with one tensor (..., hidden_size), it returns another.

        Raises:
            IndexError: no such block.
            UnsupportedModel: the MLP's output projection is not part of a module of its own.
        """
        name, dot, _ = self.output_path.partition(".")
        if not dot:
            raise UnsupportedModel(
                f"{self.block_names[self._checked(layer)]}.{self.output_path} is not inside an MLP module, "
                "which this method needs to see the input of"
            )
        return self.blocks[self._checked(layer)].get_submodule(name)

    def attention_projection(self, layer: int) -> nn.Module:
        """The attention output projection of block ``layer``: its output is what the attention computes.

        Raises:
            IndexError: no such block.
            UnsupportedModel: the block has none at a conventional path.
        """
        block = self.blocks[self._checked(layer)]
        path = _first_path(block, ATTENTION_OUTPUTS)
        if path is None:
            raise UnsupportedModel(
                f"the attention's output projection of {self.block_names[layer]} was not found: looked for "
                f"{', '.join(ATTENTION_OUTPUTS)}; its parts are {[name for name, _ in block.named_children()]}"
            )
        return block.get_submodule(path)

    def parameter(self, weight_name: str) -> nn.Parameter:
        """The weight of the projection with this checkpoint name, also where an adapter wraps it.

        Raises:
            KeyError: no projection of this model has that name.
        """
        for layer, block_name in enumerate(self.block_names):
            if weight_name == f"{block_name}.{self.output_path}.weight":
                return self.projection(layer).weight
        raise KeyError(
            f"{weight_name} is not an editable matrix of this model: they are called "
            f"{self.block_names[0]}.{self.output_path}.weight and so on"
        )

    def post_mlp_norm(self, layer: int) -> nn.Module | None:
        """The norm between block ``layer``'s MLP output and the residual stream; None where there is none."""
        block = self.blocks[self._checked(layer)]
        return None if self.post_mlp_norm_path is None else _find(block, self.post_mlp_norm_path)

    def logits(self, hidden: Tensor) -> Tensor:
        """Logits (..., vocabulary) of hidden states (..., hidden_size) taken after the final norm.

        Applies the head and whatever scale or soft cap the model itself applies, in the head's dtype.
        """
        logits = self.head(hidden)
        if self.logit_multiplier is not None:
            logits = logits * self.logit_multiplier
        if self.logit_divisor is not None:
            logits = logits / self.logit_divisor
        if self.logit_softcap is not None:
            logits = torch.tanh(logits / self.logit_softcap) * self.logit_softcap
        return logits

    def _checked(self, layer: int) -> int:
        layer = operator.index(layer)
        if not 0 <= layer < self.n_layers:
            raise IndexError(
                f"layer must be 0 to {self.n_layers - 1} for this {self.model_type} model, got {layer}"
            )
        return layer


def describe(model: nn.Module) -> ModelDescription:
    """Describe a causal language model of transformers.

    No weights are read, so any dtype and any device map will do. Models wrapped by PEFT,
    ``torch.compile`` or ``DistributedDataParallel`` are described as the model inside. Takes well under a
    millisecond for families in the table, so nothing is kept between calls.

    Raises:
        UnsupportedModel: not a causal language model with its head, a mixture of experts, or a layout that
            is neither in the table nor conventional. The message names what was looked for.
    """
    model = unwrap(model)
    config = text_config(model)
    model_type: str = getattr(model.config, "model_type", "")
    if getattr(model.config, "is_encoder_decoder", False):
        raise UnsupportedModel(
            f"{model_type} is an encoder-decoder; only causal language models can be edited"
        )
    layout = _layout_from_row(ROWS.get(model_type), model, config) or _layout_by_structure(model, config)
    blocks = list(model.get_submodule(layout.blocks).children())
    head = model.get_submodule(layout.head)
    return ModelDescription(
        family=layout.family,
        model_type=model_type,
        blocks=blocks,
        block_names=[f"{layout.blocks}.{index}" for index in range(len(blocks))],
        final_norm=model.get_submodule(layout.norm),
        head=head,
        embeddings=model.get_input_embeddings(),  # type: ignore[operator]
        decoder=model.get_submodule(layout.blocks.rpartition(".")[0]),
        hidden_size=_hidden_size(config, head),
        n_layers=len(blocks),
        context_length=_context_length(config),
        parallel_attention=layout.parallel,
        residual_scale=layout.residual_scale,
        output_path=layout.output,
        post_mlp_norm_path=layout.post_mlp_norm,
        logit_multiplier=layout.multiplier,
        logit_divisor=layout.divisor,
        logit_softcap=layout.softcap,
    )


def unwrap(model: nn.Module) -> nn.Module:
    """The transformers model inside the wrappers of PEFT, ``torch.compile`` and data parallelism."""
    while True:
        if isinstance(model, (nn.parallel.DistributedDataParallel, nn.DataParallel)):
            model = model.module
        elif isinstance(getattr(model, "_orig_mod", None), nn.Module):
            model = model._orig_mod  # type: ignore[assignment]
        elif hasattr(model, "peft_config") and callable(getattr(model, "get_base_model", None)):
            model = model.get_base_model()  # type: ignore[operator]
        else:
            return model


def text_config(model: nn.Module) -> Any:
    """The part of the model's config that describes its language model."""
    config: Any = getattr(model, "config", None)
    if config is None or not hasattr(config, "model_type"):
        raise UnsupportedModel(
            f"expected a transformers model with a config and a model_type, got {type(model).__name__}"
        )
    return config.get_text_config() if hasattr(config, "get_text_config") else config


# ------------------------------------------------------------------ finding the parts


@dataclass(frozen=True)
class _Layout:
    """Dotted paths of the parts, and how the logits are made of the head's output."""

    family: str
    blocks: str
    output: str
    norm: str
    head: str
    post_mlp_norm: str | None
    parallel: bool
    residual_scale: float
    multiplier: float | None
    divisor: float | None
    softcap: float | None


def _layout_from_row(row: Row | None, model: nn.Module, config: Any) -> _Layout | None:
    """The layout that the row names, or None if there is no row or the model is laid out differently."""
    if row is None:
        return None
    blocks, norm, head = (_first_path(model, paths) for paths in (row.blocks, row.norm, row.head))
    if blocks is None or norm is None:
        return None
    if head is None:
        raise _no_head(model, row.head)
    modules = _find(model, blocks)
    if not isinstance(modules, nn.ModuleList) or not modules or _find(modules[0], row.output) is None:
        return None
    if row.post_mlp_norm is not None and _find(modules[0], row.post_mlp_norm) is None:
        return None
    scale = _number(config, row.residual_multiplier)
    return _Layout(
        family=row.family,
        blocks=blocks,
        output=row.output,
        norm=norm,
        head=head,
        post_mlp_norm=row.post_mlp_norm,
        parallel=row.parallel(config) if callable(row.parallel) else row.parallel,
        residual_scale=1.0 if scale is None else scale,
        multiplier=_number(config, row.multiplier),
        divisor=_number(config, row.divisor),
        softcap=_number(config, row.softcap),
    )


# ------------------------------------------------------------------ unknown types with a conventional layout

_MLP_NAME = re.compile(r"(^|_)(mlp|ffn?|feed_?forward)($|_)")
_DOWN_NAME = re.compile(r"down|out|c_proj|fc2|w2|w_2|^wo$|4h_to_h|dense_2|linear_?2")
_POST_MLP_NORM_NAME = re.compile(r"post_?(mlp|ffn|ff|feed_?forward)")
_LOGIT_CONFIG = re.compile(
    r"^(?!attn|attention|router).*(logits?_?.*(scal|cap|mult)|lm_head_mult|output_mult|dim_model_base)"
)
_RESIDUAL_CONFIG = re.compile(r"residual_(mult|scal)|scale_depth")


def _layout_by_structure(model: nn.Module, config: Any) -> _Layout:
    head = _output_head(model)
    blocks, output = _find_blocks(model, _hidden_size(config, model.get_submodule(head)))
    _refuse_unknown_scaling(config)
    block = model.get_submodule(f"{blocks}.0")
    return _Layout(
        family="by structure",
        blocks=blocks,
        output=output,
        norm=_find_final_norm(model, blocks),
        head=head,
        post_mlp_norm=next((n for n, _ in _norms(block) if _POST_MLP_NORM_NAME.search(n)), None),
        parallel=_looks_parallel(block, config),
        residual_scale=1.0,
        multiplier=None,
        divisor=None,
        softcap=_number(config, "final_logit_softcapping"),
    )


def _find_blocks(model: nn.Module, hidden_size: int) -> tuple[str, str]:
    """Path of the longest list of equal blocks with an MLP that ends in ``hidden_size``; path of its end."""
    lists = sorted(_block_lists(model), key=lambda item: -len(item[1]))
    for name, blocks in lists:
        _refuse_experts(model, name, blocks)
        output = _mlp_output(blocks[0], hidden_size)
        if output is not None:
            return name, output
    model_type: str = model.config.model_type  # type: ignore[union-attr, assignment]
    row = ROWS.get(model_type)
    known = "" if row is None else f", and first the layout of the table's row ({row.blocks}, {row.output})"
    raise UnsupportedModel(
        f"the layout of {type(model).__name__} (model_type {model_type!r}) is not known and could not be "
        "found by structure: looked for a ModuleList of at least two blocks of one class, in each a part "
        f"named mlp, ffn or feed_forward with one Linear or Conv1D that maps to the hidden size {hidden_size}"
        f"{known}; the lists of blocks found are {[name for name, _ in lists] or 'none'}"
    )


def _block_lists(model: nn.Module) -> Iterator[tuple[str, nn.ModuleList]]:
    """Outermost lists of at least two modules of one class."""
    found: list[str] = []
    for name, module in model.named_modules():
        if any(name.startswith(f"{outer}.") for outer in found):
            continue
        if (
            isinstance(module, nn.ModuleList)
            and len(module) >= 2
            and len({type(item) for item in module}) == 1
        ):
            found.append(name)
            yield name, module


def _mlp_output(block: nn.Module, hidden_size: int) -> str | None:
    """Path inside the block of the MLP's output projection; None if there is not exactly one."""
    mlps = [
        (name, child)
        for name, child in block.named_children()
        if _MLP_NAME.search(name) and any(_is_linear(module) for module in child.modules())
    ]
    if len(mlps) != 1:
        return None
    mlp_name, mlp = mlps[0]
    candidates: list[str] = []
    wrappers: list[str] = []
    for name, module in mlp.named_modules():
        if any(name.startswith(f"{outer}.") for outer in wrappers):
            continue
        layer = _innermost(module)
        if layer is not module:
            wrappers.append(name)
        if _is_linear(layer) and _orientation(layer, name)[2] == hidden_size:
            candidates.append(name)
    if len(candidates) > 1:  # an MLP as wide as the model: only names can tell
        candidates = [name for name in candidates if _DOWN_NAME.search(name.rpartition(".")[2])]
    return f"{mlp_name}.{candidates[0]}" if len(candidates) == 1 else None


def _refuse_experts(model: nn.Module, name: str, blocks: nn.ModuleList) -> None:
    for inner, module in blocks.named_modules():
        kind = type(module).__name__
        if inner.rpartition(".")[2] == "experts" or re.search(
            r"experts?$|moe(block|layer|mlp)?$", kind, re.I
        ):
            raise UnsupportedModel(
                f"{type(model).__name__} is a mixture of experts ({name}.{inner} is a {kind}): a block has "
                "several output projections, and which of them holds a fact depends on the token; only "
                "models with one MLP per block can be edited"
            )


def _refuse_unknown_scaling(config: Any) -> None:
    for key, value in config.to_dict().items():
        if key == "final_logit_softcapping" or not isinstance(value, (int, float)) or value in (0, 1):
            continue
        if _LOGIT_CONFIG.search(key) or _RESIDUAL_CONFIG.search(key):
            raise UnsupportedModel(
                f"the config of this {config.model_type} model scales logits or residual stream "
                f"({key} = {value}) in a way that structure does not tell: add a row to models/table.py"
            )


def _find_final_norm(model: nn.Module, blocks: str) -> str:
    parent_name = blocks.rpartition(".")[0]
    parent = model.get_submodule(parent_name)
    names = [name for name, _ in _norms(parent) if "emb" not in name]
    if not names:
        raise UnsupportedModel(
            f"found the blocks of {type(model).__name__} at {blocks} but no norm beside them: looked for a "
            f"module whose class name contains Norm among {[name for name, _ in parent.named_children()]}"
        )
    return f"{parent_name}.{names[-1]}".lstrip(".")


def _norms(module: nn.Module) -> list[tuple[str, nn.Module]]:
    return [
        (name, child) for name, child in module.named_children() if "norm" in type(child).__name__.lower()
    ]


def _looks_parallel(block: nn.Module, config: Any) -> bool:
    """By the config's word for it if it has one; else a block with a single norm is taken as parallel."""
    for key in ("use_parallel_residual", "parallel_attn", "parallel_residual"):
        value = getattr(config, key, None)
        if value is not None:
            return bool(value)
    return len(_norms(block)) == 1


def _output_head(model: nn.Module) -> str:
    getter = getattr(model, "get_output_embeddings", None)
    head = getter() if callable(getter) else None
    for name, module in model.named_modules():
        if head is not None and module is head:
            return name
    raise _no_head(model, "get_output_embeddings()")


def _no_head(model: nn.Module, looked_for: Paths) -> UnsupportedModel:
    return UnsupportedModel(
        f"{type(model).__name__} has no output head (looked for {looked_for}): load the model with "
        "AutoModelForCausalLM"
    )


# ------------------------------------------------------------------ small things


def _find(root: nn.Module, path: str) -> nn.Module | None:
    """The submodule at a dotted path, or None."""
    module: nn.Module | None = root
    for part in path.split(".") if path else ():
        module = getattr(module, part, None)
        if not isinstance(module, nn.Module):
            return None
    return module


def _first_path(model: nn.Module, paths: Paths) -> str | None:
    for path in (paths,) if isinstance(paths, str) else paths:
        if _find(model, path) is not None:
            return path
    return None


def _innermost(module: nn.Module) -> nn.Module:
    """The layer that an adapter is wrapped around, or the module itself."""
    while isinstance(inner := getattr(module, "base_layer", None), nn.Module):
        module = inner
    return module


def _is_conv1d(module: nn.Module) -> bool:
    from transformers.pytorch_utils import Conv1D

    return isinstance(module, Conv1D)


def _is_linear(module: nn.Module) -> bool:
    return isinstance(module, nn.Linear) or _is_conv1d(module)


def _orientation(module: nn.Module, name: str) -> tuple[bool, int, int]:
    """(transposed, d_in, d_out) by the module's type; shapes cannot tell for a square matrix."""
    if isinstance(module, nn.Linear):
        return False, module.in_features, module.out_features
    if _is_conv1d(module):
        d_in, d_out = module.weight.shape  # older transformers does not keep d_in as an attribute
        return True, int(d_in), int(d_out)
    raise UnsupportedModel(
        f"{name} is a {type(module).__name__}, neither Linear nor Conv1D, so how its weight is stored is not "
        "known; if the model is quantised, load it without quantisation"
    )


def _hidden_size(config: Any, head: nn.Module | None) -> int:
    size = getattr(config, "hidden_size", None)
    if size is None:
        size = getattr(head, "in_features", None)
    if size is None:
        raise UnsupportedModel(
            "neither the config's hidden_size nor the head's in_features tells the hidden size"
        )
    return int(size)


def _context_length(config: Any) -> int | None:
    for key in ("max_position_embeddings", "n_positions", "max_seq_len", "max_sequence_length", "seq_length"):
        value = getattr(config, key, None)
        if isinstance(value, int) and value > 0:
            return value
    return None


def _number(config: Any, key: str | None) -> float | None:
    value = None if key is None else getattr(config, key, None)
    return None if value is None else float(value)
