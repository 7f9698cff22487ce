"""`attncap explain`: its files, what it never overwrites, broken images, exported folders, and its page in Chromium."""

import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from matplotlib.backends.backend_agg import FigureCanvasAgg
from PIL import Image
from test_html import Page, make_result, pixels, word

import hf_attncap.captioner
from hf_attncap import Captioner
from hf_attncap.cli import main
from hf_attncap.html_page import MARK
from hf_attncap.summary import MAX_MARKED, content_words, plot_summary

ENDINGS = (".html", ".importance.png", ".summary.png")
HOSTILE_NAMES = [
    "</script><b>x.png",
    "'\"&amp;.png",
    "two\nlines\t.png",
    "\u202egnp.png",
    "$x$ {y} %s.png",
    b"caf\xe9.png",
    "ü" * 110 + ".png",
]


def explain(model, *arguments) -> int:
    return main(["explain", "--model", str(model), *map(str, arguments)])


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


@pytest.mark.usefixtures("coarse_plots")
def test_three_files_per_image_with_their_sizes(tiny_checkpoint, pictures, tmp_path, capfd):
    out = tmp_path / "new" / "out"
    assert explain(tiny_checkpoint, *pictures[:2], "-o", out, "--num-return-sequences", "2", "--prompt", "a dog") == 0
    assert names(out) == sorted(f"{stem}{ending}" for stem in ("wide", "tall") for ending in ENDINGS)
    results = Captioner.from_pretrained(tiny_checkpoint).explain(pictures[:2], num_return_sequences=2, prompt="a dog")
    lines = capfd.readouterr().out.splitlines()
    for picture, result, first in zip(pictures, results, (0, 4)):
        assert lines[first] == f"{picture}\t{result.text}" and result.text.startswith("a dog")
        for line, ending in zip(lines[first + 1 :], (".html", ".summary.png", ".importance.png")):
            path = out / f"{picture.stem}{ending}"
            assert line == f"\t{path} ({path.stat().st_size / 1000:.0f} kB)"
        page = Page((out / f"{picture.stem}.html").read_text(encoding="utf-8"))
        assert page.texts["h1"] == [picture.name] and page.data["text"] == result.text
        assert len(page.data["alternatives"]) == 1
        np.testing.assert_allclose(np.ravel(page.data["importance"]), result.importance.ravel(), rtol=1e-3, atol=1e-5)


@pytest.mark.usefixtures("coarse_plots")
def test_only_files_of_earlier_runs_are_replaced(tiny_checkpoint, pictures, tmp_path, capfd):
    out = tmp_path / "out"
    for _ in range(2):
        assert explain(tiny_checkpoint, pictures[0], "-o", out) == 0
        assert names(out) == [f"wide{ending}" for ending in ENDINGS]
    (out / "wide.html").write_text("<!doctype html>\n<p>my page</p>")
    (out / "wide-2.summary.png").write_text("notes")
    (out / "wide-3.html").symlink_to(tmp_path / "elsewhere.html")
    (out / "wide-4.html").mkdir()
    before = {path: path.read_bytes() for path in out.iterdir() if path.is_file()}
    assert explain(tiny_checkpoint, pictures[0], "-o", out) == 0
    assert all(path.read_bytes() == content for path, content in before.items())
    assert [name for name in names(out) if name.startswith("wide-5")] == [f"wide-5{ending}" for ending in ENDINGS]
    assert not (tmp_path / "elsewhere.html").exists()


@pytest.mark.usefixtures("coarse_plots")
def test_images_of_one_name_and_inputs_in_the_output_folder(tiny_checkpoint, pictures, tmp_path, capfd):
    files = [tmp_path / "more" / "a.jpg", tmp_path / "a.jpg"]
    files[0].parent.mkdir()
    for file in files:
        file.write_bytes(pictures[0].read_bytes())
    assert explain(tiny_checkpoint, *files, "-o", tmp_path) == 0
    expected = [f"{stem}{ending}" for stem in ("a", "a-2") for ending in ENDINGS]
    assert names(tmp_path) == sorted(["more", "a.jpg", *expected])
    # The plot of an earlier run as an input
    plot = tmp_path / "a.summary.png"
    first = plot.read_bytes()
    assert explain(tiny_checkpoint, files[1], plot, "-o", tmp_path) == 0
    assert plot.read_bytes() == first and (tmp_path / "a.summary.html").exists()


