"""Deletion and insertion curves: against a plain loop, on a model whose best order is known, and from the command line."""

import importlib
import json
import math
import runpy
import sys
from pathlib import Path
from types import SimpleNamespace
from unittest.mock import Mock

import numpy as np
import pytest
import torch
from datasets import Dataset
from PIL import Image

from hf_attncap import Captioner
from hf_attncap.words_attncap import CaptionPieces

ROOT = Path(__file__).parent.parent
KINDS = ("none", "score", "channel", "history")
BOS, EOS, PAD = 1, 2, 0


@pytest.fixture
def deletion(monkeypatch):
    """`benchmarks/deletion.py` as a module, for which most words of a tiny captioner depend on its regions."""
    monkeypatch.syspath_prepend(ROOT / "benchmarks")
    module = importlib.import_module("deletion")
    monkeypatch.setattr(module, "LEAST_FALL", 0.01)
    return module


def test_steps_and_first_regions_by_hand(deletion):
    assert deletion.steps(49).tolist() == [0, 5, 10, 15, 20, 24, 29, 34, 39, 44, 49]
    assert deletion.steps(6).tolist() == [0, 1, 2, 3, 4, 5, 6] and deletion.steps(1).tolist() == [0, 1]
    maps = np.array([[0.2, -1.0, 0.7, 0.2], [4.0, 3.0, 2.0, 1.0]])
    found = deletion.leading(maps, np.array([0, 1, 2, 4]))
    # Of equal regions the one before comes first.
    assert found[0].astype(int).tolist() == [[0, 0, 0, 0], [0, 0, 1, 0], [1, 0, 1, 0], [1, 1, 1, 1]]
    assert found[1].astype(int).tolist() == [[0, 0, 0, 0], [1, 0, 0, 0], [1, 1, 0, 0], [1, 1, 1, 1]]


def plain_log_p(model, ids: list[int], position: int, regions: torch.Tensor, hidden: set[int], fill: torch.Tensor) -> float:
    """The log-probability of one token, with hidden regions replaced one at a time."""
    shown = torch.stack([fill if place in hidden else region for place, region in enumerate(regions)])  # (N, C)
    logits = model(encoder_outputs=(shown[None],), decoder_input_ids=torch.tensor([ids[:position]])).logits[0, -1]  # (V)
    return float(logits.log_softmax(-1)[ids[position]])


@pytest.mark.parametrize("kind", KINDS)
@torch.no_grad()
def test_curves_equal_a_plain_loop(deletion, make_checkpoint, kind, monkeypatch):
    captioner = Captioner.from_pretrained(make_checkpoint(word_attention=kind), device="cpu")
    model, count = captioner.model.double(), 12
    regions, fill = torch.randn(count + 1, 16, dtype=torch.float64, generator=torch.Generator().manual_seed(1)).split([count, 1])
    ids = [BOS, 5, 7, 6, 9, EOS, PAD]
    pieces = CaptionPieces(captioner.processor.tokenizer, ids)
    random = np.random.default_rng(2)
    maps = {name: random.random((rows, count)) for name, rows in (("importance", 4), ("attention", 4), ("random", 3))}
    everything = set(range(count))
    falls = [
        plain_log_p(model, ids, t, regions, set(), fill[0]) - plain_log_p(model, ids, t, regions, everything, fill[0])
        for t in range(1, 5)
    ]
    chosen = sorted(np.argsort(falls)[2:].tolist())
    monkeypatch.setattr(deletion, "LEAST_FALL", sum(sorted(falls)[1:3]) / 2)
    traced = deletion.trace(model, regions, torch.tensor(ids), pieces, maps, fill[0])
    assert traced.words == 4 and len(chosen) == 2 and traced.whole.shape == (len(chosen),)
    assert {name: found.shape for name, found in traced.log_p.items()} == {
        name: (2, 3 if name == "random" else 1, len(chosen), 11) for name in maps
    }
    for name, values in maps.items():
        for d, word in enumerate(chosen):
            for s, row in enumerate(values if name == "random" else values[word : word + 1]):
                order = sorted(range(count), key=lambda place, row=row: -row[place])
                for f, share in enumerate(np.linspace(0, 1, 11)):
                    first = set(order[: round(share * count)])
                    for curve, hidden in enumerate((first, everything - first)):
                        expected = plain_log_p(model, ids, word + 1, regions, hidden, fill[0])
                        assert traced.log_p[name][curve, s, d, f] == pytest.approx(expected, abs=1e-5), (name, word, s, f, curve)
    monkeypatch.setattr("hf_attncap.importance.MAX_ELEMENTS", 1)  # one variant at a time
    one_by_one = deletion.trace(model, regions, torch.tensor(ids), pieces, maps, fill[0])
    for name, found in traced.log_p.items():
        assert one_by_one.log_p[name] == pytest.approx(found, abs=1e-6)
        # Both curves of all orders begin and end with nothing hidden or with everything.
        (start, blank), (shown_blank, shown) = ((each[..., 0], each[..., -1]) for each in found)  # (S, D) each
        assert start == pytest.approx(np.broadcast_to(traced.whole, start.shape), abs=1e-6)
        assert shown == pytest.approx(start, abs=1e-6) and shown_blank == pytest.approx(blank, abs=1e-6)
        assert (start - blank >= deletion.LEAST_FALL).all()


