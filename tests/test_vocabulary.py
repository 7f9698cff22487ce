"""The tokenizer: raw captions to tokens and back, coverage, and extending a vocabulary."""

import json
import logging
import random
import shutil
from typing import Literal

import pytest
import torch
from datasets import Dataset, Features, List, Value
from datasets import Image as Picture
from hf_attncap.training.data.vocabulary import (
    build_tokenizer,
    describe_coverage,
    extend_vocabulary,
    repeatable_tokens,
    word_coverage,
)
from hf_attncap.training.train import main
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import AutoTokenizer

from hf_attncap import AttnCapForConditionalGeneration, AttnCapProcessor
from tests.test_data import picture

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
def test_the_tokenizer_normalises_raw_captions(kind, raw, clean):
    tokenizer = TOKENIZERS[kind]
    assert decode(kind, raw) == clean
    assert tokenizer(raw)["input_ids"] == tokenizer(clean)["input_ids"]
    if kind == "word":
        assert tokenizer.tokenize(raw) == clean.split()


def test_word_ids_are_ordered_by_count_then_alphabet():
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
def test_special_tokens_in_a_text_are_ordinary_text(kind):
    ids = TOKENIZERS[kind]("a </s> dog <s> <pad> is")["input_ids"]
    assert not {0, 1, 2} & set(ids)


def test_bpe_spells_unseen_words_and_marks_unknown_characters():
    tokenizer = TOKENIZERS["bpe"]
    assert decode("bpe", "Blackish   dogfish") == "blackish dogfish"
    ids = tokenizer("a 日本 dog")["input_ids"]
    assert ids.count(tokenizer.unk_token_id) == 1
    assert decode("bpe", "a 日本 dog") == "a dog"


def test_bpe_respects_the_vocabulary_size():
    assert len(build_tokenizer(CAPTIONS, "bpe", min_count=1, vocab_size=50)) == 50


def test_coverage_counts_words_not_pieces():
    word, bpe = TOKENIZERS["word"], TOKENIZERS["bpe"]
    assert word_coverage(word, ["A black zebra .", "dog"]) == pytest.approx(3 / 4)
    assert word_coverage(bpe, ["blackish dog", "日本 cat"]) == pytest.approx(3 / 4)
    assert word_coverage(word, []) == 1.0


@kinds
@pytest.mark.parametrize("captions", [[], ["?!"], ["all of these words once"]])
def test_empty_vocabulary_is_an_error(kind, captions):
    with pytest.raises(ValueError, match=r"min_count"):
        build_tokenizer(captions, kind, min_count=5)


def test_wrong_arguments_are_reported():
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
def test_known_text_round_trips(kind, text):
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
def test_unknown_text_decodes_to_clean_text(kind, text):
    decoded = decode(kind, text)
    assert decoded == " ".join(decoded.split())


@kinds
@given(words=st.lists(st.sampled_from(WORDS)), noise=st.lists(st.sampled_from([" ", ", ", " . ", '! "', " & "])))
@settings(max_examples=100)
def test_known_words_survive_punctuation_and_case(kind, words, noise):
    seams = [noise[i % len(noise)] if noise else " " for i in range(len(words))]
    text = "".join(word + seam for word, seam in zip(words, seams, strict=True))
    assert decode(kind, text) == decode(kind, text.upper()) == " ".join(words)


def coverage_of(tokenizer, captions: list[str]) -> tuple[float, list[str]]:
    return word_coverage(tokenizer, captions), describe_coverage(tokenizer, captions, "do this")


def test_low_coverage_lists_the_most_frequent_missing_words():
    share, said = coverage_of(TOKENIZERS["word"], ["Ein Hund, ein Café!", "a dog 's Hunde-Hütte, EIN cafe\u0301"])
    assert share == pytest.approx(4 / 9)
    assert said[0] == f"vocabulary: {len(TOKENIZERS['word'])} tokens, which cover 44.44% of the 9 words in the training captions"
    assert "5 words in the training captions (3 different ones) are read as <unk>" in said[1]
    assert "most often ein (3), hund (1), hunde-hütte (1): do this." in said[1]
    assert len(describe_coverage(TOKENIZERS["word"], ["a black dog"] * 7 + ["hund"], "")) == 1, "21 of 22 words are enough"


