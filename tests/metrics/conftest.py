"""Caption files for tests."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest


@pytest.fixture
def write(tmp_path: Path) -> Callable[..., Path]:
    """Writes a file with an ending that says nothing: JSON of a value, lines of several, or text and bytes as they are."""

    def write(*values: Any, name: str = "file.txt") -> Path:
        path = tmp_path / name
        if isinstance(values[0], bytes):
            path.write_bytes(values[0])
        else:
            path.write_text("\n".join(value if isinstance(value, str) else json.dumps(value) for value in values), encoding="utf-8")
        return path

    return write
