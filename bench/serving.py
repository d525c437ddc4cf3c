"""Serving with memories: tokens per second and time to first token beside the unedited model.

    python bench/serving.py                              GPT-2-small shape with random weights, and the demo model
    python bench/serving.py --models demo --batches 1 8 --new-tokens 8 --repetitions 2

The memories are GRACE's with 1,000 entries and WISE-Retrieve's with 1, 2 and 4 side memories, their content built
directly: entries for 64 prompts among random ones; side memories that differ from the main one in a direction that
tells some templates' prompts from all others. Prompts are those 64 (edited: every one is routed into the memory), 64
of other templates (unrelated: none is), or both by turns (mixed). All models generate side by side, greedily and
with a KV cache, and take turns at every token; only calls of the model count, nothing that is the same around them.
Ratios are medians over tokens (for the first one over rounds) of a memory's time to the unedited model's in the same
turn. Before anything is timed: routes are as said, unrelated prompts get the unedited model's logits bit for bit, and
a generated token makes the host wait for no more results than without the memory.
"""

from __future__ import annotations

import argparse
import copy
import json
import statistics
import sys
import time
from collections.abc import Sequence
from contextlib import ExitStack
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

from fastedit.bench import common
from fastedit.bench.editing import MODELS, load
from fastedit.demo import load_demo_facts
from fastedit.editors.grace import GraceMemory, GraceParams
from fastedit.editors.wise import WiseParams
from fastedit.memory import attach, last_token, route_info
from fastedit.memory.wise import SideMemory, WiseMemory
from fastedit.models import describe

LAYERS = {"gpt2-small-shape": 9, "demo": 4}
ENTRIES = 1000
WISE_MEMORIES = (1, 2, 4)
TEMPLATES = 4  # of the edited prompts, and as many of the unrelated ones
PROMPTS = 64
UNEDITED = "unedited"
CHECKED_TOKENS = 4
COLUMNS = (
    "model", "memory", "prompts", "batch", "prompt_tokens", "new_tokens", "routed", "tokens_per_s",
    "unedited_tokens_per_s", "speed_ratio", "first_token_ms", "unedited_first_token_ms", "first_token_ratio",
    "waits_per_token", "waits_at_first_token",
)  # fmt: skip

Inputs = dict[str, Tensor]


# ---- prompts --------------------------------------------------------------------------------------------


def prompts() -> tuple[list[str], list[str]]:
    """Texts of the edited and of the unrelated prompts: the templates of each come by turns."""
    by_template: dict[str, list[str]] = {}
    for fact in load_demo_facts():
        by_template.setdefault(fact["prompt"], []).append(fact["prompt"].replace("{}", fact["subject"]))
    each = PROMPTS // TEMPLATES
    enough = [texts[:each] for texts in by_template.values() if len(texts) >= each][: 2 * TEMPLATES]
    edited, unrelated = enough[:TEMPLATES], enough[TEMPLATES:]
    return [t for turn in zip(*edited, strict=True) for t in turn], [
        t for turn in zip(*unrelated, strict=True) for t in turn
    ]


def encoded(tokenizer: Any, texts: Sequence[str], device: str) -> Inputs:
    tokenizer.padding_side = "left"
    tokens = tokenizer(list(texts), return_tensors="pt", padding=True)
    return {name: tokens[name].to(device) for name in ("input_ids", "attention_mask")}


# ---- memories -------------------------------------------------------------------------------------------


def twin(model: nn.Module) -> nn.Module:
    """A copy with the same parameters and buffers, not copies of them: memories attached to it are its own."""
    return copy.deepcopy(model, {id(t): t for t in (*model.parameters(), *model.buffers())})


@torch.no_grad()
def seen(model: Any, layer: int, inputs: Inputs) -> tuple[Tensor, Tensor]:
    """What block ``layer``'s projection is given (B, T, d_in) and returns (B, T, d_out)."""
    found: list[Tensor] = []

    def keep(_module: object, args: tuple[Tensor, ...], out: Tensor) -> None:
        found.extend(t.reshape(*inputs["input_ids"].shape, -1) for t in (args[0], out))

    handle = describe(model).projection(layer).module.register_forward_hook(keep)
    try:
        prefill(model, inputs)
    finally:
        handle.remove()
    return found[0], found[1]


