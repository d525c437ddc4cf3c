"""RECIPE's losses and training step against their definitions, what is trained on, and being interrupted."""

from __future__ import annotations

import dataclasses
import math
import random
from pathlib import Path
from typing import Any

import pytest
import recipe_oracle
import torch
from model_configs import tiny_model, tiny_tokenizer
from recipe_tiny import ROWS, SHORT, save_encoder
from tiny import bits, same_bits

import fastedit
from fastedit import Fact, FasteditError
from fastedit.data import records_from
from fastedit.editors import recipe_training, training_loop
from fastedit.editors.recipe_losses import edit_losses, inside_loss, neighbour_loss, outside_loss
from fastedit.editors.recipe_training import (
    RecipeTrainingParams,
    examples_of,
    row_of,
    train,
)
from fastedit.memory.encoder import TextEncoder
from fastedit.memory.recipe import load_parts
from fastedit.models import describe

RECORDS = records_from(ROWS)


@pytest.fixture(scope="module")
def encoder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_encoder(tmp_path_factory.mktemp("encoder"))


# ------------------------------------------------------------------ single losses


def same(ours: torch.Tensor, theirs: torch.Tensor, leaves: tuple[torch.Tensor, ...]) -> None:
    """Value and gradients agree to float64."""
    torch.testing.assert_close(ours, theirs, rtol=1e-10, atol=1e-12)
    found = torch.autograd.grad(ours, leaves, retain_graph=True, allow_unused=True)
    wanted: tuple[torch.Tensor | None, ...] = (None,) * len(leaves)
    if theirs.requires_grad:
        wanted = torch.autograd.grad(theirs, leaves, retain_graph=True, allow_unused=True)
    for leaf, ours_, theirs_ in zip(leaves, found, wanted, strict=True):
        zero = torch.zeros_like(leaf)
        torch.testing.assert_close(
            zero if ours_ is None else ours_, zero if theirs_ is None else theirs_, rtol=1e-9, atol=1e-12
        )


@pytest.mark.parametrize("n", [1, 2, 7])
@pytest.mark.parametrize(("scale", "eps"), [(1.0, 1e-8), (3.0, 0.0)], ids=["published", "clean"])
def test_contrastive_losses(n: int, scale: float, eps: float) -> None:
    generator = torch.Generator().manual_seed(n)
    queries, keys = (
        torch.randn(n, 5, dtype=torch.double, generator=generator).requires_grad_() for _ in range(2)
    )
    sentinel = torch.randn(5, dtype=torch.double, generator=generator).requires_grad_()
    leaves = (queries, keys, sentinel)
    scores = queries @ torch.cat((keys, sentinel[None])).T * scale / math.sqrt(5)
    same(neighbour_loss(scores, eps), recipe_oracle.neighbour(queries, keys, sentinel, scale, eps), leaves)
    same(
        inside_loss(scores, 1.2, eps), recipe_oracle.inside(queries, keys, sentinel, scale, 1.2, eps), leaves
    )
    same(
        outside_loss(scores, 1.2, eps),
        recipe_oracle.outside(queries, keys, sentinel, scale, 1.2, eps),
        leaves,
    )
    if n > 1:
        same(
            inside_loss(scores, None, eps),
            recipe_oracle.inside(queries, keys, sentinel, scale, 1e300, eps),
            leaves,
        )


def test_rows_that_are_won_count_nothing() -> None:
    scores = torch.tensor([[0.0, -9.0, 9.0], [-9.0, 0.0, 9.0]], dtype=torch.double, requires_grad=True)
    for loss in (inside_loss(scores, 1.2, 0.0), outside_loss(scores, 1.2, 0.0)):
        assert float(loss.detach()) == 0
        (gradient,) = torch.autograd.grad(loss, scores)
        assert not gradient.any()
    assert float(inside_loss(scores, None, 0.0).detach()) > 0


