"""Exported captioners: the same captions, scores and maps as with torch, the search, images, and imports."""

import subprocess
import sys
from dataclasses import replace

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from hf_attncap import Captioner
from hf_attncap.engine import Engine, GeneratedCaptions
from hf_attncap.numpy_search import Sampling, _sample
from hf_attncap.runtime import ExportedModel

BACKBONE = "squeezenet1_1"  # exported quickly


class Calibration(dict):
    """A dictionary that can be a key of the fixtures' caches."""

    def __hash__(self) -> int:  # pyright: ignore[reportIncompatibleVariableOverride]
        return hash(str(self))


CALIBRATION = Calibration(weights={"score": 1.5, "lowest": 0.3, "entropy": -0.2}, bias=0.1, threshold=0.5, images=9)
CONFIGS = {
    "none": {"word_attention": "none", "tokenizer": "bpe", "gate": False, "deep_output": False, "backbone": BACKBONE},
    "score": {"word_attention": "score", "backbone": BACKBONE},
    "channel": {"word_attention": "channel", "confidence": CALIBRATION, "backbone": BACKBONE},
    "history": {"word_attention": "history", "backbone": BACKBONE},
}
PAD = 0


def pictures(count: int, size: tuple[int, int] = (96, 64)) -> list[Image.Image]:
    """Generated pictures of the size that the tiny captioners use, so that nothing is resized."""
    random = np.random.default_rng(0)
    blocks = (Image.fromarray(random.integers(0, 256, (n % 4 + 2, n % 5 + 2, 3), dtype=np.uint8)) for n in range(count))
    return [block.resize(size, Image.Resampling.BICUBIC) for block in blocks]


def assert_same(found: GeneratedCaptions, expected: GeneratedCaptions) -> None:
    np.testing.assert_array_equal(found.sequences, expected.sequences)
    for name in ("scores", "lowest", "entropy"):
        np.testing.assert_allclose(getattr(found, name), getattr(expected, name), atol=1e-4, err_msg=name)
    is_word = expected.sequences[:, :, 1:] != PAD  # (B, k, T)
    assert is_word.any()
    np.testing.assert_allclose(found.attention[is_word], expected.attention[is_word], atol=1e-4)
    assert (found.word_attention is None) == (expected.word_attention is None)
    if expected.word_attention is not None:
        np.testing.assert_allclose(found.word_attention[is_word], expected.word_attention[is_word], atol=1e-4)
    assert (found.importance is None) == (expected.importance is None)
    if expected.importance is not None:
        best = is_word[:, 0]
        np.testing.assert_allclose(found.importance[best], expected.importance[best], atol=1e-4)


def make_pair(make_export, make_checkpoint, format: str, config: dict) -> tuple[ExportedModel, Engine]:
    """An exported captioner, and the same with torch. Their captions have at least four words, all different."""
    from hf_attncap.export import _search_settings

    exported = ExportedModel(make_export(format, **config))
    captioner = Captioner.from_pretrained(make_checkpoint(**config), device="cpu", optimize=False)
    captioner.model.generation_config.update(min_new_tokens=4, repeatable_token_ids=[])
    exported._settings = _search_settings(captioner.model)
    return exported, captioner.engine


@pytest.fixture(params=CONFIGS)
def pair(request, make_export, make_checkpoint) -> tuple[ExportedModel, Engine]:
    return make_pair(make_export, make_checkpoint, "onnx", CONFIGS[request.param])


@pytest.mark.parametrize("prompt", [None, "a black dog"])
@pytest.mark.parametrize("beams, count", [(1, 1), (2, 1), (3, 2), (4, 4)])
def test_captions_scores_and_attention_equal_those_of_torch(pair, beams, count, prompt):
    exported, expected = pair
    images = pictures(6)
    for some in (images[:1], images):
        arguments = some, prompt, beams, count, False
        found = exported.generate(*arguments)
        assert_same(found, expected.generate(*arguments))
        assert found.sequences.shape[2] >= 5


def test_importance_equals_that_of_torch(pair, monkeypatch):
    exported, torch_engine = pair
    expected = torch_engine.generate(pictures(3), None, 3, 2, True)
    assert_same(exported.generate(pictures(3), None, 3, 2, True), expected)
    monkeypatch.setattr("hf_attncap.runtime.MAX_ELEMENTS", 1)  # one variant at a time
    assert_same(exported.generate(pictures(3), None, 3, 2, True), expected)