def test_the_true_order_has_the_steepest_curves(deletion, tiny_checkpoint):
    """A made-up model: each region adds its share to one word's logit, and nothing where it is hidden."""
    tokenizer = Captioner.from_pretrained(tiny_checkpoint, device="cpu").processor.tokenizer
    count, word, vocab = 20, 5, 40
    random = np.random.default_rng(0)
    shares = random.normal(0.3, 1, count)  # some regions speak against the word

    def forward(encoder_outputs, decoder_input_ids, **_):
        given = encoder_outputs[0].diagonal(dim1=1, dim2=2)  # (v, N)
        logits = torch.zeros(*decoder_input_ids.shape, vocab)  # (v, T, V)
        logits[..., word] = (given @ torch.tensor(shares, dtype=torch.float32))[:, None]
        return SimpleNamespace(logits=logits)

    model = Mock(side_effect=forward, config=SimpleNamespace(vocab_size=vocab, attention_dim=1))
    maps = {"importance": shares[None], "attention": -shares[None], "random": random.random((30, count))}
    ids = [BOS, word]
    traced = deletion.trace(model, torch.eye(count), torch.tensor(ids), CaptionPieces(tokenizer, ids), maps, torch.zeros(count))
    best, worst, others = (traced.log_p[name][:, :, 0] for name in ("importance", "attention", "random"))  # (2, S, F)
    for curve, sign in ((0, 1), (1, -1)):
        assert (sign * best[curve] <= sign * others[curve] + 1e-5).all() and (
            sign * worst[curve] >= sign * others[curve] - 1e-5
        ).all()
        assert (sign * best[curve, :, 1:-1] < sign * worst[curve, :, 1:-1] - 0.5).all()
    kept = np.sort(shares)[: count - 2].sum()  # with 2 of 20 regions hidden
    assert best[0, 0, 1] == pytest.approx(kept - math.log(math.exp(kept) + vocab - 1), abs=1e-4)


@torch.no_grad()
def test_a_word_of_pieces_is_one_word(deletion, make_checkpoint):
    captioner = Captioner.from_pretrained(make_checkpoint("bpe"), device="cpu")
    ids = [BOS, *captioner.processor.tokenizer("beaching dogred").input_ids]
    pieces = CaptionPieces(captioner.processor.tokenizer, ids)
    assert len(pieces.words) == 2 < len(ids) - 1
    regions = torch.randn(6, 16)
    hidden = np.array([[False] * 6, [True] + [False] * 5])
    found = deletion.log_probabilities(captioner.model, regions, torch.tensor(ids), pieces, hidden, regions.mean(dim=0))
    assert found.shape == (2, 2)
    for row, places in zip(found, (set(), {0})):
        tokens = [plain_log_p(captioner.model, ids, t, regions, places, regions.mean(dim=0)) for t in range(1, len(ids))]
        assert row.sum() == pytest.approx(sum(tokens), abs=1e-4)


