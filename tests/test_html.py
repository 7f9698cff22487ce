"""`CaptionResult.to_html`: the page, what hostile captions and names do to it, and the interactive view in Chromium."""

import base64
import io
import json
import re
from html.parser import HTMLParser

import numpy as np
import pytest
from PIL import Image

from hf_attncap import CaptionResult
from hf_attncap.html_page import MARK, is_own_page
from hf_attncap.result import Alternative
from hf_attncap.visualize import _overlay, attention_layer, importance_layer

GRID = (2, 3)
HOSTILE = [
    "</script><script>document.title='hacked'</script>",
    "<!--<script>",
    '"><img src=x onerror="document.title=\'hacked\'">',
    "</title></style></iframe><b>bold</b>",
    "\u202egnitirw \u05e9\u05dc\u05d5\u05dd",
    "&lt;&amp;#39; `${1}` {data} \u2028 \\u003c",
]


def make_result(words=("a", "red", "dog"), size=(300, 200), explained=True, **changes) -> CaptionResult:
    """A result whose word t attends to region t alone, and depends on the last region but t."""
    random = np.random.default_rng(0)
    noise = Image.fromarray(random.integers(0, 256, (4, 6, 3), dtype=np.uint8))
    regions = GRID[0] * GRID[1]
    attention = np.eye(regions, dtype=np.float32)[np.arange(len(words)) % regions].reshape(-1, *GRID)
    values = {
        "text": " ".join(words),
        "score": -0.25,
        "words": list(words),
        "attention": attention,
        "word_attention": None,
        "alternatives": [Alternative("a dog", -0.5)],
        "image": noise.resize(size, Image.Resampling.BICUBIC),
        "importance": attention[:, ::-1, ::-1] * 2 - 0.125 if explained else None,
        "confidence": 0.75,
    }
    return CaptionResult(**{**values, **changes})


class Page(HTMLParser):
    """The elements, texts and data of a page."""

    def __init__(self, content: str):
        super().__init__()
        self.tags, self.texts, self._open = [], {}, []
        self.feed(content)
        self.data = json.loads(self.texts["script"][0])

    def handle_starttag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))
        self._open.append(tag)

    def handle_endtag(self, tag):
        while self._open and self._open.pop() != tag:
            pass

    def handle_data(self, data):
        if self._open:
            self.texts.setdefault(self._open[-1], []).append(data)

    def attributes(self, name):
        return [attributes for tag, attributes in self.tags if tag == name]


def picture_of(page: str) -> Image.Image:
    source = Page(page).attributes("img")[0]["src"]
    return Image.open(io.BytesIO(base64.b64decode(source.partition(",")[2])))


def test_page_holds_the_result():
    result = make_result()
    page = Page(result.to_html("dog.jpg"))
    assert page.texts["h1"] == page.texts["title"] == ["dog.jpg"] and page.texts["figcaption"] == ["a red dog"]
    assert page.attributes("img")[0]["alt"] == "The picture, captioned by the model as: a red dog"
    assert page.data["words"] == ["a", "red", "dog"] and page.data["grid"] == [2, 3]
    np.testing.assert_allclose(np.reshape(page.data["attention"], (3, 2, 3)), result.attention, rtol=1e-3)
    np.testing.assert_allclose(np.reshape(page.data["importance"], (3, 2, 3)), result.importance, rtol=1e-3)
    assert (page.data["score"], page.data["confidence"]) == (-0.25, 0.75)
    assert page.data["alternatives"] == [{"text": "a dog", "score": -0.5}]


def test_page_of_a_result_without_maps_confidence_and_words():
    page = Page(make_result((), explained=False, attention=None, confidence=None, score=float("-inf"), alternatives=[]).to_html())
    assert page.data == {
        "alt": "The picture, captioned by the model as: ", "text": "", "words": [], "grid": [1, 1], "attention": None,
        "importance": None, "score": None, "confidence": None, "alternatives": [],
    }  # fmt: skip


def test_result_without_an_image_has_no_page():
    result = make_result(image=None, attention=None, explained=False)
    with pytest.raises(ValueError, match="caption the image without `attention=False`"):
        result.to_html()
    assert result._repr_html_() is None, "a notebook then prints the result as text"


