import random
from pathlib import Path

import numpy
import torch


class SecondMoment:
    def __init__(self):
        self.mom2, self.count = None, 0

    def add(self, rows):
        self.mom2 = rows.T @ rows + (0 if self.mom2 is None else self.mom2)
        self.count += len(rows)

    def moment(self):
        return self.mom2 / self.count

    def state_dict(self):
        return {"constructor": "SecondMoment()", "count": self.count, "mom2": self.mom2.numpy()}


class CombinedStat:
    def __init__(self, **stats):
        self.stats = stats

    def __getattr__(self, name):
        return self.__dict__["stats"][name]

    def add(self, rows):
        for stat in self.stats.values():
            stat.add(rows)


def save_cached_state(file, stat, args):
    Path(file).parent.mkdir(exist_ok=True, parents=True)
    entries = {f"{k}.{n}": v for k, s in stat.stats.items() for n, v in s.state_dict().items()}
    numpy.savez(file, **entries, **args)


def tally(
    stat, dataset, cache=None, sample_size=None, batch_size=1, collate_fn=None, random_sample=1, **rest
):
    if cache is not None and Path(cache).exists():
        with numpy.load(cache) as data:
            for name, part in stat.stats.items():
                part.count, part.mom2 = int(data[f"{name}.count"]), torch.from_numpy(data[f"{name}.mom2"])
        return
    order = list(range(len(dataset)))
    random.Random(random_sample).shuffle(order)
    chosen = order[:sample_size]
    for start in range(0, len(chosen), batch_size):
        yield collate_fn([dataset[i] for i in chosen[start : start + batch_size]])
    if cache is not None:
        save_cached_state(cache, stat, {"sample_size": sample_size})
