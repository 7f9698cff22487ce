"""`attncap caption --output` and `--format txt`: every format, broken images, refusals, continued and finished runs."""

import csv
import hashlib
import io
import json
import os
import sys
import threading
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from filelock import FileLock
from PIL import Image

import hf_attncap.bulk
import hf_attncap.caption_command
from hf_attncap import Captioner
from hf_attncap.cli import main
from hf_attncap.metrics.report import evaluate_files

FORMATS = ["jsonl", "csv", "parquet", "coco"]
BROKEN = ["in/c broken.jpg", "in/d.png"]


@pytest.fixture
def here(tmp_path, monkeypatch) -> Path:
    """The current folder, with `in`: eleven pictures and two broken ones, three per batch."""
    monkeypatch.chdir(tmp_path)
    random = np.random.default_rng(0)
    for name in ("a.png", "b.jpg", "d/x.png", "d/y.webp", "e", "f.png", "g.png", "h,\"'.png", "i\nj.png", "k.png", "l.png"):
        path = tmp_path / "in" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        pixels = Image.fromarray(random.integers(0, 256, (4, 4, 3), dtype=np.uint8))
        pixels.resize((90, 60), Image.Resampling.NEAREST).save(path, {"b.jpg": "JPEG", "d/y.webp": "WEBP"}.get(name, "PNG"))
    (tmp_path / "in" / "c broken.jpg").write_bytes(b"no image")
    whole = (tmp_path / "in" / "a.png").read_bytes()
    (tmp_path / "in" / "d.png").write_bytes(whole[: len(whole) // 2])
    return tmp_path


@pytest.fixture(scope="module")
def loaded(tiny_checkpoint):
    return Captioner.from_pretrained(tiny_checkpoint, device="cpu")


@pytest.fixture
def caption(tiny_checkpoint, loaded, monkeypatch):
    """Runs the command with the tiny checkpoint, which is loaded only once."""
    load = Captioner.from_pretrained

    def from_pretrained(name, **options):
        used = {option for option, value in options.items() if value is not None}
        return loaded if name == str(tiny_checkpoint) and not used else load(name, **options)

    monkeypatch.setattr(Captioner, "from_pretrained", from_pretrained)

    def run(*arguments) -> int:
        return main(["caption", "--model", str(tiny_checkpoint), "--batch-size", "3", *map(str, arguments)])

    return run


@pytest.fixture
def interrupt(monkeypatch):
    """`interrupt.at(n)` ends the next run with Ctrl-C in batch n, from 0; `interrupt.batches` has the sizes of all batches."""
    generate, batches = Captioner._caption_batch, []

    def arm(number: int) -> None:
        left = [number]

        def fail(captioner, images, *rest):
            if not left[0]:
                monkeypatch.setattr(Captioner, "_caption_batch", counted)
                raise KeyboardInterrupt
            left[0] -= 1
            return counted(captioner, images, *rest)

        monkeypatch.setattr(Captioner, "_caption_batch", fail)

    def counted(captioner, images, *rest):
        batches.append(len(images))
        return generate(captioner, images, *rest)

    monkeypatch.setattr(Captioner, "_caption_batch", counted)
    return SimpleNamespace(at=arm, batches=batches)


def read_rows(path: Path, format: str) -> list[dict]:
    """The rows of an output in the types of JSON lines, without `words`."""
    if format == "jsonl":
        rows = [json.loads(line) for line in path.read_text().splitlines()]
        return [{name: value for name, value in row.items() if name != "words"} for row in rows]
    if format == "parquet":
        from pyarrow.parquet import read_table

        return read_table(path).to_pylist()
    with open(path, newline="", encoding="utf-8") as file:
        rows = list(csv.DictReader(file))
    numbers = {"score": float, "confidence": float, "alternatives": json.loads, "error": str}
    return [
        {name: (numbers[name](value) if value else None) if name in numbers else value for name, value in row.items()}
        for row in rows
    ]


@pytest.mark.parametrize("format", FORMATS[:3])
def test_tables_have_a_row_per_image_and_the_reason_of_broken_ones(format, here, caption, loaded, capfd):
    assert caption("in", "nowhere.png", "--output", f"out.{format}", "--num-return-sequences", 2) == 1
    out, err = capfd.readouterr()
    rows = {row["path"]: row for row in read_rows(here / f"out.{format}", format)}
    assert list(rows) == [
        "in/a.png", "in/b.jpg", "in/c broken.jpg", "in/d/x.png", "in/d/y.webp", "in/d.png", "in/e", "in/f.png", "in/g.png",
        "in/h,\"'.png", "in/i\nj.png", "in/k.png", "in/l.png", "nowhere.png",
    ]  # fmt: skip
    good = [path for path in rows if path not in (*BROKEN, "nowhere.png")]
    expected = loaded.caption(good, num_return_sequences=2)
    for path, result in zip(good, expected):
        row = rows.pop(path)
        assert (row["caption"], row["error"], row["confidence"]) == (result.text, None, None)
        assert row["score"] == pytest.approx(result.score, abs=1e-4)
        assert [other["caption"] for other in row["alternatives"]] == [other.text for other in result.alternatives]
    for path, row in rows.items():
        assert (row["caption"], row["score"], row["alternatives"]) == ("", None, []) and path in row["error"]
    assert out == "" and len(err.splitlines()) == 4
    assert err.splitlines()[-1] == f"out.{format} is complete: 14 images, 3 of them failed"
    assert sorted(path.name for path in here.iterdir()) == ["in", f"out.{format}", f"out.{format}.attncap"]


@pytest.mark.parametrize("format", [*FORMATS, "txt"])
def test_a_continued_run_gives_the_bytes_of_an_uninterrupted_one(format, here, caption, interrupt, capfd):
    arguments = ["in", "--format", format] if format == "txt" else ["in", "--format", format, "--output", "out"]
    assert caption(*arguments) == 1
    expected, batches = contents(here), list(interrupt.batches)
    restart(here)
    assert batches == [2, 2, 3, 3, 1], "the broken images are in the first two batches"
    for number in range(len(batches)):
        interrupt.batches.clear()
        interrupt.at(number)
        capfd.readouterr()
        assert caption(*arguments) == 130
        done = [0, 3, 6, 9, 12][number]
        assert f"interrupted after {done} images; repeat the command to go on\n" in capfd.readouterr().err
        assert not (here / "out").exists()
        assert caption(*arguments) == 1
        assert interrupt.batches == batches, "no image is captioned twice, and the batches are the same"
        assert contents(here) == expected
        restart(here)


def test_a_continued_run_divides_batches_of_large_images_alike(here, caption, interrupt, monkeypatch):
    monkeypatch.setattr("hf_attncap.images.MAX_BATCH_PIXELS", 2 * 90 * 60 - 1)
    assert caption("in", "--output", "out.csv") == 1
    expected, batches = contents(here), list(interrupt.batches)
    assert batches == [2, 2, 2, 1, 2, 1, 1], "two of three"
    for number in range(1, len(batches)):
        (here / "out.csv").unlink()
        interrupt.batches.clear()
        interrupt.at(number)
        assert caption("in", "--output", "out.csv") == 130
        assert caption("in", "--output", "out.csv") == 1
        assert contents(here) == expected
        again = len(interrupt.batches) - len(batches)
        assert again in (0, 1) and interrupt.batches[-3:] == batches[-3:]


def contents(folder: Path) -> dict[str, bytes]:
    """The files of a folder, without those of journals."""
    files = [path for path in folder.rglob("*") if path.is_file() and ".attncap" not in str(path.parent)]
    return {str(path.relative_to(folder)): path.read_bytes() for path in files}


def restart(folder: Path) -> None:
    """Removes outputs and journals."""
    for path in [*folder.rglob("*.txt"), folder / "out", *folder.rglob("*.attncap*/*")]:
        path.unlink(missing_ok=True)
    for path in folder.rglob("*.attncap*"):
        path.rmdir()


@pytest.mark.parametrize("format", ["jsonl", "txt"])
def test_a_journal_that_was_cut_anywhere_is_continued(format, here, caption, interrupt, capfd):
    """As after a crash while a line was written."""
    arguments = ["in", "--format", format] if format == "txt" else ["in", "--format", format, "--output", "out"]
    assert caption(*arguments) == 1
    expected = contents(here)
    restart(here)
    interrupt.at(2)
    assert caption(*arguments) == 130
    journal = next(here.rglob("rows.jsonl"))
    whole, files = journal.read_bytes(), contents(here)
    for length in (0, 1, whole.index(b"\n"), whole.index(b"\n") + 1, len(whole) - 1):
        for path in here.rglob("*.txt"):
            path.unlink()
        for path, content in files.items():  # the caption files that were there when the journal had this length
            if path.endswith(".txt") and f'"{path[:-4]}.' in whole[:length].decode().rpartition("\n")[0]:
                (here / path).write_bytes(content)
        journal.parent.mkdir(exist_ok=True)
        journal.write_bytes(whole[:length])
        assert caption(*arguments) == 1
        assert contents(here) == expected, length
        restart(here)
        interrupt.at(2)
        assert caption(*arguments) == 130


@pytest.mark.skipif(sys.platform == "win32", reason="needs a limit of file sizes")
@pytest.mark.parametrize("limit", [1500, 2500, 3500])
def test_a_run_on_a_full_disk_can_be_continued(limit, here, caption, capfd):
    import resource

    assert caption("in", "--output", "whole.csv") == 1
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    capfd.readouterr()
    try:
        resource.setrlimit(resource.RLIMIT_FSIZE, (limit, before[1]))
        code = caption("in", "--output", "out.csv")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert code == 1 and not (here / "out.csv").exists()
    assert "rows.jsonl cannot be written" in (err := capfd.readouterr().err) and "repeat the command to go on" in err
    assert caption("in", "--output", "out.csv") == 1
    assert (here / "out.csv").read_bytes() == (here / "whole.csv").read_bytes()


def test_a_finished_run_does_nothing(here, caption, capfd, monkeypatch):
    assert caption("in", "--output", "out.csv") == 1
    written = (here / "out.csv").stat()
    capfd.readouterr()
    monkeypatch.setattr(Captioner, "from_pretrained", None)
    assert caption("in", "--output", "out.csv") == 1, "the exit code stays"
    assert capfd.readouterr() == ("", "out.csv is complete already, nothing was done: 13 images, 2 of them failed\n")
    assert (here / "out.csv").stat() == written


def test_a_finished_run_whose_output_is_gone_runs_again(here, caption):
    assert caption("in/a.png", "--output", "out.csv") == 0
    before = (here / "out.csv").read_bytes()
    (here / "out.csv").unlink()
    assert caption("in/a.png", "--output", "out.csv") == 0
    assert (here / "out.csv").read_bytes() == before


@pytest.mark.parametrize("finished", [False, True])
@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--num-beams", "2"], "--num-beams was null and is now 2"),
        (["--batch-size", "4"], "--batch-size was 3 and is now 4"),
        (["--prompt", "two red"], '--prompt was null and is now "two red"'),
        (["--max-words", "5"], "--max-words was null and is now 5"),
        (["--format", "csv"], '--format was "jsonl" and is now "csv"'),
    ],
)
def test_other_settings_are_refused(finished, options, message, here, caption, interrupt, capfd):
    if not finished:
        interrupt.at(2)
    assert caption("in", "--output", "out.jsonl") == (1 if finished else 130)
    before = contents(here)
    capfd.readouterr()
    assert caption("in", "--output", "out.jsonl", *options) == 1
    err = capfd.readouterr().err
    assert (
        f"out.jsonl was begun with other settings: {message}. Repeat the first command on the same images, or remove out.jsonl and"
        in err
    )
    assert err.count("\n") == 1 and contents(here) == before


