"""Stores the weights of ONNX graphs in int8 or float16. The graphs compute in float32: only rounding the weights costs accuracy.

ONNX Runtime converts the weights of layers back to float32 when it loads a graph, and the rows of tables when it reads them.
"""

from pathlib import Path
from typing import Any

import numpy as np

MIN_ELEMENTS = 1024  # smaller weights stay in float32: rounding them saves nothing
LEVELS = 127  # int8, symmetric
LARGEST = float(np.finfo(np.float16).max)


def store_as_float16(graph: Path, target: Path) -> None:
    """Write an ONNX graph in float32 to `target` with its weights in float16."""
    import onnx  # pyright: ignore[reportMissingImports]

    model = onnx.load(graph)
    stored, nodes = {}, []
    for name, weight in _weights(model).items():
        if np.abs(weight).max() <= LARGEST:
            stored[name] = {f"{name}.float16": weight.astype(np.float16)}
            nodes.append(onnx.helper.make_node("Cast", [f"{name}.float16"], [name], to=onnx.TensorProto.FLOAT))
    _write(model, stored, [*nodes, *model.graph.node], target)


def store_as_int8(graph: Path, target: Path) -> None:
    """Write an ONNX graph in float32 to `target` with its weights in int8.

    The weight of a layer has one float32 scale per output channel, and a table (the data of a Gather) one per row.
    """
    import onnx  # pyright: ignore[reportMissingImports]

    model = onnx.load(graph)
    stored, conversions, nodes = {}, [], list(model.graph.node)
    for name, weight in _weights(model).items():
        users = [node for node in nodes if name in node.input]
        axes = {_output_axis(node, name, weight.ndim) for node in users}
        if len(axes) != 1 or None in axes:
            continue  # it is not used, or no scale per channel fits all operators
        rounded, scale = _to_int8(weight, axes.pop())
        stored[name] = {f"{name}.int8": rounded, f"{name}.scale": scale}
        if any(node.op_type != "Gather" for node in users):
            conversions += _multiply(f"{name}.int8", f"{name}.scale", name)
        nodes = [new for node in nodes for new in (_read_rows(node) if node.op_type == "Gather" and node in users else [node])]
    _write(model, stored, [*conversions, *nodes], target)


def _weights(model: Any) -> dict[str, np.ndarray]:
    """The large weights of a graph, without biases."""
    import onnx  # pyright: ignore[reportMissingImports]

    found = {item.name: onnx.numpy_helper.to_array(item) for item in model.graph.initializer}
    return {name: w for name, w in found.items() if w.dtype == np.float32 and w.ndim > 1 and w.size >= MIN_ELEMENTS}


def _output_axis(node: Any, name: str, dimensions: int) -> int | None:
    """The axis of output channels, or of the rows of a table; None if the operator has none, or uses the weight otherwise."""
    settings = {attribute.name: attribute.i for attribute in node.attribute}
    if list(node.input).index(name) != (0 if node.op_type == "Gather" else 1):
        return None
    return {
        "Conv": 0,
        "Gather": None if settings.get("axis") else 0,
        "Gemm": 0 if settings.get("transB") else 1,
        "MatMul": dimensions - 1,
    }.get(node.op_type)


def _to_int8(weight: np.ndarray, axis: int | None) -> tuple[np.ndarray, np.ndarray]:
    """A weight in int8, and the float32 scale of each index of the axis, with as many axes as the weight."""
    scale = np.abs(weight).max(axis=tuple(n for n in range(weight.ndim) if n != axis), keepdims=True) / LEVELS
    scale = np.where(scale > 0, scale, 1).astype(np.float32)
    return np.round(weight / scale).astype(np.int8), scale


def _read_rows(node: Any) -> list[Any]:
    """Nodes that read int8 rows of a table, to replace a Gather that reads float32 rows."""
    import onnx  # pyright: ignore[reportMissingImports]

    (table, index), (output,) = node.input, node.output
    rows, scale = f"{output}.int8", f"{output}.scale"
    reads = [onnx.helper.make_node("Gather", [f"{table}.{kind}", index], [f"{output}.{kind}"]) for kind in ("int8", "scale")]
    return [*reads, *_multiply(rows, scale, output)]


def _multiply(integers: str, scale: str, output: str) -> list[Any]:
    import onnx  # pyright: ignore[reportMissingImports]

    whole = f"{integers}.float32"
    cast = onnx.helper.make_node("Cast", [integers], [whole], to=onnx.TensorProto.FLOAT)
    return [cast, onnx.helper.make_node("Mul", [whole, scale], [output])]


def _write(model: Any, stored: dict[str, dict[str, np.ndarray]], nodes: list[Any], target: Path) -> None:
    """Write a model with these nodes, and with arrays in place of the weights that have these names."""
    import onnx  # pyright: ignore[reportMissingImports]

    kept = [item for item in model.graph.initializer if item.name not in stored]
    new = [onnx.numpy_helper.from_array(array, name) for arrays in stored.values() for name, array in arrays.items()]
    del model.graph.initializer[:], model.graph.node[:]
    model.graph.initializer.extend([*kept, *new])
    model.graph.node.extend(nodes)
    onnx.checker.check_model(model)
    onnx.save(model, target)