@pytest.mark.parametrize("eps", [1e-8, 0.0], ids=["published", "clean"])
@pytest.mark.parametrize("hinge", [1.0, 1.2, 1e300], ids=["exact", "hinge", "none"])
@pytest.mark.parametrize("sizes", [(3, 4, 2), (1, 0, 0), (2, 2, 3)], ids=str)
def test_edit_losses(sizes: tuple[int, int, int], hinge: float, eps: float) -> None:
    first, second, m = sizes
    generator = torch.Generator().manual_seed(7)
    logits = (
        3 * torch.randn(first + second + m, 11, dtype=torch.double, generator=generator)
    ).requires_grad_()
    labels = torch.randint(11, (first + second,), generator=generator)
    labels[0] = int(logits[0].argmax())  # won already
    before = torch.randn(m, 11, dtype=torch.double, generator=generator)
    ours = edit_losses(logits * 1, labels, first, before.log_softmax(1), None if hinge > 1e9 else hinge, eps)
    groups = [(logits[:first], labels[:first]), (logits[first : first + second], labels[first:])]
    wanted = [recipe_oracle.edit(rows, of.tolist(), hinge, eps) for rows, of in groups]
    wanted.append(
        recipe_oracle.kl(before, logits[first + second :]) if m else torch.zeros((), dtype=torch.double)
    )
    same(sum(ours[1:], ours[0]), sum(wanted[1:], wanted[0]), (logits,))
    for mine, theirs in zip(ours, wanted, strict=True):
        torch.testing.assert_close(mine, theirs, rtol=1e-10, atol=1e-12)


# ------------------------------------------------------------------ a whole step


def learner_of(encoder: Path, family: str, **changes: Any) -> tuple[Any, list[Any], Any]:
    """A learner in float64, its examples and its model."""
    model = tiny_model(family, torch.float64).requires_grad_(False)
    settings = RecipeTrainingParams(**{**SHORT, "train_encoder": False, **changes}).resolved("clean")
    reader = TextEncoder.load(encoder)
    reader.module.double()
    examples, _ = examples_of(RECORDS, [], tiny_tokenizer(), 128)
    learner = recipe_training._Learner(model, tiny_tokenizer(), settings, reader, str(encoder), "clean", 0)
    learner.networks.double()
    learner.prepare(examples, False)
    return learner, examples, model