def test_another_model_of_the_same_name_is_refused(here, make_checkpoint, caption, interrupt, capfd, tmp_path):
    import shutil

    model = tmp_path / "model"
    shutil.copytree(make_checkpoint(), model)
    interrupt.at(1)
    assert caption("in", "--output", "out.jsonl", "--model", model) == 130
    weights = bytearray((model / "model.safetensors").read_bytes())
    weights[-1] ^= 1
    (model / "model.safetensors").write_bytes(weights)
    assert caption("in", "--output", "out.jsonl", "--model", model) == 1
    assert "the content of the model was" in capfd.readouterr().err


@pytest.mark.parametrize("finished", [False, True])
@pytest.mark.parametrize("change", ["new", "missing", "changed"])
def test_other_images_are_refused(change, finished, here, caption, interrupt, capfd):
    if not finished:
        interrupt.at(2)
    assert caption("in", "--output", "out.jsonl") == (1 if finished else 130)
    capfd.readouterr()
    file = here / "in" / "b.jpg"
    if change == "new":
        (here / "in" / "aa.png").write_bytes(file.read_bytes())
    elif change == "missing":
        file.unlink()
    else:
        os.utime(file, ns=(1, 1))
    assert caption("in", "--output", "out.jsonl") == 1
    messages = {
        "new": "out.jsonl was begun with other images: number 2 was in/b.jpg and is now in/aa.png. Repeat",
        "missing": "out.jsonl was begun with other images: number 2 was in/b.jpg and is now in/c broken.jpg. Repeat",
        "changed": "in/b.jpg has changed since out.jsonl was begun. Repeat",
    }
    message = (
        "The images have changed since out.jsonl was written: one was added, removed or modified. Repeat"
        if finished
        else messages[change]
    )
    err = capfd.readouterr().err
    assert message in err and "or give another --output" in err


