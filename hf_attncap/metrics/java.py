"""METEOR and SPICE: runs the Java implementations through pycocoevalcap, with clear errors and without leftover processes.

Both take lists of tokens like the other metrics and join them with spaces, as pycocoevalcap's own tokeniser does.
"""

import contextlib
import importlib
import os
import shutil
import subprocess
import sys
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np

Tokens = Sequence[str]


class JavaMetricError(OSError):
    """A metric that needs Java could not run; the message says what to install or what Java reported."""


def meteor(references: Sequence[Sequence[Tokens]], predictions: Sequence[Tokens]) -> tuple[float, np.ndarray]:
    """METEOR 1.5 (Denkowski & Lavie 2014), English, as pycocoevalcap runs it.

    Args:
        references: one or more lists of tokens for each of I images.
        predictions: one list of tokens per image; an empty one scores 0.

    Returns:
        The score of the corpus, 0 to 1, which is not the mean over images; and the score of each image, float64 (I,).

    Raises:
        JavaMetricError: pycocoevalcap or Java is not installed, or Java failed (it takes up to 2 GB of memory).
    """
    gold, predicted = _texts(references, predictions)
    kind = _scorer("meteor.meteor", "Meteor")
    with _english_java():
        scorer = kind()
    try:
        corpus, per_image = scorer.compute_score(gold, predicted)
    except (OSError, ValueError) as error:
        raise JavaMetricError(f"METEOR's Java process failed: {_error_output(scorer) or error}") from error
    finally:
        _close(scorer)
    return float(corpus), np.array(per_image, dtype=np.float64)


def spice(references: Sequence[Sequence[Tokens]], predictions: Sequence[Tokens]) -> tuple[float, np.ndarray]:
    """SPICE (Anderson et al. 2016, arXiv 1607.08822), as pycocoevalcap runs it.

    On first use, pycocoevalcap downloads the models of a parser (about 400 MB) to its own folder, which must be writable. SPICE
    needs up to 8 GB of memory and Java 8.

    Args, Raises: as `meteor`.

    Returns:
        The mean over the images, 0 to 1, and each image's F-score: float64 (I,), nan where SPICE gives none.
    """
    gold, predicted = _texts(references, predictions)
    kind = _scorer("spice.spice", "Spice")
    try:
        with contextlib.redirect_stdout(sys.stderr):  # keeps the download's messages off stdout
            corpus, scores = kind().compute_score(gold, predicted)
    except (OSError, ValueError, subprocess.CalledProcessError) as error:
        raise JavaMetricError(
            f"SPICE failed: {error}; it needs network on its first use, a writable pycocoevalcap folder, 8 GB of memory and Java 8"
        ) from error
    return float(corpus), np.array([score["All"]["f"] for score in scores], dtype=np.float64)


def _texts(
    references: Sequence[Sequence[Tokens]], predictions: Sequence[Tokens]
) -> tuple[dict[int, list[str]], dict[int, list[str]]]:
    """References and predictions as pycocoevalcap expects them: index of the image -> captions."""
    gold = {number: [_line(tokens) for tokens in captions] for number, captions in enumerate(references)}
    return gold, {number: [_line(tokens)] for number, tokens in enumerate(predictions)}


def _line(tokens: Tokens) -> str:
    """The tokens as one line of valid UTF-8 without "|||": METEOR reads one command per line, with fields separated by it."""
    text = " ".join(" ".join(tokens).replace("|||", " ").split())
    return text.encode("utf-8", "replace").decode()


def _scorer(module: str, name: str) -> Any:
    """A class of pycocoevalcap; raises if it or Java is missing."""
    try:
        kind = getattr(importlib.import_module(f"pycocoevalcap.{module}"), name)
    except ImportError as error:
        raise JavaMetricError(
            f'{name.upper()} needs pycocoevalcap, which is not installed: pip install "hf_attncap[java]", and a Java runtime'
        ) from error
    if shutil.which("java") is None:
        raise JavaMetricError(
            f"{name.upper()} needs a Java runtime, and there is no java on the PATH; install one, such as OpenJDK"
        )
    return kind


@contextlib.contextmanager
def _english_java() -> Iterator[None]:
    """Java processes started inside use the English locale and UTF-8; METEOR cannot parse numbers such as "0,5"."""
    before = os.environ.get("JAVA_TOOL_OPTIONS")
    os.environ["JAVA_TOOL_OPTIONS"] = f"{before or ''} -Duser.language=en -Duser.country=US -Dfile.encoding=UTF-8"
    try:
        yield
    finally:
        if before is None:
            del os.environ["JAVA_TOOL_OPTIONS"]
        else:
            os.environ["JAVA_TOOL_OPTIONS"] = before


def _error_output(scorer: Any) -> str:
    """The stderr of a failed METEOR process on one line, without Java's message about its options."""
    scorer.meteor_p.kill()
    lines = scorer.meteor_p.stderr.read().decode(errors="replace").splitlines()
    return " ".join(line.strip() for line in lines if not line.startswith("Picked up"))[:500]


def _close(scorer: Any) -> None:
    """Ends METEOR's process and closes its pipes. pycocoevalcap does so only in a finalizer, which after an error waits for ever
    on its own lock."""
    process = scorer.meteor_p
    process.kill()
    process.wait()
    for pipe in (process.stdin, process.stdout, process.stderr):
        with contextlib.suppress(BrokenPipeError):  # unread input
            pipe.close()
    if scorer.lock.locked():
        scorer.lock.release()
