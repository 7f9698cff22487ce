"""Raw captions become tokens, and tokens become clean text again."""

import random
from typing import Literal

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import AutoTokenizer

from training.vocabulary import build_tokenizer, word_coverage

CAPTIONS = [
    "A black dog is running , fast .",
    "The dog 's owner wears a T-shirt !",
    "Two dogs don't run on the beach in 1999 .",
    "A café with naïve art ; a black cat",
]
WORDS = [
    "a",
    "black",
    "dog",
    "is",
    "running",
    "the",
    "dog's",
    "t-shirt",
    "two",
    "don't",
    "run",
    "café",
    "1999",
]
Kind = Literal["word", "bpe"]
KINDS: tuple[Kind, ...] = ("word", "bpe")
TOKENIZERS = {kind: build_tokenizer(CAPTIONS, kind, min_count=1) for kind in KINDS}
kinds = pytest.mark.parametrize("kind", KINDS)


def decode(kind: Kind, text: str) -> str:
    tokenizer = TOKENIZERS[kind]
    decoded = tokenizer.decode(tokenizer(text)["input_ids"], skip_special_tokens=True)
    assert isinstance(decoded, str)
    return decoded


@kinds
def test_special_tokens_have_their_ids_and_padding_is_left(kind):
    tokenizer = TOKENIZERS[kind]
    assert tokenizer.convert_ids_to_tokens([0, 1, 2, 3]) == ["<pad>", "<s>", "</s>", "<unk>"]
    ids = (tokenizer.pad_token_id, tokenizer.bos_token_id, tokenizer.eos_token_id, tokenizer.unk_token_id)
    assert ids == (0, 1, 2, 3)
    batch = tokenizer(["a black dog", "a"], padding=True)
    assert batch["input_ids"][1][:2] == [0, 0] and batch["attention_mask"] == [[1, 1, 1], [0, 0, 1]]
    assert set(batch) == {"input_ids", "attention_mask"}


@kinds
@pytest.mark.parametrize(
    ("raw", "clean"),
    [
        ("A black dog is running , fast .", "a black dog is running fast"),
        ('"The DOG" -- running; fast?!', "the dog running fast"),
        ("the dog 's t-shirt", "the dog's t-shirt"),
        ("the dog\u2019s T\u2011Shirt", "the dog's t-shirt"),
        ("'the' dogs' -black- cat-", "the dogs black cat"),
        ("a cafe\u0301 in 1999", "a café in 1999"),
        ("a\tdog\n\nis\u00a0running", "a dog is running"),
        ("", ""),
        ("?!", ""),
    ],
)
def test_raw_captions_are_cleaned_inside_the_tokenizer(kind, raw, clean):
    tokenizer = TOKENIZERS[kind]
    assert decode(kind, raw) == clean
    assert tokenizer(raw)["input_ids"] == tokenizer(clean)["input_ids"]
    if kind == "word":
        assert tokenizer.tokenize(raw) == clean.split()


def test_word_ids_fall_by_count_then_alphabet():
    tokenizer = build_tokenizer(["b c a", "c b", "rare c"], min_count=2)
    assert tokenizer.get_vocab() == {"<pad>": 0, "<s>": 1, "</s>": 2, "<unk>": 3, "c": 4, "b": 5}
    assert tokenizer.tokenize("a rare C") == ["<unk>", "<unk>", "c"]


@kinds
def test_order_of_captions_does_not_matter(kind):
    rng = random.Random(0)
    captions = [" ".join(rng.choices(WORDS, k=8)) for _ in range(200)]
    first = build_tokenizer(captions, kind, min_count=2).backend_tokenizer.to_str()
    rng.shuffle(captions)
    assert build_tokenizer(iter(captions), kind, min_count=2).backend_tokenizer.to_str() == first


@kinds
def test_saved_tokenizer_reads_and_writes_the_same(kind, tmp_path):
    TOKENIZERS[kind].save_pretrained(tmp_path)
    assert (tmp_path / "tokenizer.json").is_file()
    again = AutoTokenizer.from_pretrained(tmp_path)
    text = "A black DOG 's </s> zebra <pad> 日本 t-shirt !"
    assert again(text)["input_ids"] == TOKENIZERS[kind](text)["input_ids"]
    assert again.decode(again(text)["input_ids"]) == TOKENIZERS[kind].decode(again(text)["input_ids"])
    assert again.padding_side == "left"