def test_word_pieces_lack_only_words_with_new_characters():
    share, said = coverage_of(TOKENIZERS["bpe"], ["a running cat", "\u4e16\u754c"])
    assert share == 0.75 and "\u4e16\u754c (1)" in said[1]


def loaded(folder):
    return AttnCapForConditionalGeneration.from_pretrained(folder), AttnCapProcessor.from_pretrained(folder)


GERMAN = ["Zwei Hunde am Strand .", "ein Hund am Strand", "zwei Hunde, a dog", "selten"]


@pytest.mark.parametrize("tied", [False, True], ids=["own output layer", "tied"])
def test_extending_the_vocabulary_keeps_old_words_and_trains_new_ones(make_checkpoint, tmp_path, tied):
    model, processor = loaded(make_checkpoint(tie_word_embeddings=tied))
    tokenizer, size = processor.tokenizer, len(processor.tokenizer)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    pixel_values = torch.randn(2, 3, 64, 96)
    labels = processor(text_target=["two red dogs", "a child"], return_tensors="pt")["labels"]
    known = processor(text_target=["A black dog in the rain .", "Ein Hund"], return_tensors="pt")["labels"]
    logits = model.eval()(pixel_values, labels=labels).logits

    words = extend_vocabulary(model, tokenizer, GERMAN, min_count=2)
    assert words == ["am", "hunde", "strand", "zwei"] and len(tokenizer) == size + 4
    assert tokenizer.convert_tokens_to_ids(words) == list(range(size, size + 4))
    assert model.config.vocab_size == model.lm_head.out_features == model.get_input_embeddings().num_embeddings == size + 4
    for name, value in model.state_dict().items():
        assert torch.equal(value[: len(before[name])] if value.ndim else value, before[name]), name
        if len(value.shape) and len(value) > len(before[name]):
            mean, spread = before[name].mean(dim=0), before[name].std(dim=0)
            assert (value[size:] - mean).abs().max() < 0.1 * spread.max(), name
    extended = model(pixel_values, labels=labels).logits
    torch.testing.assert_close(extended[..., :size], logits)
    assert extended.softmax(-1)[..., size:].sum(-1).max() < 4 / (size + 4) * 1.5, "new words are no likelier than others"
    assert (model.lm_head.weight is model.get_input_embeddings().weight) is tied
    assert torch.equal(processor(text_target=["A black dog in the rain .", "Ein Hund"], return_tensors="pt")["labels"], known)
    assert model.generation_config.suppress_tokens == [0, 1, 3]

    model.save_pretrained(tmp_path)
    processor.save_pretrained(tmp_path)
    again, processor = loaded(tmp_path)
    assert torch.equal(again.eval()(pixel_values, labels=labels).logits, extended)
    ids = processor.tokenizer("Zwei Hunde!")["input_ids"]
    assert processor.tokenizer.decode(ids) == "zwei hunde" and min(ids) >= size
    new = processor(text_target=["Zwei Hunde", "am Strand"], return_tensors="pt")["labels"]
    again.train()(pixel_values, labels=new).loss.backward()
    for weight in (again.get_input_embeddings().weight, again.lm_head.weight):
        assert weight.grad is not None and weight.grad[size:].abs().sum(dim=1).gt(0).any()
    assert extend_vocabulary(again, processor.tokenizer, GERMAN, min_count=2) == [], "they are there"


def test_repeatable_tokens_are_words_that_captions_repeat():
    captions = ["A dog and a cat .", "A man on a bus ."] * 20 + ["The bus ."] * 300 + ["dog dog", "the the", "tram tram"] * 4
    tokenizer = build_tokenizer(captions, min_count=5)
    found = tokenizer.convert_ids_to_tokens(repeatable_tokens(tokenizer, captions))
    assert found == ["a"], "'the' is rarely repeated, 'dog' too seldom to tell, 'tram' is unknown"
    assert repeatable_tokens(tokenizer, []) == []
    assert repeatable_tokens(build_tokenizer(captions, "bpe", min_count=1), captions) is None


