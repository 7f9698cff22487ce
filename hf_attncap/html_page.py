"""One self-contained HTML file with the interactive view of a caption. The page cannot load anything from elsewhere."""

import base64
import hashlib
import html
import io
import json
import math
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

MARK = "<!doctype html>\n<!-- Written by hf_attncap; may be replaced. -->\n"  # the beginning of each page
WEB = Path(__file__).parent / "web"
MAX_SIDE = 1280  # pixels of the picture in the page
JPEG_QUALITY = 85
DIGITS = 4  # of the values of the maps
FRAME_HEIGHT = 560  # CSS pixels in a notebook
MOUNT = """
mountAttncapViewer(document.querySelector("main"), {
  ...JSON.parse(document.getElementById("caption").textContent),
  image: document.querySelector("main img").src,
});
"""
PAGE = """<html lang="en">
<head>
<meta charset="utf-8">
<meta http-equiv="Content-Security-Policy" content="{policy}">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>{title}</title>
<style>{style}</style>
</head>
<body>
{heading}<main><figure><img src="{image}" alt="{alt}"><figcaption dir="auto">{text}</figcaption></figure></main>
<script type="application/json" id="caption">{data}</script>
<script>{script}</script>
</body>
</html>
"""


def render_page(result: Any, title: str | None = None) -> str:
    """An HTML page with the interactive view of a caption, which works offline.

    Without JavaScript it shows the picture and the caption. Its Content-Security-Policy allows only its own style and script.

    Args:
        result: a `CaptionResult`.
        title: a heading above the view, such as a file name. Default: none, and the caption is the title of the page.
    """
    style = _read("viewer.css") + _read("explain.css")
    script = _read("viewer.js") + MOUNT
    text = _text(result.text)
    data = {"alt": _alt(result.text), **viewer_data(result)}
    return MARK + PAGE.format(
        style=style,
        script=script,
        policy=f"default-src 'none'; img-src data:; style-src {_hash(style)}; script-src {_hash(script)}",
        title=_text(title or result.text),
        heading=f'<h1 dir="auto">{_text(title)}</h1>\n' if title else "",
        image=data_url(result.image),
        alt=_text(data["alt"]),
        text=text,
        # "<" would end the script element in "</script>" and "<!--".
        data=json.dumps(data, allow_nan=False).replace("<", "\\u003c"),
    )


def render_frame(result: Any, title: str | None = None, height: int = FRAME_HEIGHT) -> str:
    """An `<iframe>` that holds the page, so that the page and the surrounding document do not affect each other."""
    page = html.escape(render_page(result, title))
    name = _text(f"Attention of the caption: {result.text}")
    style = f"width: 100%; height: {height}px; border: 0"
    return f'<iframe sandbox="allow-scripts" title="{name}" style="{style}" srcdoc="{page}"></iframe>'


def viewer_data(result: Any) -> dict[str, Any]:
    """What `mountAttncapViewer` of web/viewer.js takes, in plain JSON types, except `image` and `alt`."""
    maps = result.attention if result.attention is not None else result.importance
    return {
        "text": result.text,
        "words": result.words,
        "grid": [1, 1] if maps is None else list(maps.shape[1:]),
        "attention": _rows(result.attention),
        "importance": _rows(result.importance),
        "score": _finite(result.score),
        "confidence": _finite(result.confidence),
        "alternatives": [{"text": other.text, "score": _finite(other.score)} for other in result.alternatives],
    }


def data_url(image: Image.Image) -> str:
    """The picture as a JPEG in a data: URL, at most `MAX_SIDE` pixels wide and high."""
    scale = min(1.0, MAX_SIDE / max(image.size))
    size = max(round(image.width * scale), 1), max(round(image.height * scale), 1)
    small = image if size == image.size else image.resize(size, Image.Resampling.LANCZOS, reducing_gap=3.0)
    stream = io.BytesIO()
    small.save(stream, "JPEG", quality=JPEG_QUALITY, optimize=True)
    return f"data:image/jpeg;base64,{base64.b64encode(stream.getvalue()).decode()}"


def is_own_page(path: Path) -> bool:
    """Whether this package wrote the HTML file, according to its first line."""
    if path.is_symlink() or not path.is_file():
        return False
    with path.open("rb") as file:
        return file.read(len(MARK) + 2).replace(b"\r\n", b"\n").startswith(MARK.encode())


def _alt(text: str) -> str:
    return f"The picture, captioned by the model as: {text}"


def _rows(maps: np.ndarray | None) -> list[list[float]] | None:
    """Maps (T, H, W) as T lists of H * W rounded values."""
    if maps is None:
        return None
    return [[float(f"{value:.{DIGITS}g}") for value in row] for row in maps.reshape(len(maps), math.prod(maps.shape[1:])).tolist()]


def _finite(value: float | None) -> float | None:
    return value if value is not None and math.isfinite(value) else None


def _text(text: str) -> str:
    """Text for HTML; bytes of a file name that are not UTF-8 become question marks."""
    return html.escape(text.encode("utf-8", "replace").decode())


def _read(name: str) -> str:
    return (WEB / name).read_text(encoding="utf-8")


def _hash(content: str) -> str:
    """The source expression of an inline style or script in a Content-Security-Policy."""
    return f"'sha256-{base64.b64encode(hashlib.sha256(content.encode()).digest()).decode()}'"
