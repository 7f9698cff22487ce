"""The model computes what the formulas say, whatever the batch, the padding or the steps it takes."""

import itertools
from functools import cache
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from reference import BOS, EOS, KINDS, PAD, Reference, load, random_regions, tiny_model
from torch.testing import assert_close

from hf_attncap.cache_attncap import CACHE_NAME, AttnCapCache
from hf_attncap.encoder_attncap import CPU_IMAGES
from hf_attncap.loss_attncap import caption_loss
from hf_attncap.modeling_attncap import AttnCapForConditionalGeneration, GridEncoderOutput

EXACT: Any = {"rtol": 1e-10, "atol": 1e-10}
SWITCHES = [
    *(
        {"word_attention": kind, "gate": gate, "deep_output": deep}
        for kind in KINDS
        for gate in (True, False)
        for deep in (True, False)
    ),
    {"tie_word_embeddings": True},
    {"tie_word_embeddings": True, "deep_output": False, "hidden_size": 5},
    {"max_word_distance": 1},
]
every_switch = pytest.mark.parametrize("switches", SWITCHES, ids=lambda s: "-".join(f"{k}={v}" for k, v in s.items()))
every_kind = pytest.mark.parametrize("kind", KINDS)


@cache
def cached_model(**switches) -> Any:
    return tiny_model(**switches)


def run(model, regions, ids, mask=None, **kwargs):
    return model(
        encoder_outputs=regions,
        decoder_input_ids=ids,
        decoder_attention_mask=mask,
        output_attentions=True,
        output_hidden_states=True,
        **kwargs,
    )


def expect_row(kind: str, got, row: int, want, positions: list[int]) -> None:
    """Row `row` of an output equals the trace of its real words, which stand at `positions`."""
    assert_close(got.logits[row, positions], torch.stack(want.logits), **EXACT)
    assert_close(got.cross_attentions[0][row, 0, positions], torch.stack(want.regions), **EXACT)
    states, cells = got.decoder_hidden_states
    assert_close(states[row, positions], torch.stack(want.states), **EXACT)
    assert_close(cells[row, positions], torch.stack(want.cells), **EXACT)
    if not want.words:
        assert got.decoder_attentions is None
        return
    word_attention = got.decoder_attentions[0][row, 0]
    for t, position in enumerate(positions):
        weights = word_attention[position]
        if kind == "channel":
            assert_close(weights, want.words[t], **EXACT)
        else:
            wanted = torch.zeros_like(weights)
            wanted[positions[: t + 1]] = want.words[t]
            assert_close(weights, wanted, **EXACT)


