"""Training as a user runs it, on generated pictures."""

import io
import json
import math

import numpy as np
import pytest
import torch
from datasets import Dataset
from hf_attncap.training.arguments import CaptionTrainingArguments, DataArguments, ModelArguments, SettingError, parse_arguments
from hf_attncap.training.checkpoints.average import average_checkpoints
from hf_attncap.training.checkpoints.pack import pack
from hf_attncap.training.checkpoints.record import stage
from hf_attncap.training.data.collator import CaptionCollator
from hf_attncap.training.data.feature_cache import cached_features
from hf_attncap.training.data.splits import load_data
from hf_attncap.training.data.vocabulary import build_tokenizer
from hf_attncap.training.train import main
from hf_attncap.training.trainers.caption_trainer import CaptionTrainer
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from transformers import TrainerState

from hf_attncap import AttnCapConfig, AttnCapForConditionalGeneration, AttnCapImageProcessor, AttnCapProcessor
from hf_attncap.metrics import CaptionMetrics

COLOURS = {"red": (220, 30, 30), "green": (30, 200, 40), "blue": (40, 60, 220), "white": (240, 240, 240)}
TINY = {
    "backbone": "mobilenet_v3_small",
    "encoder_channels": 24,
    "hidden_size": 32,
    "attention_dim": 16,
    "word_embed_dim": 16,
    "dropout": 0.0,
    "alpha_c": 0.0,  # one region at 32 pixels
}


def picture(colour: str, side: int = 40) -> bytes:
    buffer = io.BytesIO()
    Image.new("RGB", (side, side), COLOURS[colour]).save(buffer, format="PNG")
    return buffer.getvalue()


def captions(colour: str) -> list[str]:
    return [f"A {colour} square .", f"There is a {colour} square", f"a plain {colour} picture"]


@pytest.fixture(scope="module")
def parquet(tmp_path_factory):
    """Eight images of four colours, three captions each."""
    names = list(COLOURS) * 2
    rows = Dataset.from_dict(
        {"image": [{"bytes": picture(name), "path": None} for name in names], "captions": [captions(name) for name in names]}
    )
    path = tmp_path_factory.mktemp("data") / "train.parquet"
    rows.to_parquet(str(path))
    return path


@pytest.fixture(scope="module")
def processor():
    sentences = [caption for colour in COLOURS for caption in captions(colour)]
    tokenizer = build_tokenizer(sentences, min_count=1)
    return AttnCapProcessor(AttnCapImageProcessor(size={"height": 32, "width": 32}), tokenizer)


def options(parquet, output, **more) -> list[str]:
    values = {
        "train_file": parquet,
        "validation_file": parquet,
        "output_dir": output,
        "model_config": json.dumps(TINY),
        "min_count": 1,
        "image_size": 32,
        "captions_per_image": 3,
        "per_device_train_batch_size": 4,
        "learning_rate": 0.02,
        "num_train_epochs": 2,
        "report_to": "none",
        "num_logged_images": 0,
        "use_cpu": True,
        **more,
    }
    return [word for key, value in values.items() for word in (f"--{key}", str(value))]


def metrics_of(output) -> dict:
    return json.loads((output / "metrics.json").read_text())


