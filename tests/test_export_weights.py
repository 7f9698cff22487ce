"""Weights in int8 and float16: the outputs of graphs change little, files shrink, and weights of other uses stay as they are."""

from pathlib import Path

import numpy as np
import pytest

from hf_attncap.export_weights import LEVELS, store_as_float16, store_as_int8

onnx = pytest.importorskip("onnx", reason='pip install "hf_attncap[onnx]"')
onnxruntime = pytest.importorskip("onnxruntime", reason='pip install "hf_attncap[onnx]"')

RANDOM = np.random.default_rng(0)
WEIGHTS = {
    "table": RANDOM.normal(0, 1, (50, 32)),
    "gemm": RANDOM.normal(0, 1, (64, 32)) * np.geomspace(0.001, 1, 64)[:, None],  # each channel has a range of its own
    "matmul": RANDOM.normal(0, 1, (64, 48)),
    "bias": RANDOM.normal(0, 1, 64),
    "small": RANDOM.normal(0, 1, (48, 4)),
}


def write_graph(path: Path, nodes: list) -> Path:
    """A graph from ids (n) to values (n, 4) that uses `WEIGHTS`."""
    helper = onnx.helper
    ids = helper.make_tensor_value_info("ids", onnx.TensorProto.INT64, ["n"])
    values = helper.make_tensor_value_info("values", onnx.TensorProto.FLOAT, ["n", None])
    initializers = [onnx.numpy_helper.from_array(array.astype(np.float32), name) for name, array in WEIGHTS.items()]
    graph = helper.make_graph(nodes, "graph", [ids], [values], initializers)
    onnx.save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20)], ir_version=10), path)
    return path


def layers() -> list:
    node = onnx.helper.make_node
    return [
        node("Gather", ["table", "ids"], ["embedded"]),
        node("Gemm", ["embedded", "gemm", "bias"], ["wide"], transB=1),
        node("Tanh", ["wide"], ["squashed"]),
        node("MatMul", ["squashed", "matmul"], ["narrow"]),
        node("MatMul", ["narrow", "small"], ["values"]),
    ]


def run(path: Path) -> np.ndarray:
    session = onnxruntime.InferenceSession(str(path), providers=["CPUExecutionProvider"])
    return session.run(None, {"ids": np.arange(50)})[0]


def stored(path: Path) -> dict[str, np.ndarray]:
    return {item.name: onnx.numpy_helper.to_array(item) for item in onnx.load(path).graph.initializer}


def test_weights_in_int8_have_one_scale_per_output_channel_and_row(tmp_path):
    graph = write_graph(tmp_path / "exact.onnx", layers())
    store_as_int8(graph, tmp_path / "rounded.onnx")
    found = stored(tmp_path / "rounded.onnx")
    assert {name for name in found if "." not in name} == {"bias", "small"}
    for name, axis in (("table", 0), ("gemm", 0), ("matmul", 1)):
        weight, scale = WEIGHTS[name], found[f"{name}.scale"]
        assert found[f"{name}.int8"].dtype == np.int8 and scale.size == weight.shape[axis]
        assert (
            abs(found[f"{name}.int8"] * scale - weight) <= 0.5001 * abs(weight).max(axis=1 - axis, keepdims=True) / LEVELS
        ).all()
    expected = run(graph)
    assert 0 < abs(run(tmp_path / "rounded.onnx") - expected).max() < 0.03 * abs(expected).max()
    assert (tmp_path / "rounded.onnx").stat().st_size < 0.4 * graph.stat().st_size


def test_a_table_that_is_also_a_layer_and_a_weight_with_two_axes(tmp_path):
    node = onnx.helper.make_node
    nodes = [
        node("Gather", ["table", "ids"], ["embedded"]),
        node("Gemm", ["embedded", "table"], ["tied"], transB=1),
        node("Gemm", ["embedded", "gemm", "bias"], ["wide"], transB=1),
        node("MatMul", ["wide", "gemm"], ["back"]),  # along the other axis
        node("Concat", ["tied", "back"], ["values"], axis=1),
    ]
    graph = write_graph(tmp_path / "exact.onnx", nodes)
    store_as_int8(graph, tmp_path / "rounded.onnx")
    assert {"table.int8", "gemm"} < set(stored(tmp_path / "rounded.onnx"))
    expected = run(graph)
    assert 0 < abs(run(tmp_path / "rounded.onnx") - expected).max() < 0.03 * abs(expected).max()


def test_weights_in_float16_keep_three_digits(tmp_path, monkeypatch):
    monkeypatch.setitem(WEIGHTS, "matmul", WEIGHTS["matmul"] * 1e5)  # beyond float16
    graph = write_graph(tmp_path / "exact.onnx", layers())
    store_as_float16(graph, tmp_path / "rounded.onnx")
    found = stored(tmp_path / "rounded.onnx")
    assert found["table.float16"].dtype == np.float16 and found["matmul"].dtype == np.float32
    expected = run(graph)
    assert 0 < abs(run(tmp_path / "rounded.onnx") - expected).max() < 0.003 * abs(expected).max()
