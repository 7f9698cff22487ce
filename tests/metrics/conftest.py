"""Caption files for tests."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest


@pytest.fixture
def write(tmp_path: Path) -> Callable[..., Path]:
    """Writes a file: JSON of one value, JSON lines of several, or text and bytes unchanged. The suffix does not give the format."""

    def write(*values: Any, name: str = "file.txt") -> Path:
        path = tmp_path / name
        if isinstance(values[0], bytes):
            path.write_bytes(values[0])
        else:
            path.write_text("\n".join(value if isinstance(value, str) else json.dumps(value) for value in values), encoding="utf-8")
        return path

    return write
