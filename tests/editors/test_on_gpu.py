"""Every editor's whole life on a GPU: edit, ask, generate, save, revert, load; and that it is the CPU's life.

Random models of 32 dimensions, so that what is tested is where tensors lie and not speed. Numbers agree as far as the
rounding of the dtype lets them: targets that were optimised in steps of Adam are compared by what the model says.
"""

from __future__ import annotations

import gc
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from encoders import bag_of_tokens
from helpers import relative_error
from memory.toy import generate
from model_configs import tiny_model, tiny_tokenizer
from recipe_tiny import save_encoder
from tiny import CONTEXTS, FACTS, bits, make, moments, same_bits

import fastedit
from fastedit import Fact
from fastedit.artefacts import stack_of
from fastedit.data import records_from
from fastedit.evaluation import Evaluator, evaluate
from fastedit.memory import route_info, sides_of
from fastedit.stats import collect

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.filterwarnings("ignore:.is_gradient_checkpointing. is deprecated:FutureWarning"),
]

MORE = [Fact("The capital of {} is", "Japan", "Rome"), Fact("{} was born in", "Marie Curie", "Tokyo")]
TEXTS = ["The Eiffel Tower is in the city of", "Rome", *(fact.text for fact in [*FACTS, *MORE])]
SWEEP = {"steps": 6, "lr": 0.02, "layers": (0, 1)}
ONE = {"steps": 6, "lr": 0.02, "layers": (1,)}
TUNE = {"steps": 4, "lr": 2e-3, "layers": (1,)}
WISE = {
    "lr": 0.3,
    "steps": 6,
    "alpha": 0.1,
    "beta": 0.8,
    "gamma": 0.4,
    "layers": (1,),
    "save_freq": 2,
    "merge_freq": 4,
}

WEIGHTS: dict[str, tuple[str, dict[str, Any]]] = {
    "memit": ("memit", SWEEP),
    "memit with rect": ("memit", {**SWEEP, "rect": 0.4}),
    "memit with an anchor": ("memit", {**SWEEP, "norm_anchor": 20.0}),
    "memit-cache": ("memit-cache", SWEEP),
    "alphaedit": ("alphaedit", SWEEP),
    "nse": ("nse", {**SWEEP, "mass": 0.8, "max_sweeps": 2}),
    "nse of all neurons": ("nse", {**SWEEP, "mass": 1.0}),
    "emmet": ("emmet", SWEEP),
    "pmet": ("pmet", SWEEP),
    "ultraedit": ("ultraedit", {"lr": 1e-3}),
    "rome": ("rome", ONE),
    "r-rome": ("r-rome", ONE),
    "p-rome": ("p-rome", ONE),
    "ft": ("ft", {**TUNE, "layers": (0, 1)}),
    "ft-l": ("ft-l", {**TUNE, "epsilon": 1e-3}),
    "ft-m": ("ft-m", TUNE),
}
MEMORIES: dict[str, tuple[str, dict[str, Any]]] = {
    "wise": ("wise", {**WISE, "retrieve": True}),
    "wise merged": ("wise", {**WISE, "retrieve": False}),
    "grace": ("grace", {"layers": (1,), "steps": 8, "lr": 0.3, "init": "cold", "radius": 0.5}),
    "defer": ("defer", {"layers": (1,), "steps": 6, "lr": 0.02}),
    "melo": (
        "melo",
        {"layers": (0,), "targets": (1, 2), "steps": 6, "lr": 0.01, "n_blocks": 20, "halve_every": 3},
    ),
    "t-patcher": (
        "t-patcher",
        {"steps": 20, "lr": 0.05, "memory_weight": 0.1, "check_every": 5, "check_from": 5},
    ),
    "serac": ("serac", {"threshold": 0.9999}),
    "rase": ("rase", {"editor": "rome", "editor_params": {"steps": 6, "lr": 0.5}}),
    "rase of ft": ("rase", {"editor": "ft", "editor_params": {**TUNE, "lr": 0.01}}),
    "lte": ("lte", {"template": "Facts: {facts}\n"}),
    "ike": ("ike", {"k": 0}),
}
WITH_ENCODER = ("rase", "lte", "ike")
STATES = ("memit-cache", "alphaedit", "nse", "nse of all neurons", "ultraedit", "ft-l")


@pytest.fixture(scope="module")
def encoder(tmp_path_factory: pytest.TempPathFactory) -> str:
    return str(bag_of_tokens(tmp_path_factory.mktemp("encoder")))


@pytest.fixture(autouse=True)
def no_leftovers() -> Iterator[None]:
    yield
    gc.collect()


