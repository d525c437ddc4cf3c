"""SERAC beside a whole model: prompts in the scope of an edit are answered by a counterfactual model.

The base model always runs; where a sample is routed to an edit, its logits are replaced by those of the
counterfactual model, which reads the edit in front of the prompt. So everything that is made of logits works as ever:
greedy search, sampling, beams, scores. Samples that are not routed keep the very logits of the base model.

The route is decided once, at prefill, by the prompt's real tokens, and kept on the KV cache (see
:mod:`fastedit.memory.routing`). The counterfactual model has a KV cache of its own, with the routed samples only. It
stands beside the routes, follows the rows of the base model's cache, and is shortened when that one is cropped.

What it costs: a pass of the encoder for each prompt (none if the base model's states decide), and for routed samples
the counterfactual model beside the base model. :func:`generate` runs exactly one of the two models on each sample.

Calls of the decoder or the head by themselves see no memory, nor does ``PeftModel.forward``, which calls its base
model's ``forward`` without hooks; ``PeftModel.generate`` does see it.
"""

from __future__ import annotations

import inspect
import threading
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ..errors import BaseMismatch, CorruptFile, FasteditError, UnsupportedModel
from ..models.describe import describe, text_config, unwrap
from ..models.fingerprint import fingerprint
from ..models.tokens import pad_batch
from ..ops.key_index import KeyIndex
from .base import Decision, Memory, Routes
from .edit import MemoryEdit
from .encoder import pool
from .routing import Call, Key, Router, _put_on_cache, prompts, router_at, routers_of
from .scope import BASE, COUNTERFACTUAL, TOKENIZER, Scope, load_scope, trained_settings
from .side_module import SideModule, find_side

_SCOPE_NAMES = ("pooling", "similarity", "scale", "threshold", "normalise")


# ------------------------------------------------------------------ the two models beside the base


@dataclass
class Parts:
    """What SERAC has beside the base model.

    Attributes:
        scope: the classifier.
        counterfactual: the model that answers; None for the base model itself.
        tokenizer: the base model's, which the classifier's encoder needs to read ids; None without an encoder.
        digest: of the counterfactual model.
    """

    scope: Scope
    counterfactual: nn.Module | None
    tokenizer: Any
    digest: str


def load_parts(params: Mapping[str, Any], model: nn.Module, tokenizer: Any = None) -> Parts:
    """Load what the hyper-parameters of an edit name.

    Args:
        params: of :class:`fastedit.editors.serac.SeracParams`, all given.
        model: the base model.
        tokenizer: its tokenizer; None looks for it where the classifier was trained, where ``params`` say, and in the
            base model's own folder, if an encoder needs it.

    Raises:
        FasteditError: something cannot be loaded, or the counterfactual model has another vocabulary.
    """
    classifier = str(params["classifier"])
    trained = None if classifier == BASE else trained_settings(classifier)
    if trained is not None and trained["backbone"] == BASE and trained["base"] != fingerprint(model):
        raise BaseMismatch(f"the scope classifier {classifier} was trained on the states of another model")
    scope = load_scope(classifier, {name: params[name] for name in _SCOPE_NAMES}, params["layers"][0])
    if tokenizer is None and scope.encoder is not None:
        tokenizer = _base_tokenizer(params, model)
    counterfactual, digest = _load_counterfactual(str(params["counterfactual"]), model, tokenizer)
    return Parts(scope, counterfactual, None if scope.encoder is None else tokenizer, digest)


def _base_tokenizer(params: Mapping[str, Any], model: nn.Module) -> Any:
    from ..models.loading import first_tokenizer

    places = [
        str(Path(params["classifier"]) / TOKENIZER),
        params["tokenizer"],
        getattr(unwrap(model), "name_or_path", ""),
    ]
    tokenizer = first_tokenizer(places)
    if tokenizer is None:
        raise FasteditError(
            "the scope classifier reads text, so it needs the base model's tokenizer, which is in none of "
            f"{', '.join(place for place in places if place)}: name its folder, edit.params['tokenizer'] = ..."
        )
    return tokenizer


