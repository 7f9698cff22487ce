"""Word vectors trained on captions: their properties, determinism, and a run that starts from them."""

import json
import os
import random
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from datasets import Dataset
from datasets import Image as ImageColumn
from hf_attncap.training.arguments import SettingError
from hf_attncap.training.data.vocabulary import build_tokenizer
from hf_attncap.training.data.word_vectors import train_word_vectors, write_word_vectors
from hf_attncap.training.train import main
from PIL import Image

from hf_attncap import AttnCapForConditionalGeneration, AttnCapProcessor
from hf_attncap.word_vectors import read_word_vectors

pytest.importorskip("gensim")

ROOT = Path(__file__).parent.parent
COLOURS, ANIMALS = ("red", "blue", "green"), ("dog", "horse", "cow")
TINY = {
    "backbone": "mobilenet_v3_small",
    "encoder_channels": 16,
    "hidden_size": 16,
    "attention_dim": 8,
    "word_embed_dim": 12,
    "alpha_c": 0.0,  # one region at 32 pixels
}


def toy_captions(number: int = 600) -> list[str]:
    """Animals do things, colours belong to things that are worn: each word of a group has the same neighbours."""
    draw = random.Random(0)
    sentences = []
    for _ in range(number):
        sentences.append(f"The {draw.choice(ANIMALS)} {draw.choice(('eats', 'runs', 'sleeps'))} on grass near water .")
        sentences.append(f"A child wears one {draw.choice(COLOURS)} {draw.choice(('shirt', 'hat', 'coat'))} inside")
    return sentences


@pytest.fixture(scope="module")
def learned():
    tokenizer = build_tokenizer(toy_captions(), min_count=1)
    return tokenizer, *train_word_vectors(toy_captions(), tokenizer, 12)


def test_words_in_similar_contexts_have_similar_vectors(learned):
    tokenizer, ids, vectors, _ = learned
    units = {i: vector / np.linalg.norm(vector) for i, vector in zip(ids.tolist(), vectors)}

    def near(a: str, b: str) -> float:
        first, second = tokenizer.convert_tokens_to_ids([a, b])
        return float(units[first] @ units[second])

    for group, others in ((COLOURS, ANIMALS), (ANIMALS, COLOURS)):
        alike = [near(a, b) for a in group for b in group if a != b]
        unlike = [near(a, b) for a in group for b in others]
        assert min(alike) > max(unlike) + 0.3


@pytest.mark.parametrize("dim", [4, 7])
def test_each_word_gets_a_vector_of_the_given_dimension(dim):
    tokenizer = build_tokenizer(toy_captions(5), min_count=1)
    ids, vectors, share = train_word_vectors(toy_captions(5), tokenizer, dim)
    assert ids.tolist() == list(range(4, len(tokenizer))), "special tokens are 0 to 3"
    assert vectors.shape == (len(ids), dim) and vectors.dtype == np.float32 and share == 1.0


def test_vectors_have_the_norm_of_a_new_embedding(learned):
    _, _, vectors, _ = learned
    np.testing.assert_allclose(vectors.mean(0), 0, atol=1e-6)
    assert np.square(vectors).sum(1).mean() == pytest.approx(1, abs=1e-5)
    config = AttnCapForConditionalGeneration.config_class(vocab_size=2000, **TINY)
    new = AttnCapForConditionalGeneration(config).get_input_embeddings().weight
    assert new.square().sum(1).mean().item() == pytest.approx(1, abs=0.1)


def test_unk_gets_no_vector():
    captions = [*toy_captions(20), "an okapi sneezes"]
    tokenizer = build_tokenizer(captions, min_count=2)
    ids, _, share = train_word_vectors(captions, tokenizer, 4)
    assert tokenizer.unk_token_id not in ids and share == 1.0


def test_word_pieces_get_vectors_unless_unused():
    tokenizer = build_tokenizer(toy_captions(), "bpe", min_count=2)
    ids, vectors, share = train_word_vectors(toy_captions(), tokenizer, 4)
    used = {i for caption in toy_captions() for i in tokenizer(caption, add_special_tokens=False).input_ids}
    assert set(ids.tolist()) == used and len(vectors) == len(used)
    assert share == len(used) / (len(tokenizer) - 4) < 1


@pytest.mark.parametrize("kind", ["word", "bpe"])
def test_the_vector_file_round_trips(kind, tmp_path):
    tokenizer = build_tokenizer(toy_captions(50), kind, min_count=1)
    write_word_vectors(tmp_path / "new" / "vectors.txt", toy_captions(50), tokenizer, 6)
    ids, vectors, _ = train_word_vectors(toy_captions(50), tokenizer, 6)
    read_ids, read_vectors = read_word_vectors(tmp_path / "new" / "vectors.txt", tokenizer.get_vocab(), 6)
    np.testing.assert_array_equal(read_ids.numpy(), ids)
    np.testing.assert_array_equal(read_vectors.numpy(), vectors)
    assert len(list((tmp_path / "new").iterdir())) == 1


