"""What memory editors share: a side module at a projection, routing per sample, edits as things.

>>> editor = fastedit.editor("grace", model, tokenizer)          # doctest: +SKIP
>>> edit = editor.edit(facts)                                    # doctest: +SKIP
>>> model.generate(**batch); fastedit.memory.route_info(model)   # doctest: +SKIP
>>> edit.revert()                                                # doctest: +SKIP
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from .base import Decision, Memory, Routes
    from .directory import load_model, save_model
    from .edit import Base, MemoryEdit
    from .fact_store import Entry, FactStore
    from .routing import forget_routes, last_token, prompts
    from .side_module import SideModule, attach, clear_memories, detach, find_side, route_info, sides_of

_LAZY = {
    **dict.fromkeys(("Decision", "Memory", "Routes"), ".base"),
    **dict.fromkeys(("load_model", "save_model"), ".directory"),
    **dict.fromkeys(("Base", "MemoryEdit"), ".edit"),
    **dict.fromkeys(("Entry", "FactStore"), ".fact_store"),
    **dict.fromkeys(("forget_routes", "last_token", "prompts"), ".routing"),
    **dict.fromkeys(
        ("SideModule", "attach", "clear_memories", "detach", "find_side", "route_info", "sides_of"),
        ".side_module",
    ),
}

__all__ = [
    "Base",
    "Decision",
    "Entry",
    "FactStore",
    "Memory",
    "MemoryEdit",
    "Routes",
    "SideModule",
    "attach",
    "clear_memories",
    "detach",
    "find_side",
    "forget_routes",
    "last_token",
    "load_model",
    "prompts",
    "route_info",
    "save_model",
    "sides_of",
]


def __getattr__(name: str) -> Any:
    if name in _LAZY:
        return getattr(importlib.import_module(_LAZY[name], __name__), name)
    raise AttributeError(f"module 'fastedit.memory' has no attribute {name!r}")
