"""The page of `attncap export --format web` in Chromium: the results are those of the Python runtime, errors are shown."""

import hashlib
import io
import re
import shutil
from collections.abc import Callable
from functools import cache
from pathlib import Path

import numpy as np
import PIL
import pytest
import skimage
from browser import WatchedPage, serve
from pages import ROOT, run, shell_commands
from PIL import Image, ImageCms, ImageDraw

from hf_attncap import Captioner
from hf_attncap.export import export_checkpoint
from hf_attncap.export_web import PAGE_FILES
from hf_attncap.images import load_image

SMALL = {"word_attention": "score", "backbone": "squeezenet1_1"}
CONFIGS = {"score": SMALL, "history": {**SMALL, "word_attention": "history", "tokenizer": "bpe"}}
PHOTOGRAPHS = Path(skimage.__file__).parent / "data"
NAMES = (
    "chelsea.png", "coffee.png", "astronaut.png", "rocket.jpg", "motorcycle_left.png", "hubble_deep_field.jpg", "retina.jpg",
    "ihc.png", "camera.png", "coins.png",
)  # fmt: skip

needs_pillow_13 = pytest.mark.skipif(int(PIL.__version__.partition(".")[0]) < 13, reason="the page resizes as Pillow 13 does")


@pytest.fixture(scope="module")
def make_site(make_checkpoint, onnxruntime_web, tmp_path_factory) -> Callable[..., Path]:
    """`make_site("score")` exports a tiny checkpoint as a web page and returns the folder."""
    pytest.importorskip("onnxscript", reason='pip install "hf_attncap[onnx]"')
    made: dict[str, Path] = {}

    def make(name: str) -> Path:
        if name not in made:
            out = tmp_path_factory.mktemp("site") / "out"
            made[name] = export_checkpoint(make_checkpoint(**CONFIGS[name]), out, "web", onnxruntime_web=onnxruntime_web)
        return made[name]

    return make


@pytest.fixture
def open_site(open_page) -> Callable[..., WatchedPage]:
    """`open_site(address)` opens an exported page and waits until it takes pictures. The page keeps each result in `shown`."""

    def open_site(address: str, **options) -> WatchedPage:
        site = open_page(address, **options)
        site.page.locator("#controls").wait_for(state="visible")
        site.page.evaluate(
            "() => { const mount = mountAttncapViewer; globalThis.mountAttncapViewer = (element, data) => {"
            "mount(element, data); globalThis.shown = data; document.body.dataset.shown = ''; } }"
        )
        return site

    return open_site


def caption_of(site: WatchedPage, file: Path | dict) -> dict:
    """Uploads a file and returns what the viewer shows."""
    site.page.evaluate("delete document.body.dataset.shown")
    site.page.set_input_files("#file", file)
    return next_result(site)


def next_result(site: WatchedPage) -> dict:
    """What the viewer shows next, after `data-shown` was removed from the page."""
    site.page.locator("body[data-shown], #error:not([hidden])").first.wait_for(state="attached")
    assert not site.page.locator("#error").is_visible(), site.page.locator("#error").inner_text()
    return site.page.evaluate("shown")


def error_of(site: WatchedPage, file: Path | dict) -> str:
    """Uploads a file and returns the error."""
    site.page.set_input_files("#file", file)
    site.page.locator("#error").wait_for(state="visible")
    assert site.page.locator(".attncap").count() == 0
    return site.page.locator("#error").inner_text()


load = cache(Captioner.from_pretrained)


