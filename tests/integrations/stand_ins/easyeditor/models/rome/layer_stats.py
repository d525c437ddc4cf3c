"""Second moments by module name, as the test has put them here."""

GIVEN = {}
CALLS = []


def layer_stats(model, tokenizer, layer_name, stats_dir, ds_name, to_collect, **options):
    CALLS.append(layer_name)
    return GIVEN[layer_name]