def of_weights(name: str) -> Callable[[Any], Any]:
    method, params = WEIGHTS[name]
    return lambda model: make(method, model, params=params)


def of_memory(name: str, encoder: str) -> Callable[[Any], Any]:
    method, params = MEMORIES[name]
    options: dict[str, Any] = {}
    if method in WITH_ENCODER:
        params = {**params, "encoder": encoder, "tokenizer": encoder}
    if method == "wise":
        options["contexts"] = CONTEXTS
    if method == "t-patcher":
        options["texts"] = [
            "The capital of Japan is Tokyo. Rome is not.",
            "Miles Davis was born in Paris.",
        ] * 3

    def editor(model: Any) -> Any:
        more = {"statistics": moments(model), "contexts": CONTEXTS} if params.get("editor") == "rome" else {}
        return fastedit.editor(method, model, tiny_tokenizer(), params=params, **options, **more)

    return editor


def asked(model: Any, side: str) -> dict[str, Any]:
    tokenizer = tiny_tokenizer()
    tokenizer.padding_side = side
    encoded = tokenizer(TEXTS, return_tensors="pt", padding=True)
    return {name: encoded[name].to(model.device) for name in ("input_ids", "attention_mask")}


@torch.no_grad()
def said(model: Any, side: str = "left") -> torch.Tensor:
    """(texts, vocabulary) fp32 on the CPU: the logits behind each text."""
    inputs = asked(model, side)
    mask = inputs["attention_mask"]
    out = model(**inputs, position_ids=(mask.cumsum(1) - 1).clamp(min=0)).logits
    last = mask.cumsum(1).argmax(1)
    return out[torch.arange(len(out), device=out.device), last].float().cpu()


def generated(model: Any) -> None:
    """All ways of generating run, and a mixed batch says what its samples say (with one token, exactly)."""
    inputs = asked(model, "left")
    greedy = generate(model, inputs, max_new_tokens=4)
    assert greedy.device == model.device
    assert generate(model, inputs, max_new_tokens=4, num_beams=2).shape == greedy.shape
    assert generate(model, inputs, max_new_tokens=2, do_sample=True, num_return_sequences=2).shape[
        0
    ] == 2 * len(greedy)


def life(
    editor_of: Callable[[Any], Any], device: str, dtype: torch.dtype, folder: Path, **changes: Any
) -> torch.Tensor:
    """The logits behind each text after two edits, once everything that can be done with them was done."""
    model = tiny_model("llama", dtype, **changes).to(device)
    before, plain = bits(model), said(model)
    editor = editor_of(model)
    edits = [editor.edit(FACTS), editor.edit(MORE)]
    assert {parameter.device.type for parameter in model.parameters()} == {device}
    after = said(model)
    assert torch.isfinite(after).all()
    assert relative_error(said(model, "right"), after) < (1e-4 if dtype == torch.float32 else 0.05)
    assert len(route_info(model)) == (len(TEXTS) if sides_of(model) else 0)
    generated(model)
    for number, edit in enumerate(edits):
        assert edit.as_dict()
        edit.save(folder / f"{device}{number}")
    fastedit.save_model(model, folder / f"{device}-model", tiny_tokenizer())
    for edit in reversed(edits):
        edit.revert()
    assert same_bits(model, before)
    assert torch.equal(said(model), plain)
    again = [fastedit.load_edit(folder / f"{device}{number}").apply(model) for number in range(len(edits))]
    assert relative_error(said(model), after) < (1e-5 if dtype == torch.float32 else 0.02)
    again[-1].revert()
    return after


def agrees(editor_of: Callable[[Any], Any], dtype: torch.dtype, folder: Path, **changes: Any) -> None:
    on_gpu = life(editor_of, "cuda", dtype, folder, **changes)
    on_cpu = life(editor_of, "cpu", dtype, folder, **changes)
    assert relative_error(on_gpu, on_cpu) < (2e-2 if dtype == torch.float32 else 0.15)


DTYPES = pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])


@DTYPES
@pytest.mark.parametrize("name", WEIGHTS)
def test_weight_editors(name: str, dtype: torch.dtype, tmp_path: Path) -> None:
    agrees(of_weights(name), dtype, tmp_path)


@DTYPES
@pytest.mark.parametrize("name", MEMORIES)
def test_memory_editors(name: str, dtype: torch.dtype, encoder: str, tmp_path: Path) -> None:
    agrees(of_memory(name, encoder), dtype, tmp_path, max_position_embeddings=1024)


