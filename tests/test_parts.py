"""A new model takes torchvision's backbones and text files of word vectors as they are; what it saves needs neither again."""

from pathlib import Path
from typing import Any

import pytest
import torch
import torchvision
from huggingface_hub.errors import StrictDataclassError
from hypothesis import given, settings
from hypothesis import strategies as st
from reference import BOS, PAD, load, tiny_model
from safetensors.torch import save_file
from test_word_vector_files import BODY, FOUND, VOCABULARY, write
from torch.nn import functional as F
from torch.testing import assert_close

from hf_attncap import backbone_attncap
from hf_attncap.backbone_attncap import SameConv2d, SameMaxPool2d, build_backbone, count_channels, load_backbone_weights
from hf_attncap.configuration_attncap import AttnCapConfig
from hf_attncap.modeling_attncap import AttnCapForConditionalGeneration
from hf_attncap.word_vectors import read_word_vectors

# --- backbones ---


def torchvision_classifier(name: str, **options) -> Any:
    if name in ("googlenet", "inception_v3"):
        options = {"aux_logits": False, "init_weights": False, **options}
    return torchvision.models.get_model(name, weights=None, **options).eval()


def calibrate(net: torch.nn.Module) -> None:
    """Give a random net batch norm statistics that fit it: pictures neither vanish nor explode on the way through."""
    for module in net.modules():
        if isinstance(module, torch.nn.BatchNorm2d):
            module.train().momentum = 1.0
        elif isinstance(module, torch.nn.Conv2d):
            torch.nn.init.kaiming_normal_(module.weight)
    with torch.no_grad():
        net(torch.rand(4, 3, 96, 96, dtype=next(net.parameters()).dtype))
    net.eval()


POOLED = ["resnet18", "densenet121", "googlenet", "inception_v3", "mobilenet_v2", "efficientnet_b0", "regnet_y_400mf"]


@pytest.mark.parametrize("name", [*POOLED, "squeezenet1_1", "mnasnet0_5", "shufflenet_v2_x0_5"])
def test_backbone_output_is_what_torchvision_pools(name, monkeypatch):
    torch.manual_seed(0)
    net, backbone = torchvision_classifier(name), build_backbone(name).eval()
    calibrate(net)
    wanted = backbone.state_dict()
    assert set(wanted) <= set(net.state_dict()), "torchvision's state dicts must fit"
    backbone.load_state_dict({key: value for key, value in net.state_dict().items() if key in wanted})
    picture = torch.rand(1, 3, 96, 80)
    pooled: list[torch.Tensor] = []
    pool = F.adaptive_avg_pool2d
    monkeypatch.setattr(F, "adaptive_avg_pool2d", lambda x, size: pooled.append(x) or pool(x, size))
    with torch.no_grad():
        got = backbone(picture)
        pooled.clear()
        net(picture)
        if name in POOLED:
            want = pooled[-1]
        elif name == "squeezenet1_1":  # pools after its classifier
            want = net.features(picture)
        else:  # pools by `mean`
            want = net.layers(picture) if name == "mnasnet0_5" else children_until_fc(net, picture)
    assert want.std() > 0.01
    assert_close(got, want)
    assert count_channels(backbone) == want.shape[1]


def children_until_fc(net, x: torch.Tensor) -> torch.Tensor:
    for stage in (net.conv1, net.maxpool, net.stage2, net.stage3, net.stage4, net.conv5):
        x = stage(x)
    return x


def test_counting_channels_does_not_change_the_backbone():
    backbone = build_backbone("shufflenet_v2_x0_5").train()
    before = {key: value.clone() for key, value in backbone.state_dict().items()}
    assert count_channels(backbone) == 1024
    assert backbone.training
    assert all(torch.equal(value, before[key]) for key, value in backbone.state_dict().items())


SEQUENTIAL = ("alexnet", "densenet121", "efficientnet_b0", "efficientnet_lite0", "mnasnet0_5", "mobilenet_v2", "vgg11_bn")
BRANCHED = ("googlenet", "regnet_x_400mf", "resnet18", "squeezenet1_1")


@pytest.mark.parametrize("name", SEQUENTIAL)
def test_channels_of_the_last_layer_are_those_of_a_run(name):
    with torch.device("meta"):
        backbone = build_backbone(name)
    assert backbone_attncap._channels_of_last_layer(backbone) == backbone_attncap._channels_of_dry_run(backbone)