def test_images_that_vanish_or_come_at_the_end_are_noticed(here, caption, interrupt, monkeypatch, capfd):
    write = hf_attncap.bulk._write_output
    monkeypatch.setattr(hf_attncap.bulk, "_write_output", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
    assert caption("in", "--output", "out.jsonl") == 130
    monkeypatch.setattr(hf_attncap.bulk, "_write_output", write)
    (here / "in" / "z.png").write_bytes((here / "in" / "a.png").read_bytes())
    assert caption("in", "--output", "out.jsonl") == 1
    assert "out.jsonl was begun with fewer images: in/z.png is new" in capfd.readouterr().err
    (here / "in" / "z.png").unlink()
    (here / "in" / "l.png").rename(here / "l.png")
    assert caption("in", "--output", "out.jsonl") == 1
    assert "number 13 was in/l.png and is missing" in capfd.readouterr().err
    (here / "l.png").rename(here / "in" / "l.png")
    assert caption("in", "--output", "out.jsonl") == 1 and (here / "out.jsonl").exists()


def test_a_second_run_on_the_same_output_is_refused(here, caption, interrupt, capfd):
    interrupt.at(1)
    assert caption("in", "--output", "out.jsonl") == 130
    with FileLock(here / "out.jsonl.attncap" / "lock"):
        assert caption("in", "--output", "out.jsonl") == 1
    assert "out.jsonl is being written by another run: wait until it ends" in capfd.readouterr().err
    assert caption("in", "--output", "out.jsonl") == 1 and (here / "out.jsonl").exists()


def test_files_of_other_programs_are_kept(here, caption, monkeypatch, capfd):
    (here / "out.csv").write_text("mine")
    assert caption("in", "--output", "out.csv") == 1
    assert "out.csv exists and was not written by this command: give another --output, or remove it" in capfd.readouterr().err
    assert (here / "out.csv").read_text() == "mine" and not (here / "out.csv.attncap").exists()
    assert caption("in", "--output", "in/a.png", "--format", "csv") == 1, "an image"

    stream = Captioner.stream

    def write_meanwhile(*args, **options):
        (here / "new.csv").write_text("other")
        return stream(*args, **options)

    monkeypatch.setattr(Captioner, "stream", write_meanwhile)
    assert caption("in", "--output", "new.csv") == 1
    assert "new.csv was written by another program meanwhile" in capfd.readouterr().err
    assert (here / "new.csv").read_text() == "other"
    monkeypatch.undo()


def test_a_run_that_fails_at_once_leaves_no_file(here, caption, capfd):
    assert caption("in", "--output", "out.csv", "--device", "toaster") == 1
    assert caption("--files-from", "missing", "--output", "out.csv") == 1
    assert caption("in", "--output", "nowhere/out.csv") == 1
    assert caption("in", "--output", "in", "--format", "csv") == 1
    assert caption("in", "--output", "out.json") == 1
    errors = capfd.readouterr().err.splitlines()
    assert len(errors) == 5 and "there is no folder nowhere" in errors[2] and "in is not a file" in errors[3]
    assert errors[4] == "attncap: the format of out.json is unclear from its ending: give --format jsonl, csv, parquet, coco"
    assert [path.name for path in here.iterdir()] == ["in"]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "required: PATH, or --files-from LIST"),
        (["-", "-"], "stdin can be read only once"),
        (["-", "--files-from", "-"], "stdin can be read only once"),
        (["a", "--format", "csv"], "--format csv needs --output FILE"),
        (["a", "--format", "txt", "--output", "b"], "leave out --output"),
        (["a", "--json", "--output", "b.csv"], "give --format jsonl"),
        (["a", "--attention", "maps", "--format", "txt"], "leave out --attention"),
        (["a", "--temperature", "0"], "not a number above 0"),
        (["a", "--workers", "-1"], "is not a whole number"),
    ],
)
def test_wrong_usage_exits_with_2(arguments, message, capsys):
    with pytest.raises(SystemExit, match="2"):
        main(["caption", *arguments])
    assert message in capsys.readouterr().err


