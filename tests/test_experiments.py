"""The scripts behind the tables and curves of trained captioners, on data too small to say anything."""

import importlib
import json
import runpy
import subprocess
import sys
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml
from datasets import Dataset
from hf_attncap.model_card.measure import measure
from hf_attncap.training.arguments import DataArguments, parse_arguments
from hf_attncap.training.data.splits import load_data
from PIL import Image
from safetensors.torch import save_file
from torchvision.models import mobilenet_v2

from hf_attncap import AttnCapConfig, Captioner
from hf_attncap.metrics import CaptionMetrics, compare

ROOT = Path(__file__).parent.parent
BASE = "flickr8k_mobilenet_v2_decoder.yaml"


@pytest.fixture
def script(monkeypatch):
    """A script of `benchmarks/` as a module."""
    monkeypatch.syspath_prepend(ROOT / "benchmarks")
    return lambda name: importlib.import_module(name)


def command(script: Any, monkeypatch, *arguments: object) -> None:
    monkeypatch.setattr(sys, "argv", [script.__name__, *map(str, arguments)])
    script.main()


@pytest.fixture
def table(tmp_path) -> Path:
    """Six pictures of two colours with two captions each."""
    colours = [("red", (220, 30, 30)), ("blue", (40, 60, 220))] * 3
    images = []
    for number, (_, colour) in enumerate(colours):
        Image.new("RGB", (40 + number, 40), colour).save(tmp_path / f"{number}.png")
        images.append({"bytes": (tmp_path / f"{number}.png").read_bytes(), "path": None})
    captions = [[f"a {name} square", f"the square is {name}"] for name, _ in colours]
    Dataset.from_dict({"image": images, "captions": captions}).to_parquet(str(tmp_path / "table.parquet"))
    return tmp_path / "table.parquet"


def test_curves_show_and_log_what_runs_have_logged(script, monkeypatch, tmp_path):
    history = {
        "decoder": [{"step": 5, "loss": 3.2, "epoch": 0.5}, {"step": 10, "eval_loss": 3.0, "eval_cider": 0.4}],
        "critical": [{"step": 5, "loss": -0.1, "reward": 0.3}, {"step": 10, "train_runtime": 3.0}],
    }
    for name, entries in history.items():
        (tmp_path / name).mkdir()
        (tmp_path / name / "trainer_state.json").write_text(json.dumps({"log_history": entries}))
    folders = [tmp_path / name for name in history]
    command(script("curves"), monkeypatch, *folders, "--output", tmp_path / "curves.png", "--log", tmp_path / "log.json")
    assert Image.open(tmp_path / "curves.png").width > 500
    assert json.loads((tmp_path / "log.json").read_text()) == {
        "decoder": [{"step": 5, "loss": 3.2}, {"step": 10, "eval_loss": 3.0, "eval_cider": 0.4}],
        "critical": [{"step": 5, "loss": -0.1, "reward": 0.3}],
    }


def test_every_row_of_the_ablation_is_a_run_and_differs_from_the_base(script, tmp_path):
    rows = script("ablation").read_plan()
    names = [row.name for row in rows]
    assert len(set(names)) == len(names) and all(row.against in {None, *names} for row in rows)
    configs = []
    for row in rows:
        file = tmp_path / f"{row.name}.yaml"
        file.write_text(json.dumps(row.settings))
        model, _, training = parse_arguments(["--config", str(file), "--train_file", "a.json", "--output_dir", str(tmp_path)])
        settings: Any = model.model_config
        settings = {"freeze_word_embeddings": False, **settings}
        AttnCapConfig(vocab_size=10, **settings)
        configs.append(json.dumps([settings, model.word_vectors, model.image_size, training.num_train_epochs], sort_keys=True))
    assert len(set(configs)) == len(configs)


def test_table_of_the_ablation_compares_neighbours(script, table, monkeypatch, tmp_path, capsys):
    ablation = script("ablation")
    plan = tmp_path / "plan.yaml"
    rows = {
        "good": {"what": "all right", "seeds": [1, 2]},
        "bad": {"what": "one word", "against": "good"},
        "none": {"what": "not run"},
    }
    plan.write_text(json.dumps({"base": BASE, "seeds": [1], "settings": {}, "rows": rows}))
    monkeypatch.setattr(ablation, "PLAN", plan)
    good = {str(n): f"a {'red' if n % 2 == 0 else 'blue'} square" for n in range(6)}
    ids = script("ablation").load_data(ablation.DataArguments(train_file=str(table))).train["image_id"]
    for name, captions in (("good-seed1", good), ("good-seed2", good), ("bad-seed1", dict.fromkeys(good, "square"))):
        (tmp_path / f"{name}.json").write_text(json.dumps({"captions": dict(zip(ids, captions.values()))}))
    command(ablation, monkeypatch, "--validation_file", table, "--results", tmp_path, "--table")
    heading, _, first, second = capsys.readouterr().out.strip().splitlines()
    assert "CIDEr against" in heading and first.startswith("| good | all right | 2 | 100.0 (100.0 to 100.0)")
    assert second.startswith("| bad | one word | 1 |") and "| good: -" in second


