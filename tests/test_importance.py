"""Importance of regions: against a plain reference, in batches, for every attention variant, in Python and on the command line."""

import json

import numpy as np
import pytest
import torch
from PIL import Image

from hf_attncap import Captioner
from hf_attncap.cli import main
from hf_attncap.encoder_attncap import GridEncoderOutput
from hf_attncap.images import load_image
from hf_attncap.importance import word_importance
from hf_attncap.words_attncap import CaptionPieces

KINDS = ("none", "score", "channel", "history")
BOS, EOS, PAD = 1, 2, 0


@pytest.fixture(params=KINDS)
def captioner(request, make_checkpoint) -> Captioner:
    return Captioner.from_pretrained(make_checkpoint(word_attention=request.param), device="cpu")


def plain_importance(model, caption: list[int], regions: torch.Tensor, grid: tuple[int, int], window: int) -> torch.Tensor:
    """One caption of one image's regions (N, C), region by region and token by token: (T, H, W)."""

    def log_p(shown: torch.Tensor) -> list[torch.Tensor]:
        ids = torch.tensor([caption])
        logits = [
            model(encoder_outputs=(shown[None],), decoder_input_ids=ids[:, : t + 1]).logits[0, -1] for t in range(len(caption) - 1)
        ]
        return [each.log_softmax(-1)[token] for each, token in zip(logits, caption[1:])]

    whole, reach = log_p(regions), window // 2
    falls = torch.zeros(len(caption) - 1, *grid, dtype=regions.dtype)
    for y in range(grid[0]):
        for x in range(grid[1]):
            places = [(row, column) for row in range(grid[0]) for column in range(grid[1])]
            inside = torch.tensor([abs(row - y) <= reach and abs(column - x) <= reach for row, column in places])
            shown = regions.clone()
            shown[inside] = 0 if inside.all() else regions[~inside].mean(dim=0)
            for t, (before, after) in enumerate(zip(whole, log_p(shown))):
                falls[t, y, x] = before - after
    return falls


