"""Train the demo model from scratch on the texts of ``corpus.py``, and measure what it learned.

    python -m fastedit.demo.train --out DIR

Documents are packed into blocks without padding; a document sees only itself. The loss is a weighted
mean of the token losses, with the weights that the corpus gives to its pieces.

Facts are to be editable at the subject, as they are in large models: what the hidden state at the
subject's last token carries has to decide the answer. A small model left alone reads its subjects in the
very first layers. So part of the documents come in pairs whose subjects exchange their hidden states
after a low layer while their answers are exchanged as well ("interchange interventions", Geiger et al.
2022, "Inducing causal structure for interpretable neural networks"). This costs nothing at run time and
leaves the architecture as it is.
"""

from __future__ import annotations

import argparse
import json
import logging
import math
import os
import random
import shutil
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from tqdm import tqdm

from fastedit.demo import corpus
from fastedit.demo.evaluate import evaluate_in_context, evaluate_recall

if TYPE_CHECKING:
    from transformers import LlamaForCausalLM, PreTrainedTokenizerFast

END = "<|endoftext|>"
CONTEXT_LENGTH = 512

logger = logging.getLogger(__name__)


@dataclass
class TrainSettings:
    """Sizes and schedule; the defaults are those of the packaged model."""

    steps: int = 4000
    rows: int = 4
    block: int = 256
    learning_rate: float = 1.5e-3
    final_learning_rate: float = 5e-5
    warmup: int = 100
    weight_decay: float = 0.05
    vocab_size: int = 3072
    hidden_size: int = 192
    intermediate_size: int = 640
    layers: int = 6
    heads: int = 4
    swap_layers: tuple[int, ...] = (1, 2)
    copy_until: float = 0.1
    easy_until: float = 0.3
    seed: int = 0
    tokenizer_documents: int = 20_000
    save_every: int = 500


# -- tokenizer ------------------------------------------------------------------------------------


def train_tokenizer(vocab_size: int, documents: int, seed: int) -> PreTrainedTokenizerFast:
    """A byte-level BPE tokenizer trained on the corpus. It adds no special tokens on its own."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    texts: list[str] = []
    stream = corpus.Corpus(seed, {"fact": 0.7, "description": 0.05, "context": 0.15, "prose": 0.1})
    for _ in range(documents):
        texts.extend(document.text for document in stream.documents())
    texts.append(corpus.neutral_text())
    for relation in corpus.relations():
        for subject, obj in relation.facts:
            texts += [f" {subject} {obj}"] * 5
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=[END],
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token=END,
        eos_token=END,
        pad_token=END,
        model_input_names=["input_ids", "attention_mask"],
        model_max_length=CONTEXT_LENGTH,
        clean_up_tokenization_spaces=False,
    )


# -- batches --------------------------------------------------------------------------------------


@dataclass
class Encoded:
    """A document as tokens: ids, loss weight per token, position of the first subject's last token."""

    ids: list[int]
    weights: list[float]
    subject_last: int


@dataclass
class Batch:
    """One training step's input. ``targets`` and ``weights`` are aligned with the position that predicts."""

    ids: torch.Tensor
    mask: torch.Tensor
    positions: torch.Tensor
    targets: torch.Tensor
    weights: torch.Tensor
    swaps: list[tuple[int, int]]


