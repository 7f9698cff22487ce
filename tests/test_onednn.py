"""A `PackedLinear` gives the results of torch's linear layer, with and without packed weights."""

import copy
import pickle
from types import SimpleNamespace

import pytest
import torch
from reference import tiny_model
from torch.nn import functional as F
from torch.testing import assert_close

from hf_attncap import onednn
from hf_attncap.onednn import PackedLinear, has_packed_products
from hf_attncap.optimize import optimize_for_inference

needs_packing = pytest.mark.skipif(not has_packed_products(), reason="torch cannot pack weights in bfloat16 on this processor")
OPERATIONS = ("_is_mkldnn_bf16_supported", "_reorder_linear_weight", "_linear_pointwise")


def random_layer(dtype: torch.dtype, bias: bool, transposed: bool) -> PackedLinear:
    torch.manual_seed(0)
    weight = torch.randn(24, 40, dtype=torch.float64)  # (out, in)
    weight = weight.T.contiguous().T if transposed else weight
    return PackedLinear(weight.to(dtype), torch.randn(24, dtype=torch.float64).to(dtype) if bias else None)


@torch.no_grad()
def assert_correct(layer: PackedLinear) -> None:
    """Compares with float64, for few and many rows, parts of tensors, and more dimensions."""
    dtype = layer.weight.dtype
    weight, bias = layer.weight.double(), None if layer.bias is None else layer.bias.double()
    inputs = [torch.randn(shape).to(dtype) for shape in ((1, 40), (5, 40), (70, 40), (2, 3, 40))]
    inputs += [torch.randn(5, 3, 40).to(dtype)[:, -1], torch.randn(4, 50).to(dtype)[:, 10:], torch.randn(40, 6).to(dtype).T]
    tolerance = 2e-2 if dtype == torch.bfloat16 else 1e-5
    for x in inputs:
        assert_close(layer(x).double(), F.linear(x.double(), weight, bias), rtol=tolerance, atol=10 * tolerance)
        if x.dim() == 2:
            added = torch.randn(len(x), 30).to(dtype)[:, 3:27]
            before = added.clone()
            assert_close(
                layer(x, added).double(), F.linear(x.double(), weight) + added.double(), rtol=tolerance, atol=10 * tolerance
            )
            assert torch.equal(added, before), "the layer changed its input"


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("bias", "transposed"), [(True, False), (False, True)])
def test_products_are_correct(dtype, bias, transposed):
    layer = random_layer(dtype, bias, transposed)
    assert_correct(layer)
    assert (layer._packed is not None) == (dtype == torch.bfloat16 and has_packed_products())


@needs_packing
def test_the_packed_weights_follow_changes_of_data_type_and_are_not_pickled():
    layer = random_layer(torch.bfloat16, bias=True, transposed=False)
    assert_correct(layer)
    for change in (lambda x: pickle.loads(pickle.dumps(x)), copy.deepcopy, lambda x: x.float(), lambda x: x.bfloat16()):
        other = change(layer)
        assert other._packed is None
        assert_correct(other)


@needs_packing
def test_gradients_and_autocast_use_the_layer_without_packing():
    layer = random_layer(torch.bfloat16, bias=True, transposed=False)
    x = torch.randn(2, 40, dtype=torch.bfloat16, requires_grad=True)
    layer(x).sum().backward()
    assert x.grad is not None
    assert_close(x.grad.float(), layer.weight.float().sum(dim=0).expand(2, -1), rtol=2e-2, atol=2e-2)
    with torch.autocast("cpu", dtype=torch.bfloat16), torch.no_grad():
        assert_correct(layer)
    assert layer._packed is None


@pytest.mark.parametrize("beams", [1, 3])
def test_captions_in_bfloat16_are_the_same_without_packing(beams, monkeypatch):
    torch.manual_seed(0)
    fast, pictures = optimize_for_inference(tiny_model(word_attention="score").bfloat16()), torch.randn(2, 3, 64, 64).bfloat16()
    wanted = {"num_beams": beams, "max_new_tokens": 7, "return_dict_in_generate": True, "output_scores": True}
    packed = fast.generate(pictures, **wanted)
    monkeypatch.setattr(onednn, "has_packed_products", lambda: False)
    plain = fast.generate(pictures, **wanted)
    assert torch.equal(packed.sequences, plain.sequences)
    assert_close(packed.scores, plain.scores, rtol=2e-2, atol=2e-2)


@pytest.mark.parametrize("missing", OPERATIONS)
def test_versions_of_torch_without_the_operations_are_noticed(missing, monkeypatch):
    known = {name: getattr(torch.ops.mkldnn, name) for name in OPERATIONS if name != missing}
    monkeypatch.setattr(torch.ops, "mkldnn", SimpleNamespace(**known))
    assert not has_packed_products.__wrapped__()


def test_layers_of_other_kinds_are_kept():
    class Adapted(torch.nn.Linear):
        """Like a PEFT layer, which has more than a weight and a bias."""

    model = tiny_model()
    model.lm_head = Adapted(model.lm_head.in_features, model.lm_head.out_features)
    assert isinstance(optimize_for_inference(model).lm_head, Adapted)
    assert isinstance(optimize_for_inference(tiny_model()).lm_head, PackedLinear)