def test_page_names_no_address_and_forbids_loading():
    page = make_result().to_html()
    assert not re.search(r"https?:|@import|url\(", page)
    policy = Page(page).attributes("meta")[1]["content"]
    assert policy.startswith("default-src 'none'; img-src data:; style-src 'sha256-") and "unsafe" not in policy


@pytest.mark.parametrize("hostile", HOSTILE)
def test_hostile_texts_stay_text(hostile):
    clean = Page(make_result().to_html("name"))
    words = hostile.split()
    result = make_result(words, text=hostile, alternatives=[Alternative(hostile, -1.0)])
    page = Page(result.to_html(hostile))
    assert [tag for tag, _ in page.tags] == [tag for tag, _ in clean.tags]
    assert page.data["words"] == words and page.data["alternatives"][0]["text"] == hostile
    assert page.texts["h1"] == [hostile]
    assert page.texts["script"][1] == clean.texts["script"][1], "the script is the same for each result"


def test_file_name_that_is_not_utf8_gives_a_valid_page(tmp_path):
    (tmp_path / "a.html").write_text(make_result().to_html("caf\udce9.jpg"), encoding="utf-8")
    assert "caf?.jpg" in (tmp_path / "a.html").read_text(encoding="utf-8")


@pytest.mark.parametrize(
    ("size", "shown"), [((8, 8), (8, 8)), ((8000, 6000), (1280, 960)), ((2000, 100), (1280, 64)), ((1, 4000), (1, 1280))]
)
def test_picture_of_the_page_has_a_sensible_size(size, shown):
    page = make_result(size=size).to_html()
    assert picture_of(page).size == shown
    assert len(page) < 400_000


def test_notebook_gets_a_frame_with_the_page():
    result = make_result(HOSTILE)
    shown = result._repr_html_()
    parser = HTMLParser()
    frames = []
    parser.handle_starttag = lambda tag, attributes: frames.append((tag, dict(attributes)))
    parser.feed(shown)
    assert [tag for tag, _ in frames] == ["iframe"]
    assert frames[0][1]["sandbox"] == "allow-scripts" and frames[0][1]["srcdoc"] == result.to_html()


def test_only_own_pages_are_recognised(tmp_path):
    own, other, link = tmp_path / "own.html", tmp_path / "other.html", tmp_path / "link.html"
    own.write_text(make_result().to_html(), encoding="utf-8")
    other.write_text("<!doctype html>\n<p>hf_attncap" + MARK, encoding="utf-8")
    link.symlink_to(own)
    assert is_own_page(own)
    assert not any(map(is_own_page, (other, link, tmp_path, tmp_path / "missing.html")))


# In Chromium


@pytest.fixture
def show(tmp_path, open_page):
    """`show(result, **options)` opens the page of a result from its file."""

    def show(result: CaptionResult, **options):
        path = tmp_path / "page.html"
        path.write_text(result.to_html(), encoding="utf-8")
        found = open_page(path.as_uri(), **options)
        if result.words and options.get("java_script_enabled", True):
            found.page.wait_for_function("document.querySelector('canvas').width > 1")
            settle(found.page)
        return found

    return show


def settle(page) -> None:
    """Waits until the view has been drawn."""
    page.evaluate("new Promise((done) => requestAnimationFrame(() => requestAnimationFrame(done)))")


def pixels(page) -> np.ndarray:
    """The canvas: (height, width, 3)."""
    settle(page)
    url = page.evaluate("document.querySelector('canvas').toDataURL('image/png')")
    return np.asarray(Image.open(io.BytesIO(base64.b64decode(url.partition(",")[2]))).convert("RGB"))


def hover_region(page, row: int, column: int) -> None:
    box = page.locator(".attncap-stage").bounding_box()
    page.mouse.move(box["x"] + box["width"] * (column + 0.5) / GRID[1], box["y"] + box["height"] * (row + 0.5) / GRID[0])
    settle(page)


def word(page, text: str):
    return page.get_by_role("button", name=text, exact=True)


def values(page) -> list[str]:
    settle(page)
    return page.locator(".attncap-value").all_inner_texts()