class Batches:
    """Packs the documents of a corpus into blocks of ``block`` tokens, ``rows`` at a time."""

    def __init__(self, tokenizer: Any, stream: corpus.Corpus, rows: int, block: int) -> None:
        self.stream, self.rows, self.block = stream, rows, block
        self.rng = random.Random(f"batches-{stream.rng.random()}")
        backend = tokenizer.backend_tokenizer
        self.end = int(tokenizer.eos_token_id)
        self._encode = lru_cache(maxsize=200_000)(lambda text: tuple(backend.encode(text).ids))
        self._waiting: list[tuple[Encoded, ...]] = []

    def encode(self, document: corpus.Document) -> Encoded:
        """Token ids of a document with the end token behind it, now and then also in front."""
        ids: list[int] = []
        weights: list[float] = []
        if self.rng.random() < 0.2:
            ids, weights = [self.end], [0.0]
        subject_last = -1
        for piece in document.pieces:
            tokens = self._encode(piece.text)
            ids.extend(tokens)
            weights.extend([piece.weight] * len(tokens))
            if piece.role == "subject" and subject_last < 0:
                subject_last = len(ids) - 1
        return Encoded([*ids, self.end], [*weights, 0.1], subject_last)

    def _group(self) -> tuple[Encoded, ...]:
        while True:
            documents = self.stream.documents()
            if len(documents) == 2:
                state = self.rng.getstate()
                first = self.encode(documents[0])
                self.rng.setstate(state)
                group: tuple[Encoded, ...] = (first, self.encode(documents[1]))
            else:
                group = (self.encode(documents[0]),)
            if sum(len(item.ids) for item in group) <= self.block:
                return group

    def _row(self) -> list[tuple[Encoded, ...]]:
        """Groups that fill one block nearly to the end (first fit over a small pool)."""
        row: list[tuple[Encoded, ...]] = []
        left = self.block
        while len(self._waiting) < 64:
            self._waiting.append(self._group())
        index = 0
        while index < len(self._waiting) and left > 8:
            size = sum(len(item.ids) for item in self._waiting[index])
            if size <= left:
                row.append(self._waiting.pop(index))
                left -= size
            else:
                index += 1
        return row

    def __iter__(self) -> Iterator[Batch]:
        while True:
            shape = (self.rows, self.block)
            ids = torch.full(shape, self.end, dtype=torch.long)
            weights = torch.zeros(shape)
            owner = torch.zeros(shape, dtype=torch.long)
            positions = torch.zeros(shape, dtype=torch.long)
            swaps: list[tuple[int, int]] = []
            for r in range(self.rows):
                start, number = 0, 0
                for group in self._row():
                    lasts = []
                    for item in group:
                        n = len(item.ids)
                        number += 1
                        ids[r, start : start + n] = torch.tensor(item.ids)
                        weights[r, start : start + n] = torch.tensor(item.weights)
                        weights[r, start] = 0.0
                        owner[r, start : start + n] = number
                        positions[r, start : start + n] = torch.arange(n)
                        lasts.append(r * self.block + start + item.subject_last)
                        start += n
                    if len(group) == 2:
                        swaps.append((lasts[0], lasts[1]))
            causal = torch.ones(self.block, self.block, dtype=torch.bool).tril()
            mask = (owner[:, None, :, None] == owner[:, None, None, :]) & causal
            targets = torch.roll(ids, -1, 1)
            shifted = torch.roll(weights, -1, 1)
            shifted[:, -1] = 0.0
            yield Batch(ids, mask, positions, targets, shifted, swaps)


# -- training -------------------------------------------------------------------------------------


def build_model(settings: TrainSettings) -> LlamaForCausalLM:
    """A freshly initialised model of the given sizes."""
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(settings.seed)
    config = LlamaConfig(
        vocab_size=settings.vocab_size,
        hidden_size=settings.hidden_size,
        intermediate_size=settings.intermediate_size,
        num_hidden_layers=settings.layers,
        num_attention_heads=settings.heads,
        num_key_value_heads=settings.heads,
        max_position_embeddings=CONTEXT_LENGTH,
        tie_word_embeddings=True,
        bos_token_id=0,
        eos_token_id=0,
        pad_token_id=0,
        initializer_range=0.04,
    )
    return LlamaForCausalLM(config)


class _Swap:
    """Forward hook that exchanges hidden states between given pairs of positions."""

    def __init__(self) -> None:
        self.index: torch.Tensor | None = None
        self.partner: torch.Tensor | None = None

    def set(self, pairs: list[tuple[int, int]]) -> None:
        both = pairs + [(b, a) for a, b in pairs]
        self.index = torch.tensor([a for a, _ in both]) if both else None
        self.partner = torch.tensor([b for _, b in both]) if both else None

    def __call__(self, module: torch.nn.Module, args: Any, output: Any) -> Any:
        if self.index is None or self.partner is None:
            return None
        hidden = output[0] if isinstance(output, tuple) else output
        flat = hidden.reshape(-1, hidden.shape[-1])
        swapped = flat.index_copy(0, self.index, flat[self.partner]).view_as(hidden)
        return (swapped, *output[1:]) if isinstance(output, tuple) else swapped


def batch_loss(model: LlamaForCausalLM, batch: Batch) -> torch.Tensor:
    """Weighted mean of the token losses; the head runs only where a token counts."""
    hidden = model.model(
        input_ids=batch.ids, attention_mask=batch.mask, position_ids=batch.positions, use_cache=False
    )
    chosen = batch.weights.flatten().nonzero().squeeze(1)
    logits = model.lm_head(hidden.last_hidden_state.flatten(0, 1)[chosen])
    losses = torch.nn.functional.cross_entropy(logits, batch.targets.flatten()[chosen], reduction="none")
    weights = batch.weights.flatten()[chosen]
    return (losses * weights).sum() / weights.sum()


