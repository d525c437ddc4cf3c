"""The WISE baseline does what the published code did."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from golden import GoldenCase, find_cases, load_case
from helpers import relative_error

from fastedit.bench.baselines.wise import PublishedWise, ties_by_sort


@pytest.fixture(scope="module")
def case() -> GoldenCase:
    if "wise" not in find_cases():
        pytest.skip("FASTEDIT_TEST_DATA is unset or has no golden/index.json with the case wise")
    return load_case("wise")


@pytest.fixture(scope="module")
def published(case: GoldenCase) -> PublishedWise:
    model, tokenizer = case.load_model(eager=True)
    n = int(np.prod(case.data["weight_shape"]))
    masks = [torch.from_numpy(np.unpackbits(case.arrays[f"mask_{j}_packed"])[:n].copy()) for j in range(4)]
    return PublishedWise(
        model, tokenizer, {**case.hparams, "n_iter": 12}, case.data["context_templates"], masks
    )


@pytest.mark.parametrize("shard", range(4))
def test_the_first_edit_of_a_shard_takes_the_stored_path(
    case: GoldenCase, published: PublishedWise, shard: int
) -> None:
    number = shard * case.hparams["save_freq"]
    request = case.data["requests"][number]
    published.side, published.count = published.original.clone(), 0
    masks, published.masks = published.masks, published.masks[shard:]
    published.edit(
        request["prompt"].replace("{}", request["subject"]),
        request["target_new"],
        f"{request['locality_prompt']} {request['locality_ground_truth']}",
    )
    published.masks = masks
    stored, ours = case.tensor(f"loss_e{number}"), published.losses[-1]
    for steps, tolerance in ((4, 1e-5), (12, 5e-3)):
        torch.testing.assert_close(ours[:steps], stored[:steps], rtol=tolerance, atol=tolerance)


def test_merging_gives_the_stored_memories(case: GoldenCase, published: PublishedWise) -> None:
    base = published.original
    sides = [base + case.tensor(f"side_delta_{shard}") for shard in range(4)]
    first = ties_by_sort(base, sides[:2], [0.5, 0.5], 0.53)
    second = ties_by_sort(base, [*sides[2:], first], [0.2, 0.2, 0.6], 0.53)
    # a sort's order among equal magnitudes decides about a few entries
    assert relative_error(first - base, case.tensor("merged_delta_0")) < 2e-2
    assert relative_error(second - base, case.tensor("merged_delta_1")) < 2e-2
