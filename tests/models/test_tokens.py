from __future__ import annotations

import warnings

import pytest
import torch
from helpers import data_folder
from hypothesis import given, settings
from hypothesis import strategies as st
from model_configs import tiny_tokenizer

from fastedit.errors import UnsupportedModel
from fastedit.models import (
    TokenizedPrompt,
    encode_prompt,
    encode_with_subject,
    has_bos,
    leading_specials,
    official_subject_last_index,
    pad_batch,
    pad_id,
    subject_last_index,
    target_ids,
    tokenize_prompt,
)
from fastedit.models.tokens import shared_starts

REAL = ("gpt2", "llama2", "gpt-neox")
_loaded: dict[str, object] = {}


def load(name):
    """A tokenizer by name: one of the real ones, or the tiny one with or without BOS."""
    if name not in _loaded:
        if name.startswith("tiny"):
            _loaded[name] = tiny_tokenizer(add_bos=name == "tiny-bos")
        else:
            from transformers import AutoTokenizer

            folder = data_folder("models", "tokenizers", name)
            with warnings.catch_warnings():
                warnings.filterwarnings("ignore", "`clean_up_tokenization_spaces` was not set", FutureWarning)
                _loaded[name] = AutoTokenizer.from_pretrained(folder)
    return _loaded[name]


tokenizers = pytest.mark.parametrize("name", [*REAL, "tiny", "tiny-bos"])

CASES = [
    ("{} is the capital of France", "Paris"),
    ("The capital of {} is", "France"),
    ("The mother tongue of {} is", "Danielle Darrieux"),
    ("The city of {}, in", "Zürich"),
    ("{} and {", "Café Müller"),
    ("In {}. Then", "1990"),
    ("{}: what it is", "東京"),
    ("They say {} lies in", "Владивосток"),
    ("Emoji {} here", "🙂🚀"),
    ("The band {} plays", "Guns N'"),
    ('"{}" plays the', "Miles Davis"),
    ("The players' {} of", "Apollo 11"),
    ("{}", "France"),
    ("The capital of {}", "France"),
    ("The height of {} (metres)", "K2"),
    ("\n\n{} was born", "Edwin of Northumbria"),
    ("Context one. Two, three. {} works as", "Jean-Luc Picard"),
]


@tokenizers
@pytest.mark.parametrize(("template", "subject"), CASES)
def test_6_subject_last_agrees_with_the_official_formula(name, template, subject):
    tokenizer = load(name)
    prompt = tokenize_prompt(tokenizer, template, subject)
    end = template.index("{}") + len(subject)
    text = template.replace("{}", subject)
    assert prompt.ids == tokenizer(text)["input_ids"] == encode_prompt(tokenizer, text)
    assert prompt.subject_last == subject_last_index(tokenizer, text, end)
    assert prompt.subject_last == official_subject_last_index(tokenizer, text, end)


@tokenizers
@pytest.mark.parametrize(("template", "subject"), CASES)
def test_prefix_up_to_subject_decodes_to_it(name, template, subject):
    tokenizer = load(name)
    ids, last = tokenize_prompt(tokenizer, template, subject)
    upto = tokenizer.decode(ids[: last + 1], skip_special_tokens=True, clean_up_tokenization_spaces=False)
    assert upto.endswith(subject)


@tokenizers
def test_index_without_special_tokens(name):
    tokenizer = load(name)
    text = "The capital of France is"
    with_specials = subject_last_index(tokenizer, text, 21)
    without = subject_last_index(tokenizer, text, 21, add_special_tokens=False)
    assert with_specials - without == len(leading_specials(tokenizer)) == int(has_bos(tokenizer))


@pytest.mark.parametrize(
    ("name", "expected"),
    [("gpt2", False), ("llama2", True), ("gpt-neox", False), ("tiny", False), ("tiny-bos", True)],
)
def test_bos_is_asked_of_the_tokenizer(name, expected):
    assert has_bos(load(name)) is expected


