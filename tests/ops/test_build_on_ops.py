"""What ``docs/build_on_ops.md`` says is so."""

from __future__ import annotations

import doctest
import re
from pathlib import Path

import pytest
import torch

import fastedit.ops
import fastedit.testing

PAGE = Path(__file__).parents[2] / "docs" / "build_on_ops.md"
pytestmark = pytest.mark.skipif(not PAGE.exists(), reason="not a source tree: no docs/")


def registered():
    names = {name for name in torch._C._dispatch_get_all_op_names() if name.startswith("fastedit::")}
    return {name: getattr(torch.ops.fastedit, name.split("::")[1]).default._schema for name in names}


def test_the_table_of_names_is_what_is_registered():
    rows = re.findall(
        r"^\| `torch\.ops\.fastedit\.(\w+)` \| `(.*)` \|$", PAGE.read_text(encoding="utf-8"), re.M
    )
    assert [name for name, _ in rows] == sorted(name for name, _ in rows)
    documented = {
        f"fastedit::{name}": torch._C.parse_schema(f"fastedit::{name}{text}") for name, text in rows
    }
    assert documented == registered()


def test_every_operation_is_public_and_can_be_checked():
    names = {name.split("::")[1] for name in registered()} - {
        "covariance_layers_",
        "philox_bits_",
    }  # parts of others
    assert names == set(fastedit.testing.OPS)
    assert names <= set(fastedit.ops.__all__)


def test_examples_in_the_documentation_run():
    flags = doctest.IGNORE_EXCEPTION_DETAIL | doctest.ELLIPSIS
    assert doctest.testfile(str(PAGE), module_relative=False, optionflags=doctest.ELLIPSIS).failed == 0
    assert doctest.testmod(fastedit.testing, optionflags=flags).failed == 0
