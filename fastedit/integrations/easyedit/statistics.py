"""Replacement for EasyEdit's ``layer_stats``: all layers of the settings in one pass, into the files it reads."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from ...errors import FasteditError
from ...models import describe
from ...models.describe import ModelDescription
from ...stats import collect, npz_path
from ..patching import Context, NotCovered, Point

# The corpora that EasyEdit takes under its names for them.
_CORPORA = {
    "wikitext": ("Salesforce/wikitext", "wikitext-103-raw-v1"),
    "wikitext2": ("Salesforce/wikitext", "wikitext-2-raw-v1"),
    "wikipedia": ("wikimedia/wikipedia", "20231101.en"),
}


def layer_stats(context: Context) -> Callable[..., Any]:
    """Collects what is missing of ``hparams.layers`` together; the original then reads the file."""

    def stats(
        model: Any,
        tokenizer: Any,
        layer_name: str,
        stats_dir: Any,
        ds_name: str,
        to_collect: Any,
        model_name: str | None = None,
        sample_size: int | None = None,
        precision: str | None = None,
        batch_tokens: int | None = None,
        download: bool = True,
        progress: Any = None,
        force_recompute: bool = False,
        hparams: Any = None,
    ) -> Any:
        if force_recompute:
            raise NotCovered("force_recompute")
        if (
            list(to_collect) != ["mom2"]
            or precision not in ("float32", "float64")
            or batch_tokens is not None
        ):
            raise NotCovered(
                "statistics other than the second moment, of another precision, or with batch_tokens"
            )
        if ds_name not in _CORPORA:
            raise NotCovered(f"the data set {ds_name}")
        name = model_name or model.config._name_or_path.rsplit("/")[-1]

        def file(module: str) -> Path:
            return npz_path(
                stats_dir, name, module, dataset=ds_name, precision=precision, sample_size=sample_size
            )

        if not file(layer_name).exists():
            description = _describe(model)
            modules = {
                layer: description.projection(layer).name for layer in getattr(hparams, "layers", None) or []
            }
            missing = [layer for layer, module in modules.items() if not file(module).exists()]
            if layer_name not in [modules[layer] for layer in missing]:
                raise NotCovered(f"{layer_name} is not the MLP output projection of one of hparams.layers")
            texts = context.namespace["load_dataset"](*_CORPORA[ds_name])["train"]["text"]
            found = collect(
                model,
                tokenizer,
                texts,
                layers=missing,
                n_texts=sample_size,
                dtype=getattr(torch, precision),
                profile="official",
            )
            for statistics in found.values():
                statistics.to_npz(file(statistics.module), sample_size=sample_size)
        return context.original(
            model,
            tokenizer,
            layer_name,
            stats_dir,
            ds_name,
            to_collect,
            model_name=model_name,
            sample_size=sample_size,
            precision=precision,
            download=download,
            **({} if progress is None else {"progress": progress}),
            hparams=hparams,
        )

    return stats


def _describe(model: Any) -> ModelDescription:
    try:
        return describe(model)
    except FasteditError as error:
        raise NotCovered(f"the model is not covered: {error}") from None


def points(models: str) -> list[Point]:
    """The points in EasyEdit's package of methods."""
    uses = ("TokenizedDataset.__getitem__", "length_collation", "flatten_masked_batch", "SecondMoment.add")
    return [
        Point(f"{models}.{package}.layer_stats:layer_stats", layer_stats, uses)
        for package in ("rome", "r_rome")
    ]