def _learning_rate(settings: TrainSettings, step: int) -> float:
    if step < settings.warmup:
        return settings.learning_rate * (step + 1) / settings.warmup
    progress = (step - settings.warmup) / max(1, settings.steps - settings.warmup)
    low, high = settings.final_learning_rate, settings.learning_rate
    return low + 0.5 * (high - low) * (1.0 + math.cos(math.pi * progress))


def _mix(settings: TrainSettings, step: int) -> dict[str, float]:
    """What the texts are at a step: copying first, which teaches the model to look back, then all kinds."""
    done = step / settings.steps
    if done < settings.copy_until:
        return {"copy": 0.40, "easy": 0.25, "fact": 0.25, "context": 0.05, "prose": 0.05}
    if done < settings.easy_until:
        return {"copy": 0.08, "easy": 0.25, "fact": 0.30, "context": 0.25, "prose": 0.05, "swap": 0.07}
    return dict(corpus.DEFAULT_MIX)


def train(
    out: Path,
    settings: TrainSettings,
    *,
    init: Path | None = None,
    progress: bool = True,
    evaluate: bool = True,
) -> dict[str, float]:
    """Train, save to ``out`` and return the measured accuracies.

    Args:
        out: folder for model and tokenizer; replaced as a whole at each save.
        settings: sizes, schedule, seed.
        init: folder of an earlier model to go on from (its tokenizer is kept); from scratch without.
        progress: show a progress bar.
        evaluate: measure recall and in-context accuracy at the end.
    """
    model: LlamaForCausalLM
    if init is None:
        tokenizer = train_tokenizer(settings.vocab_size, settings.tokenizer_documents, settings.seed)
        settings.vocab_size = len(tokenizer)
        model = build_model(settings)
    else:
        from transformers import LlamaForCausalLM, PreTrainedTokenizerFast

        tokenizer = PreTrainedTokenizerFast.from_pretrained(init)
        model = LlamaForCausalLM.from_pretrained(init).float()
    model.train()
    decayed = [p for p in model.parameters() if p.dim() > 1]
    plain = [p for p in model.parameters() if p.dim() <= 1]
    optimizer = torch.optim.AdamW(
        [{"params": decayed, "weight_decay": settings.weight_decay}, {"params": plain, "weight_decay": 0.0}],
        lr=settings.learning_rate,
        betas=(0.9, 0.98),
        fused=True,
    )
    swap = {layer: _Swap() for layer in settings.swap_layers}
    for layer, hook in swap.items():
        model.model.layers[layer].register_forward_hook(hook)
    stream = corpus.Corpus(settings.seed)
    batches = iter(Batches(tokenizer, stream, settings.rows, settings.block))
    chooser = random.Random(f"layers-{settings.seed}")
    average = float("nan")
    bar = tqdm(range(settings.steps), disable=not progress, mininterval=10.0, dynamic_ncols=True)
    for step in bar:
        stream.mix = _mix(settings, step)
        batch = next(batches)
        layer = chooser.choice(settings.swap_layers)
        swap[layer].set(batch.swaps)
        for group in optimizer.param_groups:
            group["lr"] = _learning_rate(settings, step)
        loss = batch_loss(model, batch)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        swap[layer].set([])
        value = loss.item()
        average = value if math.isnan(average) else 0.98 * average + 0.02 * value
        if step % 20 == 0:
            bar.set_postfix(loss=f"{average:.3f}")
        if settings.save_every and (step + 1) % settings.save_every == 0 and step + 1 < settings.steps:
            save(model, tokenizer, out)
            if evaluate:
                _report(model, tokenizer, step + 1, average, sample=200)
    save(model, tokenizer, out)
    return _report(model, tokenizer, settings.steps, average) if evaluate else {"loss": average}


def _report(
    model: Any, tokenizer: Any, step: int, loss: float, sample: int | None = None
) -> dict[str, float]:
    model.eval()
    recall = evaluate_recall(model, tokenizer, sample=sample)
    context = evaluate_in_context(model, tokenizer, sample=sample or 600)
    model.train()
    measured = {"loss": loss, "recall": recall["accuracy"], "in_context": context["accuracy"]}
    logger.info("step %d: %s", step, {key: round(value, 4) for key, value in measured.items()})
    logger.info("in context: %s", {key: round(value, 3) for key, value in context.items()})
    return measured