def test_decoder_stage_on_cached_features_then_encoder_stage(parquet, tmp_path):
    """The two stages: the decoder learns on features that are computed once, then the encoder moves too."""
    first, second, cache = tmp_path / "decoder", tmp_path / "encoder", tmp_path / "cache"
    assert main(options(parquet, first, feature_cache=cache, num_train_epochs=15)) == 0
    assert metrics_of(first)["eval_loss"] < 0.9  # ln(vocabulary) is 2.6
    trained = AttnCapForConditionalGeneration.from_pretrained(first)

    more = {"model_name_or_path": first, "augment": True, "encoder_learning_rate": 0.001, "learning_rate": 0.001}
    assert main(options(parquet, second, **{**more, "model_config": '{"freeze_backbone": false}'})) == 0
    tuned = AttnCapForConditionalGeneration.from_pretrained(second)
    before, after = trained.model.encoder.backbone.state_dict(), tuned.model.encoder.backbone.state_dict()
    moved = {key for key in before if not torch.equal(before[key], after[key])}
    assert any(key.endswith("0.weight") for key in moved)
    assert not any("running" in key for key in moved), "frozen batch norm statistics moved"

    upper, blocks = tmp_path / "upper", '{"freeze_backbone": false, "trainable_blocks": 3}'
    assert main(options(parquet, upper, **{**more, "model_config": blocks, "feature_cache": cache, "cached_views": 2})) == 0
    tuned = AttnCapForConditionalGeneration.from_pretrained(upper)
    for number, (was, now) in enumerate(zip(trained.model.encoder.blocks(), tuned.model.encoder.blocks(), strict=True)):
        same = all(torch.equal(value, now.state_dict()[name]) for name, value in was.named_parameters())
        assert same == (number < len(trained.model.encoder.blocks()) - 3 or not list(was.parameters())), number

    record = json.loads((second / "training.json").read_text())
    assert [stage["frozen_backbone"] for stage in record] == [True, False]
    assert [stage["images"] for stage in record] == [2 * len(COLOURS)] * 2
    assert [stage["epochs"] for stage in record] == [15, 2]
    assert record[1]["settings"]["encoder_learning_rate"] == 0.001 and record[1]["settings"]["augment"] is True
    assert not [value for stage in record for value in stage["settings"].values() if str(tmp_path) in str(value)]
    assert record[0]["log"][-1]["eval_loss"] == pytest.approx(metrics_of(first)["eval_loss"])

    processor = AttnCapProcessor.from_pretrained(first)
    image = Image.open(io.BytesIO(picture("red")))
    ids = trained.generate(**processor(images=image, return_tensors="pt"))
    assert processor.batch_decode(ids, skip_special_tokens=True)[0]
    assert trained.generation_config.num_beams == 3 and trained.generation_config.max_new_tokens == 21
    assert isinstance(trained.generation_config.repeatable_token_ids, list)


def test_weight_decay_follows_the_learning_rate_and_skips_biases(parquet, tmp_path):
    first = tmp_path / "first"
    assert main(options(parquet, first, max_steps=1)) == 0
    tuned = {"model_name_or_path": first, "max_steps": 1, "learning_rate": 0.01, "encoder_learning_rate": 0.001}
    tuned["model_config"] = '{"freeze_backbone": false}'
    after = []
    for decay in (0.0, 0.5):
        assert main(options(parquet, tmp_path / f"decay {decay}", **tuned, weight_decay=decay)) == 0
        after.append(AttnCapForConditionalGeneration.from_pretrained(tmp_path / f"decay {decay}").state_dict())
    plain, decayed = after
    for name, before in AttnCapForConditionalGeneration.from_pretrained(first).named_parameters():
        rate = 0.001 if ".backbone." in name else 0.01
        lost = 0.5 * rate * before.detach() if before.ndim > 1 else torch.zeros_like(before)
        assert torch.allclose(plain[name] - decayed[name], lost, rtol=1e-3, atol=1e-6), name


def test_record_has_file_names_without_folders():
    said = stage((ModelArguments(backbone_weights="/my/own/net.pth", word_vectors="captions"),), TrainerState(), 8, True)[
        "settings"
    ]
    assert said["backbone_weights"] == "net.pth" and said["word_vectors"] == "captions"


@pytest.mark.parametrize("kept, said", [(True, 3), (False, None)])
def test_record_has_the_best_step_if_its_weights_were_kept(tmp_path, kept, said):
    arguments = CaptionTrainingArguments(str(tmp_path), load_best_model_at_end=kept, eval_strategy="steps", use_cpu=True)
    assert stage((arguments,), TrainerState(best_global_step=3), 8, True)["best_step"] == said