def test_extending_word_pieces_or_frozen_embeddings_is_refused(make_checkpoint, tmp_path):
    model, processor = loaded(make_checkpoint("bpe"))
    with pytest.raises(ValueError, match="word pieces .* cannot be extended"):
        extend_vocabulary(model, processor.tokenizer, GERMAN)
    model, processor = loaded(make_checkpoint())
    model.config.freeze_word_embeddings = True
    with pytest.raises(ValueError, match="set `freeze_word_embeddings` to false"):
        extend_vocabulary(model, processor.tokenizer, GERMAN)


def test_embeddings_are_resized_as_in_other_models(make_checkpoint):
    model, _ = loaded(make_checkpoint())
    size = model.config.vocab_size
    model.resize_token_embeddings(size + 3)
    assert model(torch.randn(1, 3, 64, 96)).logits.shape[-1] == model.config.vocab_size == size + 3
    assert model.generate(pixel_values=torch.randn(1, 3, 64, 96)).shape[0] == 1


@pytest.mark.parametrize("streaming", [False, True], ids=["whole", "streamed"])
def test_a_run_reports_missing_words_and_extends_the_vocabulary(tiny_checkpoint, streaming, tmp_path, caplog, monkeypatch, capsys):
    monkeypatch.setattr("datasets.config.SLEEP_TIME_ON_THREADS_SHUTDOWN", 0.1, raising=False)
    images = [{"bytes": picture(n), "path": None} for n in range(1, 5)]
    columns = {"image": images, "captions": [[f"Ein Hund {name}", "ein Hund"] for name in ("rot", "blau", "alt", "jung")]}
    features = Features({"image": Picture(), "captions": List(Value("string"))})
    Dataset.from_dict(columns, features=features).to_parquet(str(tmp_path / "a.parquet"))
    options = {"train_file": tmp_path / "a.parquet", "model_name_or_path": tiny_checkpoint, "max_steps": 1, "use_cpu": True}
    options |= {"per_device_train_batch_size": 2, "captions_per_image": 2, "report_to": "none", "streaming": streaming}
    argv = [word for key, value in options.items() for word in (f"--{key}", str(value))]
    with caplog.at_level(logging.WARNING):
        assert main([*argv, "--output_dir", str(tmp_path / "plain")]) == 0
    assert (
        "cover 0.00% of the" in caplog.text
        and "ein (" in caplog.text
        and "set `--extend_vocabulary True` to add those" in caplog.text
    )
    caplog.clear()
    extend = ["--extend_vocabulary", "True", "--min_count", "2"]
    with caplog.at_level(logging.WARNING):
        assert main([*argv, *extend, "--output_dir", str(tmp_path / "more")]) == 0
    assert "the vocabulary has 2 new words: ein, hund" in caplog.text and "set `min_count` below 2" in caplog.text
    model, processor = loaded(tmp_path / "more")
    old = AttnCapForConditionalGeneration.from_pretrained(tiny_checkpoint).config.vocab_size
    assert model.config.vocab_size == len(processor.tokenizer) == old + 2
    assert processor.tokenizer.decode(processor.tokenizer("Ein Hund")["input_ids"]) == "ein hund"
    assert not hasattr(model.generation_config, "repeatable_token_ids"), "the checkpoint has no such rule"
    if not streaming:
        assert main([*argv, "--inspect"]) == 0
        assert "set `--extend_vocabulary True` to add those" in capsys.readouterr().out
        ruled = shutil.copytree(tiny_checkpoint, tmp_path / "ruled")
        settings = json.loads((ruled / "generation_config.json").read_text()) | {"_from_model_config": False}
        (ruled / "generation_config.json").write_text(json.dumps(settings | {"repeatable_token_ids": [4]}))
        assert (
            main(
                [
                    *argv,
                    *extend,
                    "--model_name_or_path",
                    str(ruled),
                    "--model_config",
                    '{"dropout": 0.1}',
                    "--output_dir",
                    str(tmp_path / "more ruled"),
                ]
            )
            == 0
        )
        settings = loaded(tmp_path / "more ruled")[0].generation_config.to_dict()
        assert settings["repeatable_token_ids"] == [4] and "dropout" not in settings
        frozen = ["--model_config", '{"freeze_word_embeddings": true}', "--output_dir", str(tmp_path / "frozen")]
        assert main([*argv, *extend, *frozen]) == 2
        assert "`extend_vocabulary`: Frozen word embeddings cannot learn new words" in capsys.readouterr().err
