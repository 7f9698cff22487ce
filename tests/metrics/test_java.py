"""METEOR with the real Java if it is installed; errors are one sentence, and no process is left running."""

import builtins
import contextlib
import importlib.util
import os
import shutil
import subprocess
import sys
from types import ModuleType

import pytest

from hf_attncap.metrics.java import JavaMetricError, meteor, spice

REFERENCES = [["a dog runs on the beach", "a black dog is running"], ["two men"], ["a dog on sand caf\xe9"], ["a cat"]]
PREDICTIONS = ["a dog running on a beach", "", "a dog caf\xe9", "a cat"]
# Of these captions, by pycocoevalcap 1.2 itself in an English-speaking place.
METEOR = (0.388642007774207, [0.7666666666666666, 0.0, 0.30068718959391766, 1.0])

package = pytest.mark.skipif(importlib.util.find_spec("pycocoevalcap") is None, reason="pycocoevalcap is not installed")
runtime = pytest.mark.skipif(shutil.which("java") is None, reason="there is no Java runtime")


def tokens(captions):
    return [caption.split() for caption in captions]


def split(references=REFERENCES, predictions=PREDICTIONS):
    return [tokens(captions) for captions in references], tokens(predictions)


@pytest.fixture
def started(monkeypatch):
    """The processes that a test has started."""
    processes = []
    start = subprocess.Popen.__init__

    def noted(self, *args, **options):
        processes.append(self)
        start(self, *args, **options)

    monkeypatch.setattr(subprocess.Popen, "__init__", noted)
    return processes


@pytest.fixture
def fake_java(tmp_path, monkeypatch):
    """Puts a `java` on the PATH that runs a shell script instead."""

    def install(script: str) -> None:
        java = tmp_path / "java"
        java.write_text(f"#!/bin/sh\n{script}\n", encoding="utf-8")
        java.chmod(0o755)
        monkeypatch.setenv("PATH", str(tmp_path), prepend=os.pathsep)

    return install


def assert_over(process):
    assert process.returncode is not None
    assert all(pipe.closed for pipe in (process.stdin, process.stdout, process.stderr))
    with contextlib.suppress(ProcessLookupError):
        os.kill(process.pid, 0)
        pytest.fail("the process is still there, be it as a zombie")


@package
@runtime
def test_meteor(started, monkeypatch):
    """One run for all, because Java takes seconds to start.

    In an Italian place METEOR alone does not even start to read; bars, line ends and half characters would break its protocol.
    """
    monkeypatch.setenv("JAVA_TOOL_OPTIONS", "-Duser.language=it -Duser.country=IT")
    references, predictions = split()
    references[2][0] = ["a", "|||", "dog", "on", "sand\n", "caf\xe9"]
    predictions[2] = ["a\u2028", "|||", "dog\r\n", "caf\xe9", "||||||"]
    predictions[3] = ["a", "cat"]
    corpus, per_image = meteor(references, predictions)
    assert (pytest.approx(corpus), per_image.tolist()) == (METEOR[0], pytest.approx(METEOR[1]))
    assert os.environ["JAVA_TOOL_OPTIONS"] == "-Duser.language=it -Duser.country=IT"
    assert_over(started[0])


@package
def test_text_that_is_not_valid_utf8(fake_java):
    fake_java('while read line; do case "$line" in EVAL*) echo 0.25;; esac; echo 0.25; done')
    assert meteor([[["\ud83d"]]], [["dog"]])[0] == 0.25


@package
@pytest.mark.parametrize(
    ("script", "message"),
    [
        ('echo "Picked up JAVA_TOOL_OPTIONS: $JAVA_TOOL_OPTIONS" >&2; echo out of memory >&2; exit 1', "failed: out of memory"),
        ("read line; echo 1.0 2.0; echo died later >&2; exit 1", "failed: died later"),
        ("while read line; do echo nonsense; done", "failed: could not convert"),
        ("exit 0", "METEOR's Java process failed: "),
    ],
    ids=["at once", "half way", "nonsense", "without a word"],
)
def test_failing_java_raises_and_does_not_hang(fake_java, started, script, message):
    fake_java(script)
    with pytest.raises(JavaMetricError, match=message):
        meteor(*split())
    assert_over(started[0])


def test_package_missing(monkeypatch):
    for name in ("pycocoevalcap", "pycocoevalcap.meteor.meteor", "pycocoevalcap.spice.spice"):
        monkeypatch.setitem(sys.modules, name, None)
    for metric in (meteor, spice):
        with pytest.raises(JavaMetricError, match=r'needs pycocoevalcap, .* pip install "hf_attncap\[java\]"'):
            metric(*split())


class StandInSpice:
    """Scores the fraction of a prediction's words that are in the references, and prints like a download."""

    fails: Exception | None = None

    def __init__(self):
        builtins.print("Downloading ...")

    def compute_score(self, gts, res):
        assert gts == {number: list(captions) for number, captions in enumerate(REFERENCES)}
        assert res == {number: [caption] for number, caption in enumerate(PREDICTIONS)}
        if self.fails:
            raise self.fails
        return 0.5, [{"All": {"f": value}, "Color": {"f": 0.1}} for value in (0.5, 0.0, 0.5, 1.0)]


@pytest.fixture
def stand_in(monkeypatch, fake_java):
    """A pycocoevalcap that contains only SPICE."""
    fake_java("exit 1")
    for name in ("pycocoevalcap", "pycocoevalcap.spice", "pycocoevalcap.spice.spice"):
        monkeypatch.setitem(sys.modules, name, ModuleType(name))
    monkeypatch.setattr(sys.modules["pycocoevalcap.spice.spice"], "Spice", StandInSpice, raising=False)


def test_spice(stand_in, capsys):
    corpus, per_image = spice(*split())
    assert corpus == 0.5
    assert per_image.tolist() == [0.5, 0.0, 0.5, 1.0]
    printed = capsys.readouterr()
    assert (printed.out, printed.err) == ("", "Downloading ...\n")


@pytest.mark.parametrize("error", [OSError("no network"), subprocess.CalledProcessError(1, ["java"])])
def test_spice_that_fails(stand_in, monkeypatch, error):
    monkeypatch.setattr(StandInSpice, "fails", error)
    with pytest.raises(JavaMetricError, match="SPICE failed: .*(no network|exit status 1)"):
        spice(*split())


def test_runtime_missing(stand_in, monkeypatch, tmp_path):
    monkeypatch.setenv("PATH", str(tmp_path / "empty"))
    with pytest.raises(JavaMetricError, match="SPICE needs a Java runtime, and there is no java on the PATH"):
        spice(*split())