@pytest.mark.slow
def test_ablation_runs_what_is_missing(script, table, monkeypatch, tmp_path):
    ablation = script("ablation")
    plan = tmp_path / "plan.yaml"
    tiny = {"hidden_size": 16, "attention_dim": 8, "word_embed_dim": 8, "encoder_channels": 8}
    rows = {
        "none": {"what": "two layers", "model_config": {"word_attention": "none"}},
        "other": {"what": "small", "model_config": tiny},
    }
    settings = {**yaml.safe_load(ablation.PLAN.read_text())["settings"], "max_steps": 2, "image_size": 64, "min_count": 1}
    plan.write_text(json.dumps({"base": BASE, "seeds": [1], "settings": settings, "rows": rows}))
    monkeypatch.setattr(ablation, "PLAN", plan)
    weights = tmp_path / "weights.safetensors"
    save_file(mobilenet_v2().state_dict(), weights)
    options = ["--train_file", table, "--validation_file", table, "--backbone_weights", weights, "--runs", tmp_path / "runs"]
    (tmp_path / "none-seed1.json").write_text("{}")  # is there: not run again
    command(ablation, monkeypatch, *options, "--results", tmp_path)
    found = json.loads((tmp_path / "other-seed1.json").read_text())
    assert len(found["captions"]) == 6 and found["scores"]["cider"] >= 0 and found["settings"]["model_config"]["hidden_size"] == 16
    assert (tmp_path / "none-seed1.json").read_text() == "{}" and not (tmp_path / "runs" / "none-seed1").exists()


def test_objects_of_generated_scenes_lie_in_their_boxes_and_held_out_layouts_are_new(script):
    pointing = script("pointing")
    for count in (3, 4):
        known, new = (set(pointing.layouts(count, held_out)) for held_out in (False, True))
        assert known and new and not known & new
    random = np.random.default_rng(0)
    for _ in range(20):
        image, things = pointing.scene(random, held_out=False)
        assert len({thing.shape for thing in things}) == len({thing.colour for thing in things}) == len(things)
        pixels = np.asarray(image).astype(int)
        for thing in things:
            like = (np.abs(pixels - pointing.COLOURS[thing.colour]).sum(axis=-1) == 0).nonzero()
            left, top, right, bottom = thing.box
            assert len(like[0]) > 50 and top <= like[0].min() and like[0].max() <= bottom
            assert left <= like[1].min() and like[1].max() <= right
        named = pointing.captions(random, things)
        assert all(f"a {thing.colour} {thing.shape}" in caption for caption in named for thing in things)


def test_a_region_is_inside_a_box_if_its_centre_is(script):
    within = script("pointing").within((0, 0, 112, 32), (7, 7))  # centres at 16, 48, 80, 112, ...
    assert within.tolist() == [[True] * 4 + [False] * 3, *[[False] * 7] * 6]


@pytest.mark.slow
def test_pointing_game_from_scenes_to_scores(script, monkeypatch, tmp_path):
    pointing, output = script("pointing"), tmp_path / "pointing.json"
    weights = tmp_path / "weights.safetensors"
    save_file(mobilenet_v2().state_dict(), weights)
    sizes = ["--seeds", 1, "--scenes", 16, "--tests", 3, "--epochs", 1]
    command(pointing, monkeypatch, "--backbone_weights", weights, "--runs", tmp_path / "runs", "--output", output, *sizes)
    found = json.loads(output.read_text())["runs"]
    assert [run["word_attention"] for run in found] == list(pointing.KINDS)
    assert all(0 <= run["shapes_with_colour"] <= run["shapes"] <= 1 for run in found)
    assert all({"hits", "importance_hits"} <= run.keys() for run in found)


def results_file(folder: Path, sets: list[dict[str, Any]]) -> Path:
    folder.mkdir()
    (folder / "results.json").write_text(json.dumps({"sets": sets}))
    return folder / "results.json"


def test_two_captioners_side_by_side(script, monkeypatch, tmp_path, capsys):
    other = {"captions": {"9": "a cat"}, "cider": {"9": 1.0}, "references": {"9": "a cat"}}
    files = []
    for name, caption, more in (("before", "a dog", []), ("after", "two dogs", [other])):
        found = {"captions": {"1": caption, "2": "x"}, "cider": {"1": 0.5, "2": 0.0}, "references": {"1": "a | b", "2": "y"}}
        files.append(results_file(tmp_path / name, [*more, found]))
    command(script("side_by_side"), monkeypatch, *files)
    said = capsys.readouterr().out.splitlines()
    assert said[0] == "| image | before | after | a reference |" and len(said) == 4
    assert "| 1 | a dog (50) | two dogs (50) | a / b |" in said


