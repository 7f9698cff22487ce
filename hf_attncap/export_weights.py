"""Stores the weights of ONNX graphs in int8. The graphs compute in float32: only the rounding of the weights costs accuracy.

ONNX Runtime converts the weights of layers back to float32 when it loads a graph, and the rows of tables when it reads them.
"""

from pathlib import Path
from typing import Any

import numpy as np

LAYERS, TABLE = ("Conv", "Gemm", "MatMul"), "Gather"  # operators whose weights are rounded
MIN_ELEMENTS = 50_000  # smaller weights stay in float32: they are a small share of the size, but rounding them changes captions
LEVELS = 127  # int8, symmetric


def quantize_weights(graph: Path, target: Path) -> None:
    """Write an ONNX graph with the large weights of its layers and tables in int8.

    The weight of a layer has one float32 scale per output channel, a table one per row.

    Args:
        graph: the file of an ONNX graph in float32.
        target: the file to write.
    """
    import onnx  # pyright: ignore[reportMissingImports]

    model = onnx.load(graph)
    weights = {item.name: onnx.numpy_helper.to_array(item) for item in model.graph.initializer}
    nodes, added = [], {}
    for node in model.graph.node:
        place = 0 if node.op_type == TABLE else 1
        name = node.input[place] if node.op_type in (*LAYERS, TABLE) else ""
        if not _is_rounded(weights.get(name)):
            nodes.append(node)
            continue
        axis = _output_axis(node, weights[name].ndim)
        stored = f"{name}.int8.{axis}"
        if node.op_type == TABLE:
            nodes += _read_rows(onnx.helper, node, stored)
        else:
            nodes += _to_float32(onnx.helper, stored, node.output[0])
            node.input[place] = f"{node.output[0]}.weight"
            nodes.append(node)
        added[stored], added[f"{stored}.scale"] = _round(weights[name], axis)
    used = {name for node in nodes for name in node.input}
    kept = [item for item in model.graph.initializer if item.name in used]
    del model.graph.initializer[:], model.graph.node[:]
    model.graph.node.extend(nodes)
    model.graph.initializer.extend(kept)
    model.graph.initializer.extend(onnx.numpy_helper.from_array(values, name) for name, values in added.items())
    onnx.checker.check_model(model)
    onnx.save(model, target)


def _is_rounded(weight: np.ndarray | None) -> bool:
    return weight is not None and weight.dtype == np.float32 and weight.ndim > 1 and weight.size >= MIN_ELEMENTS


def _output_axis(node: Any, dimensions: int) -> int:
    """The axis of a weight that has one scale per index: output channels, or the rows of a table."""
    transposed = any(attribute.name == "transB" and attribute.i for attribute in node.attribute)
    return dimensions - 1 if node.op_type == "MatMul" or (node.op_type == "Gemm" and not transposed) else 0


def _round(weight: np.ndarray, axis: int) -> tuple[np.ndarray, np.ndarray]:
    """A weight in int8, and the float32 scale of each index of the axis, with the weight's number of axes."""
    others = tuple(other for other in range(weight.ndim) if other != axis)
    scale = np.abs(weight).max(axis=others, keepdims=True) / LEVELS
    scale = np.where(scale > 0, scale, 1).astype(np.float32)
    return np.round(weight / scale).astype(np.int8), scale


def _to_float32(helper: Any, stored: str, output: str) -> list[Any]:
    """Nodes that convert the weight of the layer with this output. ONNX Runtime runs them once, when it loads the graph."""
    whole, weight = f"{output}.integers", f"{output}.weight"
    return [
        helper.make_node("Cast", [stored], [whole], to=helper.TensorProto.FLOAT),
        helper.make_node("Mul", [whole, f"{stored}.scale"], [weight]),
    ]


def _read_rows(helper: Any, node: Any, stored: str) -> list[Any]:
    """Nodes that read rows of a table in int8, in place of a node that reads them in float32."""
    (output,), index = node.output, node.input[1]
    rows, whole, scale = f"{output}.rows", f"{output}.integers", f"{output}.scale"
    return [
        helper.make_node("Gather", [stored, index], [rows], axis=0),
        helper.make_node("Gather", [f"{stored}.scale", index], [scale], axis=0),
        helper.make_node("Cast", [rows], [whole], to=helper.TensorProto.FLOAT),
        helper.make_node("Mul", [whole, scale], [output]),
    ]