def test_coco_results_are_read_by_evaluate(here, caption, tiny_checkpoint):
    """With names as in COCO's folders, image ids are numbers; other images are matched by name."""
    for number, letter in ((42, "a"), (7, "f")):
        (here / "in" / f"{letter}.png").rename(here / "in" / f"COCO_val2014_{number:012}.jpg")
    assert caption("in", "--output", "results.json", "--format", "coco") == 1
    rows = json.loads((here / "results.json").read_text())
    assert [row["image_id"] for row in rows[:2]] == [7, 42]
    broken = next(row for row in rows if row["image_id"] == "in/d.png")
    assert broken["caption"] == "" and "truncated" in broken["error"]
    captions = {row["image_id"]: row["caption"] for row in rows}
    references = {
        "images": [{"id": 7, "file_name": "x"}, {"id": 42, "file_name": "y"}],
        "annotations": [{"image_id": id, "caption": captions[id]} for id in (7, 42)],
    }
    (here / "numbers.json").write_text(json.dumps(references))
    found = evaluate_files(str(here / "results.json"), str(here / "numbers.json"))
    assert json.loads(found.to_json())["scores"]["bleu_1"] == pytest.approx(1)
    (here / "names.json").write_text(json.dumps({"b.jpg": captions["in/b.jpg"], "g.png": "something else"}))
    assert 0 < json.loads(evaluate_files(str(here / "results.json"), str(here / "names.json")).to_json())["scores"]["bleu_1"] < 1