def test_openvino_gives_the_same(make_export, make_checkpoint):
    exported, expected = make_pair(make_export, make_checkpoint, "openvino", CONFIGS["history"])
    for arguments in ((pictures(1), None, 3, 2, True), (pictures(5), "a black dog", 3, 2, True), (pictures(2), None, 1, 1, False)):
        assert_same(exported.generate(*arguments), expected.generate(*arguments))


@settings(max_examples=40)
@given(data=st.data())
def test_the_search_follows_the_generation_settings_as_torch_does(make_export, make_checkpoint, data):
    from hf_attncap.export import _search_settings

    exported = ExportedModel(make_export("onnx", **CONFIGS["score"]))
    captioner = Captioner.from_pretrained(make_checkpoint(**CONFIGS["score"]), device="cpu", optimize=False)
    tokens = st.lists(st.integers(3, 12), max_size=4, unique=True)
    captioner.model.generation_config.update(
        length_penalty=data.draw(st.sampled_from([-0.5, 0.0, 0.7, 1.0, 1.5])),
        early_stopping=data.draw(st.sampled_from([True, False, "never"])),
        no_repeat_ngram_size=data.draw(st.integers(0, 3)),
        repetition_penalty=data.draw(st.sampled_from([1.0, 1.3, 0.8])),
        suppress_tokens=data.draw(tokens),
        repeatable_token_ids=data.draw(st.none() | tokens),
        min_new_tokens=data.draw(st.none() | st.integers(0, 3)),
        eos_token_id=data.draw(st.sampled_from([2, [2, 7], None])),
        **data.draw(st.sampled_from([{"max_new_tokens": 5}, {"max_new_tokens": None, "max_length": 7}, {"max_new_tokens": None}])),
    )
    exported._settings = _search_settings(captioner.model)
    beams = data.draw(st.integers(1, 4))
    prompt = data.draw(st.sampled_from([None, "a dog"]))
    arguments = pictures(data.draw(st.integers(1, 3))), prompt, beams, data.draw(st.integers(1, beams)), False
    assert_same(exported.generate(*arguments), captioner.engine.generate(*arguments))


def test_a_prompt_longer_than_captions_is_an_error(make_export):
    exported = ExportedModel(make_export("onnx", **CONFIGS["score"]))
    exported._settings = replace(exported._settings, max_new_tokens=None, max_length=3)
    with pytest.raises(ValueError, match="The prompt has 3 tokens, but captions end after 2"):
        exported.generate(pictures(1), "a black dog", 2, 1, False)


def test_results_equal_those_of_torch_with_their_confidence(make_export, make_checkpoint):
    exported = Captioner.from_pretrained(make_export("onnx", **CONFIGS["channel"]))
    captioner = Captioner.from_pretrained(make_checkpoint(**CONFIGS["channel"]), device="cpu")
    for found, expected in zip(*(one.caption(pictures(3), num_return_sequences=2, explain=True) for one in (exported, captioner))):
        assert (found.text, found.words) == (expected.text, expected.words)
        assert [other.text for other in found.alternatives] == [other.text for other in expected.alternatives] != []
        assert found.confidence == pytest.approx(expected.confidence, abs=1e-4)
        for name in ("attention", "word_attention", "importance"):
            np.testing.assert_allclose(getattr(found, name), getattr(expected, name), atol=1e-4)
    assert exported.caption(pictures(1), prompt="a dog")[0].confidence is None
    with pytest.raises(ValueError, match="does not know zebra"):
        exported.caption(pictures(1), prompt="a zebra")


ARGUMENTS = [
    {"max_new_tokens": 3, "num_beams": 2},
    {"num_beams": 1, "repetition_penalty": 3.0, "min_new_tokens": 6, "max_new_tokens": 9},
    {"length_penalty": -1.0, "no_repeat_ngram_size": 2, "early_stopping": "never", "num_return_sequences": 3},
    {"do_sample": True, "temperature": 1e-4, "num_return_sequences": 2},
    {"do_sample": True, "top_k": 1},
    {"do_sample": True, "top_p": 1e-4, "top_k": 0, "max_new_tokens": 4},
]


@pytest.mark.parametrize("options", ARGUMENTS, ids=str)
def test_arguments_of_generate_do_what_they_do_with_torch(make_export, make_checkpoint, options):
    exported, captioner = (Captioner.from_pretrained(make(**CONFIGS["history"])) for make in (make_export, make_checkpoint))
    for found, expected in zip(*(one.caption(pictures(3), **options) for one in (exported, captioner))):
        assert (found.text, found.words) == (expected.text, expected.words)
        assert found.score == pytest.approx(expected.score, abs=1e-4)
        assert [other.text for other in found.alternatives] == [other.text for other in expected.alternatives]
        for name in ("attention", "word_attention"):
            np.testing.assert_allclose(getattr(found, name), getattr(expected, name), atol=1e-4)


