"""Statistics of keys, C = E[k kᵀ]: collected in one streaming pass, kept in files."""

from __future__ import annotations

from .cache import cache_directory, collect_and_save, ensure
from .collect import collect
from .npz import npz_path
from .statistics import Statistics, load_directory, save_directory
from .texts import hash_texts, read_texts

__all__ = [
    "Statistics",
    "cache_directory",
    "collect",
    "collect_and_save",
    "ensure",
    "hash_texts",
    "load_directory",
    "npz_path",
    "read_texts",
    "save_directory",
]
