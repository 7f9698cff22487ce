"""`attncap evaluate`: input files, table, JSON and JSON lines."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from hf_attncap.cli import main
from hf_attncap.metrics import CaptionMetrics

CAPTIONS = {1: ["A man rides a bike.", "A man is on his bike!"], 2: ["Two dogs play.", "Dogs run in the snow."], 3: ["A cat."]}
COCO = {
    "images": [{"id": n, "file_name": f"{n}.jpg"} for n in CAPTIONS],
    "annotations": [
        {"image_id": n, "id": 10 * n + k, "caption": text} for n, texts in CAPTIONS.items() for k, text in enumerate(texts)
    ],
}
RESULTS = [
    {"image_id": 1, "caption": "a man on a bike"},
    {"image_id": 2, "caption": "dogs in snow"},
    {"image_id": 3, "caption": "a cat"},
]
EXPECTED = CaptionMetrics({str(n): texts for n, texts in CAPTIONS.items()}).score(
    {str(r["image_id"]): r["caption"] for r in RESULTS}
)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    karpathy = [
        {"filename": f"{n}.jpg", "imgid": n, "split": "test" if n < 3 else "train", "sentences": [{"raw": text} for text in texts]}
        for n, texts in CAPTIONS.items()
    ]
    (tmp_path / "captions.json").write_text(json.dumps(COCO), encoding="utf-8")
    (tmp_path / "karpathy.json").write_text(json.dumps({"images": karpathy}), encoding="utf-8")
    (tmp_path / "results.json").write_text(json.dumps(RESULTS), encoding="utf-8")
    lines = [json.dumps({"path": f"photos/{r['image_id']}.jpg", "caption": r["caption"]}) for r in RESULTS]
    (tmp_path / "results.jsonl").write_text("\n".join(lines), encoding="utf-8")
    return tmp_path


def evaluate(folder: Path, *options: str | Path, predictions: str = "results.json", references: str = "captions.json") -> int:
    return main(
        ["evaluate", "--predictions", str(folder / predictions), "--references", str(folder / references), *map(str, options)]
    )


@pytest.mark.parametrize("predictions", ["results.json", "results.jsonl"])
@pytest.mark.parametrize("references", ["captions.json", "karpathy.json"])
def test_prints_a_table_and_writes_json(folder, capsys, predictions, references):
    assert evaluate(folder, "--output", folder / "scores.json", predictions=predictions, references=references) == 0
    table = dict(line.split() for line in capsys.readouterr().out.splitlines())
    assert table["images"] == "3" and table["cider"] == f"{100 * EXPECTED['cider']:.2f}" and table["vocabulary"] == "8"
    written = json.loads((folder / "scores.json").read_text(encoding="utf-8"))
    assert written["scores"] == dict(EXPECTED) and written["images"] == 3
    assert not list(folder.glob(".*"))


def test_split_of_a_karpathy_file(folder, capsys):
    assert evaluate(folder, "--split", "test", references="karpathy.json") == 0
    shown = capsys.readouterr()
    assert "images                   2" in shown.out
    assert 'images without references, left out: 1 ("3")' in shown.err
    assert evaluate(folder, "--split", "dev", references="karpathy.json") == 1
    assert "has no split dev; it has test (2 images), train (1 images)" in capsys.readouterr().err


def test_json_lines_per_image(folder, capsys):
    assert evaluate(folder, "--per-image", "-") == 0
    printed = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert printed == list(EXPECTED.rows())
    assert evaluate(folder, "--per-image", folder / "images.jsonl") == 0
    assert [json.loads(line) for line in (folder / "images.jsonl").read_text(encoding="utf-8").splitlines()] == printed


def test_comparison_with_a_baseline(folder, capsys):
    other = [{"image_id": 1, "caption": "a man"}, {"image_id": 3, "caption": "dogs"}, {"image_id": 4, "caption": "what"}]
    (folder / "other.json").write_text(json.dumps(other), encoding="utf-8")
    assert evaluate(folder, "--compare", folder / "other.json", "--output", folder / "scores.json") == 0
    shown = capsys.readouterr()
    assert "95 % interval" in shown.out and "images                   2" in shown.out
    assert "images with a caption in only one of" in shown.err and 'without references, left out: 1 ("4")' in shown.err
    found = json.loads((folder / "scores.json").read_text(encoding="utf-8"))
    gain = found["comparison"]["rouge_l"]
    assert gain["second"] == pytest.approx(found["scores"]["rouge_l"]) and gain["difference"] > 0 and 0 < gain["p"] <= 1


def test_training_captions(folder, capsys):
    (folder / "training.json").write_text(json.dumps({"x": ["A cat.", "Dogs in snow"]}), encoding="utf-8")
    assert evaluate(folder, "--training", folder / "training.json") == 0
    assert "novel                33.33" in capsys.readouterr().out


def test_empty_captions_are_counted(folder, capsys):
    (folder / "results.json").write_text(json.dumps({"1": "", "2": "dogs", "3": " "}), encoding="utf-8")
    assert evaluate(folder) == 0
    shown = capsys.readouterr()
    assert 'captions without a word: 2 ("1", "3")' in shown.err and "empty                66.67" in shown.out


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ('[{"image_id": 1, "caption": "a"}, {"image_id": 1, "caption": "b"}]', 'different captions for one image: "1"'),
        ('[{"image_id": 1, "caption": "a"}, {"image_id": "1", "caption": "a"}]', "compared as text"),
        ('[{"image_id": 9, "caption": "a"}]', "results.json has a reference"),
        ('[{"image_id": 1}]', 'row 1 has no "caption"'),
        ("{", "not well-formed JSON"),
        ("[]", "holds no captions"),
    ],
)
def test_errors_name_unusable_files(folder, capsys, content, message):
    (folder / "results.json").write_text(content, encoding="utf-8")
    assert evaluate(folder, "--output", folder / "scores.json") == 1
    shown = capsys.readouterr()
    assert shown.out == "" and message in shown.err
    assert not (folder / "scores.json").exists()


def test_missing_file_and_unwritable_output(folder, capsys):
    assert evaluate(folder, predictions="none.json") == 1
    assert "none.json cannot be read" in capsys.readouterr().err
    assert evaluate(folder, "--output", folder / "nowhere" / "scores.json") == 1
    assert "scores.json cannot be written" in capsys.readouterr().err


def test_meteor_without_java(folder, capsys, monkeypatch):
    monkeypatch.setenv("PATH", str(folder))
    assert evaluate(folder, "--meteor") == 1
    assert "METEOR needs" in capsys.readouterr().err


def test_evaluate_does_not_import_torch(folder):
    shown = subprocess.run(
        [sys.executable, "-m", "hf_attncap", "evaluate", "--predictions", "results.json", "--references", "captions.json"],
        cwd=folder,
        env={**os.environ, "PYTHONPATH": str(Path(__file__).parents[1]), "PYTHONPROFILEIMPORTTIME": "1"},
        capture_output=True,
        text=True,
        timeout=60,
        check=True,
    )
    imported = {line.rpartition("|")[2].strip() for line in shown.stderr.splitlines()}
    assert "cider" in shown.stdout and "numpy" in imported and not imported & {"torch", "transformers", "datasets"}


def test_inputs_are_not_overwritten(folder, capsys):
    before = {path.name: path.read_bytes() for path in folder.iterdir()}
    for options in (
        ["--output", folder / "captions.json"],
        ["--per-image", folder / "results.json"],
        ["--output", folder / "x", "--per-image", folder / "x"],
        ["--output", folder],
    ):
        assert evaluate(folder, *options) == 1
        assert "would be overwritten" in (said := capsys.readouterr().err) or "is a folder" in said
    assert evaluate(folder, references="results.json") == 1
    assert "given as predictions and as references" in capsys.readouterr().err
    assert {path.name: path.read_bytes() for path in folder.iterdir()} == before


def test_empty_file_name_is_wrong_usage(folder, capsys):
    with pytest.raises(SystemExit, match="2"):
        evaluate(folder, "--compare", "")
    assert "the file name is empty" in capsys.readouterr().err


def test_dash_means_stdin_and_stdout(folder, capsys, monkeypatch):
    assert evaluate(folder, "--output", "-") == 0
    shown = capsys.readouterr()
    assert json.loads(shown.out)["scores"] == dict(EXPECTED) and "cider" in shown.err
    piped = subprocess.run(
        [sys.executable, "-m", "hf_attncap", "evaluate", "--predictions", "-", "--references", str(folder / "captions.json")],
        cwd=Path(__file__).parents[1],
        input=(folder / "results.json").read_bytes(),
        capture_output=True,
        timeout=60,
        check=True,
    )
    assert b"images                   3" in piped.stdout


def test_few_images_and_single_references_are_noted(folder, capsys):
    (folder / "single.json").write_text(json.dumps({n: texts[0] for n, texts in CAPTIONS.items()}), encoding="utf-8")
    assert evaluate(folder, "--compare", folder / "results.jsonl", references="single.json") == 0
    said = capsys.readouterr().err
    assert "has one reference per image" in said and "with 3 images the interval and p of the comparison are unreliable" in said


@pytest.mark.parametrize("option", ["--output", "--per-image"])
def test_only_its_own_files_are_replaced(folder, capsys, option):
    for name, content in (("photo.jpg", b"\xff\xd8\xff"), ("other.jsonl", b'{"image_id": 1, "caption": "a dog"}\n')):
        (folder / name).write_bytes(content)
        assert evaluate(folder, option, folder / name) == 1
        assert f"{name} exists and was not written by `attncap evaluate`" in capsys.readouterr().err
        assert (folder / name).read_bytes() == content
    (folder / "empty").touch()
    for name in ("empty", "scores", "scores"):
        assert evaluate(folder, option, folder / name) == 0