@pytest.mark.parametrize("name", BRANCHED)
def test_channels_after_branches_are_found_by_a_run(name):
    with torch.device("meta"):
        assert backbone_attncap._channels_of_last_layer(build_backbone(name)) is None


def test_a_fresh_backbone_is_initialised_as_torchvision_does():
    """Not as the library's default would: convolutions of N(0, 0.02), batch norm reset."""
    model = AttnCapForConditionalGeneration(tiny_model(backbone="resnet18").config)
    theirs = torchvision_classifier("resnet18")
    for name, parameter in model.model.encoder.backbone.named_parameters():
        if parameter.ndim == 4 and parameter.numel() > 10_000:
            assert_close(parameter.std(), theirs.get_parameter(name).std(), rtol=0.1, atol=0)


@pytest.mark.slow
def test_the_full_model_in_bfloat16_by_device_map(tmp_path):
    pytest.importorskip("accelerate")
    AttnCapForConditionalGeneration(AttnCapConfig(word_attention="history")).save_pretrained(tmp_path)
    model = load(tmp_path, dtype=torch.bfloat16, device_map="auto")
    assert {parameter.dtype for parameter in model.parameters()} == {torch.bfloat16}
    pixel_values = torch.rand(1, 3, 224, 224, device=model.device)
    sequences = model.generate(pixel_values=pixel_values, max_new_tokens=4, num_beams=2)
    maps, words = model.caption_attentions(sequences, pixel_values=pixel_values)
    assert maps.shape[1:] == (sequences.shape[1] - 1, 7, 7) and words is not None


# --- TensorFlow's padding ---

axis = st.tuples(st.integers(1, 11), st.integers(1, 5), st.integers(1, 4), st.integers(1, 2))  # size, kernel, stride, dilation