def oracle_objective(learner: Any, drawn: Any, batch: list[Any], model: Any) -> torch.Tensor:
    """The loss, one text and one row at a time, whole logits, no cache."""
    settings, networks, n = learner.settings, learner.networks, len(batch)

    def read(tower: Any, statistics: torch.Tensor) -> torch.Tensor:
        return tower((statistics - networks.centre) / networks.spread)

    def towered(tower: Any, texts: list[str]) -> torch.Tensor:
        return torch.cat([read(tower, learner.reader.statistics([text])) for text in texts])

    keys = towered(networks.knowledge, [f"{e.fact.text} {e.fact.target_new}" for e in batch])
    own, inside, outside = (
        towered(networks.query, texts) for texts in (drawn.own, drawn.inside, drawn.outside)
    )
    sentinel = read(networks.knowledge, learner.reader.statistics_of(networks.sentinel))[0]
    terms, hinge, eps = (keys, sentinel, settings.scale), settings.hinge, settings.epsilon
    if settings.both_queries:
        contrastive = (
            sum(
                recipe_oracle.neighbour(q, *terms, eps) + recipe_oracle.inside(q, *terms, hinge, eps)
                for q in (own, inside)
            )
            / 2
        )
    else:
        heads = torch.tensor(drawn.first)[:, None]
        contrastive = recipe_oracle.neighbour(torch.where(heads, own, inside), *terms, eps)
        contrastive = contrastive + recipe_oracle.inside(torch.where(heads, inside, own), *terms, hinge, eps)
    contrastive = contrastive + recipe_oracle.outside(outside, *terms, hinge, eps)
    prompts = networks.prompts(keys)
    scored: list[list[torch.Tensor]] = [[], [], []]
    labels: list[list[int]] = [[], [], []]
    before: list[torch.Tensor] = []
    for number, asked in enumerate(drawn.rows):
        ids, row = [], row_of(learner.tokenizer, *asked)
        ids = row.ids
        logits = in_front(model, prompts[number % n], ids)
        places = range(row.n_prompt - 1, row.n_prompt - 1 + len(row.target))
        scored[number // n] += [logits[place] for place in places]
        labels[number // n] += row.target
        if number >= 2 * n:
            plain = model(torch.tensor([ids])).logits[0]
            before += [plain[place] for place in places]
    edits = [recipe_oracle.edit(torch.stack(scored[g]), labels[g], hinge, eps) for g in (0, 1)]
    kl = recipe_oracle.kl(torch.stack(before), torch.stack(scored[2]))
    parts = (edits[0], edits[1], kl, contrastive)
    weights = (settings.reliability, settings.generality, settings.locality, settings.contrastive)
    return sum(weight * part for weight, part in zip(weights, parts, strict=True))


def in_front(model: Any, prompt: torch.Tensor, ids: list[int]) -> torch.Tensor:
    """(T, vocabulary) logits at the tokens behind a soft prompt."""
    n, table = len(prompt), getattr(describe(model).decoder, "wpe", None)
    places = torch.arange(n + len(ids))
    if table is not None:
        places = (places - n).clamp(min=0)
        prompt = prompt - table.weight[0]
    whole = torch.cat((prompt, model.get_input_embeddings()(torch.tensor(ids))))[None]
    ones = torch.ones(whole.shape[:2]).long()
    return model(inputs_embeds=whole, attention_mask=ones, position_ids=places[None]).logits[0, n:]


@pytest.mark.parametrize("both", [True, False], ids=["both", "coin"])
@pytest.mark.parametrize("family", ["llama", "gpt2", "gptj", "qwen2"])
def test_a_step_is_its_definition(encoder: Path, family: str, both: bool) -> None:
    weights = {"reliability": 0.7, "generality": 1.3, "locality": 2.0, "contrastive": 0.9, "scale": 1.5}
    learner, examples, model = learner_of(encoder, family, both_queries=both, **weights)
    with torch.no_grad():
        learner.networks.generator[1].weight.mul_(5)
    loss, parts = learner.losses(examples, random.Random(3))
    drawn = learner._draw(examples, random.Random(3))
    wanted = oracle_objective(learner, drawn, examples, model)
    torch.testing.assert_close(loss, wanted, rtol=1e-6, atol=1e-9)  # old rotary tables are fp32
    names = [name for name, _ in learner.networks.named_parameters()]
    ours = torch.autograd.grad(loss, list(learner.networks.parameters()))
    theirs = torch.autograd.grad(wanted, list(learner.networks.parameters()))
    for name, mine, oracle in zip(names, ours, theirs, strict=True):
        torch.testing.assert_close(
            mine, oracle, rtol=1e-5, atol=1e-7, msg=lambda text, name=name: f"{name}: {text}"
        )
    assert parts["loss"] == pytest.approx(float(wanted.detach()))


def test_facts_that_a_query_is_also_about_are_no_candidates(encoder: Path) -> None:
    learner, examples, _ = learner_of(encoder, "llama")
    twin = dataclasses.replace(examples[0], fact=dataclasses.replace(examples[0].fact, target_new="Rome"))
    near = dataclasses.replace(examples[2], outside={"near": [(examples[1].fact.text, "x")]})
    batch = [examples[0], twin, examples[1], near]
    drawn = learner._draw(batch, random.Random(0))
    found = recipe_training.conflicts(batch, drawn)
    assert found.shape == (12, 5)
    assert found.nonzero().tolist() == [[0, 1], [1, 0], [4, 1], [5, 0], [11, 2]]
    learner.prepare(batch, False)
    loss, _ = learner.losses(batch, random.Random(0))
    assert bool(loss.isfinite())
    loss.backward()
    assert all(bool(weight.grad.isfinite().all()) for weight in learner.networks.parameters())


def test_the_encoder_is_trained_too(encoder: Path) -> None:
    learner, examples, model = learner_of(encoder, "gpt2", train_encoder=True)  # its norms are in float64
    learner.reader.module.double().eval()
    loss, _ = learner.objective(examples, random.Random(3), 1.2)
    wanted = oracle_objective(learner, learner._draw(examples, random.Random(3)), examples, model)
    weights = list(learner.encoder.parameters())
    for mine, theirs in zip(
        torch.autograd.grad(loss, weights, allow_unused=True),
        torch.autograd.grad(wanted, weights, allow_unused=True),
        strict=True,
    ):
        assert (mine is None) == (theirs is None)
        if mine is not None:
            torch.testing.assert_close(mine, theirs, rtol=1e-6, atol=1e-8)


# ------------------------------------------------------------------ records


def test_what_is_taken_from_records() -> None:
    tokenizer = tiny_tokenizer()
    (example, *_), left_out = examples_of(RECORDS, [], tokenizer, 128)
    assert example.own == (ROWS[0]["prompt"], ROWS[0]["target_new"])
    assert example.inside == {"rephrase": [(ROWS[0]["rephrase"][0], ROWS[0]["target_new"])]}
    assert example.outside == {"near": [(f"{ROWS[0]['target_new']} plays the", "drum")]}
    assert left_out == {}
    bare = records_from([{**ROWS[0], "rephrase": []}, {**ROWS[1], "locality": {}}, ROWS[2]])
    found, left_out = examples_of(bare, [], tokenizer, 128)
    assert ([e.fact.subject for e in found], left_out) == (
        [ROWS[2]["subject"]],
        {"no rephrasing or locality prompt": 2},
    )
    assert examples_of(RECORDS, [], tokenizer, 3) == ([], {"too long": len(ROWS)})


def test_what_shares_anything_with_test_records_is_left_out() -> None:
    elsewhere = {"locality": {"near": [{"prompt": "Bonn plays the", "ground_truth": "drum"}]}}
    test = records_from(
        [
            {**ROWS[0], "prompt": f"{ROWS[0]['subject']} is", "rephrase": [], "locality": {}},
            {**ROWS[1], "subject": "The", **elsewhere},
        ]
    )
    found, left_out = examples_of(RECORDS, test, tiny_tokenizer(), 128)
    assert left_out == {"shared subject": 1, "shared prompt": 2}
    assert [e.fact.subject for e in found] == [row["subject"] for row in ROWS[3:]]
    two = [
        {"prompt": "Bonn plays the", "ground_truth": "drum"},
        {"prompt": "Rome plays the", "ground_truth": "harp"},
    ]
    several = records_from([{**ROWS[2], "locality": {"near": two}}])
    ((example,), left_out) = examples_of(several, test, tiny_tokenizer(), 128)
    assert example.outside == {"near": [("Rome plays the", "harp")]}  # the other prompt is enough
    assert left_out == {}


def test_prompt_and_answer_as_tokens() -> None:
    tokenizer = tiny_tokenizer(add_bos=True)
    row = row_of(tokenizer, "The capital of France is", "Paris")
    whole = tokenizer("The capital of France is Paris")["input_ids"]
    assert (row.ids, row.n_prompt + len(row.target)) == (whole[:-1], len(whole))
    spaced = row_of(tokenizer, "The capital of France is ", "Paris")  # its last token is the space's
    assert tokenizer.decode(spaced.target) == " Paris"


# ------------------------------------------------------------------ training


def run(encoder: Path, out: Path, **changes: Any) -> dict[str, Any]:
    model = tiny_model("llama")
    before = bits(model)
    params = {**SHORT, "steps": 6, "validate_every": 2, **changes}
    report = train(model, tiny_tokenizer(), RECORDS, out, encoder=encoder, params=params, progress=False)
    assert same_bits(model, before)
    return report


@pytest.mark.parametrize("joint", [False, True], ids=["frozen", "joint"])
@pytest.mark.parametrize("tied", [False, True], ids=["two towers", "tied"])
def test_training_and_what_it_makes(encoder: Path, joint: bool, tied: bool, tmp_path: Path) -> None:
    out = tmp_path / "out"
    report = run(encoder, out, steps=30, validate_every=10, train_encoder=joint, tied_towers=tied)
    assert [row["step"] for row in report["history"]] == [10, 20, 30]
    best = min(report["history"], key=lambda row: row["loss"])
    assert report["validation"] == {key: value for key, value in best.items() if key != "step"}
    assert set(report["validation"]) >= {
        "hit",
        "hit_rephrased",
        "false_hit",
        "accuracy",
        "accuracy_rephrased",
    }
    assert not (tmp_path / "out.checkpoint").exists()
    assert (out / "encoder").exists() == joint
    parts = load_parts(out)
    assert parts.networks.sizes.tied_towers == tied
    assert (parts.networks.query is parts.networks.knowledge) == tied
    editor = fastedit.editor("recipe", tiny_model("llama"), tiny_tokenizer(), params={"checkpoint": str(out)})
    assert len(editor.edit([Fact("The capital of {} is", "France", "Lyon")]).content["keys"]) == 1
    with pytest.raises(FileExistsError, match="choose a new folder"):
        run(encoder, out)


def test_the_loss_falls(encoder: Path, tmp_path: Path) -> None:
    losses: list[float] = []
    objective = recipe_training._Learner.objective

    def noted(learner: Any, batch: Any, rng: Any, hinge: float | None) -> Any:
        result = objective(learner, batch, rng, hinge)
        losses.append(result[1]["loss"])
        return result

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(recipe_training._Learner, "objective", noted)
        run(encoder, tmp_path / "out", steps=60, validate_every=1000, train_encoder=False)
    assert losses[58] < 0.8 * losses[0]


@pytest.mark.parametrize("joint", [False, True], ids=["frozen", "joint"])
def test_an_interrupted_training_goes_on(
    encoder: Path, joint: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = run(encoder, tmp_path / "whole", train_encoder=joint)
    step = training_loop.Loop.advance

    def stops(loop: Any) -> None:
        if loop.step == 5:
            raise KeyboardInterrupt
        step(loop)

    monkeypatch.setattr(training_loop.Loop, "advance", stops)
    with pytest.raises(KeyboardInterrupt):
        run(encoder, tmp_path / "cut", train_encoder=joint)
    monkeypatch.setattr(training_loop.Loop, "advance", step)
    with pytest.raises(ValueError, match="another model, data or settings"):
        run(encoder, tmp_path / "cut", train_encoder=joint, lr=1.0)
    torch.rand(3)  # what else draws numbers does not matter
    assert run(encoder, tmp_path / "cut", train_encoder=joint) == whole
    names = ["recipe.safetensors", *(["encoder/model.safetensors"] if joint else [])]
    for name in names:
        assert (tmp_path / "cut" / name).read_bytes() == (tmp_path / "whole" / name).read_bytes()


def test_the_published_settings() -> None:
    settings = RecipeTrainingParams().resolved("official")
    assert (settings.batch, settings.lr, settings.encoder_lr, settings.dim) == (8, 1e-5, 1e-5, 4096)
    assert not settings.both_queries
    assert (settings.standardise, settings.epsilon) == (False, 1e-8)
    assert RecipeTrainingParams(dim=8, both_queries=True).resolved("official").both_queries
    clean = RecipeTrainingParams(lr=1e-3).resolved("clean")
    assert (clean.lr, clean.encoder_lr, clean.both_queries, clean.standardise) == (1e-3, 2e-5, True, True)


def test_training_refuses(encoder: Path, tmp_path: Path) -> None:
    given: tuple[Any, ...] = (tiny_model("llama"), tiny_tokenizer(), RECORDS, tmp_path / "out")
    for params, message in (
        ({"holdout": 2}, "holdout must be between"),
        ({"dim": 0}, "dim must be positive"),
        ({"hinge": 0.5}, "hinge must be at least 1"),
        ({"sizes": 1}, "has no sizes"),
    ):
        with pytest.raises(ValueError, match=message):
            train(*given, encoder=encoder, params=params)
    with pytest.raises(FasteditError, match="cannot load the text encoder"):
        train(*given, encoder=tmp_path / "none")
    with pytest.raises(ValueError, match="at least 2 subjects"):
        train(*given[:2], records_from(ROWS[:1]), tmp_path / "out", encoder=encoder, progress=False)
    assert list(tmp_path.iterdir()) == []