def scores_by_hand(folder, parquet, **settings) -> dict:
    """Scores of what a saved captioner says of each picture, one by one, against all raw captions of each."""
    model, processor = AttnCapForConditionalGeneration.from_pretrained(folder), AttnCapProcessor.from_pretrained(folder)
    rows = load_data(DataArguments(train_file=str(parquet))).train
    said = {}
    for index, image in enumerate(rows["image"]):
        ids = model.generate(**processor(images=image, return_tensors="pt"), **settings)
        said[index] = processor.batch_decode(ids, skip_special_tokens=True)[0]
    return dict(CaptionMetrics(dict(enumerate(rows["captions"]))).score(said))


class FailingEvaluation(Exception):
    pass


AVERAGED = {"ema_decay": 0.5}
BEST = {"eval_strategy": "epoch", "save_strategy": "epoch", "load_best_model_at_end": True, "metric_for_best_model": "loss"}


@pytest.mark.parametrize("more", [{}, AVERAGED, {**BEST, "learning_rate": 1.0}], ids=["plain", "averaged", "best"])
def test_captioner_is_saved_if_the_last_evaluation_fails(parquet, tmp_path, monkeypatch, more):
    """It is the one that a run has whose evaluation succeeds, with its record."""
    whole, failed = tmp_path / "whole", tmp_path / "failed"
    assert main(options(parquet, whole, **more)) == 0
    evaluate = CaptionTrainer.evaluate

    def fail_at_the_end(self, *args, **kwargs):
        if not self.is_in_train:
            raise FailingEvaluation
        return evaluate(self, *args, **kwargs)

    monkeypatch.setattr(CaptionTrainer, "evaluate", fail_at_the_end)
    with pytest.raises(FailingEvaluation):
        main(options(parquet, failed, **more))
    weights, expected = (AttnCapForConditionalGeneration.from_pretrained(folder).state_dict() for folder in (failed, whole))
    assert all(torch.equal(weights[name], expected[name]) for name in expected)
    assert AttnCapProcessor.from_pretrained(failed).tokenizer.get_vocab()
    (record,), (complete,) = (json.loads((folder / "training.json").read_text()) for folder in (failed, whole))
    assert record["settings"] == complete["settings"] and record["steps"] == complete["steps"]
    assert "train_loss" in metrics_of(failed) and "eval_loss" not in metrics_of(failed) and "eval_loss" in metrics_of(whole)


KINDS = [
    {},
    {"self_critical": True, "model_name_or_path": "anywhere"},
]


@pytest.mark.parametrize("more", KINDS, ids=["plain", "self-critical"])
def test_several_gpus_in_one_process_are_refused_before_data_are_read(parquet, tmp_path, monkeypatch, capsys, more):
    monkeypatch.setattr(CaptionTrainingArguments, "n_gpu", property(lambda self: 2))
    monkeypatch.setattr("hf_attncap.training.train.load_data", lambda *_: pytest.fail("data were read"))
    assert main(options(parquet, tmp_path / "run", **more)) == 2
    said = capsys.readouterr().err
    assert "has 2 GPUs" in said and "`torchrun --nproc_per_node 2`" in said and "`accelerate launch --num_processes 2`" in said
    assert not (tmp_path / "run").exists()


def test_inspection_works_with_several_gpus(parquet, monkeypatch):
    monkeypatch.setattr(CaptionTrainingArguments, "n_gpu", property(lambda self: 2))
    assert main(["--inspect", "--train_file", str(parquet), "--validation_share", "0.2", "--use_cpu", "True"]) in (0, 1)


def test_trainer_refuses_several_gpus_in_one_process(processor, tmp_path, monkeypatch):
    monkeypatch.setattr(CaptionTrainingArguments, "n_gpu", property(lambda self: 2))
    model = AttnCapForConditionalGeneration(AttnCapConfig(vocab_size=len(processor.tokenizer), **TINY))
    with pytest.raises(SettingError, match="one process per GPU"):
        CaptionTrainer(model=model, args=CaptionTrainingArguments(str(tmp_path), use_cpu=True, report_to="none"))