def _load_counterfactual(name: str, model: nn.Module, tokenizer: Any) -> tuple[nn.Module | None, str]:
    if name == BASE:
        return None, BASE
    from transformers import AutoModelForCausalLM

    from ..models.loading import load_tokenizer

    folder = str(Path(name) / COUNTERFACTUAL) if trained_settings(name) is not None else name
    try:
        loaded: Any = AutoModelForCausalLM.from_pretrained(folder)
    except (OSError, ValueError, ImportError) as error:
        raise FasteditError(f"cannot load the counterfactual model {folder}: {error}") from error
    try:
        theirs = load_tokenizer(folder)
    except (OSError, ValueError):
        theirs = None  # it has none of its own: the sizes decide
    require_same_vocabulary(model, tokenizer, loaded, theirs)
    return loaded.eval().requires_grad_(False), fingerprint(loaded)


def require_same_vocabulary(model: nn.Module, tokenizer: Any, other: nn.Module, theirs: Any) -> None:
    """Make sure that the logits of two models are about the same tokens; a tokenizer may be None.

    Raises:
        FasteditError: they are not.
    """
    sizes = text_config(model).vocab_size, text_config(other).vocab_size
    if sizes[0] != sizes[1]:
        raise FasteditError(
            f"the counterfactual model has {sizes[1]} tokens, the base model {sizes[0]}: it must have the base "
            "model's vocabulary, since its logits take the place of the base model's"
        )
    if tokenizer is not None and theirs is not None and tokenizer.get_vocab() != theirs.get_vocab():
        raise FasteditError(
            "the counterfactual model's tokenizer has other tokens than the base model's: it must have the base "
            "model's vocabulary, since its logits take the place of the base model's"
        )


# ------------------------------------------------------------------ the cache of edits


@dataclass
class Line:
    """One edit in the cache.

    Attributes:
        text: the prompt.
        prefix: ids of what the counterfactual model reads in front of a prompt.
        edit_id: the edit that it belongs to.
        embedding: (k,) fp32.
    """

    text: str
    prefix: list[int]
    edit_id: str
    embedding: Tensor


@dataclass
class Conversation:
    """What the counterfactual model has read: kept with the routes, one row for each routed sample.

    Attributes:
        cache: its KV cache; None before the prefill.
        mask: (rows, columns) int64, what of it is real.
        seen: columns that the base model's cache holds.
        arranged: the routes' payload that numbers the rows as they stand; another one has to be looked at.
    """

    cache: Any = None
    mask: Tensor | None = None
    seen: int = 0
    arranged: Tensor | None = None


@dataclass(frozen=True)
class SeracRoutes(Routes):
    """Routes whose payload (B,) int64 is each sample's row in the conversation."""

    conversation: Conversation = field(default_factory=Conversation)

    @cached_property
    def routed(self) -> Tensor:
        """(n,) the samples that a line answers, in order; found once, since it waits for the device."""
        return (self.index >= 0).nonzero()[:, 0]


