"""The cache goes on from where it stands, however its rows and words were moved about before."""

from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from reference import BOS, KINDS, PAD, random_regions, tiny_model
from torch.testing import assert_close

from hf_attncap.cache_attncap import AttnCapCache
from hf_attncap.modeling_attncap import GridEncoderOutput

MODELS = {kind: tiny_model(word_attention=kind) for kind in KINDS}
REGIONS = random_regions(2)
IDS = torch.tensor([[BOS, 5, 6], [BOS, 7, 8], [BOS, 9, PAD], [BOS, 10, 11]])  # two captions an image
MASK = torch.tensor([[1, 1, 1], [1, 1, 1], [1, 1, 0], [1, 1, 1]])
NEXT = torch.tensor([[4], [5], [6], [7]])
EXACT: Any = {"rtol": 1e-10, "atol": 1e-10}
every_kind = pytest.mark.parametrize("kind", KINDS)


def fill(kind: str, ids=IDS, mask=MASK, recording: bool = False, regions=REGIONS) -> Any:
    cache = AttnCapCache()
    if recording:
        cache.activate_past_recording()
    MODELS[kind](encoder_outputs=regions, decoder_input_ids=ids, decoder_attention_mask=mask, past_key_values=cache)
    return cache


def go_on(kind: str, cache: Any, ids: torch.Tensor) -> torch.Tensor:
    return MODELS[kind](decoder_input_ids=ids, past_key_values=cache).logits


def from_scratch(kind: str, ids, mask, new_ids, regions=REGIONS) -> torch.Tensor:
    """Logits of the new words without any cache."""
    mask = torch.cat([mask, torch.ones_like(new_ids)], dim=1)
    out = MODELS[kind](
        encoder_outputs=regions, decoder_input_ids=torch.cat([ids, new_ids], 1), decoder_attention_mask=mask, use_cache=False
    )
    return out.logits[:, -new_ids.shape[1] :]


def test_length_counts_padding():
    cache = AttnCapCache()
    assert cache.get_seq_length() == 0 and not cache.is_initialized
    cache = fill("history")
    assert cache.get_seq_length() == 3 and cache.is_initialized
    go_on("history", cache, NEXT)
    assert cache.get_seq_length() == 4


@every_kind
def test_reorder_within_images(kind):
    cache = fill(kind)
    beams = torch.tensor([1, 1, 3, 2])
    cache.reorder_cache(beams)
    assert_close(go_on(kind, cache, NEXT), from_scratch(kind, IDS[beams], MASK[beams], NEXT), **EXACT)


@every_kind
@pytest.mark.parametrize("removed", [0, 1, 2, 3])
def test_crop(kind, removed):
    cache, kept = fill(kind), 3 - removed
    cache.crop(-removed)
    assert cache.get_seq_length() == kept
    new = torch.cat([NEXT, NEXT + 1], dim=1)
    assert_close(go_on(kind, cache, new), from_scratch(kind, IDS[:, :kept], MASK[:, :kept], new), **EXACT)
    cache.crop(-1)  # and again, over what came after the first cut
    assert_close(go_on(kind, cache, new[:, 1:]), from_scratch(kind, IDS[:, :kept], MASK[:, :kept], new)[:, 1:], **EXACT)


def test_crop_of_a_positive_number_or_too_much_is_rejected():
    cache = fill("history")
    with pytest.raises(ValueError, match="negative"):
        cache.crop(1)
    with pytest.raises(ValueError, match="3 earlier states"):
        cache.crop(-4)
    assert_close(go_on("history", cache, NEXT), from_scratch("history", IDS, MASK, NEXT), **EXACT)  # nothing was touched


@every_kind
@pytest.mark.parametrize("move", ["reorder", "select"])
def test_crop_after_rows_moved(kind, move):
    rows = torch.tensor([1, 0, 2, 2])
    recorded, plain = fill(kind, recording=True), fill(kind)
    for cache in (recorded, plain):
        cache.reorder_cache(rows) if move == "reorder" else cache.batch_select_indices(rows)
    with pytest.raises(ValueError, match="activate_past_recording"):
        plain.crop(-1)
    recorded.crop(-1)
    assert_close(go_on(kind, recorded, NEXT), from_scratch(kind, IDS[rows, :2], MASK[rows, :2], NEXT), **EXACT)


def test_steps_after_rows_moved_can_be_cropped_without_recording():
    rows = torch.tensor([1, 0, 3, 2])
    cache = fill("history")
    cache.reorder_cache(rows)
    go_on("history", cache, NEXT)
    cache.crop(-1)
    assert_close(go_on("history", cache, NEXT + 1), from_scratch("history", IDS[rows], MASK[rows], NEXT + 1), **EXACT)