def windows(size: int, kernel: int, stride: int, dilation: int = 1) -> list[list[int]]:
    """The positions each output looks at under TensorFlow's SAME; those below 0 or beyond the size are padding."""
    outputs = (size + stride - 1) // stride
    reach = (kernel - 1) * dilation + 1
    missing = (outputs - 1) * stride + reach - size
    first = -(missing // 2) if missing > 0 else 0
    return [[first + i * stride + k * dilation for k in range(kernel)] for i in range(outputs)]


@settings(max_examples=60)
@given(rows=axis, columns=axis)
def test_same_padding_of_convolutions(rows, columns):
    torch.manual_seed(0)
    picture = torch.randn(rows[0], columns[0], dtype=torch.float64)
    conv = SameConv2d(1, 1, (rows[1], columns[1]), (rows[2], columns[2]), dilation=(rows[3], columns[3])).double()
    kernel, bias = conv.weight.detach()[0, 0], conv.state_dict()["bias"]
    want = [
        [
            bias[0]
            + sum(
                kernel[i, j] * picture[y, x]
                for i, y in enumerate(ys)
                for j, x in enumerate(xs)
                if 0 <= y < rows[0] and 0 <= x < columns[0]
            )
            for xs in windows(*columns)
        ]
        for ys in windows(*rows)
    ]
    assert_close(conv(picture[None, None]).detach()[0, 0], torch.tensor(want, dtype=torch.float64), rtol=1e-10, atol=1e-10)


@settings(max_examples=60)
@given(rows=axis, columns=axis)
def test_same_padding_of_pools(rows, columns):
    rows, columns = rows[:3], columns[:3]
    torch.manual_seed(0)
    picture = torch.randn(rows[0], columns[0], dtype=torch.float64) - 5.0  # negative: zeros in the padding would win
    pool = SameMaxPool2d((rows[1], columns[1]), (rows[2], columns[2]))
    want = [
        [max(picture[y, x] for y in ys for x in xs if 0 <= y < rows[0] and 0 <= x < columns[0]) for xs in windows(*columns)]
        for ys in windows(*rows)
    ]
    assert_close(pool(picture[None, None])[0, 0], torch.tensor(want, dtype=torch.float64))


def test_a_backbone_padded_like_tensorflow():
    """Same tensors, same sizes of the map; strided layers pad right and bottom first."""
    torch.manual_seed(0)
    ours: Any = build_backbone("resnet18", "same").eval()
    theirs = build_backbone("resnet18").eval()
    theirs.load_state_dict(ours.state_dict())
    picture = torch.rand(1, 3, 64, 64)
    with torch.no_grad():
        first = F.conv2d(F.pad(picture, (2, 3, 2, 3)), ours.conv1.weight, stride=2)
        assert_close(ours.conv1(picture), first)
        pooled = F.max_pool2d(F.pad(first, (0, 1, 0, 1), value=-torch.inf), 3, 2)
        assert_close(ours.maxpool(first), pooled)
        block, inner = ours.layer2[0], torch.rand(1, 64, 16, 16)
        assert_close(block.conv1(inner), F.conv2d(F.pad(inner, (0, 1, 0, 1)), block.conv1.weight, stride=2))
        assert_close(block.conv2(block.conv1(inner)), F.conv2d(block.conv1(inner), block.conv2.weight, padding=1))
        assert ours(picture).shape == theirs(picture).shape
        assert not torch.allclose(ours(picture), theirs(picture))


def test_the_config_chooses_the_padding(tmp_path):
    model = tiny_model(backbone_padding="same").float()
    model.save_pretrained(tmp_path)
    loaded = load(tmp_path)
    picture = torch.rand(1, 3, 64, 64)
    with torch.no_grad():
        assert_close(loaded.model.encoder.features(picture), model.model.encoder.features(picture))
    for some in (model, loaded):
        pools = [type(module) for module in some.modules() if isinstance(module, torch.nn.MaxPool2d)]
        assert pools and SameMaxPool2d not in pools, "this backbone's pools have no padding to replace"


# --- backbone weights ---


def new_model(backbone: str = "squeezenet1_1", **parts) -> Any:
    return AttnCapForConditionalGeneration.from_pretrained_parts(tiny_model(backbone=backbone).config, **parts)


@pytest.mark.parametrize("form", [".pth", ".safetensors", "nested"])
def test_backbone_from_a_state_dict(form, tmp_path):
    net = torchvision_classifier("squeezenet1_1")
    path = tmp_path / ("weights.safetensors" if form == ".safetensors" else "weights.pth")
    if form == ".safetensors":
        save_file(net.state_dict(), path)
    else:
        torch.save({"state_dict": net.state_dict()} if form == "nested" else net.state_dict(), path)
    model = new_model(backbone_weights=path)
    backbone = model.model.encoder.backbone
    assert all(torch.equal(value, net.state_dict()[key]) for key, value in backbone.state_dict().items())
    assert not any(parameter.requires_grad for parameter in backbone.parameters())
    assert model.config.image_mean == (0.485, 0.456, 0.406)
    path.unlink()
    model.save_pretrained(tmp_path / "model")
    loaded = load(tmp_path / "model")
    inputs = {"pixel_values": torch.rand(1, 3, 64, 64), "decoder_input_ids": torch.tensor([[BOS, 5]])}
    with torch.no_grad():
        assert_close(loaded(**inputs).logits, model.eval()(**inputs).logits)


def test_auxiliary_classifiers_in_a_file_are_ignored(tmp_path):
    net = torchvision_classifier("googlenet", aux_logits=True)
    torch.save(net.state_dict(), tmp_path / "googlenet.pth")
    backbone = new_model("googlenet", backbone_weights=tmp_path / "googlenet.pth").model.encoder.backbone
    assert all(torch.equal(value, net.state_dict()[key]) for key, value in backbone.state_dict().items())


def test_error_of_weights_that_do_not_fit_names_the_tensor(tmp_path):
    state = torchvision_classifier("squeezenet1_1").state_dict()
    path = tmp_path / "weights.pth"
    torch.save({key: value for key, value in state.items() if key != "features.3.squeeze.bias"}, path)
    with pytest.raises(ValueError, match="weights.pth' lacks 1 of the 50 tensors of squeezenet1_1.*'features.3.squeeze.bias'"):
        new_model(backbone_weights=path)
    torch.save({**state, "features.3.squeeze.bias": torch.zeros(7)}, path)
    with pytest.raises(ValueError, match=r"weights.pth' does not fit.*'features.3.squeeze.bias' is \(7,\), expected \(16,\)"):
        new_model(backbone_weights=path)


def unreadable_files(folder) -> dict[str, str]:
    """Files that hold no weights, each with what its message says of it."""
    whole = folder / "whole.pth"
    torch.save(torchvision_classifier("squeezenet1_1").state_dict(), whole)
    (folder / "cut.pth").write_bytes(whole.read_bytes()[:100_000])
    (folder / "page.pth").write_text("<!DOCTYPE html><html></html>")
    (folder / "hello.pth").write_text("hello")
    (folder / "empty.pth").touch()
    (folder / "renamed.safetensors").write_bytes(whole.read_bytes())
    (folder / "empty.safetensors").touch()
    (folder / "folder").mkdir()
    torch.save([torch.zeros(3)], folder / "list.pth")
    torch.save({"state_dict": torch.zeros(3)}, folder / "nested.pth")
    unreadable = ("cut.pth", "page.pth", "hello.pth", "empty.pth", "renamed.safetensors", "empty.safetensors", "folder")
    return {
        **dict.fromkeys(unreadable, "cannot be read as weights"),
        "list.pth": "holds a list, not a state dict",
        "nested.pth": "holds a Tensor, not a state dict",
    }


def test_error_of_a_file_without_weights_says_what_is_expected(tmp_path):
    backbone = build_backbone("squeezenet1_1")
    for name, said in unreadable_files(tmp_path).items():
        expected = "expected squeezenet1_1 in torchvision's layout as a .safetensors file, or"
        with pytest.raises(ValueError, match=f"{name}' {said}.*: {expected}"):
            load_backbone_weights(backbone, "squeezenet1_1", tmp_path / name)
    numbers = dict.fromkeys(backbone.state_dict(), 1.0)
    torch.save(numbers, tmp_path / "numbers.pth")
    with pytest.raises(ValueError, match="numbers.pth' lacks 50 of the 50 tensors of squeezenet1_1"):
        load_backbone_weights(backbone, "squeezenet1_1", tmp_path / "numbers.pth")


def test_error_of_unknown_weights_lists_the_known_ones():
    with pytest.raises(ValueError, match="'IMAGENET1K_V9': no such file, and torchvision's weights of resnet18 are IMAGENET1K_V1"):
        new_model("resnet18", backbone_weights="IMAGENET1K_V9")


@pytest.mark.parametrize(
    "backbone, name",
    [("squeezenet1_1", "DEFAULT"), ("mobilenet_v2", "IMAGENET1K_V2"), ("googlenet", "DEFAULT")],
)
def test_torchvision_weights_by_name_set_mean_and_std(backbone, name, monkeypatch):
    net, asked = torchvision_classifier(backbone), []

    def fetch(self, *args, **kwargs):
        asked.append(str(self))
        return net.state_dict()

    entries = torchvision.models.get_model_weights(backbone)
    monkeypatch.setattr(entries, "get_state_dict", fetch)
    model = new_model(backbone, backbone_weights=name)
    assert asked == [str(entries[name])]
    assert all(torch.equal(v, net.state_dict()[k]) for k, v in model.model.encoder.backbone.state_dict().items())
    mean, std = ([0.485, 0.456, 0.406], [0.229, 0.224, 0.225]) if backbone != "googlenet" else ([0.5] * 3, [0.5] * 3)
    assert (list(model.config.image_mean), list(model.config.image_std)) == (mean, std)


# --- word vectors ---


@pytest.mark.parametrize("freeze", [True, False])
def test_a_new_model_from_word_vectors(freeze, tmp_path):
    path = write(tmp_path / "vectors.txt", *BODY)
    model = new_model(word_vectors=read_word_vectors(path, VOCABULARY, 5), freeze_word_embeddings=freeze)
    embedding = model.get_input_embeddings().weight
    assert_close(embedding[sorted(FOUND)], torch.tensor([FOUND[i] for i in sorted(FOUND)]).to(embedding))
    assert not embedding[PAD].any() and embedding[[4, 6, 7]].all(), "words without a vector begin at random"
    assert embedding.requires_grad == (not freeze)
    path.unlink()
    model.save_pretrained(tmp_path / "model")
    loaded = load(tmp_path / "model")
    assert torch.equal(loaded.get_input_embeddings().weight, embedding)
    assert loaded.get_input_embeddings().weight.requires_grad == (not freeze)


def test_word_vectors_need_an_untied_output(tmp_path):
    vectors = read_word_vectors(write(tmp_path / "vectors.txt", *BODY), VOCABULARY, 5)
    tied = tiny_model(tie_word_embeddings=True).config
    with pytest.raises(StrictDataclassError, match="`tie_word_embeddings=False`"):
        AttnCapForConditionalGeneration.from_pretrained_parts(tied, word_vectors=vectors)


@pytest.mark.parametrize("kind", [str, Path])
def test_error_of_a_path_of_word_vectors_names_the_reader(kind):
    wanted = r"word_vectors.read_word_vectors\('vectors.txt', tokenizer.get_vocab\(\), 5\)"
    with pytest.raises(ValueError, match=wanted):
        new_model(word_vectors=kind("vectors.txt"))