class SeracMemory(Memory):
    """The cache of edits, and the two models that use it.

    An edit's content: ``embeddings`` (n, k) fp32, a row per fact, and in ``about`` the ``prefixes`` (ids), the
    ``leading`` special tokens that the prefixes begin with, and the ``classifier`` and ``counterfactual`` that it was
    made with. Any edit can be taken off. Of lines with the same prompt the newest answers.
    """

    method = "serac"
    settings = ("classifier", "counterfactual", "layers", "mix", *_SCOPE_NAMES)

    def __init__(
        self, d_in: int, d_out: int, params: Mapping[str, Any], profile: str = "clean", seed: int = 0
    ) -> None:
        super().__init__(d_in, d_out, params, profile, seed)
        if profile == "official":
            self.route_tokens = "all"
        self.parts: Parts | None = None
        self.clear()

    def clear(self) -> None:
        """Forget all edits."""
        self.lines: dict[int, Line] = {}  # by their id in the index
        self.leading: list[int] = []
        self._newest: dict[str, int] = {}  # prompt -> the line that answers
        self._beneath: dict[str, list[Line]] = {}  # prompt -> older lines, oldest first
        self._index: KeyIndex | None = None

    @property
    def scope(self) -> Scope:
        """The classifier."""
        assert self.parts is not None
        return self.parts.scope

    # -- serving ------------------------------------------------------------------------------------

    def route(self, inputs: Tensor, outputs: Tensor, tokens: Tensor) -> Decision:
        """The line most similar to each prompt, if it is similar enough; with ``mix="soft"`` in any case.

        Args:
            inputs: (B, T) token ids.
            outputs: (B, d) the base model's pooled states; not used if the classifier has an encoder.
            tokens: (B, T) bool.
        """
        nothing = torch.full((len(inputs),), -1, dtype=torch.int64, device=inputs.device)
        if self._index is None or not len(self._index) or not len(inputs):
            return Decision(nothing, nothing, nothing.float())
        queries = self.scope.embed(self._pooled(inputs, outputs, tokens))
        ids, distances = (found[:, 0].to(inputs.device) for found in self._index.neighbours(queries.cpu(), 1))
        similarity = self.scope.similarity(distances)
        hit = similarity > self.scope.settings.threshold
        if self.params["mix"] == "soft":
            hit = torch.ones_like(hit)
        index = torch.where(hit & tokens.any(1), ids, -1)
        return Decision(index, (index >= 0).long().cumsum(0) - 1, similarity)

    def _pooled(self, inputs: Tensor, outputs: Tensor, tokens: Tensor) -> Tensor:
        encoder = self.scope.encoder
        if encoder is None:
            return outputs
        assert self.parts is not None
        self.scope.to(inputs.device)
        decode = self.parts.tokenizer.decode
        texts = [
            decode(row[marked], skip_special_tokens=True) for row, marked in zip(inputs, tokens, strict=True)
        ]
        return encoder.pooled(texts, self.scope.settings.pooling)

    def apply(self, inputs: Tensor, outputs: Tensor, routes: Routes, tokens: Tensor | None) -> Tensor:
        """Put the counterfactual model's logits in their places.

        Args:
            inputs: (n, K, vocabulary) its logits, of the routed samples in order.
            outputs: (B, K, vocabulary) the base model's; left as they are.
            routes: at least one sample is routed.
            tokens: not used.
        """
        assert isinstance(routes, SeracRoutes)
        rows = routes.routed.to(outputs.device)
        inputs = inputs.to(outputs.device)
        if self.params["mix"] == "soft":
            assert routes.score is not None
            s = routes.score.to(outputs.device)[rows][:, None, None]
            mixed = (1 - s) * outputs[rows].float().softmax(-1) + s * inputs.float().softmax(-1)
            inputs = (mixed + torch.finfo(torch.float32).eps).log()
        return outputs.index_copy(0, rows, inputs.to(outputs.dtype))

    def attach_to(self, model: nn.Module) -> SideModule:
        """Stand beside a model."""
        return attach_to_model(model, self)

    def with_prefixes(self, index: Tensor, ids: Tensor, mask: Tensor) -> tuple[Tensor, Tensor]:
        """What the counterfactual model reads: the edits (n,) in front of the prompts (n, T), ids and mask.

        The prompts keep their columns, at the end. Special tokens that they begin with are masked: the edits have
        brought them.
        """
        mask = mask * (1 - _leading(ids, mask, self.leading))
        prefix, ahead, _ = pad_batch([self.lines[line].prefix for line in index.tolist()], 0, side="left")
        return torch.cat((prefix.to(ids), ids), 1), torch.cat((ahead.to(mask), mask), 1)

    # -- content ------------------------------------------------------------------------------------

    def add(self, edit: MemoryEdit) -> None:
        """Take in an edit's lines."""
        vectors, about = edit.content.get("embeddings"), edit.about
        prefixes = about.get("prefixes", [])
        if vectors is None or vectors.dim() != 2 or not len(vectors) == len(prefixes) == len(edit.facts):
            raise CorruptFile(f"{edit!r} must hold an embedding and a prefix for each of its facts")
        self._require_parts(edit)
        if self._index is None:
            self._index = KeyIndex(vectors.shape[1])
        if self._index.dim != vectors.shape[1]:
            raise BaseMismatch(
                f"{edit!r} has embeddings of width {vectors.shape[1]}, those here have {self._index.dim}"
            )
        self.leading = list(about["leading"])
        for fact, prefix, vector in zip(edit.facts, prefixes, vectors.float(), strict=True):
            self._add(Line(fact.text, list(prefix), edit.id, vector))

    def remove(self, edit_id: str) -> None:
        """Take an edit's lines out; older ones with the same prompt answer again."""
        for text, lines in list(self._beneath.items()):
            self._beneath[text] = [line for line in lines if line.edit_id != edit_id]
        for number, line in list(self.lines.items()):
            if line.edit_id == edit_id:
                self._drop(number)
                if below := self._beneath.get(line.text):
                    self._put(below.pop())
        self._beneath = {text: lines for text, lines in self._beneath.items() if lines}

    def _add(self, line: Line) -> None:
        if line.text in self._newest:
            older = self._drop(self._newest[line.text])
            self._beneath.setdefault(line.text, []).append(older)
        self._put(line)

    def _put(self, line: Line) -> None:
        assert self._index is not None
        (number,) = self._index.add(line.embedding[None], radius=0.0).tolist()
        self.lines[number], self._newest[line.text] = line, number

    def _drop(self, number: int) -> Line:
        assert self._index is not None
        self._index.remove(torch.tensor([number]))
        line = self.lines.pop(number)
        del self._newest[line.text]
        return line

    def _require_parts(self, edit: MemoryEdit) -> None:
        assert self.parts is not None
        now = {"classifier": self.scope.digest, "counterfactual": self.parts.digest}
        for name, digest in now.items():
            if edit.about.get(name) != digest:
                raise BaseMismatch(
                    f"{edit!r} was made with another {name} ({edit.about.get(name)}) than {self.params[name]!r} "
                    f"is now ({digest}): make it again, or put the former one back"
                )

    # -- reports ------------------------------------------------------------------------------------

    def owner(self, index: int) -> str | None:
        """The edit of a line."""
        return self.lines[index].edit_id if index in self.lines else None

    @property
    def n_entries(self) -> int:
        """Lines that can be routed to."""
        return len(self.lines)

    @property
    def n_bytes(self) -> int:
        """Bytes of the cache, and of the two models beside the base."""
        held = 0 if self._index is None else self._index.n_bytes
        modules = (
            [self.parts.counterfactual, getattr(self.parts.scope.encoder, "module", None)]
            if self.parts
            else []
        )
        return held + sum(p.nbytes for module in modules if module is not None for p in module.parameters())

    @property
    def prefill_flops(self) -> int:
        """A difference, a square and a sum for each element of each embedding; the encoder's pass comes on top."""
        return 0 if self._index is None else 3 * len(self._index) * self._index.dim