def test_dispatch_batches_is_refused(parquet, tmp_path, capsys):
    assert main(options(parquet, tmp_path / "run", accelerator_config='{"dispatch_batches": true}')) == 2
    assert "`dispatch_batches` cannot join batches" in capsys.readouterr().err


@pytest.mark.parametrize("cached", [True, False], ids=["cached features", "pictures"])
def test_best_checkpoint_is_chosen_by_the_scores_of_generated_captions(parquet, tmp_path, cached):
    output, config = tmp_path / "run", tmp_path / "run.yaml"
    config.write_text(
        "predict_with_generate: true\ngeneration_num_beams: 2\ngeneration_max_length: 4\nper_device_eval_batch_size: 3\n"
        "eval_strategy: steps\neval_steps: 4\nsave_strategy: steps\nsave_steps: 4\n"
        "load_best_model_at_end: true\nmetric_for_best_model: cider\n"
        # Labels of one cut caption an image: the references must be the three whole ones all the same.
        "captions_per_image: 1\nmax_caption_words: 4\nlr_scheduler_type: constant\n"
    )
    more = {"feature_cache": tmp_path / "cache"} if cached else {}
    argv = options(parquet, output, num_train_epochs=12, learning_rate=0.03, **more)
    at = argv.index("--captions_per_image")
    assert main(["--config", str(config), *argv[:at], *argv[at + 2 :]]) == 0

    metrics, state = metrics_of(output), json.loads((output / "trainer_state.json").read_text())
    history = {entry["step"]: entry for entry in state["log_history"] if "eval_cider" in entry}
    best = max(history, key=lambda step: history[step]["eval_cider"])
    assert len(history) == 6 and len({entry["eval_cider"] for entry in history.values()}) > 1
    assert state["best_model_checkpoint"].endswith(f"checkpoint-{best}") and metrics["eval_cider"] == history[best]["eval_cider"]
    assert metrics["eval_cider"] > 0 and metrics["eval_mean_length"] <= 3  # the start token is one of the four

    by_hand = scores_by_hand(output, parquet, num_beams=2, max_new_tokens=3)
    assert {name: metrics[f"eval_{name}"] for name in by_hand} == pytest.approx(by_hand, abs=1e-6)
    for folder in (output, output / f"checkpoint-{best}"):
        saved = json.loads((folder / "generation_config.json").read_text())
        assert (saved["num_beams"], saved["max_new_tokens"], saved.get("max_length")) == (3, 21, None)
        assert saved["suppress_tokens"] == [0, 1, 3]


def test_evaluation_uses_the_generation_settings_of_the_model(parquet, tmp_path):
    """Without settings of their own, evaluations take the model's: three beams, up to 21 tokens, no `<unk>`."""
    assert main(options(parquet, tmp_path, predict_with_generate=True, num_train_epochs=4)) == 0
    by_hand, metrics = scores_by_hand(tmp_path, parquet), metrics_of(tmp_path)
    assert {name: metrics[f"eval_{name}"] for name in by_hand} == pytest.approx(by_hand, abs=1e-6)
    assert metrics["eval_loss"] > 0