def test_hovering_a_word_colours_the_picture_as_the_plots_do(show):
    result = make_result(("a", "red", "dog"), size=(420, 280))
    found = show(result, viewport={"width": 1400, "height": 900})
    page = found.page
    plain = pixels(page)
    photo = picture_of(result.to_html())
    word(page, "red").hover()
    height, width = pixels(page).shape[:2]
    photo = photo.resize((width, height), Image.Resampling.BICUBIC)
    for layer, label in ((attention_layer(result.attention), "Attention"), (importance_layer(result.importance), "Importance")):
        page.get_by_label(label).check()
        word(page, "red").hover()
        expected = 255 * _overlay(photo, layer.maps[1], scalar_map(layer))
        assert np.abs(pixels(page) - expected).mean() < 2.5, label
    page.mouse.move(5, 890)
    np.testing.assert_array_equal(pixels(page), plain)
    found.assert_no_errors()
    assert not found.hosts() - {""}


def scalar_map(layer):
    from matplotlib.cm import ScalarMappable
    from matplotlib.colors import Normalize

    return ScalarMappable(Normalize(layer.low, layer.high, clip=True), layer.colours)


def test_hovering_the_picture_lights_the_words_that_looked_there(show):
    found = show(make_result())
    page = found.page
    assert values(page) == ["", "", ""]
    hover_region(page, 0, 2)
    assert values(page) == ["0.0×", "0.0×", "6.0×"]
    backgrounds = [item.evaluate("node => getComputedStyle(node).backgroundColor") for item in page.locator(".attncap-word").all()]
    assert backgrounds[0] == backgrounds[1] != backgrounds[2]
    assert page.get_by_role("status").inner_text() == "Region in row 1, column 3: \u2068dog\u2069 6.0×"
    box, stage = page.locator(".attncap-marker").bounding_box(), page.locator(".attncap-stage").bounding_box()
    assert box["x"] == pytest.approx(stage["x"] + stage["width"] * 2 / 3, abs=1) and box["y"] == pytest.approx(stage["y"], abs=1)
    hover_region(page, 1, 1)
    assert page.get_by_role("status").inner_text() == "Region in row 2, column 2: no word looked here"
    page.get_by_label("Importance").check()
    hover_region(page, 1, 2)
    assert values(page) == ["1.88", "−0.13", "−0.13"]
    found.assert_no_errors()


def test_touch_selects_words_and_regions_and_clears_them(show):
    found = show(make_result(), has_touch=True, viewport={"width": 360, "height": 740})
    page = found.page
    plain = pixels(page)
    word(page, "dog").tap()
    assert (pixels(page) != plain).any() and word(page, "dog").get_attribute("aria-pressed") == "true"
    word(page, "dog").tap()
    np.testing.assert_array_equal(pixels(page), plain)
    box = page.locator(".attncap-stage").bounding_box()
    for expected in (["0.0×", "6.0×", "0.0×"], ["", "", ""]):
        page.touchscreen.tap(box["x"] + box["width"] / 2, box["y"] + box["height"] / 4)
        assert values(page) == expected
    found.assert_no_errors()


def test_keyboard_moves_over_regions_and_words(show):
    found = show(make_result())
    page = found.page
    plain = pixels(page)
    page.keyboard.press("Tab")
    status = page.get_by_role("status")
    assert status.inner_text().startswith("Region in row 2, column 2:")
    steps = {"ArrowUp": (1, 2), "ArrowRight": (1, 3), "ArrowDown": (2, 3), "ArrowLeft": (2, 2), "Home": (1, 1), "End": (2, 3)}
    for key, (row, column) in steps.items():
        page.keyboard.press(key)
        assert status.inner_text().startswith(f"Region in row {row}, column {column}:"), key
    page.keyboard.press("Tab")
    assert status.inner_text() == "“\u2068a\u2069”: most at row 1, column 1 (6.0×)" and (pixels(page) != plain).any()
    for key, name in (("ArrowRight", "red"), ("End", "dog"), ("ArrowRight", "dog"), ("ArrowLeft", "red"), ("Home", "a")):
        page.keyboard.press(key)
        assert word(page, name).evaluate("node => node === document.activeElement"), key
        assert word(page, name).get_attribute("aria-pressed") == "true"
    assert page.locator("[aria-pressed=true]").count() == 1
    page.keyboard.press("Tab")  # to the switch; the word stays lit
    page.keyboard.press("ArrowRight")
    assert page.get_by_label("Importance").is_checked() and "row 2, column 3 (1.88)" in status.inner_text()
    page.keyboard.press("Escape")
    assert status.inner_text() == ""
    np.testing.assert_array_equal(pixels(page), plain)
    found.assert_no_errors()