# ------------------------------------------------------------------ beside a model


class AnswerRouter(Router):
    """Follows the calls of a whole model, and lets its memories answer at the end of each."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__(model)
        self._inside: set[int] = set()  # threads in which the base model runs as the counterfactual one

    def __getstate__(self) -> dict[str, Any]:
        return {**super().__getstate__(), "_inside": set()}

    @torch.compiler.disable
    def begin(self, decoder: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """Forward pre-hook of the model."""
        if threading.get_ident() in self._inside or not any(side.enabled for side in self.sides):
            return
        super().begin(decoder, args, kwargs)
        call = self.call
        if call is None:
            return
        given = {**dict(zip(self._names, args, strict=False)), **kwargs}
        cache = given.get("past_key_values")
        if problem := _problem(given):
            del self._calls[threading.get_ident()]
            raise problem
        call.past = 0 if cache is None else int(cache.get_seq_length())
        call.noted.update(
            ids=given["input_ids"], keep=given.get("logits_to_keep", given.get("num_logits_to_keep"))
        )

    @torch.compiler.disable
    def end(self, decoder: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], out: Any) -> Any:
        """Forward hook of the model."""
        thread = threading.get_ident()
        if thread in self._inside:
            return None
        call = self._calls.pop(thread, None)
        if call is None or out is None:
            return None
        self._inside.add(thread)
        try:
            for side in self.sides:
                if side.enabled:
                    assert isinstance(side, SeracSide)
                    side.answer(call, out)
        finally:
            self._inside.discard(thread)
        _put_on_cache(call, getattr(out, "past_key_values", None))
        return out


def _problem(given: Mapping[str, Any]) -> Exception | None:
    """Why a call cannot be served, if it cannot."""
    if given.get("input_ids") is None:
        return UnsupportedModel("SERAC reads prompts, so it needs input_ids, got inputs_embeds")
    if given.get("labels") is not None:
        return ValueError(
            "a model with a SERAC memory takes no labels, since the loss would be the base model's: compute it from "
            "the logits"
        )
    cache = given.get("past_key_values")
    if isinstance(cache, (tuple, list)) and cache:
        return UnsupportedModel(
            "SERAC needs a cache object to follow its rows, got tuples of keys and values: use a newer transformers, "
            "or generate with use_cache=False inside fastedit.memory.prompts"
        )
    return None


class SeracSide(SideModule):
    """SERAC's memory beside a model.

    Attributes:
        model: the base model.
    """

    memory: SeracMemory

    def __init__(self, model: nn.Module, memory: SeracMemory, router: Router) -> None:
        super().__init__(memory, None, "", router)
        self.model = model

    @property
    def key(self) -> Key:
        """What routes are kept under."""
        return "", self.memory.method

    @torch.compiler.disable
    def watch(self, block: nn.Module, args: tuple[Any, ...], out: Any) -> None:
        """Forward hook of the block whose states decide: pools them at a prefill."""
        call = self.router.call
        if call is None or not self.enabled or call.routes(self.key, self.memory) is not None:
            return
        states = out[0] if isinstance(out, tuple) else out
        tokens = call.tokens(self.memory.route_tokens, states.device)
        call.noted["pooled"] = pool(states.detach(), tokens, self.memory.scope.settings.pooling)

    def answer(self, call: Call, out: Any) -> None:
        """Replace the logits of routed samples in a model's output."""
        ids: Tensor = call.noted["ids"]
        routes = call.routes(self.key, self.memory)
        if routes is None:
            tokens = call.tokens(self.memory.route_tokens, ids.device)
            with torch.no_grad():
                decision = self.memory.route(ids, call.noted.get("pooled", ids), tokens)
            routes = SeracRoutes.of(decision, self.memory.version)
            self.router.note(self.key, routes, call)
        if not routes.used:
            return
        assert isinstance(routes, SeracRoutes)
        keep = getattr(out, "past_key_values", None) is not None
        logits = out["logits"] if isinstance(out, dict) else None
        if logits is None:
            raise UnsupportedModel("a model with a SERAC memory must be called with return_dict=True")
        theirs = self._continue(call, routes, routes.routed.to(ids.device), keep)
        wanted = call.noted["keep"]
        theirs = (
            theirs[:, wanted]
            if isinstance(wanted, Tensor) and wanted.dim()
            else theirs[:, -logits.shape[1] :]
        )
        out["logits"] = self.memory.apply(theirs, logits, routes, None)

    @torch.no_grad()
    def _continue(self, call: Call, routes: SeracRoutes, rows: Tensor, keep: bool) -> Tensor:
        """(n, T, vocabulary): the counterfactual model's logits at this call's tokens, of the routed samples."""
        ids = call.noted["ids"][rows]
        mask = call.tokens("all", ids.device)[rows].long()
        talk = routes.conversation
        if talk.cache is None:
            ids, mask = self.memory.with_prefixes(routes.index[rows], ids, mask)
        else:
            self._follow(talk, routes, rows, call.past)
            assert talk.mask is not None
            mask = torch.cat((talk.mask, mask), 1)
        beyond = call.tokens("all", ids.device)[rows] & ~call.tokens("prompt", ids.device)[rows]
        with prompts(
            self.model, mask.sum(1) - beyond.sum(1)
        ):  # for other memories, if the base model answers
            out = self._run(ids, mask, talk.cache, keep)
        if keep:
            talk.cache, talk.mask, talk.seen = out.past_key_values, mask, call.past + call.size[1]
            talk.arranged = routes.payload
        logits: Tensor = out.logits
        return logits[:, -call.size[1] :]

    def _follow(self, talk: Conversation, routes: SeracRoutes, rows: Tensor, past: int) -> None:
        """Bring the conversation's rows and columns to those of the base model's cache."""
        assert talk.mask is not None
        assert routes.payload is not None
        if past > talk.seen:
            raise FasteditError(
                f"the KV cache holds {past} columns, of which the counterfactual model has seen {talk.seen}: begin "
                "with a new cache"
            )
        if past < talk.seen:
            talk.mask = talk.mask[:, : talk.mask.shape[1] - (talk.seen - past)]
            talk.cache.crop(talk.mask.shape[1])
        if routes.payload is talk.arranged:
            return
        slots = routes.payload[rows]
        if slots.tolist() != list(range(len(talk.mask))):
            talk.mask = talk.mask[slots]
            talk.cache = _rows(talk.cache, slots)
        routes.payload[rows] = torch.arange(len(rows), device=routes.payload.device)

    def _run(self, ids: Tensor, mask: Tensor, cache: Any, keep: bool) -> Any:
        model = self.counterfactual(ids.device)
        limit = describe(model).context_length
        if limit is not None and mask.shape[1] > limit and int(mask.sum(1).max()) > limit:
            raise ValueError(
                f"edit and text take {int(mask.sum(1).max())} tokens, the counterfactual model's context holds "
                f"{limit}"
            )
        more: dict[str, Any] = {"past_key_values": cache} if cache is not None else {}
        if "position_ids" in inspect.signature(model.forward).parameters:
            more["position_ids"] = (mask.cumsum(1) - 1).clamp(min=0)[:, -ids.shape[1] :]
        routers = routers_of(self.model)
        noted = [router.last for router in routers]
        out = model(input_ids=ids, attention_mask=mask, use_cache=keep, return_dict=True, **more)
        for router, last in zip(routers, noted, strict=True):
            router.last = last  # reports are about the samples, not about what the counterfactual model read
        return out

    def counterfactual(self, device: torch.device) -> nn.Module:
        """The model that answers, on this device."""
        assert self.memory.parts is not None
        other = self.memory.parts.counterfactual
        if other is None:
            return self.model
        return other if next(other.parameters()).device == device else other.to(device)


