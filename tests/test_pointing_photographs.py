"""The pointing game on photographs: valid boxes, scores by hand and by brute force, and a run on tiny images."""

import importlib
import json
import re
import sys
from pathlib import Path

import numpy as np
import pytest
from datasets import Dataset
from hypothesis import given
from hypothesis import strategies as st

from hf_attncap import Captioner

ROOT = Path(__file__).parent.parent
FINE = 15  # boxes of the properties have their edges on fifteenths, and so have the grids; as 15 is odd, no centre is on an edge


@pytest.fixture(scope="module")
def game():
    """`benchmarks/pointing_photographs.py` as a module."""
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(ROOT / "benchmarks")
        yield importlib.import_module("pointing_photographs")


def test_boxes_are_valid(game):
    photographs = json.loads((ROOT / "benchmarks" / "boxes.json").read_text(encoding="utf-8"), object_pairs_hook=list)
    names = [name for name, _ in photographs]
    assert len(names) == len(set(names)) >= 24
    for name, found in photographs:
        things = [dict(thing) for thing in found]
        assert len(things) >= 2, name
        for thing in things:
            assert thing.keys() == {"words", "boxes"} and thing["boxes"], name
            assert thing["words"] and len(set(thing["words"])) == len(thing["words"]), (name, thing)
            assert all(re.fullmatch("[a-z]+", word) for word in thing["words"]), (name, thing)
            for left, top, right, bottom in thing["boxes"]:
                assert 0 <= left < right <= 1 and 0 <= top < bottom <= 1, (name, thing)
            assert game.covered(thing["boxes"], (1, 1)).item() <= 0.5, (name, thing)


def test_a_word_worked_by_hand(game):
    weights = np.array([[0.05, 0.1, 0.15], [0.1, 0.4, 0.2]])  # centres at x = 1/6, 1/2, 5/6 and y = 1/4, 3/4
    # All of the last column and the lower middle region's right half; above it only what lies below the centre.
    boxes = [[0.5, 0.3, 1, 1], [2 / 3, 0, 1, 1]]
    word = game.point("picture", "dog", weights, boxes)
    assert word.peak == 4 and word.inside.tolist() == [False, False, True, False, True, True]
    assert word.mass == pytest.approx(0.15 + 0.2 + 0.4 / 2 + 0.1 / 2 * 0.4)
    assert word.area == pytest.approx(1 / 3 + 1 / 12 + 1 / 12 * 0.4)


def boxes_on(lattice: int):
    span = st.tuples(st.integers(0, lattice), st.integers(0, lattice)).filter(lambda ends: ends[0] < ends[1])
    return st.lists(st.tuples(span, span).map(lambda s: (s[0][0], s[1][0], s[0][1], s[1][1])), min_size=1, max_size=4)