def test_roles_names_and_facts(show):
    page = show(make_result()).page
    assert page.get_by_role("application", name="Picture.").count() == 1
    assert page.get_by_role("img", name="The picture, captioned by the model as: a red dog").count() == 1
    assert page.get_by_role("group", name="Words of the caption").get_by_role("button").count() == 3
    assert page.get_by_role("radio").count() == 2
    assert page.locator(".attncap-scores").inner_text().split() == ["Confidence", "75", "%", "Score", "−0.25"]
    assert page.get_by_role("listitem").all_inner_texts() == ["a red dog −0.25", "a dog −0.50"]


def test_view_without_importance_confidence_or_maps(show):
    page = show(make_result(explained=False, confidence=None, alternatives=[])).page
    assert page.get_by_role("radio").count() == page.get_by_role("listitem").count() == 0
    assert "Confidence" not in page.locator(".attncap").inner_text()
    found = show(make_result(attention=None, explained=False))
    assert found.page.get_by_role("button").count() == 0 and "red" in found.page.locator(".attncap-words").inner_text()
    found.assert_no_errors()
    found = show(make_result((), text=""))
    assert found.page.get_by_text("The caption has no words.").is_visible()
    hover_region(found.page, 0, 0)
    found.assert_no_errors()


def test_right_to_left_words_and_hostile_captions_in_the_view(show):
    words = ["\u05e9\u05dc\u05d5\u05dd", "\u05e2\u05d5\u05dc\u05dd", *HOSTILE]
    found = show(make_result(words, alternatives=[Alternative(text, -1.0) for text in HOSTILE]))
    page = found.page
    assert page.title().startswith("\u05e9") and page.locator(".attncap-word").count() == len(words)
    assert page.locator(".attncap b, .attncap img, .attncap script").count() == 0
    first, second = (page.locator(".attncap-word").nth(n).bounding_box() for n in (0, 1))
    assert first["x"] > second["x"], "right-to-left captions run from the right"
    page.locator(".attncap-word").first.focus()
    page.keyboard.press("ArrowLeft")
    assert page.locator(".attncap-word").nth(1).evaluate("node => node === document.activeElement")
    found.assert_no_errors()


@pytest.mark.parametrize("width", [360, 1600])
@pytest.mark.parametrize("size", [(2000, 100), (100, 2000), (8, 8), (8000, 6000), (300, 200)], ids=str)
def test_odd_shapes_and_long_captions_fit(show, size, width):
    words = [f"word{n}" if n % 9 else "w" * 60 for n in range(40)]
    found = show(make_result(words, size=size), viewport={"width": width, "height": 800})
    page = found.page
    assert page.evaluate("document.documentElement.scrollWidth") <= width
    stage = page.locator(".attncap-stage").bounding_box()
    assert stage["width"] / stage["height"] == pytest.approx(size[0] / size[1], rel=0.03)
    assert min(stage["width"], stage["height"]) >= 40
    assert page.locator(".attncap-frame").bounding_box()["height"] <= 0.75 * 800
    before = [item.bounding_box() for item in page.locator(".attncap-word").all()]
    hover_region(page, 0, 0)
    assert [item.bounding_box() for item in page.locator(".attncap-word").all()] == before, "nothing moves while words light up"
    found.assert_no_errors()


