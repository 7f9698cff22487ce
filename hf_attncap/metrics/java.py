"""METEOR and SPICE, which only exist in Java: pycocoevalcap runs them, here with clear errors and nothing left running.

Both take tokens as the other metrics do, and join them with spaces, as pycocoevalcap gets them from its own tokeniser.
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
    """A metric that needs Java could not run; the message says what to install or what Java said."""


def meteor(references: Sequence[Sequence[Tokens]], predictions: Sequence[Tokens]) -> tuple[float, np.ndarray]:
    """METEOR 1.5 (Denkowski & Lavie 2014), English, as pycocoevalcap runs it.

    Args:
        references: for each of I images its references, at least one, as token lists.
        predictions: one token list an image; an empty one scores 0.

    Returns:
        The score of all images together, 0 to 1, which is not the mean of theirs, and each image's: float64 (I,).

    Raises:
        JavaMetricError: pycocoevalcap or Java is not installed, or Java failed (it takes up to 2 GB of memory).
        TypeError: a caption is a string, not a list of tokens.
        ValueError: there is no image, or not one prediction for each list of references.
    """
    gold, said = _texts(references, predictions)
    kind = _scorer("meteor.meteor", "Meteor")
    with _english_java():
        scorer = kind()
    try:
        corpus, per_image = scorer.compute_score(gold, said)
    except (OSError, ValueError) as error:
        raise JavaMetricError(f"METEOR's Java process failed: {_last_words(scorer) or error}") from error
    finally:
        _close(scorer)
    return float(corpus), np.array(per_image, dtype=np.float64)


def spice(references: Sequence[Sequence[Tokens]], predictions: Sequence[Tokens]) -> tuple[float, np.ndarray]:
    """SPICE (Anderson et al. 2016, arXiv 1607.08822), as pycocoevalcap runs it.

    On its first use pycocoevalcap downloads a parser's models, some 400 MB, into its own folder, which has to be writable;
    it takes up to 8 GB of memory, and pycocoevalcap asks for Java 8.

    Args, Raises: as `meteor`.

    Returns:
        The mean over the images, 0 to 1, and each image's F-score: float64 (I,), nan where SPICE gives none.
    """
    gold, said = _texts(references, predictions)
    kind = _scorer("spice.spice", "Spice")
    try:
        with contextlib.redirect_stdout(sys.stderr):  # it reports on its download; stdout is for results
            corpus, scores = kind().compute_score(gold, said)
    except (OSError, ValueError, subprocess.CalledProcessError) as error:
        raise JavaMetricError(
            f"SPICE failed: {error}; it needs network on its first use, a writable pycocoevalcap folder, 8 GB of memory and Java 8"
        ) from error
    return float(corpus), np.array([score["All"]["f"] for score in scores], dtype=np.float64)


def _texts(
    references: Sequence[Sequence[Tokens]], predictions: Sequence[Tokens]
) -> tuple[dict[int, list[str]], dict[int, list[str]]]:
    """Both in pycocoevalcap's form: number of the image -> captions."""
    if not predictions or len(references) != len(predictions):
        raise ValueError(
            f"there are {len(predictions)} predictions for {len(references)} images; give one for each, and at least one image"
        )
    gold = {number: [_line(tokens) for tokens in captions] for number, captions in enumerate(references)}
    return gold, {number: [_line(tokens)] for number, tokens in enumerate(predictions)}


def _line(tokens: Tokens) -> str:
    """One line without METEOR's separator, which UTF-8 can hold: METEOR reads one command a line and its parts between bars."""
    if isinstance(tokens, str):
        raise TypeError(f"the caption {tokens!r} is a string; give its tokens, as ptb.tokenize makes them")
    text = " ".join(" ".join(tokens).replace("|||", " ").split())
    return text.encode("utf-8", "replace").decode()


def _scorer(module: str, name: str) -> Any:
    """A class of pycocoevalcap, once all it needs is there."""
    try:
        kind = getattr(importlib.import_module(f"pycocoevalcap.{module}"), name)
    except ImportError as error:
        raise JavaMetricError(
            f'{name.upper()} needs pycocoevalcap, which is not installed: pip install "hf_attncap[java]", and a Java runtime'
        ) from error
    if shutil.which("java") is None:
        raise JavaMetricError(f"{name.upper()} needs a Java runtime, and there is no java on the PATH; install one (OpenJDK, say)")
    return kind


@contextlib.contextmanager
def _english_java() -> Iterator[None]:
    """Java processes started inside read and write numbers and text as METEOR has to: elsewhere 0,5 is a number and 0.5 none."""
    before = os.environ.get("JAVA_TOOL_OPTIONS")
    os.environ["JAVA_TOOL_OPTIONS"] = f"{before or ''} -Duser.language=en -Duser.country=US -Dfile.encoding=UTF-8"
    try:
        yield
    finally:
        if before is None:
            del os.environ["JAVA_TOOL_OPTIONS"]
        else:
            os.environ["JAVA_TOOL_OPTIONS"] = before


def _last_words(scorer: Any) -> str:
    """What a failed METEOR wrote to stderr, on one line, less what Java says about the options it was given."""
    scorer.meteor_p.kill()
    lines = scorer.meteor_p.stderr.read().decode(errors="replace").splitlines()
    return " ".join(line.strip() for line in lines if not line.startswith("Picked up"))[:500]


def _close(scorer: Any) -> None:
    """End METEOR's process and give back its pipes; pycocoevalcap would leave that to chance, and wait for ever on its own
    lock after an error."""
    process = scorer.meteor_p
    process.kill()
    process.wait()
    for pipe in (process.stdin, process.stdout, process.stderr):
        with contextlib.suppress(BrokenPipeError):  # what it had not read
            pipe.close()
    if scorer.lock.locked():
        scorer.lock.release()