def test_packed_checkpoint_is_half_the_size_and_loads_in_float32(processor, tmp_path):
    config = AttnCapForConditionalGeneration.config_class(vocab_size=len(processor.tokenizer), **TINY)
    model = AttnCapForConditionalGeneration(config).eval()
    model.save_pretrained(tmp_path / "whole")
    processor.save_pretrained(tmp_path / "whole")
    pack(tmp_path / "whole", tmp_path / "half", {"num_beams": 7, "length_penalty": 0.5})
    said = json.loads((tmp_path / "half" / "generation_config.json").read_text())
    assert (said["num_beams"], said["length_penalty"]) == (7, 0.5)
    with pytest.raises(ValueError, match="Unknown generation settings: beams"):
        pack(tmp_path / "whole", tmp_path / "wrong", {"beams": 7})
    assert not (tmp_path / "wrong").exists()
    whole, half = ((tmp_path / name / "model.safetensors").stat().st_size for name in ("whole", "half"))
    assert half < 0.55 * whole
    loaded = AttnCapForConditionalGeneration.from_pretrained(tmp_path / "half")
    assert loaded.dtype == torch.float32
    pixels = processor(images=Image.open(io.BytesIO(picture("blue"))), return_tensors="pt").pixel_values
    ids = torch.tensor([[1, 5, 6, 7]])
    with torch.no_grad():
        expected = model(pixel_values=pixels, decoder_input_ids=ids).logits
        torch.testing.assert_close(loaded(pixel_values=pixels, decoder_input_ids=ids).logits, expected, atol=1e-2, rtol=1e-2)


def test_averaged_checkpoint_is_the_weighted_mean(processor, tmp_path):
    config = AttnCapForConditionalGeneration.config_class(vocab_size=len(processor.tokenizer), **TINY)
    states = {}
    for name in ("first", "second"):
        model = AttnCapForConditionalGeneration(config)
        model.save_pretrained(tmp_path / name)
        processor.save_pretrained(tmp_path / name)
        states[name] = model.state_dict()
    (tmp_path / "first" / "training.json").write_text('[{"steps": 5}]')
    (tmp_path / "second" / "training.json").write_text('[{"steps": 5}, {"steps": 7}]')
    out = average_checkpoints([tmp_path / "first", tmp_path / "second"], tmp_path / "out", [1, 3])
    for name, value in AttnCapForConditionalGeneration.from_pretrained(out).state_dict().items():
        first, second = states["first"][name], states["second"][name]
        assert torch.allclose(value.double(), 0.25 * first.double() + 0.75 * second.double(), atol=1e-6), name
    assert AttnCapProcessor.from_pretrained(out).tokenizer.get_vocab() == processor.tokenizer.get_vocab()
    parts = [{"share": 1, "stages": []}, {"share": 3, "stages": [{"steps": 7}]}]
    assert json.loads((out / "training.json").read_text()) == [{"steps": 5}, {"blend": parts}]

    same = average_checkpoints([tmp_path / "first", tmp_path / "second", out], tmp_path / "same")  # equal weights
    for name, value in AttnCapForConditionalGeneration.from_pretrained(same).state_dict().items():
        mean = (1.25 * states["first"][name].double() + 1.75 * states["second"][name].double()) / 3
        assert torch.allclose(value.double(), mean, atol=1e-6), name

    AttnCapForConditionalGeneration(config.__class__(**{**config.to_dict(), "hidden_size": 16})).save_pretrained(tmp_path / "other")
    processor.save_pretrained(tmp_path / "other")
    with pytest.raises(ValueError, match=r"differ in the shape of .*: average checkpoints of one captioner"):
        average_checkpoints([tmp_path / "other", tmp_path / "second"], tmp_path / "wrong")
    for weights in ([1], [1, 0], [1, -1], [1, math.inf], [math.nan, 1]):
        with pytest.raises(ValueError, match="give 2 finite weights above 0, one for each"):
            average_checkpoints([tmp_path / "first", tmp_path / "second"], tmp_path / "wrong", weights)
    assert not (tmp_path / "wrong").exists()
    with pytest.raises(FileExistsError, match="not an empty folder"):
        average_checkpoints([tmp_path / "first", tmp_path / "second"], tmp_path / "first")
    with pytest.raises(OSError, match="nowhere.*is not a folder"):
        average_checkpoints([tmp_path / "first", tmp_path / "nowhere"], tmp_path / "wrong")


