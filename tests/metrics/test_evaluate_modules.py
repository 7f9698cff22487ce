"""The metrics for `evaluate`: loaded from a folder, offline, filled at once or row by row."""

import doctest
import json
import os
import subprocess
import sys
from pathlib import Path

import evaluate
import pytest

from hf_attncap.metrics import CaptionMetrics, evaluate_module

ROOT = Path(__file__).parents[2]
PREDICTIONS = ["a black dog runs on the beach", "two men", "", "A cat's toy, on a a table with a"]
REFERENCES = [
    ["A dog runs on the beach .", "a black dog is running", "The dog runs"],
    ["Two men sit on a bench."],
    ["a bird in a tree", "a bird"],
    ["a cat 's toy on a table", "a toy", "the cat sleeps", "a table", "a table with a toy"],
]
TRAINING = ["Two men .", "a dog"]
SCORES = ["bleu_1", "bleu_2", "bleu_3", "bleu_4", "rouge_l", "cider"]
# No socket opens in there: what tries to fetch something fails.
ELSEWHERE = """
import json, socket, sys

def refuse(*args):
    raise OSError("the network is not for this")

socket.socket.connect = socket.getaddrinfo = refuse
import evaluate
from hf_attncap.metrics import evaluate_module

both = evaluate.combine([evaluate_module("caption_scores"), evaluate_module("caption_diversity")])
predictions, references = json.loads(sys.argv[1])
both.add(prediction=predictions[0], reference=references[0])
both.add_batch(predictions=predictions[1:], references=references[1:])
print(json.dumps(both.compute()))
"""


@pytest.fixture(scope="module", autouse=True)
def caches(tmp_path_factory):
    """The folder to which `evaluate` copies modules, instead of the user's cache."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(evaluate.config, "HF_MODULES_CACHE", tmp_path_factory.mktemp("modules"))
        patch.setattr(evaluate.config, "HF_METRICS_CACHE", tmp_path_factory.mktemp("rows"))
        patch.setattr(sys, "path", [*sys.path])
        yield


@pytest.fixture
def scores(tmp_path):
    return evaluate.load(evaluate_module("caption_scores"), cache_dir=str(tmp_path))


@pytest.fixture
def diversity(tmp_path):
    return evaluate.load(evaluate_module("caption_diversity"), cache_dir=str(tmp_path))


def expected(training=None):
    metrics = CaptionMetrics(dict(enumerate(REFERENCES)), training=training)
    return dict(metrics.score(dict(enumerate(PREDICTIONS))))


def test_loaded_offline_with_an_empty_home_in_another_folder(tmp_path):
    kept = {name: value for name, value in os.environ.items() if not name.startswith(("HF_", "XDG_"))}
    shown = subprocess.run(
        [sys.executable, "-c", ELSEWHERE, json.dumps([PREDICTIONS, REFERENCES])],
        cwd=tmp_path,
        env={**kept, "HOME": str(tmp_path), "HF_HUB_OFFLINE": "1", "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert shown.returncode == 0, shown.stderr
    assert json.loads(shown.stdout.splitlines()[-1]) == pytest.approx(expected())


def test_scores_are_those_of_caption_metrics(scores):
    """With one or five references per image too."""
    wanted = expected()
    assert scores.compute(predictions=PREDICTIONS, references=REFERENCES) == {name: wanted[name] for name in SCORES}
    assert 0 < wanted["cider"] < 10 and 0 < wanted["bleu_4"] < 1


@pytest.mark.parametrize("training", [None, TRAINING])
def test_diversity_is_that_of_caption_metrics(diversity, training):
    wanted = {name: value for name, value in expected(training).items() if name not in SCORES}
    given = {} if training is None else {"training": training}
    assert diversity.compute(predictions=PREDICTIONS, **given) == wanted
    assert ("novel" in wanted) == (training is not None)


def test_rows_added_one_by_one_or_in_batches_give_the_same(scores, diversity):
    once = scores.compute(predictions=PREDICTIONS, references=REFERENCES)
    for row in (0, 1):
        scores.add(prediction=PREDICTIONS[row], reference=REFERENCES[row])
    scores.add_batch(predictions=PREDICTIONS[2:], references=REFERENCES[2:])
    assert scores.compute() == once

    alone = diversity.compute(predictions=PREDICTIONS)
    for caption in PREDICTIONS:
        diversity.add(prediction=caption)
    assert diversity.compute() == alone
    assert evaluate.combine([scores, diversity]).compute(predictions=PREDICTIONS, references=REFERENCES) == {**once, **alone}


def test_one_image_has_no_cider(scores):
    """All words of a single image occur in every image, so that their weight is 0; BLEU is not affected."""
    values = scores.compute(predictions=["a dog runs on the beach"], references=[["A dog runs on the beach ."]])
    assert values["cider"] == 0 and values["bleu_4"] == pytest.approx(1)


@pytest.mark.parametrize(
    ("predictions", "references", "message"),
    [
        (["a dog", "a cat"], [["a dog"], []], "Row 1 has no references"),
        (["a dog", "a cat"], [["a dog"], None], "Row 1 has no references"),
        (["a dog", "a cat"], [["a dog"], ["a cat", None]], "Row 1 has None among its references"),
        (["a dog", "a cat"], [["a dog"]], "[Mm]ismatch in the number of predictions .2. and references .1."),
        (["a dog", None], [["a dog"], ["a cat"]], "prediction of image '1' is not a string"),
        (["a dog", "a cat"], ["a dog", "a cat"], "references of row 0 are one string"),
        (["a dog", "a cat"], [["a dog"], "a cat"], "references of row 1 are one string"),
        (["a dog", "a cat"], None, "`references` must be a list .* not None"),
        ("a dog", [["a dog"]], "`predictions` must be a list .* not 'a dog'"),
    ],
)
def test_errors_name_bad_rows(scores, predictions, references, message):
    with pytest.raises((ValueError, TypeError), match=message):
        scores.compute(predictions=predictions, references=references)
    assert scores.compute(predictions=PREDICTIONS, references=REFERENCES)["cider"] == expected()["cider"], "earlier rows were kept"


def test_single_row_with_one_string_is_refused(scores):
    with pytest.raises(ValueError, match="Got a string but expected a list"):
        scores.add(prediction="a dog", reference="a dog")


@pytest.mark.parametrize(
    ("predictions", "training", "message"),
    [
        (["a dog", None], None, "Row 1 of `predictions` is None"),
        (["a dog"], ["a dog", ["a cat"]], r"Row 1 of `training` is \['a cat'\]"),
        (["a dog"], "a dog", "`training` is one string"),
        ("a dog", None, "`predictions` must be a list of captions, not 'a dog'"),
    ],
)
def test_errors_name_bad_captions(diversity, predictions, training, message):
    with pytest.raises(TypeError, match=message):
        diversity.compute(predictions=predictions, training=training)


@pytest.mark.parametrize("name", ["caption_scores", "caption_diversity"])
def test_documentation_example_runs(name):
    """The help of `compute` lists the inputs and has an example with the right output."""
    module = evaluate.load(evaluate_module(name))
    assert module.name == name and module.description and "@" in module.citation
    assert "predictions: one caption per image" in str(module.compute.__doc__)
    example = doctest.DocTestParser().get_doctest(module.inputs_description, {}, name, None, None)
    assert len(example.examples) > 3 and doctest.DocTestRunner().run(example).failed == 0


def test_error_of_an_unknown_metric_lists_the_known_ones():
    with pytest.raises(ValueError, match="no metric 'cider' .* only caption_diversity and caption_scores"):
        evaluate_module("cider")