CONTRAST = """() => {
  const channel = (v) => ((v /= 255) <= 0.04045 ? v / 12.92 : ((v + 0.055) / 1.055) ** 2.4);
  const luminance = ([r, g, b]) => 0.2126 * channel(r) + 0.7152 * channel(g) + 0.0722 * channel(b);
  const numbers = (colour) => colour.match(/[\\d.]+/g).map(Number);
  const behind = (node) => {
    const colour = numbers(getComputedStyle(node).backgroundColor);
    return colour.length === 3 || colour[3] === 1 ? colour : behind(node.parentElement);
  };
  const leaves = [...document.querySelectorAll("body *")].filter(
    (node) => node.checkVisibility() && [...node.childNodes].some((child) => child.nodeType === 3 && child.data.trim()));
  return leaves.map((node) => {
    const [a, b] = [luminance(numbers(getComputedStyle(node).color)), luminance(behind(node))];
    return [node.textContent, (Math.max(a, b) + 0.05) / (Math.min(a, b) + 0.05)];
  });
}"""


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_contrast_and_motion(show, scheme):
    """Also of words at each level of the colour scales."""
    attention = np.linspace(0, 1, 40, dtype=np.float32)[:, None, None] * np.ones((1, *GRID), np.float32)
    result = make_result([f"w{n}" for n in range(40)], attention=attention, importance=attention.copy())
    page = show(result, color_scheme=scheme, reduced_motion="reduce").page
    for name in ("Attention", "Importance"):
        page.get_by_label(name).check()
        hover_region(page, 0, 0)
        found = page.evaluate(CONTRAST)
        assert len(found) > 90 and min(found, key=lambda pair: pair[1])[1] >= 4.5, min(found, key=lambda pair: pair[1])
    assert page.locator(".attncap-word").first.evaluate("node => getComputedStyle(node).transitionDuration") == "0s"
    background = page.evaluate("getComputedStyle(document.querySelector('.attncap')).backgroundColor")
    assert (background == "rgb(255, 255, 255)") == (scheme == "light")


def test_page_without_javascript_shows_picture_and_caption(show):
    page = show(make_result(), java_script_enabled=False).page
    assert page.get_by_text("a red dog").is_visible() and page.locator("img").is_visible()


def test_several_results_on_one_page_do_not_meet(tmp_path, open_page):
    results = [make_result(), make_result(("one", "two"), size=(100, 300), explained=False), make_result(HOSTILE)]
    body = "".join(result._repr_html_() for result in results)
    path = tmp_path / "notebook.html"
    path.write_text(f"<!doctype html><meta charset=utf-8><title>notebook</title><style>button {{ display: none }}</style>{body}")
    found = open_page(path.as_uri(), viewport={"width": 900, "height": 1800})
    page = found.page
    for frame, result in zip(page.frames[1:], results):
        frame.wait_for_function("document.querySelector('canvas')?.width > 1")
        buttons = frame.get_by_role("button")
        assert buttons.count() == len(result.words) and buttons.first.is_visible()
        buttons.first.focus()
        assert frame.locator(".attncap-status").inner_text().startswith("“")
    assert page.title() == "notebook" and page.locator("button").count() == 0
    found.assert_no_errors()


def test_mounting_again_replaces_the_view(show):
    found = show(make_result())
    page = found.page
    page.evaluate("""() => {
      const image = document.createElement("canvas").toDataURL();
      const data = {image, alt: "new", text: "new words", words: ["new", "words"], grid: [1, 2], attention: [[1, 0], [0, 1]],
                    importance: null, score: -1, confidence: null, alternatives: []};
      mountAttncapViewer(document.querySelector("main"), data);
    }""")
    settle(page)
    assert page.locator("canvas").count() == 1 and page.locator(".attncap-word").all_inner_texts() == ["new", "words"]
    word(page, "words").hover()
    assert "row 1, column 2 (2.0×)" in page.get_by_role("status").inner_text()
    found.assert_no_errors()


def test_picture_that_cannot_be_decoded_is_reported(show):
    page = show(make_result()).page
    page.evaluate("""() => mountAttncapViewer(document.querySelector("main"), {
      image: "data:image/png;base64,AAAA", alt: "", text: "a", words: ["a"], grid: [1, 1], attention: [[1]], importance: null,
      score: 0, confidence: null, alternatives: []})""")
    page.get_by_role("alert").wait_for()
    assert page.get_by_role("alert").inner_text() == "The picture cannot be shown."
    assert page.locator(".attncap-words").inner_text() == "a"