def test_token_that_merges_subject_and_punctuation():
    """GPT-2 has one token for ``!!``: it holds the subject's last character and is the one chosen."""
    tokenizer = load("gpt2")
    text = "Wham!!"
    index = subject_last_index(tokenizer, text, len("Wham!"))
    ids = tokenizer(text)["input_ids"]
    assert tokenizer.decode([ids[index]]) == "!!"
    whole = tokenize_prompt(tokenizer, "{}!", "Wham!")
    assert whole == TokenizedPrompt(ids, index)


def test_subject_ending_inside_a_word():
    tokenizer = load("gpt2")
    index = subject_last_index(tokenizer, "unbelievable", 3)
    ids = tokenizer("unbelievable")["input_ids"]
    assert "unbelievable".startswith(tokenizer.decode(ids[: index + 1]))
    assert len(tokenizer.decode(ids[: index + 1])) >= 3


@tokenizers
def test_white_space_at_subject_end_is_not_counted(name):
    tokenizer = load(name)
    text = "The capital of France  is"
    assert subject_last_index(tokenizer, text, 23) == subject_last_index(tokenizer, text, 21)
    assert (
        tokenize_prompt(tokenizer, "In {}is", "France ").subject_last
        == tokenize_prompt(tokenizer, "In {} is", "France").subject_last
    )


@tokenizers
@settings(max_examples=200, deadline=None)
@given(
    prefix=st.text(max_size=12),
    subject=st.text(min_size=1, max_size=12).filter(lambda text: bool(text.strip())),
    suffix=st.text(max_size=12),
)
def test_official_formula_wherever_it_is_defined(name, prefix, subject, suffix):
    """If encode(prefix + subject) is a prefix of encode(text), both ways give the same index."""
    tokenizer = load(name)
    text, end = prefix + subject + suffix, len(prefix + subject)
    ids, last = encode_with_subject(tokenizer, text, (len(prefix), end))
    assert 0 <= last < len(ids)
    head = list(tokenizer(text[:end])["input_ids"])
    if subject == subject.rstrip() and ids[: len(head)] == head:
        assert last == official_subject_last_index(tokenizer, text, end)


def test_eos_appended_is_not_part_of_a_prompt():
    from tokenizers.processors import TemplateProcessing

    tokenizer = tiny_tokenizer()
    tokenizer.backend_tokenizer.post_processor = TemplateProcessing(
        single="<|endoftext|> $A <|endoftext|>", special_tokens=[("<|endoftext|>", 0)]
    )
    ids, last = tokenize_prompt(tokenizer, "The capital of {}", "France")
    assert ids[0] == 0
    assert 0 not in ids[1:]
    assert last == len(ids) - 1
    assert leading_specials(tokenizer) == [0]
    assert encode_prompt(tokenizer, "The capital of France") == ids


@pytest.mark.parametrize("template", ["no place", "{} and {}"])
def test_template_needs_one_place(template):
    with pytest.raises(ValueError, match="exactly one"):
        tokenize_prompt(tiny_tokenizer(), template, "France")


def test_empty_subject_is_refused():
    tokenizer = tiny_tokenizer()
    for subject in ("", "  "):
        with pytest.raises(ValueError, match="non-empty"):
            tokenize_prompt(tokenizer, "The capital of {} is", subject)
    with pytest.raises(ValueError, match="non-empty"):
        encode_with_subject(tokenizer, "France", (2, 9))
    with pytest.raises(ValueError, match="no token"):
        subject_last_index(tokenizer, "France", 0)


def test_slow_tokenizer_is_refused_by_name():
    class SlowTokenizer:
        is_fast = False

    with pytest.raises(UnsupportedModel, match=r"SlowTokenizer gives no character offsets.*use_fast=True"):
        tokenize_prompt(SlowTokenizer(), "The capital of {} is", "France")


