import random
from pathlib import Path

import torch
from util.runningstats import CombinedStat, SecondMoment, tally

from .tok_dataset import TokenizedDataset, flatten_masked_batch, length_collation

STAT_TYPES = {"mom2": SecondMoment}
WORDS = [f"{a}{b}{c}" for a in "bdfgk" for b in "aeiou" for c in "lmnrst"]
TEXTS = [" ".join(random.Random(seed).choices(WORDS, k=20)) for seed in range(60)]
PASSES = []


def load_dataset(name, config):
    return {"train": [{"text": text} for text in TEXTS]}


def tqdm(loader, total):
    return loader


def layer_stats(
    model,
    tokenizer,
    layer_name,
    stats_dir,
    ds_name,
    to_collect,
    model_name=None,
    sample_size=None,
    precision=None,
    batch_tokens=None,
    download=True,
    progress=tqdm,
    force_recompute=False,
    hparams=None,
):
    model_name = model.config._name_or_path.rsplit("/")[-1]
    file = (
        Path(stats_dir) / model_name / f"{ds_name}_stats" / f"{layer_name}_{precision}_mom2_{sample_size}.npz"
    )
    texts = load_dataset(ds_name, "20200501.en")["train"]
    stat = CombinedStat(mom2=SecondMoment())
    data = TokenizedDataset(texts, tokenizer, maxlen=model.config.max_position_embeddings)
    seen = []
    module = dict(model.named_modules())[layer_name]
    handle = module.register_forward_pre_hook(lambda module, args: seen.append(args[0]))
    for group in tally(
        stat, data, cache=file, sample_size=sample_size, batch_size=10, collate_fn=length_collation(0)
    ):
        for batch in group:
            with torch.no_grad():
                model(**batch)
            PASSES.append(layer_name)
            stat.add(flatten_masked_batch(seen.pop(), batch["attention_mask"]).to(getattr(torch, precision)))
    handle.remove()
    return stat