def test_cached_features_give_the_loss_of_the_images(parquet, processor, tmp_path):
    rows = load_data(DataArguments(train_file=str(parquet))).train
    model = AttnCapForConditionalGeneration.from_pretrained_parts(
        AttnCapForConditionalGeneration.config_class(vocab_size=len(processor.tokenizer), **TINY)
    ).eval()
    maps = cached_features(model.model.encoder, processor.image_processor, rows, str(tmp_path))
    assert maps.dtype == np.float16 and len(maps) == len(rows)
    collate = CaptionCollator(processor, captions_per_image=3)
    pictures = collate([rows[i] for i in range(4)])
    features = collate([{"backbone_features": maps[i], "captions": rows[i]["captions"]} for i in range(4)])
    with torch.no_grad():
        torch.testing.assert_close(model(**features).loss, model(**pictures).loss, rtol=1e-3, atol=1e-3)


def test_trained_blocks_do_not_change_cached_features(parquet, processor, tmp_path):
    rows = load_data(DataArguments(train_file=str(parquet))).train
    config = AttnCapConfig(vocab_size=20, **{**TINY, "freeze_backbone": False, "trainable_blocks": 3})
    encoder = AttnCapForConditionalGeneration(config).model.encoder
    first = cached_features(encoder, processor.image_processor, rows, str(tmp_path))
    with torch.no_grad():
        for block in encoder.blocks()[-3:]:
            for weight in block.parameters():
                weight.mul_(1.5)
    assert np.array_equal(cached_features(encoder, processor.image_processor, rows, str(tmp_path)), first)
    assert len(list(tmp_path.iterdir())) == 1


@pytest.mark.parametrize(
    ("text", "message"), [("learning_rate: [1\n", "cannot be read as YAML"), ("lerning_rate: 1\n", "lerning_rate")]
)
def test_wrong_config_file_is_refused(text, message, tmp_path, capsys):
    (tmp_path / "run.yaml").write_text(text)
    assert main(["--config", str(tmp_path / "run.yaml")]) == 2
    error = capsys.readouterr().err
    assert f"{tmp_path / 'run.yaml'}" in error and message in error


def test_command_line_overrides_the_config_file(tmp_path):
    config = tmp_path / "run.yaml"
    config.write_text("learning_rate: 0.25\nseed: 7\nmodel_config: {hidden_size: 8, dropout: 0.1}\ntrain_file: a.parquet\n")
    argv = ["--config", str(config), "--seed", "9", "--model_config", '{"dropout": 0.2}', "--output_dir", str(tmp_path)]
    model, data, training = parse_arguments(argv)
    assert (training.learning_rate, training.seed, data.train_file) == (0.25, 9, "a.parquet")
    assert model.model_config == {"hidden_size": 8, "dropout": 0.2}


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["--config", "nowhere.yaml"], "No such config file: nowhere.yaml"),
        ([], "No training images"),
        (["--train_file", "nowhere.parquet", "--label_smoothing_factor", "0.1"], "`label_smoothing` in `model_config`"),
        (["--train_file", "nowhere.parquet"], "No such data file: nowhere.parquet"),
        (["--train_file", "nowhere.parquet", "--lerning_rate", "1"], "Unknown options: --lerning_rate 1"),
        (
            ["--train_file", "a.parquet", "--predict_with_generate", "--metric_for_best_model", "cidr"],
            "`metric_for_best_model: cidr` is",
        ),
    ],
)
def test_wrong_settings_give_one_sentence(argv, message, capsys, tmp_path):
    assert main([*argv, "--output_dir", str(tmp_path)]) == 2
    error = capsys.readouterr().err
    assert message in error and "Traceback" not in error


def test_contradictory_model_is_refused_before_training(parquet, tmp_path, capsys):
    argv = options(parquet, tmp_path, model_config=json.dumps({**TINY, "dropout": 2.0}))
    assert main(argv) == 2
    assert "`dropout` is 2.0" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("more", "message"),
    [
        ({"model_name_or_path": "nowhere"}, "`model_name_or_path`: nowhere cannot be loaded as a captioner"),
        ({"resume_from_checkpoint": "nowhere"}, "no such checkpoint: nowhere"),
    ],
)
def test_wrong_checkpoints_give_one_sentence(parquet, tmp_path, capsys, more, message):
    assert main(options(parquet, tmp_path, **more)) == 2
    error = capsys.readouterr().err
    assert message in error and "Traceback" not in error


