"""Training skips steps after the end of captions. Loss, logits and gradients equal those of the decoder with all steps."""

import pytest
import torch
from torch.testing import assert_close

from hf_attncap import AttnCapConfig, AttnCapForConditionalGeneration
from hf_attncap.lstm_attncap import LSTMCell, WeightGradients

KINDS = ["none", "score", "channel", "history"]
EXACT = {"rtol": 1e-12, "atol": 1e-12}


def tiny(**settings) -> AttnCapForConditionalGeneration:
    torch.manual_seed(0)
    sizes = {"encoder_channels": 8, "hidden_size": 10, "attention_dim": 7, "word_embed_dim": 6, "vocab_size": 21, "dropout": 0.0}
    return AttnCapForConditionalGeneration(AttnCapConfig(backbone="squeezenet1_1", **{**sizes, **settings})).double().train()


def captions(lengths: list[int], seed: int = 1) -> torch.Tensor:
    labels = torch.randint(4, 21, (len(lengths), max(lengths)), generator=torch.Generator().manual_seed(seed))
    return labels.masked_fill(torch.arange(max(lengths)) >= torch.tensor(lengths)[:, None], -100)


def learn(model, images: int, labels: torch.Tensor, **outputs) -> tuple:
    """Return loss, logits at the labels and all gradients; with `output_attentions`, the decoder computes all steps."""
    features = torch.randn(images, 512, 2, 2, generator=torch.Generator().manual_seed(2), dtype=torch.float64)
    model.zero_grad()
    out = model(backbone_features=features, labels=labels, **outputs)
    out.loss.backward()
    return (
        out.loss,
        out.logits[labels != -100],
        {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None},
    )


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(("gate", "deep_output"), [(True, True), (False, False)])
@pytest.mark.parametrize(
    ("images", "lengths"),
    [(3, [3, 7, 2, 5, 5, 1]), (4, [1, 9, 4, 4]), (1, [2, 6, 3]), (2, [5, 5]), (2, [1, 1])],
)
def test_equal_to_all_steps(kind, gate, deep_output, images, lengths):
    model = tiny(word_attention=kind, gate=gate, deep_output=deep_output, label_smoothing=0.1, alpha_c=1.5)
    labels = captions(lengths)
    assert_close(learn(model, images, labels), learn(model, images, labels, output_attentions=True), **EXACT)


def test_ignored_labels_inside_a_caption():
    model, labels = tiny(), captions([6, 4])
    labels[0, 2] = labels[1, 1] = -100
    assert_close(learn(model, 2, labels), learn(model, 2, labels, output_attentions=True), **EXACT)


def test_rows_without_a_label():
    model, labels = tiny(), captions([3, 1])
    labels[1] = -100
    assert_close(learn(model, 2, labels), learn(model, 2, labels, output_attentions=True), **EXACT)


@pytest.mark.parametrize("wanted", ["output_hidden_states", "output_attentions"])
def test_outputs_that_the_config_asks_for_are_returned_in_training(wanted):
    model, labels = tiny(), captions([2, 5])
    setattr(model.config, wanted, True)
    out = model(backbone_features=torch.randn(2, 512, 2, 2).double(), labels=labels)
    assert (out.decoder_hidden_states is not None) == (wanted == "output_hidden_states")
    assert (out.cross_attentions is not None) == (wanted == "output_attentions")


def test_logits_after_the_end_are_zero():
    model, labels = tiny(), captions([2, 5])
    logits = model(backbone_features=torch.randn(2, 512, 2, 2).double(), labels=labels).logits
    assert logits.shape == (2, 5, 21) and not logits[0, 2:].any() and logits[1].all()


def test_padding_is_not_computed(monkeypatch):
    """Steps of an image whose captions are over are not computed: the attention sees as many captions as go on."""
    model, seen = tiny(), []
    attention = model.model.decoder.attention
    monkeypatch.setattr(attention, "forward", lambda q, *rest: seen.append(len(q)) or type(attention).forward(attention, q, *rest))
    learn(model, 3, captions([2, 1, 4, 3, 1, 1]))
    assert seen == [6, 4, 2, 2]


def test_gradient_checkpointing():
    model, labels = tiny(), captions([3, 7, 2, 5])
    expected = learn(model, 2, labels)
    model.gradient_checkpointing_enable()
    assert_close(learn(model, 2, labels), expected, **EXACT)


def test_half_precision_by_autocast():
    model, labels = tiny().float(), captions([3, 7, 2, 5])
    features = torch.randn(2, 512, 2, 2)
    whole = model(backbone_features=features, labels=labels).loss
    with torch.autocast("cpu", torch.bfloat16):
        half = model(backbone_features=features, labels=labels).loss
    half.backward()
    assert_close(half.float(), whole, rtol=0.02, atol=0.02)
    assert model.model.decoder.cell.weight_hh.grad.dtype == torch.float32


@pytest.mark.parametrize("frozen", [False, True])
def test_shared_weight_gradients_of_the_lstm_equal_those_of_torch(frozen):
    torch.manual_seed(0)
    cell, x = LSTMCell(3, 4).double(), torch.randn(5, 2, 3, dtype=torch.float64, requires_grad=True)
    cell.weight_hh.requires_grad_(not frozen)
    start = torch.randn(2, 2, 4, dtype=torch.float64, requires_grad=True)

    def derivatives(*gradients):
        state = start.unbind()
        for step in x:
            state = cell(step, state, *gradients)
        wanted = [p for p in (*cell.parameters(), x, start) if p.requires_grad]
        return state, torch.autograd.grad(state[0].square().sum() + state[1].sin().sum(), wanted)

    assert_close(derivatives(WeightGradients()), derivatives(), **EXACT)