@pytest.mark.parametrize("target", [" Lyon", " New York", " 1990", " French", " Zürich"])
@tokenizers
def test_target_continues_the_prompt(name, target):
    """Ids by concatenation are those of the whole text, and hold nothing but the target."""
    tokenizer = load(name)
    ids = target_ids(tokenizer, target)
    prompt = "The capital of France is"
    assert tokenizer(prompt + target)["input_ids"] == [*encode_prompt(tokenizer, prompt), *ids]
    assert tokenizer.decode(ids).strip() == target.strip()


@pytest.mark.parametrize("name", ["llama2"])
def test_target_has_no_lone_metaspace(name):
    tokenizer = load(name)
    assert tokenizer.convert_ids_to_tokens(target_ids(tokenizer, " Lyon")) == ["▁Lyon"]
    assert target_ids(tokenizer, " Lyon") == target_ids(tokenizer, "Lyon")


def test_target_that_needs_a_separate_space_keeps_it():
    """Running text has the lone ``▁`` here too, so dropping it would train other ids than are read."""
    tokenizer = load("llama2")
    assert tokenizer.convert_ids_to_tokens(target_ids(tokenizer, " 東")) == ["▁", "東"]
    assert tokenizer("is 東")["input_ids"][-2:] == target_ids(tokenizer, " 東")


def test_target_without_tokens_is_refused():
    with pytest.raises(ValueError, match="no tokens"):
        target_ids(tiny_tokenizer(), "")


def test_target_drops_leading_bos():
    tokenizer = tiny_tokenizer()
    assert target_ids(tokenizer, "<|endoftext|> Paris") == target_ids(tokenizer, " Paris")


def test_pad_batch_right_and_left():
    ids, mask, positions = pad_batch([[5, 6, 7], [8]], pad_id=9)
    assert ids.tolist() == [[5, 6, 7], [8, 9, 9]]
    assert mask.tolist() == [[1, 1, 1], [1, 0, 0]]
    assert positions.tolist() == [[0, 1, 2], [0, 0, 0]]
    ids, mask, positions = pad_batch([[5, 6, 7], [8]], pad_id=9, side="left")
    assert ids.tolist() == [[5, 6, 7], [9, 9, 8]]
    assert mask.tolist() == [[1, 1, 1], [0, 0, 1]]
    assert positions.tolist() == [[0, 1, 2], [0, 0, 0]]
    assert {tensor.dtype for tensor in (ids, mask, positions)} == {torch.int64}


@pytest.mark.parametrize(("rows", "side"), [([], "right"), ([[1], []], "right"), ([[1]], "middle")])
def test_pad_batch_refuses(rows, side):
    with pytest.raises(ValueError):
        pad_batch(rows, 0, side)


def test_pad_id_without_pad_token():
    tokenizer = tiny_tokenizer()
    assert pad_id(tokenizer) == 0
    assert pad_id(load("gpt2")) == 50256
    assert load("gpt2").pad_token_id is None


def test_shared_starts_take_what_rows_with_the_same_first_tokens_have_in_common() -> None:
    rows = [[1, 2, 3, 4, 5, 6], [1, 2, 3, 4, 5, 9], [7, 7, 7, 7, 1], [1, 2, 3, 4, 5, 6, 7], [1, 2]]
    starts, of = shared_starts(rows, [5, 5, 4, 6, 1])
    assert starts == [[], [1, 2, 3, 4, 5]]
    assert of == [1, 1, 0, 1, 0]


def test_shared_starts_leave_each_row_its_end() -> None:
    starts, of = shared_starts([[1, 2, 3, 4, 5, 6]] * 2, [4, 5])
    assert (starts, of) == ([[], [1, 2, 3, 4]], [1, 1])
    assert shared_starts([[1, 2, 3, 4, 5, 6]] * 2, [3, 5]) == ([[]], [0, 0])