def test_tokens_are_sampled_with_their_probabilities():
    scores = np.array([2.0, -np.inf, 1.0, 0.0, 1.0], np.float32)  # the last is equal to the third
    for sampling, kept in (
        (Sampling(), [0, 2, 3, 4]),
        (Sampling(temperature=2.0), [0, 2, 3, 4]),
        (Sampling(top_k=2), [0, 2, 4]),  # as many more as are equal to the second
        (Sampling(top_p=0.5), [0]),
        (Sampling(top_p=0.6, top_k=0), [0, 2]),
    ):
        weights = np.zeros(5)
        weights[kept] = np.exp(scores[kept] / sampling.temperature)
        np.random.seed(0)
        drawn = _sample(np.broadcast_to(scores, (100, 100, 5)), sampling)
        shares = np.bincount(drawn.ravel(), minlength=5) / drawn.size
        np.testing.assert_allclose(shares, weights / weights.sum(), atol=0.02)
        assert set(np.unique(drawn)) == set(kept)


def test_samples_follow_numpys_seed_and_have_their_own_scores_and_attention(make_export, make_checkpoint):
    exported = Captioner.from_pretrained(make_export(**CONFIGS["history"]))
    options = {"do_sample": True, "temperature": 1.5, "num_return_sequences": 3}
    drawn = []
    for seed in (3, 3, 4):
        np.random.seed(seed)
        drawn.append(exported.caption(pictures(2), **options))
    texts = [[[one.text, *(other.text for other in one.alternatives)] for one in results] for results in drawn]
    assert texts[0] == texts[1] != texts[2]
    assert all(len(set(group)) == 3 for group in texts[0])
    np.random.seed(3)
    found = exported.engine.generate(pictures(2), None, 1, 3, False, do_sample=True, temperature=1.5)
    model = Captioner.from_pretrained(make_checkpoint(**CONFIGS["history"]), device="cpu", optimize=False)
    pixel_values = model.processor(images=pictures(2), return_tensors="pt").pixel_values.repeat_interleave(3, 0)
    ids = torch.from_numpy(found.sequences).flatten(0, 1)  # (R, T + 1)
    with torch.no_grad():
        out = model.model(pixel_values=pixel_values, decoder_input_ids=ids[:, :-1], output_attentions=True)
    is_word = ids[:, 1:] != PAD  # (R, T)
    chosen = out.logits.log_softmax(-1).gather(-1, ids[:, 1:, None]).squeeze(-1) * is_word  # (R, T)
    expected = chosen.sum(-1) / is_word.sum(-1) ** model.model.generation_config.length_penalty
    np.testing.assert_allclose(found.scores.ravel(), expected, atol=1e-4)
    maps = out.cross_attentions[0][:, 0][is_word]  # (words, N)
    np.testing.assert_allclose(found.attention.reshape(*is_word.shape, -1)[is_word], maps, atol=1e-4)


@pytest.mark.parametrize(
    "options, message",
    [
        ({"max_new_token": 3}, "`max_new_token` is not an argument .*did you mean `max_new_tokens`"),
        ({"max_length": 3}, "Exported captioners do not have `max_length`: use the checkpoint without export, or one of max_new"),
        ({"do_sample": True, "typical_p": 0.5}, "Exported captioners do not have `typical_p`"),
        ({"stop_strings": ["a"]}, "`stop_strings` is not an argument"),
        ({"top_p": 0.5}, "`top_p` has no effect without sampling"),
        ({"do_sample": True, "top_p": 1.5}, "`top_p` is 1.5, but it must be a number above 0, at most 1"),
        ({"do_sample": True, "temperature": 0}, "`temperature` is 0, but it must be a number above 0"),
        ({"max_new_tokens": 2.0}, "`max_new_tokens` is 2.0, but it must be an integer, at least 1"),
        ({"early_stopping": "always"}, "`early_stopping` is 'always', but it must be True, False or 'never'"),
        ({"do_sample": True, "num_beams": 3}, "sample without beams, but `num_beams` is 3"),
    ],
)
def test_arguments_that_an_export_does_not_have_are_named_before_reading(make_export, options, message):
    exported = Captioner.from_pretrained(make_export(**CONFIGS["score"]))
    for caption in (exported.caption, exported.stream):
        with pytest.raises(ValueError, match=message):
            caption(["nowhere.jpg"], **options)