@torch.no_grad()
def prefill(model: Any, inputs: Inputs) -> Any:
    """Call the decoder as ``generate`` does first."""
    positions = (inputs["attention_mask"].cumsum(1) - 1).clamp(min=0)
    return describe(model).decoder(**inputs, position_ids=positions, use_cache=True)


def with_grace(model: nn.Module, layer: int, edited: Inputs) -> nn.Module:
    """The model with a codebook: an entry for each edited prompt, the others' keys random and far away."""
    model = twin(model)
    keys, outputs = seen(model, layer, edited)
    rows, last = torch.arange(len(keys)), last_token(edited["attention_mask"].bool()).cpu()
    keys, outputs = keys.cpu()[rows, last], outputs.cpu()[rows, last]
    generator = torch.Generator().manual_seed(0)
    filler = (
        torch.randn(ENTRIES - len(keys), keys.shape[1], generator=generator) * keys.square().mean().sqrt()
    )
    values = torch.randn(ENTRIES, outputs.shape[1], generator=generator) * outputs.square().mean().sqrt()
    memory = GraceMemory(keys.shape[1], outputs.shape[1], vars(GraceParams(layers=(layer,))))
    for number, (key, value) in enumerate(zip(torch.cat((filler, keys)), values, strict=True)):
        memory.codebook.place(key, value, [number], 1)
    if memory.n_entries != ENTRIES:
        raise SystemExit(f"grace: {memory.n_entries} entries were made, not {ENTRIES}")
    attach(model, layer, memory)
    return model


def with_wise(model: nn.Module, layer: int, edited: Inputs, unrelated: Inputs, count: int) -> nn.Module:
    """The model with side memories of which each knows the prompts of its share of the edited templates."""
    model = twin(model)
    params = {**vars(WiseParams(layers=(layer,))), "activation_ratio": 1.0}
    projection = describe(model).projection(layer)
    memory = WiseMemory(projection.d_in, projection.d_out, params)
    attach(model, layer, memory)
    state, generator = memory.state, torch.Generator().manual_seed(0)
    tokens = [
        seen(model, layer, inputs)[0][inputs["attention_mask"].bool()].double().cpu()
        for inputs in (edited, unrelated)
    ]
    template = torch.arange(len(edited["input_ids"])) % TEMPLATES
    of_token = template[:, None].expand(edited["input_ids"].shape)[edited["attention_mask"].bool().cpu()]
    x = torch.cat(tokens)
    ridge = 1e-3 * x.square().sum() / len(x) * torch.eye(x.shape[1], dtype=x.dtype)
    for number in range(count):
        own = torch.zeros(len(x), dtype=x.dtype)
        own[: len(of_token)] = (of_token % count == number).double()
        told = torch.linalg.solve(
            x.T @ x + ridge, x.T @ own
        )  # told · token is near 1 for its own, else near 0
        change = torch.outer(torch.randn(projection.d_out, generator=generator), told.float())
        weight = torch.empty_like(state.base, dtype=torch.float32)
        weight.copy_(state.base.float() + change.to(state.base.device))
        state.merged.append(SideMemory(weight, 0.0, facts=[number]))
    threshold = between(*(scores(model, inputs) for inputs in (edited, unrelated)))
    for side_memory in state.merged:
        side_memory.threshold = threshold
    return model


def scores(model: Any, inputs: Inputs) -> list[float]:
    prefill(model, inputs)
    return [row[0]["score"] for row in route_info(model)]


def between(edited: list[float], unrelated: list[float]) -> float:
    """A threshold that tells edited prompts from unrelated ones."""
    low, high = max(unrelated), min(edited)
    if not low < high:
        raise SystemExit(
            f"wise: unrelated prompts score up to {low:.3g}, edited ones from {high:.3g}: not apart"
        )
    return (low + high) / 2


# ---- generating -----------------------------------------------------------------------------------------


@torch.no_grad()
def generate(model: Any, inputs: Inputs, new_tokens: int, **options: Any) -> Any:
    return model.generate(
        **inputs, max_new_tokens=new_tokens, do_sample=False, eos_token_id=None, pad_token_id=0, **options
    )