def test_output_folder_that_cannot_be_created_is_reported(parquet, tmp_path, capsys):
    (tmp_path / "file").write_text("")
    assert main(options(parquet, tmp_path / "file")) == 2
    assert f"`output_dir`: {tmp_path / 'file'} cannot be created" in capsys.readouterr().err


def test_output_folder_with_an_earlier_run_is_refused_or_resumed(parquet, tmp_path, capsys, caplog):
    first = options(parquet, tmp_path, num_train_epochs=1)
    assert main(first) == 0
    assert f"step 2 of 2; validation loss {metrics_of(tmp_path)['eval_loss']:.4g}" in caplog.text
    assert f"the captioner is in {tmp_path}" in caplog.text
    assert main(first) == 2
    assert "holds an earlier run, checkpoint-2: resume it with `--resume_from_checkpoint last`" in capsys.readouterr().err
    assert main([*first, "--resume_from_checkpoint", "last"]) == 0
    assert f"resuming from {tmp_path / 'checkpoint-2'}" in caplog.text


def test_settings_that_transformers_refuses_give_one_sentence(parquet, tmp_path, capsys):
    assert main([*options(parquet, tmp_path), "--bf16", "True", "--fp16", "True"]) == 2
    said = capsys.readouterr().err
    assert said.startswith("error: ") and "fp16 and bf16" in said and "Traceback" not in said


words = st.sampled_from(["a", "red", "blue", "square", "there", "is"])


@settings(max_examples=30)
@given(rows=st.lists(st.lists(st.lists(words, min_size=1, max_size=6), min_size=1, max_size=4), min_size=1, max_size=4))
def test_collator_keeps_every_word_and_pads_with_minus_100(processor, rows):
    """Each image gets k label rows, made of its own captions, each word and the end token kept."""
    k = 4
    batch = CaptionCollator(processor, captions_per_image=k)(
        [{"backbone_features": np.zeros((2, 1, 1)), "captions": [" ".join(caption) for caption in row]} for row in rows]
    )
    labels = batch["labels"]
    assert labels.shape[:2] == (len(rows), k)
    labels = labels.flatten(0, 1)
    for index, label in enumerate(labels.tolist()):
        kept = [token for token in label if token != -100]
        assert label == kept + [-100] * (len(label) - len(kept)) and kept[-1] == processor.tokenizer.eos_token_id
        assert processor.tokenizer.decode(kept[:-1]).split() in rows[index // k]
    for index, row in enumerate(rows):
        own = {tuple(token for token in label if token != -100) for label in labels[index * k : (index + 1) * k].tolist()}
        assert len(own) == len({tuple(caption) for caption in row})


@pytest.mark.parametrize(("batch", "code"), [(1, 2), (4, 0)])
def test_batch_norm_of_a_single_value_is_refused(parquet, tmp_path, capsys, batch, code):
    running = json.dumps({**TINY, "freeze_backbone": False, "freeze_batch_norm": False})
    more = {"model_config": running, "per_device_train_batch_size": batch, "max_steps": 1}
    assert main(options(parquet, tmp_path / "run", **more)) == code
    assert ("a single image with a 1 x 1 map" in capsys.readouterr().err) is (code == 2)
    assert (tmp_path / "run" / "model.safetensors").exists() is (code == 0)


def test_interrupted_run_says_how_to_continue(parquet, tmp_path, monkeypatch, capsys):
    def interrupt(*args):
        raise KeyboardInterrupt

    monkeypatch.setattr("hf_attncap.training.train.train", interrupt)
    assert main(["--train_file", str(parquet), "--output_dir", str(tmp_path / "run")]) == 130
    assert "`--resume_from_checkpoint last` continues" in capsys.readouterr().err
