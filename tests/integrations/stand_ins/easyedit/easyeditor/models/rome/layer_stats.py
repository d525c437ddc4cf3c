"""Second moments by module name, as the test has put them here."""

from types import SimpleNamespace

GIVEN = {}
CALLS = []


def layer_stats(model, tokenizer, layer_name, stats_dir, ds_name, to_collect, **options):
    CALLS.append(layer_name)
    return SimpleNamespace(mom2=SimpleNamespace(moment=lambda: GIVEN[layer_name]))