class Generation:
    """A greedy generation that is taken one token at a time.

    Attributes:
        seconds: that each call of the model took.
    """

    def __init__(self, model: Any, inputs: Inputs, device: str) -> None:
        self.description, self.device, self.mask = describe(model), device, inputs["attention_mask"]
        self.seconds: list[float] = []
        self.ids, self.cache = inputs["input_ids"], None

    @torch.no_grad()
    def step(self) -> None:
        """One token of every prompt."""
        positions = (self.mask.cumsum(1) - 1).clamp(min=0)[:, -self.ids.shape[1] :]
        start = clock(self.device)
        out = self.description.decoder(
            input_ids=self.ids, attention_mask=self.mask, position_ids=positions, past_key_values=self.cache,
            use_cache=True,
        )  # fmt: skip
        logits = self.description.logits(out.last_hidden_state[:, -1])
        self.seconds.append(clock(self.device) - start)
        self.ids, self.cache = logits.argmax(-1, keepdim=True), out.past_key_values
        self.mask = torch.cat((self.mask, torch.ones_like(self.ids)), 1)


def clock(device: str) -> float:
    """Seconds, when all work given to the device is done."""
    if device == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter()


def timed(models: dict[str, Any], inputs: Inputs, new_tokens: int, device: str) -> dict[str, list[float]]:
    """Seconds of every token, the first one being the prompt's; the models take turns and each begins as often."""
    runs = {name: Generation(model, inputs, device) for name, model in models.items()}
    names = list(runs)
    for turn in range(new_tokens):
        first = turn % len(names)
        for name in names[first:] + names[:first]:
            runs[name].step()
    return {name: run.seconds for name, run in runs.items()}


class Waits(TorchDispatchMode):
    """Counts the operations whose result the host has to wait for."""

    names = ("_local_scalar_dense", "nonzero", "equal", "is_nonzero", "masked_select", "_unique2")

    def __init__(self) -> None:
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.count += func.overloadpacket.__name__ in self.names
        return func(*args, **(kwargs or {}))


class Lists(TorchFunctionMode):
    """Counts ``Tensor.tolist``, which no dispatch mode sees."""

    def __init__(self) -> None:
        super().__init__()
        self.count = 0

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.count += func is Tensor.tolist
        return func(*args, **(kwargs or {}))


def waits(model: Any, inputs: Inputs) -> tuple[float, float]:
    """How often the host waits in a generation's first token, and in each later one."""
    found = []
    for new_tokens in (1, 2, 6):  # the second token is not counted: a cache may be set up in it
        with ExitStack() as stack:
            modes = [stack.enter_context(Waits()), stack.enter_context(Lists())]
            generate(model, inputs, new_tokens)
        found.append(sum(mode.count for mode in modes))
    return found[0], (found[2] - found[1]) / 4


# ---- checks and measurements ----------------------------------------------------------------------------


def check_routes(name: str, model: Any, kind: str, inputs: Inputs) -> float:
    """The share of prompts that are routed, which must be as the kind of prompts says."""
    prefill(model, inputs)
    routed = [row[0]["route"] is not None for row in route_info(model)]
    wanted = {"edited": [True], "unrelated": [False], "mixed": [True, False]}[kind]
    if routed != (wanted * len(routed))[: len(routed)]:
        raise SystemExit(
            f"{name}: {sum(routed)} of {len(routed)} {kind} prompts are routed: nothing was timed"
        )
    return sum(routed) / len(routed)


def check_bits(models: dict[str, Any], inputs: Inputs, new_tokens: int = CHECKED_TOKENS) -> None:
    """Unrelated prompts get the unedited model's logits, bit for bit, at every token."""
    found = {
        name: generate(model, inputs, new_tokens, return_dict_in_generate=True, output_logits=True).logits
        for name, model in models.items()
    }
    for name, logits in found.items():
        if not all(torch.equal(one, other) for one, other in zip(logits, found[UNEDITED], strict=True)):
            raise SystemExit(f"{name}: logits of unrelated prompts have changed: nothing was timed")