def _leading(ids: Tensor, mask: Tensor, leading: list[int]) -> Tensor:
    """(B, T) int64, 1 at the special tokens that a prompt begins with: the prefix has brought them."""
    place = mask.cumsum(1) * mask - 1
    found = torch.zeros_like(mask)
    for position, token in enumerate(leading):
        found |= ((place == position) & (ids == token)).long()
    return found


def _rows(cache: Any, rows: Tensor) -> Any:
    """A KV cache, or tuples of keys and values, with these rows."""
    if isinstance(cache, tuple):
        return tuple(_rows(part, rows) for part in cache)
    if isinstance(cache, Tensor):
        return cache.index_select(0, rows.to(cache.device))
    cache.reorder_cache(rows)
    return cache


def attach_to_model(model: nn.Module, memory: SeracMemory) -> SeracSide:
    """Put SERAC's memory beside a model; loads its two models if it does not have them.

    Raises:
        FasteditError: there is one already, or its models cannot be loaded.
    """
    model = unwrap(model)
    if find_side(model, None, memory.method) is not None:
        raise FasteditError(f"the model has a {memory.method} memory already")
    if memory.parts is None:
        memory.parts = load_parts(memory.params, model)
    router = router_at(model)
    if router is None:
        router = AnswerRouter(model)
        router.hook(model)
    side = SeracSide(model, memory, router)
    if memory.scope.encoder is None:
        describe(model).blocks[memory.scope.layer].register_forward_hook(side.watch)
    router.sides.append(side)
    return side