def test_coco_results_are_read_by_pycocotools(here, caption):
    coco = pytest.importorskip("pycocotools.coco", reason="pip install pycocotools")
    (here / "in" / "a.png").rename(here / "in" / f"{42:012}.png")
    assert caption("in/000000000042.png", "--output", "results.json", "--format", "coco") == 0
    (here / "refs.json").write_text(
        json.dumps({"info": {}, "images": [{"id": 42}], "annotations": [{"id": 1, "image_id": 42, "caption": "a dog"}]})
    )
    found = coco.COCO(str(here / "refs.json")).loadRes(str(here / "results.json"))
    assert list(found.imgToAnns) == [42]


def test_captions_below_the_confidence_are_left_out_with_a_reason(here, pictures, capfd):
    arguments = ["caption", "in/a.png", "--output", "out.jsonl", "--min-confidence"]
    assert main([*arguments, "0"]) == 0
    row = json.loads((here / "out.jsonl").read_text())
    assert row["caption"] and row["error"] is None and 0 < row["confidence"] < 1
    (here / "out.jsonl").unlink()
    assert main([*arguments, "1"]) == 0, "no failure"
    doubtful = json.loads((here / "out.jsonl").read_text())
    assert doubtful == row | {"caption": "", "words": [], "error": "the confidence is below 1"}
    assert main(["caption", "in/a.png", "--format", "txt", "--min-confidence", "1"]) == 0
    assert not (here / "in" / "a.txt").exists()


def test_a_caption_file_beside_each_image(here, caption, loaded, capfd):
    (here / "in" / "k.txt").write_text("mine")
    (here / "in" / "f.jpg").write_bytes((here / "in" / "b.jpg").read_bytes())
    assert caption("in", "https://127.0.0.1/x.png", "--format", "txt", "--num-return-sequences", 2) == 1
    err = capfd.readouterr().err
    files = {str(path.relative_to(here)) for path in here.rglob("*.txt")}
    assert files == {f"in/{name}.txt" for name in ("a", "b", "d/x", "d/y", "e", "f", "g", "h,\"'", "i\nj", "k", "l")}
    result = loaded.caption("in/b.jpg", num_return_sequences=2)
    for name in ("b", "f"):
        assert (here / "in" / f"{name}.txt").read_text() == f"{result.text}\n{result.alternatives[0].text}\n"
    assert (here / "in" / "k.txt").read_text() == "mine"
    assert "in/k.txt exists and is kept; for a new caption of in/k.png, remove it and the folder .attncap-txt" in err
    assert "in/f.txt is the caption file of in/f.jpg too; rename in/f.png" in err
    assert "16 images, 4 of them failed" not in err and "15 images, 4 of them failed" in err, "a file that is kept is no failure"
    (here / "in" / "a.txt").write_text("edited by hand")
    (here / "in" / "b.txt").unlink()
    assert caption("in", "https://127.0.0.1/x.png", "--format", "txt", "--num-return-sequences", 2) == 1
    assert "is complete already" in capfd.readouterr().err
    assert (here / "in" / "a.txt").read_text() == "edited by hand"