def assert_same(found: dict, folder: Path, picture, beams: int | None = None) -> None:
    """The result of the page is that of the Python runtime on the same folder."""
    captioner = load(folder)
    beams = beams or captioner.engine.default_beams
    expected = captioner.caption(picture, num_beams=beams, num_return_sequences=min(beams, 5))
    assert (found["text"], found["words"]) == (expected.text, expected.words)
    assert [other["text"] for other in found["alternatives"]] == [other.text for other in expected.alternatives]
    assert found["score"] == pytest.approx(expected.score, abs=1e-3)
    assert found["confidence"] == (None if expected.confidence is None else pytest.approx(expected.confidence, abs=1e-3))
    attention = np.reshape(found["attention"], (len(found["words"]), *found["grid"]))
    np.testing.assert_allclose(attention, expected.attention, atol=1e-3)


@pytest.fixture(scope="module")
def blocks(tmp_path_factory) -> Path:
    """A folder of generated pictures of many kinds."""
    folder = tmp_path_factory.mktemp("blocks")
    random = np.random.default_rng(0)

    def picture(width: int, height: int, mode: str = "RGB") -> Image.Image:
        image = Image.new(mode, (width, height), "white")
        draw = ImageDraw.Draw(image)
        for _ in range(12):
            x, y = random.integers(0, width), random.integers(0, height)
            colour = random.integers(0, 256, len(image.getbands())).tolist()
            draw.rectangle((x, y, x + width // 3, y + height // 3), tuple(colour) if len(colour) > 1 else colour[0])
        return image

    picture(320, 200).save(folder / "wide.png")
    picture(90, 700).save(folder / "tall.png")
    picture(5000, 40).save(folder / "very wide.png")
    picture(2, 3).save(folder / "tiny.png")
    picture(200, 160, "L").save(folder / "grey.png")
    picture(200, 160).quantize(16).save(folder / "palette.png")
    picture(200, 160).save(folder / "lossless.webp", lossless=True)
    picture(200, 160).save(folder / "photo.jpg", quality=90)
    picture(200, 160).save(folder / "progressive.jpg", progressive=True)
    picture(200, 160).save(folder / "bitmap.bmp")
    picture(200, 160).save(folder / "profile.png", icc_profile=ImageCms.ImageCmsProfile(ImageCms.createProfile("LAB")).tobytes())
    transparent = picture(200, 160, "RGBA")
    transparent.putalpha(Image.linear_gradient("L").resize((200, 160)))
    transparent.save(folder / "transparent.png")
    picture(200, 160, "P").save(folder / "clear.gif", transparency=0)
    for orientation in (3, 6, 8):
        exif = Image.Exif()
        exif[0x0112] = orientation
        picture(200, 120).save(folder / f"turned {orientation}.jpg", exif=exif)
    return folder


def test_the_page_has_no_address_of_another_host(make_site):
    for name in PAGE_FILES:
        text = (make_site("score") / name).read_text(encoding="utf-8").replace("http://www.w3.org/2000/svg", "")
        assert set(re.findall(r"https?://[\w.:]+", text)) <= {"http://localhost:8000"}


@needs_pillow_13
@pytest.mark.parametrize("name", CONFIGS)
def test_results_equal_those_of_python_for_pictures_of_many_kinds(make_site, open_site, blocks, name):
    folder = make_site(name)
    with serve(folder) as address:
        site = open_site(address)
        for picture in sorted(blocks.iterdir()):
            assert_same(caption_of(site, picture), folder, picture)
        assert site.page.locator(".attncap-word").all_inner_texts() != []
        assert site.hosts() == {address.split("/")[2]}
    site.assert_no_errors()


@needs_pillow_13
def test_pixels_equal_those_of_python(make_site, open_site, blocks, tmp_path):
    """Those of CMYK and of 16 bits per pixel may be rounded otherwise."""
    pixels = """async (content) => {
        const { decode, pixelsOf } = await import("./image.js");
        const bitmap = await decode(new Blob([Uint8Array.from(content)]));
        return [...pixelsOf(bitmap, 96, 64, 2)];
    }"""
    random = np.random.default_rng(0)
    Image.fromarray(random.integers(0, 2**16, (70, 120)).astype(np.uint16)).save(tmp_path / "grey 16.png")
    Image.fromarray(random.integers(0, 256, (70, 120, 4), np.uint8), "CMYK").save(tmp_path / "cmyk.jpg")
    with serve(make_site("score")) as address:
        page = open_site(address).page
        for file in sorted([*blocks.iterdir(), *tmp_path.iterdir()]):
            found = np.reshape(page.evaluate(pixels, list(file.read_bytes())), (64, 96, 3))
            expected = np.asarray(load_image(file).resize((96, 64), Image.Resampling.BILINEAR)).astype(int)
            assert abs(found - expected).max() <= (file.parent == tmp_path), file.name


def test_pointing_at_a_word_and_at_the_picture_changes_the_view(make_site, open_site, pictures):
    with serve(make_site("score")) as address:
        site = open_site(address)
        found = caption_of(site, pictures[0])
        canvas, words = site.page.locator(".attncap-canvas"), site.page.locator(".attncap-word")
        site.page.mouse.move(0, 0)

        def pixels() -> str:
            site.page.wait_for_timeout(300)
            return hashlib.sha256(canvas.screenshot()).hexdigest()

        plain = pixels()
        words.nth(0).hover()
        assert pixels() != plain
        site.page.mouse.move(0, 0)
        assert pixels() == plain
        strongest = int(np.argmax(np.max(found["attention"], axis=0)))
        box, (rows, columns) = canvas.bounding_box(), found["grid"]
        x, y = (strongest % columns + 0.5) / columns, (strongest // columns + 0.5) / rows
        site.page.mouse.move(box["x"] + x * box["width"], box["y"] + y * box["height"])
        assert "rgb" in words.evaluate_all("words => words.map((word) => word.style.backgroundColor).join()")
        assert canvas.get_attribute("aria-label") == f"wide.jpg: {found['text']}"
    site.assert_no_errors()


def test_pictures_are_taken_by_drop_and_paste(make_site, open_site, blocks):
    folder = make_site("score")
    content = list((blocks / "wide.png").read_bytes())
    transfer = """(content) => {
        const transfer = new DataTransfer();
        transfer.items.add(new File([Uint8Array.from(content)], "wide.png", { type: "image/png" }));
        %s
    }"""
    drop = 'document.body.dispatchEvent(new DragEvent("drop", { dataTransfer: transfer, bubbles: true, cancelable: true }));'
    paste = 'document.body.dispatchEvent(new ClipboardEvent("paste", { clipboardData: transfer, bubbles: true }));'
    with serve(folder) as address:
        site = open_site(address)
        for event in (drop, paste):
            site.page.evaluate("delete document.body.dataset.shown")
            site.page.evaluate(transfer % event, content)
            assert_same(next_result(site), folder, blocks / "wide.png")
    site.assert_no_errors()


def test_a_file_that_is_no_image_is_an_error_and_the_next_picture_is_captioned(make_site, open_site, blocks):
    files = {
        "notes.txt": b"no image",
        "empty.png": b"",
        "cut off.png": (blocks / "wide.png").read_bytes()[:40],
        "drawing.svg": b'<svg xmlns="http://www.w3.org/2000/svg" width="9" height="9"><rect width="9" height="9"/></svg>',
    }
    folder = make_site("score")
    with serve(folder) as address:
        site = open_site(address)
        for name, content in files.items():
            error = error_of(site, {"name": name, "mimeType": "image/png", "buffer": content})
            assert error == f"{name} is not an image that this browser can read. Choose a JPEG, PNG, WebP or GIF file."
        assert_same(caption_of(site, blocks / "wide.png"), folder, blocks / "wide.png")
    site.assert_no_errors()


def test_a_huge_picture_is_refused_before_it_is_decoded(make_site, open_site):
    stream = io.BytesIO()
    Image.new("1", (20000, 20000)).save(stream, "PNG")
    with serve(make_site("score")) as address:
        site = open_site(address)
        error = error_of(site, {"name": "bomb.png", "mimeType": "image/png", "buffer": stream.getvalue()})
        assert error == "bomb.png has 400 megapixels. Make it smaller than 134 megapixels."
    site.assert_no_errors()


def test_the_beam_width_can_be_chosen(make_site, open_site, blocks):
    folder = make_site("score")
    with serve(folder) as address:
        site = open_site(address)
        for beams in ("1", "4"):
            site.page.fill("#beams", beams)
            assert_same(caption_of(site, blocks / "wide.png"), folder, blocks / "wide.png", int(beams))
        site.page.evaluate("delete document.body.dataset.shown")
        site.page.fill("#beams", "2")
        site.page.locator("#beams").blur()
        assert_same(next_result(site), folder, blocks / "wide.png", 2)
    site.assert_no_errors()


def test_neither_the_page_nor_its_worker_can_reach_another_host(make_site, open_site):
    with serve(make_site("score")) as address:
        site = open_site(address)
        reach = "fetch('http://127.0.0.2:9/', { mode: 'no-cors' }).then(() => 'reached', (error) => error.message)"
        for place in (site.page, *site.page.workers):
            place.evaluate(reach)
        assert len(site.page.workers) == 1
        refused = [text for text in site.console_errors if "Content Security Policy" in text]
        assert len(refused) >= 2 and "127.0.0.2" in "".join(refused)


def test_threads_are_used_where_the_server_isolates_the_page(make_site, open_site, blocks):
    folder = make_site("score")
    headers = {"Cross-Origin-Opener-Policy": "same-origin", "Cross-Origin-Embedder-Policy": "require-corp"}
    with serve(folder, headers) as address:
        site = open_site(address)
        assert site.page.evaluate("crossOriginIsolated")
        assert_same(caption_of(site, blocks / "wide.png"), folder, blocks / "wide.png")
        assert len(site.page.workers) > 1
    site.assert_no_errors()


def test_a_missing_or_damaged_file_is_named(make_site, open_page, tmp_path):
    for name, reason in (("step.onnx", "step.onnx cannot be loaded: the server answered 404"), ("start.onnx", "is incomplete")):
        folder = shutil.copytree(make_site("score"), tmp_path / name)
        if name == "step.onnx":
            (folder / name).unlink()
        else:
            (folder / name).write_bytes((folder / name).read_bytes()[:-100])
        with serve(folder) as address:
            site = open_page(address)
            site.page.locator("#error").wait_for(state="visible")
            assert "The captioner cannot be loaded." in site.page.locator("#error").inner_text()
            assert reason in site.page.locator("#error").inner_text()
            assert not site.page.locator("#controls").is_visible()


def test_opened_as_a_file_the_page_says_that_it_needs_a_server(make_site, open_page):
    site = open_page((make_site("score") / "index.html").as_uri())
    assert "needs JavaScript and a web server" in site.page.locator("#needs-server").inner_text()
    assert not site.page.locator("#controls").is_visible()


@pytest.mark.slow
def test_the_command_of_the_page_writes_a_site_whose_captions_of_ten_photographs_equal_those_of_python(
    onnxruntime_web, open_site, tmp_path, monkeypatch
):
    """With the released checkpoint, default decoding."""
    pytest.importorskip("onnxscript")
    (tmp_path / "hf_attncap").symlink_to(ROOT / "hf_attncap")
    monkeypatch.setenv("npm_config_offline", "true")
    (command,) = shell_commands("docs/export.md")
    done = run(command, tmp_path)
    assert done.returncode == 0, done.stderr
    folder = tmp_path / "site"
    with serve(folder) as address:
        site = open_site(address)
        for name in NAMES:
            assert_same(caption_of(site, PHOTOGRAPHS / name), folder, PHOTOGRAPHS / name)
        assert site.hosts() == {address.split("/")[2]}
    site.assert_no_errors()