@pytest.mark.parametrize("window", [1, 3, 5])
@torch.no_grad()
def test_importance_equals_a_plain_loop_over_hidden_regions(captioner, window, monkeypatch):
    model = captioner.model.double()
    torch.manual_seed(0)
    regions = torch.randn(2, 12, 16, dtype=torch.float64)
    captions = [[BOS, 5, 7, 6, EOS], [BOS, 8, 5, EOS, PAD], [BOS, 9, 9, 4, 6], [BOS, EOS, PAD, PAD, PAD]]
    expected = [plain_importance(model, caption, regions[n // 2], (3, 4), window) for n, caption in enumerate(captions)]
    for numbers in (2**25, 1):  # all at a time, and one by one
        monkeypatch.setattr("hf_attncap.importance.MAX_ELEMENTS", numbers)
        encoded = GridEncoderOutput(last_hidden_state=regions, grid_shape=(3, 4))
        found = word_importance(model, torch.tensor(captions), encoded, window)
        assert found.dtype == torch.float32 and found.shape == (4, 4, 3, 4)
        assert torch.allclose(found, torch.stack(expected).float(), atol=1e-6)
    assert found.abs().max() > 0.01


def test_padding_after_the_end_changes_nothing(captioner):
    encoded = GridEncoderOutput(last_hidden_state=torch.randn(1, 6, 16), grid_shape=(2, 3))
    short = word_importance(captioner.model, torch.tensor([[BOS, 5, 7, EOS]]), encoded)
    long = word_importance(captioner.model, torch.tensor([[BOS, 5, 7, EOS, PAD, PAD]]), encoded)
    assert torch.allclose(long[:, :3], short, atol=1e-5)


@pytest.mark.parametrize(("grid", "window"), [((5, 5), 3), ((4, 7), 1), ((1, 1), 1)])
def test_the_default_window_fits_the_grid(tiny_checkpoint, grid, window):
    model = Captioner.from_pretrained(tiny_checkpoint, device="cpu").model
    encoded = GridEncoderOutput(last_hidden_state=torch.randn(1, grid[0] * grid[1], 16), grid_shape=grid)
    ids = torch.tensor([[BOS, 5, 7, EOS]])
    assert torch.equal(word_importance(model, ids, encoded), word_importance(model, ids, encoded, window))
    with pytest.raises(ValueError, match="`window` is 2, but it must be an odd number"):
        word_importance(model, ids, encoded, 2)


@torch.no_grad()
def test_importance_of_a_word_peaks_at_the_region_that_causes_it(tiny_checkpoint):
    model = Captioner.from_pretrained(tiny_checkpoint, device="cpu").model
    regions = torch.zeros(1, 35, 16)
    regions[0, 12] = 8 * torch.randn(16, generator=torch.Generator().manual_seed(0))  # row 1, column 5 of (5, 7)
    encoded = GridEncoderOutput(last_hidden_state=regions, grid_shape=(5, 7))
    for likelier, sign in ((True, 1), (False, -1)):
        shown, blank = (
            model(encoder_outputs=(each,), decoder_input_ids=torch.tensor([[BOS]])).logits[0, 0] for each in (regions, 0 * regions)
        )
        change = shown.log_softmax(-1) - blank.log_softmax(-1)
        word = int(change.argmax() if likelier else change.argmin())
        maps = word_importance(model, torch.tensor([[BOS, word]]), encoded, 1)[0, 0] * sign  # (5, 7)
        assert maps[1, 5] > 0.01 and int(maps.argmax()) == 12
        squares = word_importance(model, torch.tensor([[BOS, word]]), encoded, 3)[0, 0] * sign
        # Elsewhere the mean of the others brings more of the region into the picture, never less.
        assert (squares[:3, 4:] > 0.01).all() and (squares[:, :4] < 1e-4).all() and (squares[3:] < 1e-4).all()


@pytest.mark.parametrize(
    "checkpoint", [{"tokenizer": "bpe"}, {"backbone": "resnet18"}, *({"word_attention": kind} for kind in KINDS)], ids=str
)
@pytest.mark.parametrize("options", [{}, {"num_beams": 1}, {"prompt": "two red"}, {"num_return_sequences": 2}], ids=str)
def test_explain_is_caption_with_importance(make_checkpoint, pictures, checkpoint, options):
    captioner = Captioner.from_pretrained(make_checkpoint(**checkpoint), device="cpu")
    found, plain = captioner.explain(pictures, **options), captioner.caption(pictures, **options)
    for picture, explained, captioned in zip(pictures, found, plain):
        assert (explained.text, explained.words, explained.score) == (captioned.text, captioned.words, captioned.score)
        assert captioned.importance is None and explained.importance is not None
        assert explained.importance.dtype == np.float32 and explained.importance.shape == explained.attention.shape
        alone = captioner.explain(picture, **options)
        assert alone.text == explained.text
        assert np.allclose(alone.importance, explained.importance, atol=2e-3)
    assert max(np.abs(each.importance).max(initial=0) for each in found) > 0.01


def test_importance_of_a_word_is_the_sum_over_its_tokens(make_checkpoint, pictures):
    captioner = Captioner.from_pretrained(make_checkpoint("bpe"), device="cpu")
    tokenizer, prompt = captioner.processor.tokenizer, "beaching dogred"
    ids = [BOS, *tokenizer(prompt).input_ids]
    pieces = CaptionPieces(tokenizer, ids)
    assert len(pieces.words) == 2 < len(ids) - 1
    rows = np.arange(1.0, len(ids))[:, None]
    words = pieces.add_up(rows)
    assert words.shape == (2, 1) and words.sum() == rows.sum()  # every piece counts once
    result = captioner.explain(pictures[0], prompt=prompt)
    assert result.words[:2] == prompt.split() and result.importance is not None
    encoded = captioner.model.get_encoder()(captioner.processor(images=load_image(pictures[0]), return_tensors="pt").pixel_values)
    tokens = word_importance(captioner.model, torch.tensor([ids]), encoded)[0]  # (T, H, W)
    assert np.allclose(result.importance[:2].sum(axis=0), tokens.sum(dim=0), atol=1e-3)


def test_half_precision_and_captions_without_words(tiny_checkpoint, pictures, tmp_path):
    captioner = Captioner.from_pretrained(tiny_checkpoint, dtype="bfloat16", device="cpu")
    result = captioner.explain(pictures[0])
    assert result.importance is not None and result.importance.dtype == np.float32 and np.isfinite(result.importance).all()
    captioner.model.lm_head.bias.data[EOS] = 1000
    empty = captioner.explain(pictures[0])
    assert empty.importance is not None and empty.importance.shape == empty.attention.shape == (0, 2, 3)
    empty.plot_importance(tmp_path / "none.png")
    assert Image.open(tmp_path / "none.png").format == "PNG"


def test_stream_with_importance_and_its_plot(tiny_checkpoint, pictures, tmp_path):
    captioner = Captioner.from_pretrained(tiny_checkpoint, device="cpu")
    result = next(captioner.stream(pictures, explain=True))
    figure = result.plot_importance(tmp_path / "both.png")
    drawn = [axis for axis in figure.axes if axis.images and axis.get_ylabel() == ""]
    assert len(drawn) == 1 + 2 * len(result.words)
    assert [axis.get_title() for axis in figure.axes if axis.get_title()] == result.words
    assert [axis.get_ylabel() for axis in figure.axes if axis.get_ylabel()] == ["attention (1 = uniform)", "importance (nats)"]
    with pytest.raises(ValueError, match="has no importance: get one with `Captioner.explain`"):
        captioner.caption(pictures[0]).plot_importance()


def test_a_word_without_importance_stays_grey(tiny_checkpoint, pictures):
    result = Captioner.from_pretrained(tiny_checkpoint, device="cpu").explain(pictures[0])
    result.words, result.attention = result.words[:2], result.attention[:2]
    result.importance = np.full_like(result.attention, -3.0)
    result.importance[0, 0, 0] = 2.0
    _, _, _, lit, grey = (np.asarray(axis.images[0].get_array()) for axis in result.plot_importance().axes if axis.images)
    assert np.ptp(lit[..., :3], axis=2).max() > 0.1 and np.ptp(grey[..., :3], axis=2).max() == pytest.approx(0, abs=1e-6)


def test_command_line_writes_importance(tiny_checkpoint, pictures, tmp_path, capfd):
    folders = ["--attention", str(tmp_path / "a"), "--importance", str(tmp_path / "b")]
    assert main(["caption", str(pictures[0]), "--model", str(tiny_checkpoint), "--json", *folders]) == 0
    out, err = capfd.readouterr()
    record = json.loads(out)
    assert record["importance_file"] == str(tmp_path / "b" / "wide.importance.png")
    assert record["attention_file"] == str(tmp_path / "a" / "wide.attention.png")
    assert f"importance in {tmp_path / 'b' / 'wide.importance.png'}" in err
    foreign = tmp_path / "b" / "tall.importance.png"
    foreign.write_bytes(b"mine")
    assert main(["caption", str(pictures[1]), "--model", str(tiny_checkpoint), "--importance", str(tmp_path / "b")]) == 0
    assert foreign.read_bytes() == b"mine" and (tmp_path / "b" / "tall-2.importance.png").is_file()