def test_images_of_one_stem_in_different_batches(here, caption, interrupt, capfd):
    """The caption file of the first image is not that of the second, also if the run is continued between them."""
    for number, name in enumerate(("s.bmp", "s.c.png", "s.d.png", "s.e.png", "s.png")):
        (here / "more").mkdir(exist_ok=True)
        Image.new("RGB", (40, 30), (50 * number, 0, 0)).save(here / "more" / name)
    interrupt.at(1)
    assert caption("more", "--format", "txt") == 130
    assert caption("more", "--format", "txt") == 1
    assert "more/s.txt is the caption file of more/s.bmp too; rename more/s.png" in capfd.readouterr().err
    assert sorted(path.name for path in (here / "more").glob("*.txt")) == ["s.c.txt", "s.d.txt", "s.e.txt", "s.txt"]


@pytest.mark.skipif(sys.platform != "linux", reason="file names of any bytes")
@pytest.mark.parametrize("format", FORMATS[:3])
def test_names_that_are_not_utf8(format, here, caption):
    odd = os.fsdecode(b"in/caf\xe9.png")
    (here / odd).write_bytes((here / "in" / "a.png").read_bytes())
    (here / os.fsdecode(b"in/na\xefve.png")).touch()
    assert caption(odd, os.fsdecode(b"in/na\xefve.png"), "--output", f"out.{format}") == 1
    good, bad = read_rows(here / f"out.{format}", format)
    assert good["path"] == (odd if format == "jsonl" else r"in/caf\xe9.png") and good["caption"]
    assert "is empty" in bad["error"]


def test_sampled_captions_are_the_same_after_a_continued_run(here, caption, interrupt):
    arguments = ["in", "--output", "out", "--format", "jsonl", "--temperature", "3", "--top-p", "0.95"]
    assert caption(*arguments) == 1
    first = (here / "out").read_bytes()
    restart(here)
    interrupt.at(2)
    assert caption(*arguments) == 130
    np.random.random()
    assert caption(*arguments) == 1
    assert (here / "out").read_bytes() == first
    restart(here)
    assert caption("in", "--output", "out", "--format", "jsonl", "--num-beams", 1) == 1
    assert (here / "out").read_bytes() != first


def test_max_words(here, caption):
    assert caption("in", "--output", "out.jsonl") == 1
    assert max(len(json.loads(line)["words"]) for line in (here / "out.jsonl").read_text().splitlines()) > 2
    assert caption("in", "--output", "short.jsonl", "--max-words", 2) == 1
    rows = [json.loads(line) for line in (here / "short.jsonl").read_text().splitlines()]
    assert {len(row["words"]) for row in rows if not row["error"]} <= {1, 2}


def test_workers_give_the_same_captions(here, caption):
    assert caption("in", "--output", "out.jsonl") == 1
    assert caption("in", "--output", "more.jsonl", "--workers", 2) == 1
    assert (here / "more.jsonl").read_bytes() == (here / "out.jsonl").read_bytes()


def test_folders_patterns_lists_and_stdin_are_printed(here, caption, monkeypatch, capfd):
    (here / "list").write_bytes(b"in/i\nj.png\0in/b.jpg\0")
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO((here / "in" / "a.png").read_bytes())))
    assert caption("in/d", "in/[fg].png", "-", "--files-from", "list") == 0
    out, err = capfd.readouterr()
    lines = [line.split("\t") for line in out.splitlines()]
    assert [path for path, _ in lines] == ["in/d/x.png", "in/d/y.webp", "in/f.png", "in/g.png", "-", "in/i\\nj.png", "in/b.jpg"]
    assert err == ""
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(b"no image")))
    assert caption("-") == 1
    assert capfd.readouterr().err.startswith("attncap: stdin: the bytes object of length 8 is not an image")


