"""``layer_stats``: the second moments of all layers that are going to be asked for, in one pass over the texts.

Texts, sampling, packing and precision of the files are the project's own: its data set, loader and statistics
classes are used, only the pass through the model is ours. The files it writes are read by the original.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor, nn

from ... import ops
from ...models.describe import Projection, describe
from ...models.runner import frozen
from ..locate import covering
from ..patching import Context, NotCovered, Point

_expected: list[tuple[nn.Module, list[str]]] = []  # innermost last


@contextmanager
def expecting(model: nn.Module, names: Sequence[str]) -> Iterator[None]:
    """While this lasts, statistics that must be collected are collected for all these modules at once."""
    _expected.append((model, list(names)))
    try:
        yield
    finally:
        _expected.pop()


def layer_stats(context: Context) -> Callable[..., Any]:
    """``layer_stats``: makes the files that are missing, then lets the original read its own."""
    repository = context.version.split()[0]
    unified = repository.startswith("scalable-model-editing/")
    features: dict[Path, Tensor] = {}

    def stats(*args: Any, **kwargs: Any) -> Any:
        bound = inspect.signature(context.original).bind(*args, **kwargs)
        bound.apply_defaults()
        call = SimpleNamespace(**bound.arguments)
        if list(call.to_collect) != ["mom2"]:
            raise NotCovered(f"to_collect is {list(call.to_collect)}, not ['mom2']")
        if call.force_recompute or call.batch_tokens is not None:
            raise NotCovered("force_recompute or batch_tokens is given")
        precision = call.precision or "float64"
        folder = Path(call.stats_dir) / (call.model_name or _model_name(repository, call.model))

        def file(name: str) -> Path:
            suffix = "" if call.sample_size is None else f"_{call.sample_size}"
            return folder / f"{call.ds_name}_stats" / f"{name}_{precision}_mom2{suffix}.npz"

        names = [call.layer_name]
        if _expected and _expected[-1][0] is call.model and call.layer_name in _expected[-1][1]:
            names = _expected[-1][1]
        missing = [name for name in names if not file(name).exists()]
        if call.layer_name in missing and call.download and repository.startswith("kmeng01/"):
            missing = [name for name in missing if not _downloaded(context, file(name), Path(call.stats_dir))]
        if call.layer_name in missing:
            for name, (total, count, kept) in _collect(context, repository, call, missing).items():
                total = total.to(getattr(torch, precision))
                _save(context, file(name), total, count, call.sample_size)
                if unified:
                    features[file(name)] = kept
        answer = context.original(*args, **kwargs)
        if unified and file(call.layer_name) in features:
            return answer[0], features.pop(file(call.layer_name))
        return answer

    return stats


def _model_name(repository: str, model: nn.Module) -> str:
    """The folder of a model's files."""
    config: Any = model.config
    name: str = config._name_or_path
    if repository.startswith("jianghoucheng/"):
        return name.rsplit("/")[-1]
    if repository.startswith("scalable-model-editing/") and "data" in name:
        return name.split("/")[-1]
    return name.replace("/", "_")


def _downloaded(context: Context, file: Path, stats_dir: Path) -> bool:
    """Fetch a file from the authors' server, as the original does first; False if that fails."""
    relative = file.relative_to(stats_dir)
    url = f"{context.namespace['REMOTE_ROOT_URL']}/data/stats/{relative}"
    file.parent.mkdir(exist_ok=True, parents=True)
    try:
        torch.hub.download_url_to_file(url, str(file))
    except Exception as error:
        print(f"Unable to download {relative} due to {error}. Computing locally....")
        return False
    return True


def _longest(repository: str, config: Any) -> int:
    """The number of tokens that a text is cut to."""
    if repository.startswith("kmeng01/"):
        return config.n_positions
    if repository.startswith("scalable-model-editing/"):
        return getattr(config, "n_positions", None) or config.max_position_embeddings
    model_type = getattr(config, "model_type", "")
    if "mistral" in model_type:
        return getattr(config, "sliding_window", None) or 4096
    if "qwen2" in model_type:
        return 4096
    names = ("n_positions", "max_sequence_length", "max_position_embeddings", "seq_length")
    for name in names:
        if hasattr(config, name):
            return getattr(config, name)
    raise NotCovered(f"the config has none of {', '.join(names)}")


def _texts(context: Context, repository: str, ds_name: str) -> Any:
    """The data set of a version."""
    if repository == "jianghoucheng/NSE":
        from datasets import Dataset

        return Dataset.from_file("data/wikipedia-train.arrow")
    name = {"wikitext": "wikitext-103-raw-v1", "wikipedia": "20200501.en"}[ds_name]
    return context.namespace["load_dataset"](ds_name, name)["train"]


