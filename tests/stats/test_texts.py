from __future__ import annotations

import gzip
import io
import json

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fastedit import CorruptFile
from fastedit.stats import hash_texts, read_texts
from fastedit.stats.tokens import Position, TokenStream

TEXTS = ["One paragraph\nof two lines.", "Zwei: äöü 東京", "three"]


def write(path, texts):
    content = {
        ".txt": "\n\n  \n\n".join(texts) + "\n",
        ".json": json.dumps([texts[0], *({"text": text, "id": 1} for text in texts[1:]), ""]),
        ".jsonl": "\n".join(json.dumps({"text": text} if i else text) for i, text in enumerate(texts))
        + "\n\n",
    }[path.suffixes[0]].encode()
    path.write_bytes(gzip.compress(content) if path.suffix == ".gz" else content)
    return path


@pytest.mark.parametrize("name", ["a.txt", "a.json", "a.jsonl", "a.txt.gz", "a.json.gz", "a.jsonl.gz"])
def test_read_texts(name, tmp_path):
    assert list(read_texts(write(tmp_path / name, TEXTS))) == TEXTS


def test_read_several_files_and_standard_input(tmp_path):
    first = write(tmp_path / "a.jsonl", TEXTS)
    assert list(read_texts(first, "-", stdin=io.StringIO("x\n\ny"))) == [*TEXTS, "x", "y"]


def test_long_paragraph_ends_with_its_line(tmp_path):
    (tmp_path / "a.txt").write_text("A line of a corpus without empty lines.\n" * 1000)
    texts = list(read_texts(tmp_path / "a.txt"))
    assert len(texts) == 20
    assert all(text.endswith("lines.") for text in texts)


def test_reading_streams(tmp_path):
    path = tmp_path / "a.jsonl"
    path.write_text('"first"\n' + "not json\n")
    texts = read_texts(path)
    assert next(texts) == "first"
    with pytest.raises(CorruptFile, match="line 2"):
        next(texts)


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("a.txt", b"\xff\xfe\xfa"),
        ("a.txt.gz", gzip.compress(b"text " * 1000, mtime=0)[:40]),
        ("a.txt.gz", b"plain"),
        ("a.json", b'["cut'),
        ("a.json", b'{"text": "not a list"}'),
        ("a.json", b"[1]"),
        ("a.jsonl", b'{"txt": "other field"}'),
    ],
)
def test_damaged_file_is_named(name, content, tmp_path):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(CorruptFile, match=name):
        list(read_texts(tmp_path / name))


def test_unknown_or_missing_file_is_refused_at_once(tmp_path):
    (tmp_path / "a.csv").write_text("x")
    with pytest.raises(ValueError, match=r"\.jsonl"):
        read_texts(tmp_path / "a.csv")
    with pytest.raises(FileNotFoundError, match=r"b\.txt"):
        read_texts(tmp_path / "b.txt")


@given(st.lists(st.text(), max_size=4), st.lists(st.text(), max_size=4))
def test_hash_tells_lists_of_texts_apart(a, b):
    assert (hash_texts(a) == hash_texts(b)) == (a == b)


class Letters:
    """A tokenizer of letters."""

    def __call__(self, texts, max_length, **_):
        return {"input_ids": [[ord(letter) for letter in text][:max_length] for text in texts]}


def stream(texts, n_tokens=None, group_tokens=50):
    return TokenStream(
        iter(texts),
        Letters(),
        n_tokens=n_tokens,
        max_length=10,
        group_tokens=group_tokens,
        add_special_tokens=True,
    )


@given(st.lists(st.text("abc", max_size=15), max_size=250), st.one_of(st.none(), st.integers(0, 900)))
def test_stream_spends_the_budget_in_the_order_of_the_texts(texts, n_tokens):
    tokens = stream(texts, n_tokens)
    found = [letter for group in tokens.groups() for ids in group for letter in ids]
    expected = [ord(letter) for text in texts for letter in text[:10]]
    assert found == expected[: len(expected) if n_tokens is None else n_tokens]
    assert tokens.position.n_tokens == len(found)


@settings(max_examples=30)
@given(st.lists(st.text("abc", min_size=1, max_size=15), min_size=101, max_size=350), st.integers(0, 3))
def test_stream_goes_on_where_it_was(texts, n_groups):
    whole = stream(texts)
    seen: list[tuple[Position, Position, list[list[int]]]] = []
    for group in whole.groups():
        seen.append((whole.group_start, whole.position, group))
    start, end, _ = seen[min(n_groups, len(seen) - 1)]
    again = stream(texts)
    assert again.skip_to(start, end)
    assert list(again.groups()) == [group for begin, _, group in seen if begin.n_texts >= start.n_texts]
    other = stream([*texts[: end.n_texts - 1], "different"])
    assert not other.skip_to(start, end)
    assert other.position == Position()
    assert len(next(other.groups())[0]) == len(texts[0][:10]) or end.n_texts == 1