@pytest.mark.usefixtures("coarse_plots")
def test_broken_images_are_reported_and_the_rest_goes_on(tiny_checkpoint, pictures, tmp_path, capfd):
    broken = tmp_path / "broken.png"
    broken.write_bytes(pictures[1].read_bytes()[:60])
    assert explain(tiny_checkpoint, broken, tmp_path / "missing.png", pictures[2], "-o", tmp_path / "out") == 1
    out, err = capfd.readouterr()
    assert names(tmp_path / "out") == [f"grey{ending}" for ending in ENDINGS] and out.startswith(f"{pictures[2]}\t")
    assert len(err.splitlines()) == 2 and f"{broken} is " in err and "missing.png" in err and "Traceback" not in err


@pytest.mark.usefixtures("coarse_plots")
def test_a_file_that_cannot_be_written_does_not_keep_the_others(tiny_checkpoint, pictures, tmp_path, capfd, monkeypatch):
    def fail(*_):
        raise OSError("no space left")

    monkeypatch.setattr(hf_attncap.captioner.CaptionResult, "plot_summary", fail)
    assert explain(tiny_checkpoint, pictures[0], "-o", tmp_path / "out") == 1
    assert names(tmp_path / "out") == ["wide.html", "wide.importance.png"]
    out, err = capfd.readouterr()
    path = tmp_path / "out" / "wide.summary.png"
    assert err == f"attncap: {pictures[0]}: {path} cannot be written: OSError: no space left\n" and out.count("\n\t") == 2


@pytest.mark.usefixtures("coarse_plots")
@pytest.mark.parametrize("name", HOSTILE_NAMES)
def test_hostile_file_names(tiny_checkpoint, pictures, tmp_path, capfd, name):
    file = os.fsdecode(os.path.join(os.fsencode(tmp_path), os.fsencode(name)))
    # A slash in a name is a folder.
    Path(file).parent.mkdir(exist_ok=True)
    Path(file).write_bytes(pictures[0].read_bytes())
    assert explain(tiny_checkpoint, file, "-o", tmp_path / "out") == 0
    assert capfd.readouterr().out.count("\n") == 4
    (page,) = (tmp_path / "out").glob("*.html")
    content = page.read_text(encoding="utf-8")
    assert content.startswith(MARK)
    parsed = Page(content)
    assert [tag for tag, _ in parsed.tags if tag in ("b", "script")] == ["script", "script"]
    assert parsed.texts["h1"] == [Path(file).name.encode("utf-8", "replace").decode()]


def test_wrong_usage_and_unwritable_folders(tiny_checkpoint, pictures, tmp_path, capfd):
    for arguments in (
        [pictures[0]],
        ["-o", tmp_path],
        [pictures[0], "-o", tmp_path, "--num-beams", "1", "--num-return-sequences", "2"],
    ):
        with pytest.raises(SystemExit, match="2"):
            explain(tiny_checkpoint, *arguments)
    assert "--num-return-sequences 2 needs --num-beams 2 or more" in capfd.readouterr().err
    (tmp_path / "file").write_text("x")
    assert explain(tiny_checkpoint, pictures[0], "-o", tmp_path / "file" / "out") == 1
    assert "cannot be created as a folder" in capfd.readouterr().err
    assert explain(tiny_checkpoint, "http://127.0.0.1:9/a.png", "-o", tmp_path / "out") == 1
    assert "--allow-private-urls" in capfd.readouterr().err


@pytest.mark.slow
def test_exported_folders_need_no_torch(make_export, pictures, tmp_path):
    code = (
        "import sys; from hf_attncap.cli import main; code = main(sys.argv[1:]);"
        "print([name for name in ('torch', 'transformers') if name in sys.modules]); sys.exit(code)"
    )
    command = [sys.executable, "-c", code, "explain", pictures[0], "-o", tmp_path, "--model", make_export("onnx")]
    done = subprocess.run([str(part) for part in command], capture_output=True, text=True, timeout=120)
    assert (done.returncode, done.stderr) == (0, "") and done.stdout.endswith("\n[]\n")
    assert names(tmp_path) == [f"wide{ending}" for ending in ENDINGS]


# The summary picture


def test_content_words_with_high_importance_are_marked():
    words = ["The", "dog", "runs", "on", "sand"]
    importance = np.zeros((5, 2, 3), np.float32)
    importance[0, 0, 0] = 9  # a function word
    importance[1, 1, 2], importance[1, 0, 0] = 2, 1
    importance[2, 0, 1] = 0.49
    importance[4, 0, 1] = 0.5
    marks, unmarked = content_words(words, importance)
    assert [(mark.number, mark.word, mark.row, mark.column, mark.peak) for mark in marks] == [
        (1, "dog", 1, 2, 2),
        (2, "sand", 0, 1, 0.5),
    ]
    assert unmarked == ["runs (0.49)"]