def test_summary_worked_by_hand(deletion):
    def image(whole: list[float], **orders: list) -> object:
        log_p = {name: np.log(np.array(values, dtype=float)) for name, values in orders.items()}  # (2, S, D, F)
        return deletion.Traced(5, np.log(whole), log_p)

    even = [[[[0.5, 0.5, 0.5]]], [[[0.5, 0.5, 0.5]]]]
    one = image([0.5], importance=[[[[0.5, 0.1, 0.1]]], [[[0.1, 0.5, 0.5]]]], attention=even, random=even)
    two = image(
        [0.2, 0.8],
        importance=[[[[0.2, 0.2, 0.2], [0.8, 0.4, 0.4]]], [[[0.2, 0.2, 0.2], [0.4, 0.8, 0.8]]]],
        attention=[[[[0.2, 0.2, 0.2], [0.8, 0.8, 0.4]]], [[[0.2, 0.2, 0.2], [0.4, 0.4, 0.8]]]],
        random=[[[[0.2, 0.1, 0.2], [0.8, 0.8, 0.4]], [[0.2, 0.3, 0.2], [0.8, 0.4, 0.4]]]] * 2,
    )
    nothing = deletion.Traced(7, np.zeros(0), {})
    found = deletion.summarize([one, nothing, two], np.array([0, 0.5, 1]))
    assert (found["images_scored"], found["words_scored"], found["shares"]) == (2, 3, [0, 0.5, 1])
    curves, areas = found["curves"], found["areas"]
    assert curves["deletion"]["probability"]["importance"] == pytest.approx([1, 0.7 / 1.5, 0.7 / 1.5])
    assert curves["insertion"]["probability"]["attention"] == pytest.approx([1.1 / 1.5, 1.1 / 1.5, 1])
    # Probabilities are averaged over the random orders, and so are log-probabilities.
    assert curves["deletion"]["probability"]["random"] == pytest.approx([1, (0.5 + 0.2 + 0.6) / 1.5, (0.5 + 0.2 + 0.4) / 1.5])
    lost = (math.log(0.1 * 0.3 / 0.2**2) + math.log(0.5)) / 2
    assert curves["deletion"]["log_probability"]["random"] == pytest.approx([0, lost / 3, math.log(0.5) / 3])
    assert areas["deletion"]["probability"]["importance"] == pytest.approx((0.2 + 0.2 + 0.5) / 1.5)
    assert areas["deletion"]["probability"]["attention"] == pytest.approx((0.5 + 0.2 + 0.7) / 1.5)
    # Drawn twice, "one" gives (0.2 - 0.5) / 0.5 and "two" (0.5 - 0.7) / 1.
    assert areas["deletion"]["probability"]["importance_minus_attention"] == pytest.approx([-0.5 / 1.5, -0.6, -0.2])
    change = math.log(0.2) * 3 / 4, (math.log(0.5) * 3 / 4 - math.log(0.5) / 4) / 2
    expected = [(change[0] + 2 * change[1]) / 3, *change]
    assert areas["deletion"]["log_probability"]["importance_minus_attention"] == pytest.approx(expected)
    with pytest.raises(ValueError, match="Only 1 of 2 images have words .*: give more images"):
        deletion.summarize([one, nothing], np.array([0, 0.5, 1]))


def test_mean_region_of_all_images(deletion, tiny_checkpoint, pictures, monkeypatch):
    captioner = Captioner.from_pretrained(tiny_checkpoint, device="cpu")
    rows = [{"image": {"bytes": path.read_bytes()}} for path in pictures]
    pixels = captioner.processor(images=[Image.open(path) for path in pictures], return_tensors="pt").pixel_values
    with torch.no_grad():
        expected = captioner.model.get_encoder()(pixels).last_hidden_state.flatten(0, 1).mean(dim=0)
    for batch in (2, 16):
        monkeypatch.setattr(deletion, "BATCH", batch)
        assert torch.allclose(deletion.encode(captioner, rows)[1], expected, atol=1e-4)
    with pytest.raises(ValueError, match="There is no image"):
        deletion.encode(captioner, [])


@pytest.fixture
def table(tiny_checkpoint, pictures, tmp_path) -> Path:
    """A table of three pictures, with the tiny captioner's own captions as their references."""
    texts = [result.text for result in Captioner.from_pretrained(tiny_checkpoint).caption(pictures)]
    images = [{"bytes": path.read_bytes(), "path": None} for path in pictures]
    path = tmp_path / "table.parquet"
    Dataset.from_dict({"image": images, "captions": [[text, "a dog"] for text in texts]}).to_parquet(str(path))
    return path