@pytest.mark.slow
def test_training_vectors_is_deterministic_across_processes(tmp_path):
    """Whatever seed Python hashes strings with."""
    here, there = tmp_path / "here.txt", tmp_path / "there.txt"
    script = (
        "import sys; from pathlib import Path; from tests.test_word_vectors import *; words = toy_captions(50);"
        "write_word_vectors(Path(sys.argv[1]), words, build_tokenizer(words, min_count=1), 6)"
    )
    seed = "2" if os.environ.get("PYTHONHASHSEED") == "1" else "1"
    env = {**os.environ, "PYTHONPATH": str(ROOT), "PYTHONHASHSEED": seed}
    subprocess.run([sys.executable, "-c", script, str(there)], cwd=ROOT, env=env, check=True, timeout=120)
    write_word_vectors(here, toy_captions(50), build_tokenizer(toy_captions(50), min_count=1), 6)
    assert here.read_text() == there.read_text()


def test_captions_without_words_are_refused():
    tokenizer = build_tokenizer(["dog dog"], min_count=1)
    with pytest.raises(SettingError, match="at least two different words"):
        train_word_vectors(["dog", "dog"], tokenizer, 4)


def test_missing_gensim_is_reported(monkeypatch):
    monkeypatch.setitem(sys.modules, "gensim.models", None)
    with pytest.raises(SettingError, match="needs gensim: `pip install gensim`"):
        train_word_vectors(["a dog"], build_tokenizer(["a dog"], min_count=1), 4)


@pytest.fixture(scope="module")
def parquet(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("data")
    files = []
    for colour in COLOURS:
        files.append(str(folder / f"{colour}.png"))
        Image.new("RGB", (40, 40), colour).save(files[-1])
    captions = [[f"a {colour} hat", f"one {colour} coat there", f"the hat is {colour}"] for colour in COLOURS]
    columns = {"image": files, "captions": captions, "image_id": list(COLOURS)}
    Dataset.from_dict(columns).cast_column("image", ImageColumn()).to_parquet(str(folder / "train.parquet"))
    return folder / "train.parquet"


def run(parquet: Path, output: Path, config: dict | None = None, **more) -> int:
    settings = {
        "train_file": parquet,
        "output_dir": output,
        "model_config": json.dumps({**TINY, **(config or {})}),
        "min_count": 1,
        "image_size": 32,
        "per_device_train_batch_size": 3,
        "learning_rate": 0.05,
        "num_train_epochs": 2,
        "report_to": "none",
        "use_cpu": True,
        **more,
    }
    return main([word for key, value in settings.items() for word in (f"--{key}", str(value))])


@pytest.mark.parametrize("settings", [{}, {"freeze_word_embeddings": True}, {"freeze_word_embeddings": False}])
def test_run_starts_from_vectors_trained_on_its_captions(parquet, tmp_path, settings):
    frozen = settings.get("freeze_word_embeddings", True)
    assert run(parquet, tmp_path, settings, word_vectors="captions") == 0
    model = AttnCapForConditionalGeneration.from_pretrained(tmp_path)
    tokenizer = AttnCapProcessor.from_pretrained(tmp_path).tokenizer
    ids, vectors = read_word_vectors(tmp_path / "word_vectors.txt", tokenizer.get_vocab(), TINY["word_embed_dim"])
    assert ids.tolist() == list(range(4, len(tokenizer)))
    embedding = model.get_input_embeddings().weight
    assert torch.equal(embedding[ids], vectors) == frozen
    assert embedding.requires_grad != frozen and model.config.freeze_word_embeddings == frozen


@pytest.mark.parametrize(
    ("config", "settings", "message"),
    [
        ({}, {"word_vectors": "nowhere.txt"}, "No such file of word vectors: nowhere.txt. `captions` trains them"),
        ({}, {"word_vectors": "{other}"}, "set `word_embed_dim=2` in the config"),
        ({}, {"word_vectors": "captions", "model_name_or_path": "nowhere"}, "remove one of them"),
        ({"freeze_word_embeddings": True}, {}, "`freeze_word_embeddings` would keep random vectors: set `word_vectors` as well"),
        (
            {"tie_word_embeddings": True},
            {"word_vectors": "captions"},
            "`freeze_word_embeddings=False` or `tie_word_embeddings=False`",
        ),
    ],
    ids=["no file", "other width", "checkpoint", "frozen without vectors", "tied and frozen"],
)
def test_wrong_vector_settings_give_one_sentence(parquet, tmp_path, capsys, config, settings, message):
    other = tmp_path / "other.txt"
    other.write_text("hat 1 2\ncoat 3 4\n")
    settings = {name: value.format(other=other) for name, value in settings.items()}
    assert run(parquet, tmp_path / "run", config, **settings) == 2
    error = capsys.readouterr().err
    assert message in error and "Traceback" not in error
