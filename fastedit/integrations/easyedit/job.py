"""One call of an ``execute_*`` function of EasyEdit, checked and prepared, and what its single functions share."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from copy import deepcopy
from typing import Any

from torch import Tensor, nn

from ...editors.prompts import FactRows
from ..locate import Request, covered_model, value_rows
from ..patching import Context, NotCovered, follow
from ..research.job import Job as ResearchJob
from ..research.job import lookup_of
from ..research.statistics import expecting

AT_WORDS = "get_module_input_output_at_words"
WORDS = "repr_tools.get_words_idxs_in_templates"
READ = ("repr_tools.get_reprs_at_word_tokens", "repr_tools.get_reprs_at_idxs")


class Job(ResearchJob):
    """As in the research repositories, with EasyEdit's requests and its ``get_cov``.

    Args:
        context: of the replaced function.
        model: the user's model.
        tokenizer: its tokenizer.
        requests: dictionaries with ``prompt``, ``subject``, ``target_new``, and ``case_id`` where values are cached.
        hparams: EasyEdit's hyper-parameters.
        always: put ``{}`` for the subject also into prompts that have one already, as AlphaEdit does.

    Raises:
        NotCovered: something that our pipeline does not compute as EasyEdit does.
    """

    def __init__(
        self,
        context: Context,
        model: nn.Module,
        tokenizer: Any,
        requests: Sequence[Mapping[str, Any]],
        hparams: Any,
        *,
        always: bool = False,
    ) -> None:
        self.context, self.model, self.tokenizer, self.hparams = context, model, tokenizer, hparams
        self.description = covered_model(model, tokenizer, hparams)
        self.requests = [_request(each, always) for each in deepcopy(list(requests))]
        groups = context.namespace["get_context_templates"](model, tokenizer)
        if groups[0] != ["{}"] or len(groups) > 2:
            raise NotCovered("the context templates are not the bare one and one group of others")
        self.contexts = [each for group in groups for each in group]
        self.weights: dict[str, Tensor] = {
            projection.weight_name: projection.weight
            for projection in (self.description.projection(layer) for layer in hparams.layers)
        }
        compute = follow(context.original, "compute_z")
        self.rows = rows_of(
            compute, tokenizer, self.requests, self.contexts, self.description.context_length, trim=True
        )

    def covariance(self, layer: int) -> Tensor:
        """EasyEdit's second moment of a layer, from its own cache, which is filled if need be."""
        hparams, space = self.hparams, self.context.namespace
        name = hparams.rewrite_module_tmp.format(layer)
        model: Any = self.model
        key = model.config._name_or_path.replace("/", "_"), name
        if key not in space["COV_CACHE"]:
            get_cov(self.context, model, self.tokenizer, name, hparams)
        moment: Tensor = space["COV_CACHE"][key]
        return moment


def _request(given: Mapping[str, Any], always: bool) -> Request:
    """A request as the execute functions rewrite it."""
    prompt, subject, target = given["prompt"], given["subject"], given["target_new"]
    if target[0] != " ":
        target = " " + target
    if "{}" not in prompt and subject not in prompt:
        raise NotCovered("a subject does not occur in its prompt")
    if always or "{}" not in prompt:
        prompt = prompt.replace(subject, "{}")
    if prompt.count("{}") != 1:
        raise NotCovered("a prompt does not have exactly one {}")
    return Request(prompt, subject, target, given.get("case_id"))


def rows_of(
    compute: Callable[..., Any],
    tokenizer: Any,
    requests: Sequence[Request],
    contexts: Sequence[str],
    context_length: int | None,
    *,
    trim: bool,
) -> list[FactRows]:
    """Token rows as EasyEdit makes them.

    Args:
        compute: the original ``compute_z`` or ``compute_v``, which leads to its look-up.
        tokenizer: the user's.
        requests: the facts.
        contexts: flat list of templates.
        context_length: the model's, or None.
        trim: leave out a BOS or UNK at the beginning of a target.
    """

    def trimmed(ids: list[int]) -> list[int]:
        drop = trim and ids and ids[0] in (tokenizer.bos_token_id, tokenizer.unk_token_id)
        return ids[1:] if drop else ids

    lookup = lookup_of(compute, WORDS, tokenizer)
    return value_rows(tokenizer, requests, contexts, lookup, trimmed, context_length, special_tokens=False)


def get_cov(context: Context, model: Any, tokenizer: Any, name: str, hparams: Any) -> Tensor:
    """EasyEdit's own ``get_cov``; statistics that must be collected are collected for all its layers at once."""
    names = [hparams.rewrite_module_tmp.format(layer) for layer in hparams.layers]
    with expecting(model, names):
        moment: Tensor = context.namespace["get_cov"](
            model,
            tokenizer,
            name,
            hparams.mom2_dataset,
            hparams.mom2_n_samples,
            hparams.mom2_dtype,
            hparams=hparams,
        )
    return moment
