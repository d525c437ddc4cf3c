"""What memory editors share: a side module at a projection, routing per sample, edits as things.

>>> editor = fastedit.editor("grace", model, tokenizer)          # doctest: +SKIP
>>> edit = editor.edit(facts)                                    # doctest: +SKIP
>>> model.generate(**batch); fastedit.memory.route_info(model)   # doctest: +SKIP
>>> edit.revert()                                                # doctest: +SKIP
"""

from __future__ import annotations

from .base import Decision, Memory, Routes
from .edit import Base, MemoryEdit, load_memory_edit
from .routing import forget_routes, last_token, prompts
from .side_module import SideModule, attach, clear_memories, detach, find_side, route_info, sides_of

__all__ = [
    "Base",
    "Decision",
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
    "load_memory_edit",
    "prompts",
    "route_info",
    "sides_of",
]
