"""pycocoevalcap and test captions for the benchmarks of scores."""

import contextlib
import io
import os
import platform
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from datetime import UTC, datetime
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pyarrow.parquet as parquet  # pyright: ignore[reportMissingImports]

Tokens = dict[str, list[str]]  # captions by image id, the tokens of each joined by spaces

SEED = 0
NAMES = ("bleu_1", "bleu_2", "bleu_3", "bleu_4", "rouge_l", "cider")


class Scores(NamedTuple):
    """pycocoevalcap's scores by our names: of the corpus, and of each image (I,) in float64."""

    corpus: dict[str, float]
    per_image: dict[str, np.ndarray]


def captions_of(table: str) -> dict[str, list[str]]:
    """The captions of each row of a Parquet file with a column `captions`, by the row number as text."""
    if "captions" not in (columns := parquet.read_schema(table).names):
        sys.exit(f"{table} has no column captions, only {', '.join(columns)}.")
    rows = parquet.read_table(table, columns=["captions"]).to_pydict()["captions"]
    return {str(number): captions for number, captions in enumerate(rows)}


class CocoCaption:
    """pycocoevalcap's tokeniser and scorers without their output. Exits if it or Java is missing."""

    def __init__(self) -> None:
        try:
            from pycocoevalcap.bleu.bleu import Bleu  # pyright: ignore[reportMissingImports]
            from pycocoevalcap.cider.cider import Cider  # pyright: ignore[reportMissingImports]
            from pycocoevalcap.rouge.rouge import Rouge  # pyright: ignore[reportMissingImports]
            from pycocoevalcap.tokenizer.ptbtokenizer import PTBTokenizer  # pyright: ignore[reportMissingImports]
        except ImportError as error:
            sys.exit(f"This benchmark needs pycocoevalcap ({error}): pip install pycocoevalcap")
        if not shutil.which("java"):
            sys.exit("pycocoevalcap's tokeniser needs the program java: install a Java runtime.")
        self._tokenizer, self._bleu, self._rouge, self._cider = PTBTokenizer(), Bleu(4), Rouge(), Cider()

    def tokenized(self, captions: Mapping[str, Sequence[str]]) -> Tokens:
        """Tokenise captions with Stanford's tokeniser. Starts Java once."""
        with _java_quiet() as messages:
            tokens = self._tokenizer.tokenize({id: [{"caption": text} for text in texts] for id, texts in captions.items()})
            if {id: len(texts) for id, texts in captions.items()} != {id: len(texts) for id, texts in tokens.items()}:
                messages.seek(0)
                raise RuntimeError(f"pycocoevalcap's tokeniser lost captions: {messages.read().decode(errors='replace')}")
        return tokens

    def scored(self, references: Tokens, predictions: Tokens) -> Scores:
        """Score tokenised captions with BLEU, ROUGE-L and CIDEr."""
        with contextlib.redirect_stdout(io.StringIO()):
            bleu, bleu_per_image = self._bleu.compute_score(references, predictions)
            rouge, rouge_per_image = self._rouge.compute_score(references, predictions)
            cider, cider_per_image = self._cider.compute_score(references, predictions)
        per_image = map(np.asarray, (*bleu_per_image, rouge_per_image, cider_per_image))
        return Scores(dict(zip(NAMES, map(float, (*bleu, rouge, cider)))), dict(zip(NAMES, per_image)))

    def end_to_end(self, references: Mapping[str, Sequence[str]], predictions: Mapping[str, str]) -> Scores:
        """Score captions given as strings. Starts Java twice."""
        return self.scored(self.tokenized(references), self.tokenized({id: [caption] for id, caption in predictions.items()}))


def environment() -> dict[str, Any]:
    """Date, command (with file names only), CPUs, load and versions."""
    java = subprocess.run(["java", "-version"], capture_output=True, text=True, check=True).stderr.splitlines()[0]
    versions = {"python": platform.python_version(), "java": java}
    for package in ("hf_attncap", "numpy", "pycocoevalcap"):
        with contextlib.suppress(PackageNotFoundError):  # not installed, but run from a clone
            versions[package] = version(package)
    arguments = [Path(part).name if os.sep in part else part for part in sys.argv[1:]]
    return {
        "command": " ".join(["python", f"benchmarks/{Path(sys.argv[0]).name}", *arguments]),
        "date": datetime.now(UTC).date().isoformat(),
        "cpus": os.cpu_count(),
        "load_1_min": round(os.getloadavg()[0], 2),
        "versions": versions,
    }


@contextlib.contextmanager
def _java_quiet() -> Iterator[Any]:
    """Redirect the standard error of child processes to the yielded file."""
    with tempfile.TemporaryFile() as messages:
        before = os.dup(2)
        os.dup2(messages.fileno(), 2)
        try:
            yield messages
        finally:
            os.dup2(before, 2)
            os.close(before)