def _batches(context: Context, repository: str, call: Any) -> tuple[Any, int]:
    """The project's own loader over its own sample, and the number of groups of batches in it."""
    space = context.namespace
    longest = _longest(repository, call.model.config)
    texts = _texts(context, repository, call.ds_name)
    data = space["TokenizedDataset"](texts, call.tokenizer, maxlen=longest)
    size = 1 if repository.startswith("scalable-model-editing/") else 100
    loader = space["tally"](
        space["CombinedStat"](),
        data,
        cache=None,
        sample_size=call.sample_size,
        batch_size=size,
        collate_fn=space["length_collation"](3 * longest),
        pin_memory=True,
        random_sample=1,
        num_workers=2,
    )
    return loader, -(-(call.sample_size or len(data)) // size)


@torch.no_grad()
def _collect(
    context: Context, repository: str, call: Any, names: Sequence[str]
) -> dict[str, tuple[Tensor, int, Tensor]]:
    """By module name: Σ k kᵀ (d, d) float64, the number of tokens, and rows of k if the project keeps some."""
    model = call.model
    places = _projections(model, names)
    device = next(model.parameters()).device
    sums = {
        name: torch.zeros(each.d_in, each.d_in, dtype=torch.float64, device=each.weight.device)
        for name, (_, each) in places.items()
    }
    wanted = 0
    if repository.startswith("scalable-model-editing/"):
        wanted = 1000 if "llama" in model.config._name_or_path.lower() else 5000
    kept: dict[str, list[Tensor]] = {name: [] for name in names}
    seen: dict[str, Tensor] = {}
    top = max(names, key=lambda name: places[name][0])
    count = 0
    loader, groups = _batches(context, repository, call)
    bar = loader if call.progress is None else call.progress(loader, total=groups)
    with frozen(model), ExitStack() as stack:
        for name, (_, each) in places.items():
            handle = each.module.register_forward_pre_hook(_keep(seen, name, last=name == top))
            stack.callback(handle.remove)
        for group in bar:
            for batch in group:
                with suppress(_Enough):
                    model(**{key: value.to(device) for key, value in batch.items()}, use_cache=False)
                mask = batch["attention_mask"].bool()
                rows = [seen[name].reshape(*mask.shape, -1) for name in names]
                ops.covariance_([sums[name] for name in names], rows, [mask.to(row.device) for row in rows])
                if count < wanted:
                    for name, row in zip(names, rows, strict=True):
                        kept[name].append(row[mask.to(row.device)].float())
                count += int(mask.sum())
                seen.clear()
    return {
        name: (total, count, torch.cat(kept[name]) if kept[name] else torch.empty(0))
        for name, total in sums.items()
    }


class _Enough(Exception):
    """The topmost module that is wanted has been reached."""


def _keep(seen: dict[str, Tensor], name: str, *, last: bool) -> Callable[..., None]:
    def hook(_module: nn.Module, args: tuple[Tensor, ...]) -> None:
        seen[name] = args[0]
        if last:
            raise _Enough

    return hook


def _projections(model: nn.Module, names: Sequence[str]) -> dict[str, tuple[int, Projection]]:
    """By module name: the block's number and the projection.

    Raises:
        NotCovered: a name that is no MLP output projection of the model.
    """
    with covering():
        description = describe(model)
        found = [description.projection(layer) for layer in range(description.n_layers)]
    known = {each.name: (layer, each) for layer, each in enumerate(found)}
    missing = [name for name in names if name not in known]
    if missing:
        raise NotCovered(f"{missing[0]} is no MLP output projection of this model")
    return {name: known[name] for name in names}


def _save(context: Context, file: Path, total: Tensor, count: int, sample_size: int | None) -> None:
    """Write a file as the project's own code does, under a temporary name first."""
    space = context.namespace
    stat = space["CombinedStat"](mom2=space["STAT_TYPES"]["mom2"]())
    stat.mom2.mom2, stat.mom2.count = total.cpu(), count
    temporary = file.with_name(f".{file.name}.part.npz")
    save = space["tally"].__globals__["save_cached_state"]
    save(str(temporary), stat, {"sample_size": sample_size})
    temporary.replace(file)


POINTS = (
    Point(
        "rome.layer_stats:layer_stats",
        layer_stats,
        ("TokenizedDataset.__getitem__", "length_collation", "flatten_masked_batch", "SecondMoment.add"),
    ),
)