def expect_all(model, regions, ids, mask, got) -> None:
    reference, per_image = Reference(model), len(ids) // len(regions.last_hidden_state)
    for row, words in enumerate(ids.tolist()):
        positions = [t for t in range(len(words)) if mask is None or mask[row, t]]
        if positions:
            want = reference.caption(regions.last_hidden_state[row // per_image], [words[t] for t in positions])
            expect_row(model.config.word_attention, got, row, want, positions)


@every_switch
def test_model_equals_the_formulas(switches):
    model, regions = cached_model(**switches), random_regions(2)
    ids = torch.tensor([[BOS, 5, 6, 7, 4, 8, 9], [BOS, 10, 4, 4, 11, EOS, PAD]])
    expect_all(model, regions, ids, None, run(model, regions, ids))


@st.composite
def batches(draw):
    images, per_image, length = draw(st.integers(1, 3)), draw(st.integers(1, 3)), draw(st.integers(1, 6))
    rows = images * per_image
    word, flag = st.integers(0, 11), st.booleans()
    ids = draw(st.lists(st.lists(word, min_size=length, max_size=length), min_size=rows, max_size=rows))
    mask = draw(st.lists(st.lists(flag, min_size=length, max_size=length), min_size=rows, max_size=rows))
    regions = random_regions(images, draw(st.tuples(st.integers(1, 3), st.integers(1, 3))), seed=draw(st.integers(0, 99)))
    return regions, torch.tensor(ids), torch.tensor(mask)


@every_kind
@settings(max_examples=15)
@given(batch=batches())
def test_any_shape_and_any_padding_equals_the_formulas(kind, batch):
    regions, ids, mask = batch
    model = cached_model(word_attention=kind)
    got = run(model, regions, ids, mask.long())
    expect_all(model, regions, ids, mask, got)
    if kind in ("channel", "history"):
        assert not got.decoder_attentions[0][:, 0][~mask].any()


@every_kind
@settings(max_examples=15)
@given(batch=batches(), data=st.data())
def test_any_split_into_cached_steps_equals_the_whole(kind, batch, data):
    regions, ids, mask = batch
    model = cached_model(word_attention=kind)
    whole = run(model, regions, ids, mask)
    cuts = sorted(data.draw(st.sets(st.integers(1, ids.shape[1]), max_size=4)) | {ids.shape[1]})
    mask_so_far = data.draw(st.booleans(), label="mask covers the words so far, not the new ones alone")
    cache, start = AttnCapCache(), 0
    for end in cuts:
        part_mask = mask[:, :end] if mask_so_far else mask[:, start:end]
        part = run(model, regions, ids[:, start:end], part_mask, past_key_values=cache)
        expected_logits = whole.logits[:, start:end]
        real = mask[:, start:end]
        assert_close(part.logits[real], expected_logits[real], **EXACT)
        assert_close(part.cross_attentions[0], whole.cross_attentions[0][:, :, start:end], **EXACT)
        if kind == "channel":
            assert_close(part.decoder_attentions[0], whole.decoder_attentions[0][:, :, start:end], **EXACT)
        if kind == "history":
            assert_close(part.decoder_attentions[0], whole.decoder_attentions[0][:, :, start:end, :end], **EXACT)
        start = end
        assert cache.get_seq_length() == end


@pytest.mark.parametrize("training", [False, True])
def test_labels_by_image_equal_labels_in_adjacent_rows(training):
    model, pictures = tiny_model(dropout=0.0).train(training), torch.rand(2, 3, 64, 64).double()
    rows = torch.tensor([[5, 6, 2, -100], [7, 8, 9, 2], [4, 2, -100, -100], [10, 11, 4, 2]])  # (R, T)
    by_image = rows.unflatten(0, (2, 2))  # (B, k, T)
    together, apart = (model(pixel_values=pictures, labels=labels) for labels in (by_image, rows))
    assert_close(together.loss, apart.loss, **EXACT)
    assert together.logits.shape == (4, 4, model.config.vocab_size)
    assert_close(together.logits, apart.logits, **EXACT)
    shifted = (model.prepare_decoder_input_ids_from_labels(labels) for labels in (by_image, rows))
    assert torch.equal(*shifted)


@pytest.mark.parametrize("training", [False, True])
def test_labels_of_another_number_of_images_are_rejected(training):
    """Two images and the captions of four: as rows they would be taken for two captions each."""
    model, labels = tiny_model().train(training), torch.tensor([[[5, 2]], [[6, 2]], [[7, 2]], [[8, 2]]])  # (4, 1, T)
    pictures = torch.rand(2, 3, 64, 64).double()
    features = model.model.encoder.features(pictures)
    for picture in (
        {"pixel_values": pictures},
        {"backbone_features": features},
        {"encoder_outputs": (torch.rand(2, 4, model.config.encoder_channels).double(),)},
    ):
        with pytest.raises(ValueError, match=r"`labels` \(4, 1, 2\) are for 4 images, but 2 were given"):
            model(labels=labels, **picture)


@pytest.mark.parametrize("cached", [False, True])
def test_padding_after_the_last_word_does_not_change_its_prediction(cached):
    """A batch of prompts may hold an empty one: [BOS, pad, pad] must go on as [BOS] does."""
    model, regions = cached_model(), random_regions(2)
    ids = torch.tensor([[BOS, PAD, PAD], [BOS, 5, 6]])
    padded = run(model, regions, ids, torch.tensor([[1, 0, 0], [1, 1, 1]]), use_cache=cached)
    image = GridEncoderOutput(last_hidden_state=regions.last_hidden_state[:1])
    assert_close(padded.logits[0, -1], run(model, image, ids[:1, :1]).logits[0, -1], **EXACT)


@every_kind
@pytest.mark.parametrize("smoothing", [0.0, 0.1])
@pytest.mark.parametrize("items", [None, 17])
def test_loss_equals_the_formulas(kind, smoothing, items):
    model, regions = (
        tiny_model(word_attention=kind, alpha_c=0.7, label_smoothing=smoothing),
        random_regions(2),
    )
    labels = [[5, 6, EOS, -100, -100], [7, EOS, -100, -100, -100], [8, 9, 10, 11, EOS], [4, 4, 4, EOS, -100]]
    got = model(encoder_outputs=regions, labels=torch.tensor(labels), num_items_in_batch=items).loss
    assert_close(got, Reference(model).loss(regions.last_hidden_state, labels, items), **EXACT)


def test_doubly_stochastic_term_by_hand():
    """Two rows, two regions: only real words count, each row weighs as many words as it has."""
    model = tiny_model(alpha_c=2.0)
    labels = torch.tensor([[4, EOS, -100], [EOS, -100, -100]])
    alpha = torch.tensor([[[0.9, 0.1], [0.5, 0.5], [9, 9]], [[0.2, 0.8], [9, 9], [9, 9]]], dtype=torch.float64)
    logits = torch.zeros(2, 3, 12).double()  # uniform: a cross-entropy of log 12 a word
    # Row 1 saw (1.4, 0.6): mean square of (-0.4, 0.4) is 0.16. Row 2 saw (0.2, 0.8): mean square of (0.8, 0.2) is 0.34.
    uneven = (2 * 0.16 + 1 * 0.34) / 3
    loss = caption_loss(model.config, logits[labels != -100], labels, alpha)
    assert_close(loss, torch.tensor(12.0).double().log() + 2.0 * uneven, **EXACT)


def test_dropout_only_in_training():
    model, regions = tiny_model(dropout=0.5), random_regions(1)
    ids = torch.tensor([[BOS, 5, 6, 7]])
    plain = run(model, regions, ids)
    assert_close(run(model, regions, ids).logits, plain.logits, rtol=0, atol=0)
    model.train()
    torch.manual_seed(0)
    dropped = run(model, regions, ids)
    assert (dropped.logits != plain.logits).any()
    assert_close(dropped.cross_attentions[0], plain.cross_attentions[0], **EXACT)  # before the output layer alone


@pytest.mark.parametrize("grid", [None, 2, (1, 3), (5, 4)])
def test_regions_are_pooled_features_row_by_row(grid):
    model = tiny_model(grid_size=grid)
    pictures = torch.rand(2, 3, 70, 90, dtype=torch.float64)
    with torch.no_grad():
        features = model.model.encoder.features(pictures)
        out = model.model.encoder(pictures)
        from_features = model.model.encoder(backbone_features=features)
    want = torch.stack([Reference(model).grid(image) for image in features])
    assert_close(out.last_hidden_state, want, **EXACT)
    assert_close(from_features.last_hidden_state, want, **EXACT)
    rows, columns = out.grid_shape
    assert (rows, columns) == {None: features.shape[-2:], 2: (2, 2), (1, 3): (1, 3), (5, 4): (5, 4)}[grid]
    assert out.last_hidden_state.shape == (2, rows * columns, 4)


@pytest.mark.parametrize("trained", [{"freeze_backbone": True}, {"trainable_blocks": 2}, {}], ids=["none", "some", "all"])
def test_the_encoder_splits_large_batches_only_for_inference(trained):
    """Large batches take longer per image on CPUs. The regions are the same."""
    encoder, seen = tiny_model(**trained).model.encoder, []
    for block in encoder.blocks():
        block.register_forward_pre_hook(lambda _, inputs: seen.append(len(inputs[0])))
    images = torch.rand(2 * CPU_IMAGES + 3, 3, 40, 40, dtype=torch.float64)  # (B, 3, height, width)
    whole = encoder(images).last_hidden_state  # (B, N, C), with gradients
    assert set(seen) == {len(images)}
    seen.clear()
    with torch.no_grad():
        split = encoder(images).last_hidden_state  # (B, N, C)
        assert set(seen) == {CPU_IMAGES, 3}
        seen.clear()
        encoder.train()(images)
        assert set(seen) == {len(images)}
    assert_close(split, whole)


def test_images_features_and_encoder_outputs_give_equal_results():
    model = tiny_model()
    pictures, labels = torch.rand(2, 3, 64, 64).double(), torch.tensor([[5, EOS], [6, EOS]])
    with torch.no_grad():
        want = model(pixel_values=pictures, labels=labels)
        features = model.model.encoder.features(pictures)
        encoded = model.model.encoder(pictures)
        for way in (
            {"backbone_features": features},
            {"encoder_outputs": encoded},
            {"encoder_outputs": encoded.to_tuple()},
        ):
            got = model(labels=labels, **way)
            assert_close(got.loss, want.loss, **EXACT)
            assert_close(got.logits, want.logits, **EXACT)


def test_errors_name_bad_input():
    model, regions = cached_model(), random_regions(2)
    with pytest.raises(ValueError, match="3 rows of words for 2 images"):
        run(model, regions, torch.full((3, 2), BOS))
    with pytest.raises(ValueError, match="`decoder_attention_mask` covers"):
        run(model, regions, torch.full((2, 3), BOS), torch.ones(2, 2))
    with pytest.raises(ValueError, match="`pixel_values`"):
        model(decoder_input_ids=torch.tensor([[BOS]]))
    with pytest.raises(ValueError, match=f"`{CACHE_NAME}` is a tuple, but the decoder needs"):
        run(model, regions, torch.full((2, 1), BOS), past_key_values=())


def batch_norm_statistics(model) -> dict[str, torch.Tensor]:
    return {name: value.clone() for name, value in model.model.encoder.backbone.named_buffers()}


def train_one_step(model) -> None:
    model(pixel_values=torch.rand(2, 3, 64, 64), labels=torch.tensor([[5, EOS], [6, EOS]])).loss.backward()


def with_batch_norm(origin: str, folder, **switches) -> Any:
    """A model about to be trained: just made, switched from evaluation to training, or saved and reloaded."""
    config = tiny_model(backbone="mobilenet_v3_small", **switches).config
    model = AttnCapForConditionalGeneration(config)
    if origin == "fresh":
        return model  # torch's modules begin in training mode
    if origin == "reloaded":
        model.save_pretrained(folder)
        model = load(folder)
    return model.eval().train()


@pytest.mark.parametrize("origin", ["fresh", "switched", "reloaded"])
def test_frozen_backbone_keeps_weights_and_statistics(origin, tmp_path):
    model = with_batch_norm(origin, tmp_path)
    before = batch_norm_statistics(model)
    train_one_step(model)
    after = batch_norm_statistics(model)
    assert before and all(torch.equal(before[name], after[name]) for name in before)
    for name, parameter in model.named_parameters():
        assert (parameter.grad is None) == ("backbone" in name), name


@pytest.mark.parametrize("frozen_statistics", [False, True])
@pytest.mark.parametrize("origin", ["fresh", "switched", "reloaded"])
def test_trained_backbone(origin, frozen_statistics, tmp_path):
    model = with_batch_norm(origin, tmp_path, freeze_backbone=False, freeze_batch_norm=frozen_statistics)
    before = batch_norm_statistics(model)
    train_one_step(model)
    after = batch_norm_statistics(model)
    assert all(torch.equal(before[name], after[name]) for name in before) == frozen_statistics
    assert all(parameter.grad is not None for parameter in model.parameters())


@pytest.mark.parametrize("origin", ["fresh", "switched", "reloaded"])
def test_last_blocks_learn_equally_from_cached_features_and_images(origin, tmp_path):
    model = with_batch_norm(origin, tmp_path, freeze_backbone=False, trainable_blocks=2, freeze_batch_norm=False, dropout=0.0)
    encoder = model.model.encoder
    learning = {id(parameter) for block in encoder.blocks()[-2:] for parameter in block.parameters()}
    statistics = {id(value) for block in encoder.blocks()[-2:] for value in block.buffers()}
    pictures, labels = torch.rand(2, 3, 64, 64), torch.tensor([[5, EOS], [6, EOS]])
    with torch.no_grad():
        features = encoder.features(pictures)
        assert_close(model.eval()(backbone_features=features, labels=labels).loss, model(pixel_values=pictures, labels=labels).loss)
    gradients = []
    for way in ({"pixel_values": pictures}, {"backbone_features": features}):
        before = batch_norm_statistics(model)
        model.train().zero_grad()
        model(labels=labels, **way).loss.backward()
        gradients.append({name: parameter.grad for name, parameter in model.named_parameters()})
        moved = {name for name, value in batch_norm_statistics(model).items() if not torch.equal(value, before[name])}
        assert moved and {id(encoder.backbone.get_buffer(name)) for name in moved} <= statistics
    for name, parameter in model.named_parameters():
        learns = "backbone" not in name or id(parameter) in learning
        assert (gradients[0][name] is not None) == learns, name
        if learns:
            assert_close(gradients[1][name], gradients[0][name])


def test_too_many_trainable_blocks_are_rejected():
    with pytest.raises(ValueError, match=r"`trainable_blocks` is 99, but squeezenet1_1 has 13 blocks"):
        tiny_model(backbone="squeezenet1_1", freeze_backbone=False, trainable_blocks=99)


def test_frozen_word_embeddings_get_no_gradient():
    model = tiny_model(freeze_word_embeddings=True).float().train()
    train_one_step(model)
    assert model.get_input_embeddings().weight.grad is None
    assert model.lm_head.weight.grad is not None


@every_kind
def test_gradients(kind):
    """Analytic and numerical derivatives agree for regions and every weight of the decoder, cached steps included."""
    sizes = {
        "encoder_channels": 2,
        "vocab_size": 5,
        "word_embed_dim": 2,
        "hidden_size": 2,
        "attention_dim": 2,
    }
    model = tiny_model(word_attention=kind, alpha_c=0.5, label_smoothing=0.1, max_word_distance=2, **sizes)
    names = [name for name, _ in model.named_parameters() if "encoder" not in name]
    weights = [model.get_parameter(name).detach().clone().requires_grad_() for name in names]
    regions = random_regions(1, (1, 2), channels=2).last_hidden_state.requires_grad_()
    labels = torch.tensor([[4, 3, EOS], [3, EOS, -100]])
    mask = torch.tensor([[1, 1, 1], [1, 0, 1]])

    def loss(regions, *weights):
        inputs = {
            "encoder_outputs": GridEncoderOutput(last_hidden_state=regions),
            "labels": labels,
            "decoder_attention_mask": mask,
        }
        return torch.func.functional_call(model, dict(zip(names, weights, strict=True)), kwargs=inputs).loss

    assert torch.autograd.gradcheck(loss, (regions, *weights), fast_mode=True)


@pytest.mark.filterwarnings("ignore::FutureWarning")  # an alias of transformers' new name
def test_gradient_checkpointing_changes_no_gradient():
    pictures, labels = torch.rand(2, 3, 64, 64), torch.tensor([[5, EOS], [6, EOS]])
    model = tiny_model(freeze_backbone=False, dropout=0.0).float().train()
    gradients, runs = [], []
    model.get_submodule("model.encoder.backbone.features.3").register_forward_pre_hook(lambda *_: runs.append(1))
    for checkpointing in (False, True):
        if checkpointing:
            model.gradient_checkpointing_enable()
        model.zero_grad()
        torch.manual_seed(0)
        model(pixel_values=pictures, labels=labels).loss.backward()
        gradients.append([parameter.grad.clone() for parameter in model.parameters()])
    for plain, checkpointed in zip(*gradients, strict=True):
        assert_close(checkpointed, plain)
    assert len(runs) == 3, "a checkpointed block runs again in the backward pass"


def test_initial_distance_bias_and_padding_embedding_are_zero():
    """A fresh model prefers no distance between words, and its padding is silent."""
    model = AttnCapForConditionalGeneration(cached_model().config)
    decoder = model.model.decoder
    assert not decoder.attention.distance_bias.any()
    assert not decoder.embed_tokens.weight[PAD].any()
    weights = [
        decoder.attention.region_proj.weight,
        decoder.attention.query_proj.weight,
        decoder.cell.weight_hh,
        model.lm_head.weight,
    ]
    assert all(weight.std() > 0 for weight in weights)


def test_regions_are_projected_once_per_image():
    """K is computed once an image, not once a caption or a word."""
    model, regions = cached_model(), random_regions(2)
    seen = []
    handle = model.model.decoder.attention.region_proj.register_forward_hook(lambda _, args, __: seen.append(len(args[0])))
    run(model, regions, torch.full((6, 5), 4))
    handle.remove()
    assert seen == [2]


def test_word_attention_uses_the_distance_bias():
    """ "history" reads its bias by distance: shifting the bias changes the weights as the formula says."""
    model = tiny_model(max_word_distance=3)
    ids = torch.tensor([[BOS, 5, 6, 7, 8, 9]])
    with torch.no_grad():
        model.model.decoder.attention.word_score.weight.zero_()
        model.model.decoder.attention.distance_bias.copy_(torch.tensor([1.0, 2.0, 4.0], dtype=torch.float64).log())
    beta = run(model, random_regions(1), ids).decoder_attentions[0][0, 0, -1]
    assert_close(beta, torch.tensor([4, 4, 4, 4, 2, 1]).double() / 19, **EXACT)


def test_every_switch_changes_the_result():
    """No switch is idle: models that share all weights but differ in one switch say different things."""
    ids, states, logits = torch.tensor([[BOS, 5, 6, 7]]), [], []
    for kind, gate, deep in itertools.product(KINDS, (True, False), (True, False)):
        got = run(
            cached_model(word_attention=kind, gate=gate, deep_output=deep, word_embed_dim=6),
            random_regions(1),
            ids,
        )
        states.append(got.decoder_hidden_states[0][0, -1])
        logits.append(got.logits[0, -1])
        if not deep:
            assert_close(states[-1], states[-2], **EXACT)  # the state does not depend on the output layer
    assert all(not torch.allclose(a, b) for a, b in itertools.combinations(states[::2], 2))
    assert all(not torch.allclose(a, b) for a, b in itertools.combinations(logits, 2))