def test_differences_of_two_captioners_have_intervals(script, monkeypatch, table, tmp_path, capsys):
    """Also where only one of them was measured on a further set; p is that of `compare` with all references."""
    rows = load_data(DataArguments(train_file=str(table))).train
    references = dict(zip(rows["image_id"], rows["captions"]))
    right, wrong = {name: own[0] for name, own in references.items()}, dict.fromkeys(references, "a blue square")
    sets = [{"captions": said, "cider": dict.fromkeys(said, 1.0), "references": right} for said in (wrong, right)]
    other = {"captions": {"x": "a cat"}, "cider": {"x": 1.0}, "references": {"x": "a cat"}}
    files = [results_file(tmp_path / "before", sets[:1]), results_file(tmp_path / "after", [other, sets[1]])]
    command(script("side_by_side"), monkeypatch, *files, "--references", table)
    lines = capsys.readouterr().out.split("\n\n")[1].splitlines()
    metrics = CaptionMetrics(references)
    expected = compare(metrics.score(wrong), metrics.score(right))
    assert lines[0] == "| images | score | before | after | difference (95 % interval) | p |" and len(lines) == 4
    for line, kind, title in ((lines[2], "bleu_4", "BLEU-4"), (lines[3], "cider", "CIDEr")):
        one = expected[kind]
        cells = line.strip("| ").split(" | ")
        assert cells[0].endswith(f"{table.parent.name}/table.parquet, 6") and cells[1] == title
        assert cells[2:4] == [f"{100 * one.first:.1f}", f"{100 * one.second:.1f}"] and one.second > one.first
        assert cells[4].startswith(f"{100 * one.difference:+.1f} (") and cells[5] == f"{one.p:.4f}"
    Dataset.from_parquet(str(table)).select([0, 1]).to_parquet(str(tmp_path / "two.parquet"))
    with pytest.raises(SystemExit, match="before/results.json has no set of the images of"):
        command(script("side_by_side"), monkeypatch, *files, "--references", tmp_path / "two.parquet")


def test_settings_of_the_search_are_scored_as_the_captioner_would_say_it(script, tiny_checkpoint, table, monkeypatch, tmp_path):
    output = tmp_path / "decoding.json"
    settings = ["--beams", 1, 3, "--length_penalties", 0.7, 2]
    command(script("decoding"), monkeypatch, tiny_checkpoint, "--images", table, *settings, "--output", output)
    found = json.loads(output.read_text())["settings"]
    assert [(each["num_beams"], each["length_penalty"]) for each in found] == [(1, 0.7), (3, 0.7), (3, 2)]
    # The checkpoint's own settings are three beams and 0.7.
    own = measure(Captioner.from_pretrained(tiny_checkpoint), [str(table)])["sets"][0]["scores"]
    scores = found[1].keys() & own.keys()
    assert len(scores) == 5 and {name: found[1][name] for name in scores} == pytest.approx(
        {name: own[name] for name in scores}, abs=1e-5
    )


@pytest.mark.parametrize(
    "arguments",
    [
        ["benchmarks/curves.py", "MISSING", "--output", "curves.png"],
        ["benchmarks/side_by_side.py", "MISSING/results.json", "MISSING/results.json"],
        ["benchmarks/grammar.py", "MISSING.json"],
        ["benchmarks/pointing_photographs.py", "--images", "MISSING.parquet"],
        ["-m", "benchmarks.decoding", "MISSING", "--images", "TABLE"],
        ["-m", "benchmarks.decoding", "hf_attncap/checkpoint", "--images", "MISSING.parquet"],
        ["-m", "benchmarks.ablation", "--table", "--results", "MISSING", "--validation_file", "TABLE"],
    ],
    ids=lambda arguments: " ".join(arguments[:2]),
)
def test_what_is_missing_is_named_in_one_line(table, arguments, monkeypatch, capsys):
    """The script that does not need torch runs in a new process, the others in this one, which has already imported torch."""
    arguments = [argument.replace("TABLE", str(table)) for argument in arguments]
    if arguments[0] == "benchmarks/grammar.py":
        found = subprocess.run([sys.executable, *arguments], cwd=ROOT, capture_output=True, text=True, timeout=120)
        code, said = found.returncode, found.stderr
    else:
        monkeypatch.chdir(ROOT)
        monkeypatch.syspath_prepend(ROOT / "benchmarks")
        name = arguments.pop(0)
        start = runpy.run_path
        if name == "-m":
            name, start = arguments.pop(0), partial(runpy.run_module, alter_sys=True)
        monkeypatch.setattr(sys, "argv", [name, *arguments])
        with pytest.raises(SystemExit) as ended:
            start(name, run_name="__main__")
        code = ended.value.code
        said = capsys.readouterr().err + (code if isinstance(code, str) else "")  # Python would print a message for `sys.exit`
    assert code
    assert "MISSING" in said.splitlines()[-1] and "error:" in said and "Traceback" not in said