@torch.no_grad()
def test_words_are_traced_with_the_maps_of_explain_and_both_fills(deletion, tiny_checkpoint, pictures, monkeypatch):
    captioner = Captioner.from_pretrained(tiny_checkpoint, device="cpu")
    rows = [{"image": {"bytes": path.read_bytes()}} for path in pictures]
    mean, given = torch.full((16,), 0.5), []

    def trace(*arguments):
        given.append(arguments)
        return plain_trace(*arguments)

    plain_trace = deletion.trace
    monkeypatch.setattr(deletion, "trace", trace)
    traced, at = deletion.trace_images(captioner, deletion.encode(captioner, rows)[0], mean)
    assert {fill: len(images) for fill, images in traced.items()} == {"image": 3, "set": 3} and len(given) == 6
    assert at == pytest.approx(np.arange(7) / 6)  # of the 2 x 3 regions
    for number, result in enumerate(captioner.explain(pictures)):
        pixels = captioner.processor(images=result.image, return_tensors="pt").pixel_values
        own = captioner.model.get_encoder()(pixels).last_hidden_state[0]  # (N, C)
        for arguments, expected in zip(given[2 * number :], (own.mean(dim=0), mean)):
            _, regions, _, pieces, maps, fill = arguments
            assert pieces.words == result.words
            assert torch.allclose(regions, own, atol=1e-4) and torch.allclose(fill, expected, atol=1e-4)
            assert maps["attention"] == pytest.approx(result.attention.reshape(-1, 6), abs=1e-4)
            assert maps["importance"] == pytest.approx(result.importance.reshape(-1, 6), abs=2e-3)
            assert maps["random"].shape == (5, 6) and len(np.unique(maps["random"])) == 30


def run(deletion, monkeypatch, *arguments: object) -> dict:
    output = Path(str(arguments[1])).with_name("found.json")
    monkeypatch.setattr(sys, "argv", ["deletion", *map(str, arguments), "--output", str(output)])
    deletion.main()
    return json.loads(output.read_text(encoding="utf-8"))


def test_the_command_measures_own_captions_and_references(
    deletion, table, tiny_checkpoint, pictures, monkeypatch, tmp_path, capsys
):
    common = ("--images", table, "--model", tiny_checkpoint)
    own = run(deletion, monkeypatch, *common, "--figure", tmp_path / "curves.png")
    shown = capsys.readouterr().out.strip().splitlines()
    assert (own["model"], own["images_file"], own["captions"], own["images"]) == (tiny_checkpoint.name, "table.parquet", "own", 3)
    assert own["words"] == sum(len(result.words) for result in Captioner.from_pretrained(tiny_checkpoint).caption(pictures))
    assert Image.open(tmp_path / "curves.png").width > 500
    assert len([line for line in shown if line.startswith(("| image |", "| set |"))]) == 8
    assert "favours it by construction" in shown[-1]
    for fill in ("image", "set"):
        figures = own["fills"][fill]
        assert 2 <= figures["images_scored"] <= 3 and 0 < figures["words_scored"] < own["words"]
        assert any(line.startswith(f"{fill}: {figures['words_scored']} of {own['words']} words in") for line in shown)
        for unit, start in (("probability", 1), ("log_probability", 0)):
            deleted, inserted = (figures["curves"][curve][unit] for curve in ("deletion", "insertion"))
            for order in ("importance", "attention", "random"):
                assert deleted[order][0] == pytest.approx(start, abs=1e-5) == inserted[order][-1]
                assert deleted[order][-1] == pytest.approx(deleted["random"][-1], abs=1e-5) == inserted[order][0]
                assert deleted[order][-1] < start
    # The same captions as references, one image and one variant at a time.
    monkeypatch.setattr(deletion, "BATCH", 1)
    monkeypatch.setattr("hf_attncap.importance.MAX_ELEMENTS", 1)
    references = run(deletion, monkeypatch, *common, "--references")
    assert references["captions"] == "references" and references["words"] == own["words"]
    for fill, figures in own["fills"].items():
        for curve, units in figures["areas"].items():
            for unit, areas in units.items():
                for name, area in areas.items():
                    assert references["fills"][fill]["areas"][curve][unit][name] == pytest.approx(area, abs=1e-4), (fill, name)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--limit", "1"], "of 1 images have words .*: give more images"),
        (["--limit", "0"], "There is no image"),
        (["--references"], "table.parquet has no column captions, only image"),
        (["--images", "nowhere.parquet"], "nowhere.parquet"),
    ],
    ids=lambda value: value if isinstance(value, str) else " ".join(value),
)
def test_unusable_data_end_in_one_line(table, tiny_checkpoint, monkeypatch, arguments, message):
    monkeypatch.syspath_prepend(ROOT / "benchmarks")
    Dataset.from_parquet(str(table)).remove_columns("captions").to_parquet(str(table))
    monkeypatch.setattr(sys, "argv", ["deletion", "--images", str(table), "--model", str(tiny_checkpoint), *arguments])
    with pytest.raises(SystemExit, match=f"^error: .*{message}"):
        runpy.run_path(str(ROOT / "benchmarks" / "deletion.py"), run_name="__main__")
