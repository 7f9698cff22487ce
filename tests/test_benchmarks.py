"""The benchmarks run on tiny tables."""

import importlib.util
import json
import runpy
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from datasets import Dataset

ROOT = Path(__file__).parent.parent
SCRIPTS = ["metrics", "metrics_agreement", "deletion"]
JAVA_SCORES = pytest.mark.skipif(
    not (importlib.util.find_spec("pycocoevalcap") and shutil.which("java")), reason="needs pycocoevalcap and a Java runtime"
)


def run(script: str, *arguments: str) -> str:
    return subprocess.run(
        [sys.executable, f"benchmarks/{script}.py", *arguments], cwd=ROOT, capture_output=True, text=True, timeout=300, check=True
    ).stdout


@pytest.fixture
def table(tmp_path: Path) -> str:
    captions = [
        [f"A {colour} {animal} runs .", f"the {animal} is {colour}"] for colour in ("red", "big") for animal in ("dog", "cat")
    ]
    path = tmp_path / "table.parquet"
    Dataset.from_dict({"captions": captions}).to_parquet(str(path))
    return str(path)


@pytest.mark.parametrize("script", SCRIPTS)
def test_benchmarks_have_help(script, monkeypatch, capsys):
    monkeypatch.syspath_prepend(ROOT / "benchmarks")
    monkeypatch.setattr(sys, "argv", [script, "--help"])
    with pytest.raises(SystemExit):
        runpy.run_path(str(ROOT / "benchmarks" / f"{script}.py"), run_name="__main__")
    assert "--references" in capsys.readouterr().out


@JAVA_SCORES
@pytest.mark.slow
def test_speed_is_measured(table, tmp_path):
    output = tmp_path / "speed.json"
    shown = run("metrics", "--references", table, "--images", "4", "--repetitions", "2", "--output", str(output))
    result = json.loads(output.read_text(encoding="utf-8"))
    assert result["command"].startswith("python benchmarks/metrics.py --references table.parquet")
    assert result["images"] == 4 and result["references"] == 8
    for row in result["compared"]:
        assert row["lowest"] <= row["highest"] and len(result["seconds"][row["ours"]]) == 2
        assert f"| {row['ours']} |" in shown


@JAVA_SCORES
@pytest.mark.slow
def test_scores_agree(table, tmp_path):
    predictions, output = tmp_path / "predictions.json", tmp_path / "agreement.json"
    rows = [{"image_id": str(n), "caption": f"a dog {n}", "references": ["A dog.", f"dog no. {n}"]} for n in range(3)]
    predictions.write_text(json.dumps(rows), encoding="utf-8")
    run("metrics_agreement", "--references", table, "--predictions", str(predictions), "--output", str(output))
    corpora = json.loads(output.read_text(encoding="utf-8"))["corpora"]
    assert [corpus["images"] for corpus in corpora] == [3, 4, 4]
    for corpus in corpora:
        assert max(score["largest_of_an_image"] for score in corpus["scores"].values()) < 1e-9


def test_references_that_agree_predict_the_label_and_others_do_not(monkeypatch, tmp_path):
    monkeypatch.syspath_prepend(ROOT)
    from benchmarks import confidence_limit

    things = ["dog", "cat", "man", "woman", "child", "bus", "train", "boat", "horse", "sheep", "car", "bike"]
    agree = {thing: [f"the {thing} is near a {thing} number {n}" for n in range(5)] for thing in things}
    captions = {thing: agree[thing][0] if n % 2 else "people stand and talk" for n, thing in enumerate(things)}
    assert confidence_limit.auroc_of_references(agree, captions, confidence_limit.good_by_split(agree, captions)) == [1.0] * 10
    # The first three people see one thing, the last two another one: only splits with both kinds in each part tell something.
    differ = {name: [*own[:3], "nothing to be seen here", "nothing to be seen here"] for name, own in agree.items()}
    values = confidence_limit.auroc_of_references(differ, captions, confidence_limit.good_by_split(differ, captions))
    assert min(values) == 0.5 < max(values)