@every_kind
def test_batch_repeat_interleave(kind):
    cache = fill(kind)
    cache.batch_repeat_interleave(3)
    ids, mask, new = (x.repeat_interleave(3, dim=0) for x in (IDS, MASK, NEXT))
    new = (new + torch.arange(12)[:, None]) % 12
    assert_close(go_on(kind, cache, new), from_scratch(kind, ids, mask, new), **EXACT)
    assert len(cache.regions.keys) == 2, "the images' regions are shared, not copied"


@every_kind
@settings(max_examples=15)
@given(data=st.data())
def test_batch_select_indices(kind, data):
    """Rows of any images, in any order, by index or by truth value; each then has regions of its own."""
    flags = data.draw(st.lists(st.booleans(), min_size=4, max_size=4).filter(any))
    rows = data.draw(st.lists(st.integers(0, 3), min_size=1, max_size=5))
    by_flag = data.draw(st.booleans())
    indices = torch.tensor(flags if by_flag else rows)
    chosen = indices.nonzero().squeeze(1) if by_flag else indices
    cache = fill(kind)
    cache.batch_select_indices(indices)
    regions = GridEncoderOutput(last_hidden_state=REGIONS.last_hidden_state[chosen // 2])
    want = from_scratch(kind, IDS[chosen], MASK[chosen], NEXT[chosen], regions)
    assert_close(go_on(kind, cache, NEXT[chosen]), want, **EXACT)


@every_kind
def test_reset_then_reuse(kind):
    cache = fill(kind)
    cache.reset()
    assert cache.get_seq_length() == 0 and not cache.is_initialized
    other = random_regions(1, (1, 2), seed=5)  # other images, another grid, other rows
    ids = torch.tensor([[BOS, 8]])
    MODELS[kind](encoder_outputs=other, decoder_input_ids=ids, past_key_values=cache)
    assert cache.get_seq_length() == 2
    want = from_scratch(kind, ids, torch.ones_like(ids), NEXT[:1], other)
    assert_close(go_on(kind, cache, NEXT[:1]), want, **EXACT)


@every_kind
def test_gradients_flow_through_cached_steps(kind):
    """Word by word or all at once: the same derivatives for regions and weights."""
    model, found = MODELS[kind], []
    for stepwise in (False, True):
        regions = random_regions(2).last_hidden_state.requires_grad_()
        encoded, cache, logits = GridEncoderOutput(last_hidden_state=regions), AttnCapCache(), []
        for ids in IDS.split(1, dim=1) if stepwise else [IDS]:
            out = model(encoder_outputs=encoded, decoder_input_ids=ids, past_key_values=cache)
            logits.append(out.logits)
        weights = [parameter for name, parameter in model.named_parameters() if "encoder" not in name]
        found.append(torch.autograd.grad(torch.cat(logits, 1).square().sum(), [regions, *weights]))
    for whole, stepped in zip(*found, strict=True):
        assert_close(stepped, whole, rtol=1e-9, atol=1e-9)


def test_a_reordered_cache_keeps_the_gradient():
    model, regions = MODELS["history"], random_regions(1).last_hidden_state.requires_grad_()
    cache: Any = AttnCapCache()
    cache.activate_past_recording()
    encoded = GridEncoderOutput(last_hidden_state=regions)
    model(encoder_outputs=encoded, decoder_input_ids=IDS[:2], past_key_values=cache)
    cache.reorder_cache(torch.tensor([1, 0]))
    got = torch.autograd.grad(go_on("history", cache, NEXT[:2]).sum(), regions)[0]
    mask = torch.ones(2, 4)
    ids = torch.cat([IDS[[1, 0]], NEXT[:2]], dim=1)
    whole = model(encoder_outputs=encoded, decoder_input_ids=ids, decoder_attention_mask=mask).logits[:, -1:]
    assert_close(got, torch.autograd.grad(whole.sum(), regions)[0], **EXACT)


def test_no_state_stays_on_the_model():
    """The same call twice, with another one between, gives the same answer; and a cache is not shared by accident."""
    model = MODELS["history"]
    first = model(encoder_outputs=REGIONS, decoder_input_ids=IDS, use_cache=True)
    model(encoder_outputs=random_regions(1, seed=9), decoder_input_ids=NEXT[:1], use_cache=True)
    second = model(encoder_outputs=REGIONS, decoder_input_ids=IDS, use_cache=True)
    assert_close(first.logits, second.logits, rtol=0, atol=0)
    assert first.past_key_values is not second.past_key_values
    go_on("history", first.past_key_values, NEXT)
    assert second.past_key_values.get_seq_length() == 3


def test_use_cache_controls_whether_a_cache_is_returned():
    model = MODELS["history"]
    assert model(encoder_outputs=REGIONS, decoder_input_ids=IDS).past_key_values is not None  # the config's default
    assert model(encoder_outputs=REGIONS, decoder_input_ids=IDS, use_cache=False).past_key_values is None
    labels = IDS.masked_fill(model.config.pad_token_id == IDS, -100)
    assert model(encoder_outputs=REGIONS, labels=labels).past_key_values is None