def save(model: Any, tokenizer: Any, out: Path, dtype: torch.dtype = torch.bfloat16) -> None:
    """Write model and tokenizer to ``out``, all or nothing, for every transformers from 4.45 on."""
    out.parent.mkdir(parents=True, exist_ok=True)
    folder = Path(tempfile.mkdtemp(prefix=out.name + ".", dir=out.parent))
    try:
        from safetensors.torch import save_file

        config = model.config
        state = {name: tensor.detach().to(dtype).contiguous() for name, tensor in model.state_dict().items()}
        state.pop("lm_head.weight")  # tied to the embedding
        save_file(state, folder / "model.safetensors", metadata={"format": "pt"})
        # Written by hand: the names that save_pretrained chooses differ between versions of transformers.
        _write_json(
            folder / "config.json",
            {
                "architectures": ["LlamaForCausalLM"],
                "attention_bias": False,
                "attention_dropout": 0.0,
                "bos_token_id": 0,
                "eos_token_id": 0,
                "head_dim": config.hidden_size // config.num_attention_heads,
                "hidden_act": "silu",
                "hidden_size": config.hidden_size,
                "initializer_range": config.initializer_range,
                "intermediate_size": config.intermediate_size,
                "max_position_embeddings": config.max_position_embeddings,
                "mlp_bias": False,
                "model_type": "llama",
                "num_attention_heads": config.num_attention_heads,
                "num_hidden_layers": config.num_hidden_layers,
                "num_key_value_heads": config.num_key_value_heads,
                "pad_token_id": 0,
                "rms_norm_eps": config.rms_norm_eps,
                "rope_theta": 10000.0,
                "tie_word_embeddings": True,
                "torch_dtype": str(dtype).removeprefix("torch."),
                "use_cache": True,
                "vocab_size": config.vocab_size,
            },
        )
        _write_json(
            folder / "generation_config.json",
            {"_from_model_config": True, "bos_token_id": 0, "eos_token_id": 0, "pad_token_id": 0},
        )
        tokenizer.backend_tokenizer.save(str(folder / "tokenizer.json"))
        _write_json(
            folder / "tokenizer_config.json",
            {
                "add_prefix_space": False,
                "bos_token": END,
                "clean_up_tokenization_spaces": False,
                "eos_token": END,
                "model_input_names": ["input_ids", "attention_mask"],
                "model_max_length": CONTEXT_LENGTH,
                "pad_token": END,
                "tokenizer_class": "PreTrainedTokenizerFast",
            },
        )
        folder.chmod(0o755)
        for path in folder.iterdir():
            path.chmod(0o644)
        old = out.with_name(out.name + ".old")
        if out.exists():
            out.rename(old)
        os.replace(folder, out)
        shutil.rmtree(old, ignore_errors=True)
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def _write_json(path: Path, content: dict[str, Any]) -> None:
    path.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")


def main(arguments: list[str] | None = None) -> int:
    """Command line entry."""
    defaults = TrainSettings()
    parser = argparse.ArgumentParser(
        prog="python -m fastedit.demo.train",
        description="Train the demo model from scratch and measure it.",
        epilog="Example: python -m fastedit.demo.train --out /tmp/demo-model --steps 4000 --threads 2",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    parser.add_argument("--out", type=Path, required=True, help="folder for model and tokenizer")
    parser.add_argument("--init", type=Path, help="folder of an earlier model to go on from")
    parser.add_argument("--steps", type=int, default=defaults.steps, help="optimiser steps")
    parser.add_argument("--rows", type=int, default=defaults.rows, help="blocks per step")
    parser.add_argument("--block", type=int, default=defaults.block, help="tokens per block")
    parser.add_argument(
        "--learning-rate", type=float, default=defaults.learning_rate, help="highest learning rate"
    )
    parser.add_argument("--warmup", type=int, default=defaults.warmup, help="steps of rising learning rate")
    parser.add_argument("--layers", type=int, default=defaults.layers, help="decoder blocks")
    parser.add_argument("--hidden-size", type=int, default=defaults.hidden_size, help="width")
    parser.add_argument("--intermediate-size", type=int, default=defaults.intermediate_size, help="MLP width")
    parser.add_argument("--vocab-size", type=int, default=defaults.vocab_size, help="tokens of the tokenizer")
    parser.add_argument(
        "--save-every", type=int, default=defaults.save_every, help="steps between saves, 0 for none"
    )
    parser.add_argument(
        "--copy-until", type=float, default=defaults.copy_until, help="share of mostly copying"
    )
    parser.add_argument("--easy-until", type=float, default=defaults.easy_until, help="share until all kinds")
    parser.add_argument("--seed", type=int, default=defaults.seed, help="seed of weights and texts")
    parser.add_argument("--threads", type=int, default=1, help="CPU threads")
    chosen = parser.parse_args(arguments)
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(message)s")
    torch.set_num_threads(chosen.threads)
    options = {key: value for key, value in vars(chosen).items() if hasattr(defaults, key)}
    measured = train(chosen.out, TrainSettings(**options), init=chosen.init)
    logger.info("written to %s: %s", chosen.out, measured)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
