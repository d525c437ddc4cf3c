"""``get_context_templates`` with the correction that keeps templates apart by model."""

from __future__ import annotations

import weakref
from collections.abc import Callable
from typing import Any

from torch import nn

from ..patching import Context, Point


def get_context_templates(context: Context) -> Callable[..., Any]:
    """As published, templates sampled from one model serve all others in the process: here they are sampled anew."""
    last: list[weakref.ref[nn.Module]] = []

    def templates(model: nn.Module, *args: Any, **kwargs: Any) -> Any:
        if last and last[0]() is not model:
            context.namespace["CONTEXT_TEMPLATES_CACHE"] = None
        last[:] = [weakref.ref(model)]
        return context.original(model, *args, **kwargs)

    return templates


POINTS = tuple(
    Point(f"{module}:get_context_templates", get_context_templates)
    for module in (
        "rome.rome_main",
        "memit.memit_main",
        "memit.memit_seq_main",
        "memit.memit_rect_main",
        "AlphaEdit.AlphaEdit_main",
        "nse.nse_main",
        "emmet.emmet_main",
    )
)