@given(boxes_on(FINE), st.sampled_from([1, 3, 5, 15]), st.sampled_from([1, 3, 5, 15]))
def test_chance_and_cover_against_brute_force(game, fifteenths, height, width):
    boxes = [[edge / FINE for edge in box] for box in fifteenths]
    word = game.point("picture", "dog", np.full((height, width), 1 / (height * width)), boxes)
    reached = 0
    for row in range(height):
        for column in range(width):
            # In whole thirtieths.
            y, x = (2 * row + 1) * FINE // height, (2 * column + 1) * FINE // width
            reached += any(2 * left < x < 2 * right and 2 * top < y < 2 * bottom for left, top, right, bottom in fifteenths)
    assert word.inside.sum() == reached
    pixels = np.zeros((FINE, FINE))
    for left, top, right, bottom in fifteenths:
        pixels[top:bottom, left:right] = 1
    expected = pixels.reshape(height, FINE // height, width, FINE // width).mean(axis=(1, 3))
    assert game.covered(boxes, (height, width)) == pytest.approx(expected)
    assert word.mass == pytest.approx(word.area) == pytest.approx(pixels.mean())


def test_a_word_has_the_boxes_of_all_objects_that_it_names(game):
    left, right, dot = [0, 0, 0.5, 1], [0.5, 0, 1, 1], [0.4, 0.4, 0.6, 0.6]
    things = [
        {"words": ["dog", "animal"], "boxes": [left]},
        {"words": ["cat", "animal"], "boxes": [right]},
        {"words": ["ball"], "boxes": [dot]},
    ]
    maps = {"attention": np.array([[[0.9, 0.1]]] * 5), "importance": np.array([[[-3.0, 0.1]]] * 5)}
    caption = (["a", "dog", "cat", "animal", "ball"], maps)
    found = game.point_captions("picture", [caption], things, "attention")
    assert {word.peak for word in found} == {0}
    assert {word.peak for word in game.point_captions("picture", [caption], things, "importance")} == {1}
    assert [(word.word, word.inside.tolist()) for word in found] == [
        ("dog", [True, False]),
        ("cat", [False, True]),
        ("animal", [True, True]),
        ("ball", [False, False]),
    ]


@pytest.fixture
def make_word(game):
    def word(photograph: str, peak: int, inside: list[int], mass: float = 0.5) -> object:
        return game.Pointed(photograph, "dog", peak, np.array(inside, dtype=bool), mass, sum(inside) / 4)

    return word


def test_summary_worked_by_hand(game, make_word):
    words = [
        make_word("one", 0, [1, 0, 0, 0], 0.5),
        make_word("one", 1, [0, 0, 1, 1], 0.3),
        make_word("two", 3, [0, 0, 0, 1], 0.4),
        make_word("two", 2, [0, 0, 0, 0], 0.0),
    ]
    found = game.summary(words)
    assert (found["photographs"], found["words"], found["too_small"]) == (2, 3, 1)
    assert found["hits"] == pytest.approx(2 / 3) and found["chance"] == pytest.approx((1 + 2 + 1) / 12) == found["area"]
    # The peak at 3 lies in the second word's boxes but not the first's; neither 0 nor 1 lies in the third's.
    assert found["other_photographs"] == pytest.approx((0 + 1 + 0) / 3)
    assert found["mass_inside"] == pytest.approx(0.4)
    # Drawn twice, "one" gives 1/2 - 3/8 and "two" 1 - 1/4.
    assert found["hits_minus_chance"] == pytest.approx([1 / 3, 1 / 8, 3 / 4])
    assert game.summary(words[:2]) == {"photographs": 1, "words": 2, "too_small": 0}


def test_maps_are_compared_over_photographs(game, make_word):
    left, right, nowhere = [1, 1, 0, 0], [0, 0, 1, 1], [0, 0, 0, 0]
    boxes = [("one", left), ("one", right), ("one", left), ("one", nowhere), ("two", right)]
    attention = [make_word(*box[:1], peak, box[1]) for box, peak in zip(boxes, (0, 0, 2, 0, 1))]  # a hit of 3 and one of none
    importance = [make_word(*box[:1], peak, box[1]) for box, peak in zip(boxes, (1, 3, 3, 1, 2))]  # two of 3 and one of one
    found = game.compare(attention, importance)
    assert found["attention"] == game.summary(attention)
    assert found["importance"] == {name: value for name, value in game.summary(importance).items() if name != "mass_inside"}
    assert (found["attention"]["hits"], found["importance"]["hits"]) == (1 / 4, 3 / 4)
    # Drawn twice, "one" gives 2/3 - 1/3 and "two" 1 - 0.
    assert found["importance_minus_attention"] == pytest.approx([1 / 2, 1 / 3, 1])
    assert game.compare(importance, attention)["importance_minus_attention"] == pytest.approx([-1 / 2, -1, -1 / 3])
    alone = {"photographs": 1, "words": 3, "too_small": 1}
    assert game.compare(attention[:4], importance[:4]) == {"attention": alone, "importance": alone}


@pytest.fixture
def boxed(game, tiny_checkpoint, pictures, tmp_path, monkeypatch) -> Path:
    """A table of three pictures, the tiny captioner's own captions as their references, and boxes for each of their words."""
    results = Captioner.from_pretrained(tiny_checkpoint).caption(pictures)
    images = [{"bytes": path.read_bytes(), "path": None} for path in pictures]
    names = [path.name for path in pictures]
    captions = [[result.text] for result in results]
    Dataset.from_dict({"image": images, "image_id": names, "captions": captions}).to_parquet(tmp_path / "table.parquet")
    boxes = {name: [{"words": sorted(set(result.words)), "boxes": [[0, 0, 0.5, 1]]}] for name, result in zip(names, results)}
    (tmp_path / "boxes.json").write_text(json.dumps(boxes))
    monkeypatch.setattr(game, "BOXES", tmp_path / "boxes.json")
    return tmp_path / "table.parquet"


def command(game, monkeypatch, *arguments: object) -> None:
    monkeypatch.setattr(sys, "argv", ["pointing_photographs", *map(str, arguments)])
    game.main()


def test_references_equal_to_generated_captions_have_the_same_scores(game, boxed, tiny_checkpoint, monkeypatch, tmp_path, capsys):
    command(game, monkeypatch, "--images", boxed, "--model", tiny_checkpoint, "--output", tmp_path / "found.json")
    found = json.loads((tmp_path / "found.json").read_text())
    own, references = found["captions"]["own"], found["captions"]["references"]
    assert found["model"] == tiny_checkpoint.name
    assert own.keys() == {"attention", "importance", "importance_minus_attention"}
    assert own["attention"].keys() - own["importance"].keys() == {"mass_inside"}
    for kind in ("attention", "importance"):
        assert own[kind]["photographs"] == 3 and own[kind]["words"] >= 3
        assert own[kind]["chance"] == pytest.approx(2 / 3)  # the grid is 2 x 3, and the middle's centres are on the edge
        assert own[kind]["area"] == pytest.approx(1 / 2)
        for name, figure in own[kind].items():
            assert references[kind][name] == pytest.approx(figure, abs=1e-5), name
    assert references["importance_minus_attention"] == pytest.approx(own["importance_minus_attention"], abs=1e-5)
    shown = capsys.readouterr().out.strip().splitlines()
    rows = [
        f"| {name} | {kind} | 3 | {own[kind]['words']} |" for name in ("own", "references") for kind in ("attention", "importance")
    ]
    assert len(shown) == 2 + len(rows) and all(line.startswith(row) for line, row in zip(shown[2:], rows))
    assert shown[2].endswith("| - |") and shown[3].count(" to ") == 3  # importance against chance, other photographs and attention


def test_both_maps_are_those_of_explain(game, boxed, tiny_checkpoint, pictures):
    captioner = Captioner.from_pretrained(tiny_checkpoint)
    for picture in pictures:
        result = captioner.explain(picture)
        [(words, maps)] = game.read_references(captioner, result.image, [result.text])
        assert words == result.words
        assert maps["attention"] == pytest.approx(result.attention, abs=1e-5)
        assert maps["importance"] == pytest.approx(result.importance, abs=1e-4)


def test_a_table_without_the_photographs_is_refused(game, boxed, tiny_checkpoint, monkeypatch, tmp_path, capsys):
    rows = Dataset.from_parquet(str(boxed))
    rows.select([0, 2]).to_parquet(tmp_path / "fewer.parquet")
    with pytest.raises(SystemExit):
        command(game, monkeypatch, "--images", tmp_path / "fewer.parquet", "--model", tiny_checkpoint)
    assert "lacks 1 of the 3 boxed photographs, such as tall.png" in capsys.readouterr().err
