"""Facts, and what is checked before anything is edited."""

from __future__ import annotations

import pytest

from fastedit import Fact, InvalidFact
from fastedit.facts import validate_facts


def test_a_fact_gives_its_texts() -> None:
    fact = Fact("The capital of {} is", "France", "Lyon", target_old="Paris", case_id=7)
    assert fact.text == "The capital of France is"
    assert fact.target == " Lyon"
    assert Fact("{} is", "a", "  b ").target == " b"
    assert fact.as_dict() == {
        "prompt": "The capital of {} is",
        "subject": "France",
        "target_new": "Lyon",
        "target_old": "Paris",
        "case_id": 7,
    }


@pytest.mark.parametrize(
    ("prompt", "subject", "template"),
    [
        ("The capital of France is", "France", "The capital of {} is"),
        ("France, the France of old", "France", "France, the {} of old"),
        ("the capital of FRANCE is", "France", "the capital of {} is"),
        ("L'hymne de l'Équateur", "l'equateur", "L'hymne de {}"),
        ("The capital of {} is", "France", "The capital of {} is"),
    ],
)
def test_a_filled_prompt_finds_its_subject(prompt: str, subject: str, template: str) -> None:
    assert Fact.from_filled(prompt, subject, "x").prompt == template


@pytest.mark.parametrize("prompt", ["no place", "{} and {}"])
def test_wrong_number_of_places_is_refused(prompt: str) -> None:
    with pytest.raises(InvalidFact, match="exactly one"):
        Fact(prompt, "France", "Lyon")


def test_values_that_are_no_text_are_refused() -> None:
    with pytest.raises(InvalidFact, match="target_new must be text, got int"):
        Fact("The year of {} is", "it", 1969)  # type: ignore[arg-type]


def test_same_fact_in_other_spacing_counts_as_the_same() -> None:
    with pytest.raises(InvalidFact, match="facts 0 and 1 are given twice"):
        validate_facts([Fact("A {} is", "b", "c"), Fact("A  {} is", "b", " c")])


def test_mappings_become_facts_and_errors_name_their_position() -> None:
    (fact,) = validate_facts([{"prompt": "A b is", "subject": "b", "target_new": "c", "target_old": "d"}])
    assert fact == Fact("A {} is", "b", "c", target_old="d")
    with pytest.raises(InvalidFact, match="fact 1: "):
        validate_facts([fact, {"prompt": "A b is", "subject": "z", "target_new": "c"}])