def check_waits(models: dict[str, Any], inputs: Inputs) -> dict[str, tuple[float, float]]:
    """What :func:`waits` gives for every model, of two prompts: how many there are makes no difference."""
    few = {name: tensor[:2] for name, tensor in inputs.items()}
    found = {name: waits(model, few) for name, model in models.items()}
    for name, (_, later) in found.items():
        if later > found[UNEDITED][1]:
            raise SystemExit(f"{name}: a generated token waits for the device: nothing was timed")
    return found


def measure(name: str, options: argparse.Namespace) -> list[dict[str, Any]]:
    model, tokenizer = load(name)
    model, device, layer = model.to(options.device), options.device, LAYERS[name]
    texts = dict(zip(("edited", "unrelated"), prompts(), strict=True))
    edited, unrelated = (encoded(tokenizer, texts[kind], device) for kind in ("edited", "unrelated"))
    models = {UNEDITED: model, f"grace, {ENTRIES} entries": with_grace(model, layer, edited)}
    for count in WISE_MEMORIES:
        models[f"wise-retrieve, {count}"] = with_wise(model, layer, edited, unrelated, count)
    texts["mixed"] = [text for pair in zip(texts["edited"], texts["unrelated"], strict=True) for text in pair]
    rows = []
    for kind in ("unrelated", "edited", "mixed"):
        waited = check_waits(models, encoded(tokenizer, texts[kind], device))
        for batch in options.batches:
            if batch == 1 and kind == "mixed":
                continue
            print(name, kind, batch, file=sys.stderr)
            inputs = encoded(tokenizer, texts[kind][:batch], device)
            rows += compared(models, kind, inputs, waited, options)
    return [{"model": name, **row} for row in rows]


def compared(
    models: dict[str, Any],
    kind: str,
    inputs: Inputs,
    waited: dict[str, tuple[float, float]],
    options: argparse.Namespace,
) -> list[dict[str, Any]]:
    """A row for each memory on the same prompts."""
    n, (batch, length) = options.new_tokens, inputs["input_ids"].shape
    memories = [name for name in models if name != UNEDITED]
    routed = {name: check_routes(name, models[name], kind, inputs) for name in memories}
    if kind == "unrelated":
        check_bits(models, inputs)
    rounds = [timed(models, inputs, n, options.device) for _ in range(options.repetitions)]
    first = {name: [each[name][0] for each in rounds] for name in models}
    step = {name: [taken for each in rounds for taken in each[name][1:]] for name in models}

    def ratio(seconds: dict[str, list[float]], name: str) -> float:
        return statistics.median(a / b for a, b in zip(seconds[name], seconds[UNEDITED], strict=True))

    return [
        {
            "memory": name,
            "prompts": kind,
            "batch": batch,
            "prompt_tokens": length,
            "new_tokens": n,
            "routed": routed[name],
            "tokens_per_s": batch / statistics.median(step[name]),
            "unedited_tokens_per_s": batch / statistics.median(step[UNEDITED]),
            "speed_ratio": 1 / ratio(step, name),
            "first_token_ms": statistics.median(first[name]) * 1e3,
            "unedited_first_token_ms": statistics.median(first[UNEDITED]) * 1e3,
            "first_token_ratio": ratio(first, name),
            "waits_per_token": waited[name][1] - waited[UNEDITED][1],
            "waits_at_first_token": waited[name][0] - waited[UNEDITED][0],
        }
        for name in memories
    ]


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--models", nargs="+", default=MODELS, choices=MODELS)
    parser.add_argument(
        "--batches", nargs="+", type=int, default=[1, 8, 64], choices=range(1, PROMPTS + 1), metavar="B",
        help=f"prompts at a time, up to {PROMPTS}",
    )  # fmt: skip
    parser.add_argument("--new-tokens", type=int, default=32, help="tokens to generate, at least 2")
    parser.add_argument("--repetitions", type=int, default=3, help="timed generations")
    common.add_output_arguments(parser)
    options = parser.parse_args()
    rows = []
    for name in options.models:
        rows += measure(name, options)
        print(json.dumps(rows[-1]), file=sys.stderr)
    shown = (
        *COLUMNS[:4],
        "tokens_per_s",
        "speed_ratio",
        "first_token_ms",
        "first_token_ratio",
        *COLUMNS[-2:],
    )
    common.report("serving", rows, COLUMNS, shown, options)


if __name__ == "__main__":
    main()