@DTYPES
@pytest.mark.parametrize("name", STATES)
def test_saved_states_go_on(name: str, dtype: torch.dtype, tmp_path: Path) -> None:
    """On the device where they were saved, and saved there and loaded on the CPU."""
    editor = of_weights(name)(tiny_model("llama", dtype).to("cuda"))
    editor.edit(FACTS)
    editor.save_state(tmp_path / "state")
    after = []
    for device in ("cuda", "cpu"):
        model = tiny_model("llama", dtype).to(device)
        with torch.no_grad():
            for ours, theirs in zip(model.parameters(), editor.model.parameters(), strict=True):
                ours.copy_(theirs)
        resumed = of_weights(name)(model)
        resumed.load_state(tmp_path / "state")
        resumed.edit(MORE)
        after.append(said(model))
    editor.edit(MORE)
    assert relative_error(after[0], said(editor.model)) < 1e-4
    assert relative_error(after[1], after[0]) < (2e-2 if dtype == torch.float32 else 0.15)


@pytest.mark.parametrize("method", ["memit", "pmet"])
def test_prune_and_norm_anchor(method: str) -> None:
    editor = make(method, tiny_model("llama").to("cuda"), params={**SWEEP, "norm_anchor": 20.0})
    assert make(method, editor.model, params=SWEEP).measure_norm_anchor(FACTS) > 0
    before = bits(editor.model)
    editor.edit(FACTS)
    projection = editor.description.projection(0)
    with torch.no_grad():
        projection.weight.add_(0)
    pruned = editor.prune()
    if pruned is not None:
        pruned.revert()
    stack_of(editor.model).edits[0].revert()
    assert same_bits(editor.model, before)


@DTYPES
def test_statistics(dtype: torch.dtype) -> None:
    texts = [
        "The capital of France is Paris. Miles Davis plays the trumpet.",
        "The Colosseum is in Rome.",
    ] * 4
    found = [
        collect(tiny_model("llama", dtype).to(device), tiny_tokenizer(), texts, layers=[0, 2], progress=False)
        for device in ("cuda", "cpu")
    ]
    for layer in (0, 2):
        ours, theirs = (each[layer] for each in found)
        assert ours.count == theirs.count
        limit = 1e-4 if dtype == torch.float32 else 2e-2
        assert relative_error(ours.second_moment.cpu(), theirs.second_moment) < limit


def records() -> Any:
    return records_from(
        [
            {
                "prompt": fact.prompt.format(fact.subject),
                "subject": fact.subject,
                "target_new": fact.target_new,
                "rephrase": [f"{fact.subject} is known for"],
                "locality": {"near": [{"prompt": "The Colosseum is in", "ground_truth": "Rome"}]},
                "portability": {},
            }
            for fact in FACTS
        ]
    )


@DTYPES
def test_an_evaluation(dtype: torch.dtype) -> None:
    measured: list[dict[str, float]] = []
    for device in ("cuda", "cpu"):
        model = tiny_model("llama", dtype).to(device)
        before = Evaluator(model, tiny_tokenizer(), records(), drift_tokens=256).before()
        edit = of_weights("memit")(model).edit(FACTS)
        given = {"before": before, "n_edits": len(FACTS), "edits": [edit], "drift_tokens": 256}
        report = evaluate(model, tiny_tokenizer(), records(), **given)
        measured.append(
            {
                f"{result.protocol} {result.when} {name}": estimate.mean
                for result in report.results
                for name, estimate in result.metrics.items()
            }
        )
    assert measured[0].keys() == measured[1].keys()
    name = next(name for name in measured[0] if name.endswith("ppl"))
    assert measured[0][name] == pytest.approx(measured[1][name], rel=1e-2 if dtype == torch.float32 else 0.2)


@DTYPES
def test_recipe(dtype: torch.dtype, tmp_path: Path) -> None:
    """Trained on the GPU, used there and on the CPU."""
    from fastedit.editors.recipe_training import train

    params = {
        "dim": 16,
        "batch": 2,
        "lr": 1e-2,
        "validate_every": 4,
        "holdout": 0.3,
        "steps": 4,
        "train_encoder": True,
    }
    train(
        tiny_model("llama", dtype).to("cuda"),
        tiny_tokenizer(),
        records(),
        tmp_path / "checkpoint",
        encoder=save_encoder(tmp_path / "encoder"),
        params=params,
        progress=False,
    )
    options = {"checkpoint": str(tmp_path / "checkpoint"), "same_weights": False}
    agrees(lambda model: fastedit.editor("recipe", model, tiny_tokenizer(), params=options), dtype, tmp_path)