@pytest.mark.parametrize("option", ["revision", "token", "cache_dir"])
def test_an_exported_folder_has_no_options_of_the_hub(make_export, option):
    folder = make_export(**CONFIGS["score"])
    with pytest.raises(ValueError, match=f"is an exported folder and not on the Hub: leave `{option}` out"):
        Captioner.from_pretrained(folder, **{option: "v1"})
    assert Captioner.from_pretrained(folder, local_files_only=True).caption(pictures(1)[0]).text


@pytest.mark.parametrize("workers", [0, 1])
def test_images_without_attention_are_resized_when_read_and_captions_stay_equal(make_export, tmp_path, workers, monkeypatch):
    exported, sizes = Captioner.from_pretrained(make_export(**CONFIGS["score"])), []
    files = [tmp_path / f"{n}.png" for n in range(5)]
    for file, size in zip(files, ((640, 480), (31, 200), (96, 64), (1500, 37), (97, 65))):
        noise = np.random.default_rng(0).integers(0, 256, (size[1], size[0], 3), dtype=np.uint8)
        Image.fromarray(noise).resize(size).save(file)
    expected = exported.caption(files)
    pixels = exported.engine._pixels
    monkeypatch.setattr(exported.engine, "_pixels", lambda images: sizes.extend(one.size for one in images) or pixels(images))
    found = list(exported.stream(files, workers=workers, attention=False))
    assert [(one.text, one.score) for one in found] == [(one.text, one.score) for one in expected]
    assert sizes == [(96, 64)] * 5 and all(one.attention is None and one.image is None for one in found)


@pytest.mark.parametrize("size", [(31, 200), (640, 480), (1500, 37), (224, 224)])
def test_pixels_differ_from_those_of_torch_by_at_most_one_level(make_export, make_checkpoint, size):
    noise = Image.fromarray(np.random.default_rng(0).integers(0, 256, (size[1], size[0], 3), dtype=np.uint8))
    found = ExportedModel(make_export("onnx", **CONFIGS["score"]))._pixels([noise]).astype(int)
    processor = Captioner.from_pretrained(make_checkpoint(**CONFIGS["score"]), device="cpu").processor
    expected = processor.image_processor(noise, do_rescale=False, do_normalize=False, return_tensors="pt").pixel_values
    difference = abs(found - expected.permute(0, 2, 3, 1).numpy())
    assert difference.max() <= 1 and difference.mean() < 0.3


@pytest.mark.parametrize("format", ["onnx", "openvino"])
def test_captioning_imports_neither_torch_nor_transformers(make_export, tmp_path, format):
    folder = make_export(format, **CONFIGS["score"])
    pictures(1)[0].save(tmp_path / "a.png")
    for code in (
        f"from hf_attncap import Captioner; found = Captioner.from_pretrained({str(folder)!r})"
        ".explain('a.png', prompt='a black dog'); print(found.text)",
        f"from hf_attncap.cli import main; main(['caption', '--prompt', 'a black dog', '--model', {str(folder)!r}, 'a.png'])",
    ):
        code += "; import sys; print([name for name in ('torch', 'transformers', 'huggingface_hub') if name in sys.modules])"
        command = [sys.executable, "-c", code]
        ran = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=True, timeout=100)
        assert ran.stdout.splitlines()[-1] == "[]" and "a black dog" in ran.stdout and not ran.stderr


@pytest.mark.slow
@pytest.mark.parametrize("format", ["onnx", "openvino"])
def test_captions_of_200_pictures_equal_those_of_torch(format, tmp_path):
    """With the released checkpoint, default decoding."""
    pytest.importorskip({"onnx": "onnxruntime"}.get(format, format))
    pytest.importorskip("onnxscript")
    from hf_attncap.captioner import CHECKPOINT
    from hf_attncap.export import export_checkpoint

    exported = Captioner.from_pretrained(export_checkpoint(CHECKPOINT, tmp_path / "out", format)).engine
    expected = Captioner.from_pretrained(device="cpu", optimize=False).engine
    images = pictures(200, size=(224, 224))
    for start in range(0, 200, 10):
        for beams in (1, 5) if start < 50 else (5,):
            arguments = images[start : start + 10], None, beams, 1, False
            assert_same(exported.generate(*arguments), expected.generate(*arguments))
