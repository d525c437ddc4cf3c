"""Readers of the public data sets' own file formats, and of lists of facts."""

from .facts import load_facts, parse_fact
from .files import read_values
from .formats import FORMATS, detect_format, load_records, records_from
from .records import Item, Record, Records, Skipped, answer_groups, flatten_answers
from .texts import Snippets, load_snippets, load_texts

__all__ = [
    "FORMATS",
    "Item",
    "Record",
    "Records",
    "Skipped",
    "Snippets",
    "answer_groups",
    "detect_format",
    "flatten_answers",
    "load_facts",
    "load_records",
    "load_snippets",
    "load_texts",
    "parse_fact",
    "read_values",
    "records_from",
]
