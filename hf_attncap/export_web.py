"""Turns an exported folder into a web page that captions in the visitor's browser, with ONNX Runtime Web."""

import json
import os
import shutil
import subprocess
import tarfile
import tempfile
from pathlib import Path
from typing import Any

from .atomic import write_json
from .runtime import EXPORT_FILE, GRAPHS, TOKENIZER_FILE

PACKAGE, VERSION = "onnxruntime-web", "1.30.0"  # on npm
# The build for processors: files for GPUs are twice as large.
RUNTIME_FILES = ("ort.wasm.min.mjs", "ort-wasm-simd-threaded.mjs", "ort-wasm-simd-threaded.wasm")
LICENCES = ("LICENSE", "ThirdPartyNotices.txt")  # in the Python package of ONNX Runtime; the one on npm has none
RUNTIME_FOLDER = "onnxruntime"
PAGE = Path(__file__).parent / "web"
PAGE_FILES = (
    "index.html", "page.css", "page.js", "viewer.css", "viewer.js", "worker.js", "model.js", "search.js", "words.js", "image.js",
)  # fmt: skip
DOWNLOADS = "downloads.json"  # what the worker downloads, with sizes, for the progress bar
DECODERS = ("Sequence", "Metaspace", "Fuse", "Replace")  # of tokenizers, that words.js has
NEAREST = 0  # of Pillow's filters, the one that image.js does not have
NPM_SECONDS = 300


def read_runtime(source: str | os.PathLike | None) -> dict[str, bytes]:
    """The files of ONNX Runtime Web that the page needs, by name, and its `package.json`.

    Args:
        source: the package's folder or its .tgz file. Default: npm downloads the version that this module names.

    Raises:
        OSError: npm is missing or cannot download the package; or the source cannot be read.
        ValueError: the source is not the package, or lacks a file.
    """
    if source is not None:
        return _read_package(Path(source))
    npm = shutil.which("npm")
    way_out = f"download {PACKAGE} {VERSION} with npm on another machine, and give --onnxruntime-web its folder or .tgz file."
    if npm is None:
        raise OSError(f"The export to web downloads {PACKAGE} with npm, which is not installed: install Node.js, or {way_out}")
    with tempfile.TemporaryDirectory() as scratch:
        command = [npm, "pack", f"{PACKAGE}@{VERSION}", "--silent", "--pack-destination", scratch]
        try:
            done = subprocess.run(command, cwd=scratch, capture_output=True, text=True, timeout=NPM_SECONDS, check=False)
        except subprocess.TimeoutExpired as error:
            raise OSError(f"npm could not download {PACKAGE} {VERSION} within {NPM_SECONDS} s: {way_out}") from error
        found = list(Path(scratch).glob("*.tgz"))
        if done.returncode or not found:
            reason = next(iter(done.stderr.strip().splitlines()), f"exit code {done.returncode}")
            raise OSError(f"npm could not download {PACKAGE} {VERSION} ({reason}): {way_out}")
        return _read_package(found[0])


def _read_package(source: Path) -> dict[str, bytes]:
    places = {"package.json": "package.json", **{name: f"dist/{name}" for name in RUNTIME_FILES}}
    if source.is_dir():
        found = {name: (source / place).read_bytes() for name, place in places.items() if (source / place).is_file()}
    elif not source.exists():
        raise FileNotFoundError(f"'{source}' does not exist: give the folder or the .tgz file of the npm package {PACKAGE}.")
    else:
        found = {}
        try:
            with tarfile.open(source) as archive:
                for name, place in places.items():
                    if f"package/{place}" in archive.getnames() and (member := archive.extractfile(f"package/{place}")):
                        found[name] = member.read()
        except tarfile.TarError as error:
            raise ValueError(f"'{source}' is not a .tgz file of {PACKAGE} ({error}): download it again with npm.") from error
    try:
        name = json.loads(found.get("package.json", b"{}")).get("name")
    except ValueError:
        name = None
    missing = [name for name in places if name not in found]
    if name != PACKAGE or missing:
        reason = f"it has no {', '.join(missing)}" if missing else f"it is the package {name}"
        raise ValueError(
            f"'{source}' is not the npm package {PACKAGE} ({reason}): give its folder or .tgz file of version {VERSION}."
        )
    return found


def check_page(tokenizer: Any, resample: int) -> None:
    """Raises a ValueError if the page cannot decode the tokens of a fast tokenizer, or resize images with a filter."""
    decoder = json.loads(tokenizer.backend_tokenizer.to_str())["decoder"]
    steps = [] if decoder is None else decoder.get("decoders", [decoder])
    wrong = [step["type"] for step in steps if step["type"] not in DECODERS]
    if wrong:
        raise ValueError(f"The checkpoint's tokenizer has the decoder {wrong[0]}, which the web page does not support.")
    if resample == NEAREST:
        raise ValueError("The checkpoint's image processor resizes to the nearest pixel, which the web page does not support.")


def write_page(folder: Path, runtime: dict[str, bytes]) -> None:
    """Adds the page, and the files of ONNX Runtime Web from `read_runtime`, to an exported folder of the format onnx."""
    import onnxruntime  # pyright: ignore[reportMissingImports]

    for name in PAGE_FILES:
        shutil.copyfile(PAGE / name, folder / name)
    (folder / RUNTIME_FOLDER).mkdir()
    for name in RUNTIME_FILES:
        (folder / RUNTIME_FOLDER / name).write_bytes(runtime[name])
    for name in LICENCES:
        shutil.copyfile(Path(onnxruntime.__file__).parent / name, folder / RUNTIME_FOLDER / name)
    about = json.loads((folder / EXPORT_FILE).read_text(encoding="utf-8"))
    about["packages"][PACKAGE] = json.loads(runtime["package.json"])["version"]
    write_json(folder / EXPORT_FILE, about)
    downloads = (EXPORT_FILE, TOKENIZER_FILE, *(f"{name}.onnx" for name in GRAPHS), f"{RUNTIME_FOLDER}/{RUNTIME_FILES[-1]}")
    write_json(folder / DOWNLOADS, {name: (folder / name).stat().st_size for name in downloads})
