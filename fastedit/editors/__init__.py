"""Editing methods: one file per method, families share a base."""

from .base import Editor, editor, editor_class, methods, register_editor

__all__ = ["Editor", "editor", "editor_class", "methods", "register_editor"]