@kinds
def test_control_tokens_in_a_text_are_only_text(kind):
    ids = TOKENIZERS[kind]("a </s> dog <s> <pad> is")["input_ids"]
    assert not {0, 1, 2} & set(ids)


def test_bpe_writes_unseen_words_and_marks_unseen_characters():
    tokenizer = TOKENIZERS["bpe"]
    assert decode("bpe", "Blackish   dogfish") == "blackish dogfish"
    ids = tokenizer("a 日本 dog")["input_ids"]
    assert ids.count(tokenizer.unk_token_id) == 1
    assert decode("bpe", "a 日本 dog") == "a dog"


def test_bpe_keeps_to_its_size():
    assert len(build_tokenizer(CAPTIONS, "bpe", min_count=1, vocab_size=50)) == 50


def test_coverage_counts_words_not_pieces():
    word, bpe = TOKENIZERS["word"], TOKENIZERS["bpe"]
    assert word_coverage(word, ["A black zebra .", "dog"]) == pytest.approx(3 / 4)
    assert word_coverage(bpe, ["blackish dog", "日本 cat"]) == pytest.approx(3 / 4)
    assert word_coverage(word, []) == 1.0


@kinds
@pytest.mark.parametrize("captions", [[], ["?!"], ["all of these words once"]])
def test_nothing_to_learn_is_an_error(kind, captions):
    with pytest.raises(ValueError, match=r"min_count"):
        build_tokenizer(captions, kind, min_count=5)


def test_bad_arguments_are_named():
    with pytest.raises(ValueError, match="vocab_size"):
        build_tokenizer(CAPTIONS, "bpe", min_count=1, vocab_size=10)
    with pytest.raises(ValueError, match="min_count"):
        build_tokenizer(CAPTIONS, "word", min_count=1, vocab_size=10)
    with pytest.raises(ValueError, match="'sentence'"):
        build_tokenizer(CAPTIONS, "sentence", min_count=1)  # pyright: ignore[reportArgumentType]
    with pytest.raises(TypeError, match="list"):
        build_tokenizer("a dog", min_count=1)
    with pytest.raises(TypeError, match="flat"):
        build_tokenizer([["a dog", "the dog"]], min_count=1)  # pyright: ignore[reportArgumentType]


# Any text, and text of the captions' letters, joints and noise, which is likelier to find a wrong seam.
CAPTION_LIKE = st.text(alphabet="adgos'-n \u2019.,\u0301S", max_size=30)


@kinds
@given(text=st.text(max_size=60) | CAPTION_LIKE)
@settings(max_examples=300)
def test_known_text_comes_back_clean_and_stays_so(kind, text):
    try:
        tokenizer = build_tokenizer([text], kind, min_count=1)
    except ValueError:  # not a word in it
        assert TOKENIZERS[kind](text)["input_ids"] == []
        return
    assert word_coverage(tokenizer, [text]) == 1.0
    once = str(tokenizer.decode(tokenizer(text)["input_ids"]))
    assert once and once == " ".join(once.split()) == once.lower()
    assert tokenizer.decode(tokenizer(once)["input_ids"]) == once


@kinds
@given(text=st.text(max_size=60) | CAPTION_LIKE)
@settings(max_examples=200)
def test_unknown_text_leaves_clean_text(kind, text):
    decoded = decode(kind, text)
    assert decoded == " ".join(decoded.split())


@kinds
@given(words=st.lists(st.sampled_from(WORDS)), noise=st.lists(st.sampled_from([" ", ", ", " . ", '! "', " & "])))
@settings(max_examples=100)
def test_known_words_survive_punctuation_and_case(kind, words, noise):
    seams = [noise[i % len(noise)] if noise else " " for i in range(len(words))]
    text = "".join(word + seam for word, seam in zip(words, seams, strict=True))
    assert decode(kind, text) == decode(kind, text.upper()) == " ".join(words)
