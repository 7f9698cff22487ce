"""Stores the weights of ONNX graphs in 8 bits. The graphs compute in float32, so that only the rounding of the weights costs accuracy.

ONNX Runtime converts the weights of layers back to float32 when it loads a graph, and rows of tables when it reads them.
"""

from pathlib import Path
from typing import Any

import numpy as np

# The operators whose weights are stored in 8 bits, and the input that holds them.
WEIGHTS = {"Conv": 1, "Gemm": 1, "MatMul": 1, "Gather": 0}
MIN_ELEMENTS = 4096  # smaller weights, such as biases, save nothing
LEVELS = 127  # int8, symmetric


def quantize_weights(graph: Path, target: Path) -> None:
    """Write an ONNX graph with the weights of its layers and tables in int8, with one float32 scale per output channel or row.

    Args:
        graph: the file of an ONNX graph in float32.
        target: the file to write.
    """
    import onnx  # pyright: ignore[reportMissingImports]

    model = onnx.load(graph)
    weights = {item.name: item for item in model.graph.initializer}
    nodes = []
    done: dict[str, str] = {}  # names of weights to names of their float32 values
    for node in model.graph.node:
        name = node.input[WEIGHTS[node.op_type]] if node.op_type in WEIGHTS else ""
        values = onnx.numpy_helper.to_array(weights[name]) if name in weights else np.zeros(0)
        if values.dtype != np.float32 or values.size < MIN_ELEMENTS or values.ndim < 2:
            nodes.append(node)
            continue
        ...