class _Enough(Exception):
    """Ends a forward pass once the states wanted have been seen."""


@torch.no_grad()
def base_states(model: nn.Module, ids: Tensor, mask: Tensor, layer: int, pooling: str) -> Tensor:
    """(B, d) pooled output of block ``layer`` for ids and mask (B, T); the blocks above are not run."""
    found: list[Tensor] = []

    def keep(_module: object, _args: object, out: Any) -> None:
        found.append(pool(out[0] if isinstance(out, tuple) else out, mask.bool(), pooling))
        raise _Enough

    description = describe(model)
    hook = description.blocks[layer].register_forward_hook(keep)
    try:
        positions = (mask.cumsum(1) - 1).clamp(min=0)
        more = {}
        if "position_ids" in inspect.signature(description.decoder.forward).parameters:
            more["position_ids"] = positions
        description.decoder(input_ids=ids, attention_mask=mask, use_cache=False, **more)
    except _Enough:
        pass
    finally:
        hook.remove()
    return found[0]


@torch.no_grad()
def generate(
    model: nn.Module, input_ids: Tensor, attention_mask: Tensor | None = None, **options: Any
) -> Tensor:
    """As ``model.generate``, but with one model for each sample: base or counterfactual, never both.

    Sampled text is drawn in another order than by ``model.generate``. If the base model's states decide, its blocks
    up to that of the classifier are run once on the prompts.

    Args:
        model: a model; without a SERAC memory this is ``model.generate``.
        input_ids: (B, T), padded on the left.
        attention_mask: (B, T); None if nothing is padding.
        **options: of ``model.generate``, which must not ask for anything but the ids.

    Returns:
        (B · num_return_sequences, T + new tokens), padded on the right.

    Raises:
        ValueError: the memory mixes both models' answers, or ``return_dict_in_generate`` was asked for.
    """
    model = unwrap(model)
    side = find_side(model, None, SeracMemory.method)
    mask = torch.ones_like(input_ids) if attention_mask is None else attention_mask
    if side is None or not side.enabled:
        return model.generate(input_ids=input_ids, attention_mask=mask, **options)  # type: ignore[operator]
    assert isinstance(side, SeracSide)
    memory = side.memory
    if memory.params["mix"] != "hard" or options.get("return_dict_in_generate"):
        raise ValueError("one model for each sample needs mix='hard', and returns ids only")
    settings = memory.scope.settings
    pooled = input_ids
    if memory.scope.encoder is None:
        pooled = base_states(model, input_ids, mask, memory.scope.layer, settings.pooling)
    index = memory.route(input_ids, pooled, mask.bool()).index
    parts: list[tuple[Tensor, Tensor]] = []
    with side.suspended():
        for rows in ((index < 0).nonzero()[:, 0], (index >= 0).nonzero()[:, 0]):
            if not len(rows):
                continue
            ids, real, runs = input_ids[rows], mask[rows], model
            if int(index[rows[0]]) >= 0:
                ids, real = memory.with_prefixes(index[rows], ids, real)
                runs = side.counterfactual(ids.device)
            out = runs.generate(input_ids=ids, attention_mask=real, **options)  # type: ignore[operator]
            parts.append((rows, out[:, ids.shape[1] - input_ids.shape[1] :]))
    return _merged(parts, len(index), _padding(model, options))


def _merged(parts: list[tuple[Tensor, Tensor]], n: int, padding: int) -> Tensor:
    """Sequences of some rows each, in the order of the rows."""
    first = parts[0][1]
    each, width = len(first) // len(parts[0][0]), max(out.shape[1] for _, out in parts)
    result = first.new_full((n, each, width), padding)
    for rows, out in parts:
        result[rows, :, : out.shape[1]] = out.reshape(len(rows), each, -1)
    return result.reshape(n * each, width)


def _padding(model: Any, options: Mapping[str, Any]) -> int:
    for value in (
        options.get("pad_token_id"),
        model.generation_config.pad_token_id,
        options.get("eos_token_id"),
    ):
        if isinstance(value, int):
            return value
    end = model.generation_config.eos_token_id
    return end if isinstance(end, int) else (end or [0])[0]


def answers(model: nn.Module) -> bool:
    """Whether a memory answers for the whole model, so that its decoder and head are not all of it."""
    router = router_at(unwrap(model))
    return router is not None and any(side.enabled for side in router.sides)