def test_only_the_most_important_of_many_words_are_marked_in_the_order_of_the_caption():
    words = [f"word{n}" for n in range(12)]
    importance = np.full((12, 2, 3), 1, np.float32) * (1 + np.arange(12)[::-1, None, None])
    marks, unmarked = content_words(words, importance)
    assert [mark.word for mark in marks] == words[:MAX_MARKED] and len(unmarked) == 12 - MAX_MARKED
    assert content_words([], np.zeros((0, 2, 3), np.float32)) == ([], [])


def test_summary_marks_the_regions_on_the_photograph():
    """An outline encloses the region that the word depends on, and badges of one region stay apart."""
    importance = np.zeros((3, 4, 4), np.float32)
    importance[:2, 0, 3] = 2
    importance[2, 3, 0] = 1
    figure = plot_summary(Image.new("RGB", (400, 400)), "red dogs run", ["red", "dogs", "run"], importance)
    axis = figure.axes[0]
    assert len(axis.collections) == 3
    pixels_per_region = axis.images[0].get_array().shape[0] / 4
    for outline, (x, y) in zip(axis.collections, ((3, 0), (3, 0), (0, 3))):
        points = np.concatenate([path.vertices for path in outline.get_paths()]) / pixels_per_region
        low, high = points.min(axis=0), points.max(axis=0)
        assert (low >= (x - 0.6, y - 0.6)).all() and (high <= (x + 1.6, y + 1.6)).all() and (high - low > 0.4).all()
    badges = np.array([text.get_position() for text in axis.texts])
    assert [text.get_text() for text in axis.texts] == ["1", "2", "3"]
    assert np.linalg.norm(badges[0] - badges[1]) > 20 and badges.min() >= 0
    shown = [text.get_text() for text in figure.texts]
    assert {"red dogs run", "red  2.00 nats", "run  1.00 nats"} <= set(shown)


def test_summary_without_important_regions_says_so():
    result = make_result(importance=np.full((3, 2, 3), 0.01, np.float32))
    shown = " ".join(text.get_text() for text in result.plot_summary().texts)
    assert "lowers no content word's log-probability by 0.5 nats or more" in shown.replace("\n", " ") and "dog (0.01)" in shown
    with pytest.raises(ValueError, match="`Captioner.explain` or `explain=True`"):
        make_result(explained=False).plot_summary()


@pytest.mark.parametrize("size", [(2000, 100), (100, 2000), (8, 8), (8000, 6000), (1, 500)], ids=str)
def test_summary_of_any_shape_and_caption_keeps_its_text_inside(size, tmp_path):
    words = [f"word{n}" if n % 9 else "W" * 40 for n in range(40)]
    importance = np.random.default_rng(0).uniform(0, 3, (40, 7, 7)).astype(np.float32)
    result = make_result(words, size=size, importance=importance)
    figure = result.plot_summary(tmp_path / "summary.png")
    assert max(Image.open(tmp_path / "summary.png").size) < 3000
    renderer, outer = FigureCanvasAgg(figure).get_renderer(), figure.bbox
    for text in [*figure.texts, *figure.axes[0].texts]:
        box = text.get_window_extent(renderer)
        assert box.x0 >= outer.x0 and box.x1 <= outer.x1 and box.y0 >= outer.y0 and box.y1 <= outer.y1, text.get_text()


# In Chromium


@pytest.mark.usefixtures("coarse_plots")
def test_page_of_the_command_is_interactive_and_loads_nothing(tiny_checkpoint, pictures, tmp_path, open_page, capfd):
    assert explain(tiny_checkpoint, pictures[0], "-o", tmp_path) == 0
    found = open_page((tmp_path / "wide.html").as_uri())
    page = found.page
    page.wait_for_function("document.querySelector('canvas').width > 1")
    assert page.get_by_role("heading", level=1).inner_text() == "wide.jpg"
    plain = pixels(page)
    text = capfd.readouterr().out.splitlines()[0].partition("\t")[2]
    assert page.locator(".attncap-letters").all_inner_texts() == text.split()
    word(page, text.split()[-1]).last.hover()
    assert (pixels(page) != plain).any()
    page.get_by_label("Importance").check()
    box = page.locator(".attncap-stage").bounding_box()
    page.mouse.move(box["x"] + box["width"] / 2, box["y"] + box["height"] / 2)
    assert all(page.locator(".attncap-value").all_inner_texts())
    found.assert_no_errors()
    assert found.hosts() == {""}
