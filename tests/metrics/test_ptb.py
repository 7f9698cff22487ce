"""The tokeniser against stored tokens of pycocoevalcap, and properties for any text."""

import json
import lzma
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from odd_captions import CHOSEN, random_captions

from hf_attncap.metrics import tokenize
from hf_attncap.metrics.ptb import PUNCTUATION
from hf_attncap.metrics.ptb_rules import ASSIMILATED

FIXTURE = Path(__file__).parents[1] / "data" / "caption_tokens.json.xz"
TEXT = st.text(st.characters(codec="utf-8"), max_size=60)


@pytest.fixture(scope="module")
def expected() -> dict:
    return json.loads(lzma.decompress(FIXTURE.read_bytes()))


def joined(caption: str) -> str:
    return " ".join(tokenize(caption))


def test_tokens_of_dataset_captions_equal_pycocoevalcap(expected):
    assert len(expected["tables"]) > 1000
    assert {caption: joined(caption) for caption in expected["tables"]} == expected["tables"]


@pytest.mark.parametrize("number", range(len(CHOSEN)), ids=lambda number: CHOSEN[number][:20])
def test_tokens_of_hard_captions_equal_pycocoevalcap(expected, number):
    assert joined(CHOSEN[number]) == expected["chosen"][number]


def test_tokens_of_random_strings_equal_pycocoevalcap(expected):
    captions = random_captions(20_000, seed=0)
    assert len(captions) == len(expected["random"]) == 20_000
    differing = [(caption, joined(caption), java) for caption, java in zip(captions, expected["random"]) if joined(caption) != java]
    assert differing == []


def test_words_are_lower_case_without_punctuation():
    assert tokenize("A man's dog, \"Rex\", doesn't bark.") == ["a", "man", "'s", "dog", "rex", "does", "n't", "bark"]
    assert tokenize("") == tokenize(" ") == tokenize(" . , !") == []


def test_a_fraction_with_its_number_is_one_word():
    assert tokenize("1 1/2 cups") == ["1\u00a01/2", "cups"]


def test_letters_of_later_unicode_are_kept():
    assert tokenize("\u0c5d is \ua7ca") == ["\u0c5d", "is", "\ua7ca"]  # the Java tokeniser drops both


@given(st.lists(st.text("abcdefghijklmnopqrstuvwxyzABCXYZ", min_size=1, max_size=8), max_size=12))
def test_no_word_is_lost(words):
    """Only punctuation is left out: all letters are kept, wherever words are split."""
    assert "".join(tokenize(" ".join(words))) == "".join(words).lower()


WORD = st.text("abcdefghijklmnopqrstuvwxyz", min_size=2, max_size=8).filter(lambda word: word not in ASSIMILATED)
ENDING = st.sampled_from(["", "", "'s", "'ll", ".", ",", "!", "?", ";", " -", "-haired", '"'])


@given(st.lists(st.tuples(WORD, ENDING).map("".join), max_size=12))
def test_tokenising_tokens_changes_nothing(words):
    once = tokenize(" ".join(words))
    assert tokenize(" ".join(once)) == once


@pytest.mark.parametrize(
    "caption, expected",
    [
        ("wanna's dog", "wanna 's dog"),
        ("gimme'll go", "gimme 'll go"),
        ("cannot's cannot-haired", "cannot 's cannot-haired"),
        ("wanna 's", "wan na 's"),
    ],
)
def test_contracted_words_are_split_only_alone(caption, expected):
    """As in the Java tokeniser, so that tokenising such tokens again changes them."""
    assert joined(caption) == expected


@given(TEXT)
def test_words_contain_no_line_breaks(text):
    for word in tokenize(text):
        assert word and " " not in word and "\n" not in word
        assert word not in PUNCTUATION


@given(TEXT, TEXT)
@settings(max_examples=200)
def test_a_line_break_is_a_space(first, second):
    assert tokenize(f"{first} . dog\ncat {second}") == tokenize(f"{first} . dog cat {second}")


@given(st.sampled_from(CHOSEN), st.integers(0, 5))
def test_fast_path_equals_the_rules(caption, spaces):
    """A bell character forces the rules and is dropped itself."""
    padded = caption.replace(" ", " " * (1 + spaces))
    assert tokenize(padded + " \x07") == tokenize(padded + " ")


@pytest.mark.parametrize("text", ["a" * 20_000, "a-" * 10_000, "<a b=" * 4_000, "1." * 10_000, "www." * 5_000, "a'" * 10_000])
def test_long_texts_are_tokenised_quickly(text):
    assert tokenize(text)


def test_tokenising_tokens_of_dataset_captions_changes_nothing(expected):
    """Metrics that join tokens with spaces and split them again rely on this."""
    for tokens in expected["tables"].values():
        assert joined(tokens) == tokens