def test_ray_gets_the_options(monkeypatch, capsys):
    calls = []
    ray = SimpleNamespace(caption_with_ray=lambda *args, **options: calls.append((args, options)) or 7)
    monkeypatch.setitem(sys.modules, "hf_attncap.ray_captions", ray)
    words = ["caption", "in", "b.tar", "--engine", "ray", "--output", "out", "--model", "m", "--num-beams", "2", "--max-words", "9"]
    assert main(words) == 7
    expected = {"num_beams": 2, "batch_size": 8, "allow_private_urls": False, "max_new_tokens": 9}
    assert calls == [((["in", "b.tar"], "out", "m"), expected)]
    for wrong in (["--format", "csv"], ["--workers", "2"], ["--json"], ["--attention", "maps"], ["--min-confidence", "0.5"]):
        with pytest.raises(SystemExit, match="2"):
            main([*words, *wrong])
    with pytest.raises(SystemExit, match="2"):
        main(["caption", "in", "--engine", "ray"])
    assert "--engine ray needs --output FOLDER" in capsys.readouterr().err and len(calls) == 1


def test_version(capsys):
    import hf_attncap

    with pytest.raises(SystemExit, match="0"):
        main(["--version"])
    assert capsys.readouterr().out == f"attncap {hf_attncap.__version__}\n"


def test_parquet_without_pyarrow_is_refused_before_the_captions(here, caption, monkeypatch, capfd):
    for name in ("pyarrow", "pyarrow.parquet"):
        monkeypatch.setitem(sys.modules, name, None)
    monkeypatch.setattr(Captioner, "from_pretrained", None)
    assert caption("in", "--output", "out.parquet") == 1
    assert 'Parquet needs pyarrow: pip install "hf_attncap[parquet]", or use --format jsonl' in capfd.readouterr().err


def test_many_rows_are_written_in_groups(tmp_path, monkeypatch):
    from pyarrow.parquet import ParquetFile

    from hf_attncap import writers

    monkeypatch.setattr(writers, "ROW_GROUP", 4)
    row = {"caption": "a", "score": None, "confidence": 0.5, "words": [], "alternatives": [], "error": None}
    with open(tmp_path / "a.parquet", "wb") as file:
        writers.Parquet().write(({"path": str(number), **row} for number in range(10)), file)
    found = ParquetFile(tmp_path / "a.parquet")
    assert found.num_row_groups == 3 and found.read()["path"].to_pylist() == [str(number) for number in range(10)]


@pytest.mark.parametrize("format", FORMATS)
def test_outputs_without_a_row_can_be_read(format, here, caption, capfd):
    (here / "list").touch()
    assert caption("--files-from", "list", "--output", f"out.{format}", "--format", format) == 0
    assert "0 images" in capfd.readouterr().err
    if format == "coco":
        assert json.loads((here / "out.coco").read_text()) == []
    else:
        assert read_rows(here / f"out.{format}", format) == []


@pytest.mark.skipif(sys.platform == "win32", reason="needs a pseudo-terminal")
def test_progress_is_shown_on_a_terminal(here, caption, monkeypatch):
    """With the number of images, the rate and the time left; messages stay on lines of their own."""
    import fcntl
    import struct
    import termios

    reader, writer = os.openpty()
    fcntl.ioctl(writer, termios.TIOCSWINSZ, struct.pack("HHHH", 24, 100, 0, 0))
    shown: list[bytes] = []

    def read() -> None:
        while True:
            try:
                shown.append(os.read(reader, 4096))
            except OSError:
                return

    thread = threading.Thread(target=read)
    thread.start()
    with os.fdopen(writer, "w") as terminal:
        monkeypatch.setattr(sys, "stderr", terminal)
        assert caption("in", "--output", "out.jsonl") == 1
    thread.join()
    text = b"".join(shown).decode()
    assert "13/13 [" in text and ("images/s]" in text or "s/ images]" in text)
    assert any(line.startswith("attncap: in/c broken.jpg is not an image") for line in text.replace("\r", "\n").splitlines())


def test_model_digest_ignores_other_files(tiny_checkpoint, tmp_path):
    import shutil

    shutil.copytree(tiny_checkpoint, tmp_path / "model")
    (tmp_path / "model" / "README.md").write_text("a card")
    assert hf_attncap.bulk.model_digest(tmp_path / "model") == hf_attncap.bulk.model_digest(tiny_checkpoint)
    assert len(hf_attncap.bulk.model_digest(tiny_checkpoint)) == len(hashlib.sha256().hexdigest())
