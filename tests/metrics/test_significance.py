"""The paired bootstrap against a plain loop, normal theory and simulated systems."""

from dataclasses import asdict

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scorers import bleu_scores

from hf_attncap.metrics import significance
from hf_attncap.metrics.bleu import corpus_bleu
from hf_attncap.metrics.significance import Statistics, bootstrap, means, paired_bootstrap


def ratio(totals: np.ndarray) -> np.ndarray:
    """A corpus metric that is not a mean over images: matches / guesses and its square, (..., 2) -> (..., 2)."""
    precision = totals[..., 0] / totals[..., 1]
    return np.stack([precision, precision**2], axis=-1)


def system(seed: int, images: int = 40, gain: float = 0.0) -> list[Statistics]:
    random = np.random.default_rng(seed)
    guesses = random.integers(5, 12, images)
    counts = np.stack([random.binomial(guesses, 0.5), guesses], axis=-1).astype(float)
    return [means({"cider": random.normal(1 + gain, 0.3, images)}), Statistics(("precision", "squared"), counts, ratio)]


def test_interval_of_one_system_equals_its_gain_over_zero():
    values = np.random.default_rng(0).normal(1, 0.3, 60)
    nothing, something = [means({"cider": np.zeros(60)})], [means({"cider": values})]
    gain = paired_bootstrap(nothing, something)["cider"]
    low, high = bootstrap(something)["cider"]
    assert (low, high) == (gain.low, gain.high) and low < values.mean() < high
    assert high - low == pytest.approx(2 * 1.96 * values.std() / 60**0.5, rel=0.1)
    intervals = bootstrap(system(0), resamples=300)
    assert list(intervals) == ["cider", "precision", "squared"] and intervals == bootstrap(system(0), resamples=300)
    with pytest.raises(ValueError, match="resamples is 0"):
        bootstrap(something, resamples=0)


@given(st.integers(0, 1000), st.integers(1, 30), st.integers(1, 50))
def test_a_system_against_itself(seed, images, resamples):
    for comparison in paired_bootstrap(system(seed, images), system(seed, images), resamples=resamples).values():
        assert (comparison.difference, comparison.low, comparison.high, comparison.p) == (0, 0, 0, 1)
        assert comparison.first == comparison.second


@given(st.integers(0, 1000), st.integers(2, 30))
def test_swapping_the_systems_flips_the_sign(seed, images):
    one, other = system(seed, images), system(seed + 1, images)
    there, back = paired_bootstrap(one, other, resamples=200), paired_bootstrap(other, one, resamples=200)
    for name, comparison in there.items():
        assert back[name].difference == -comparison.difference
        assert (back[name].low, back[name].high) == pytest.approx((-comparison.high, -comparison.low))
        assert back[name].p == comparison.p
        assert comparison.difference == pytest.approx(comparison.second - comparison.first)
        assert 0 < comparison.p <= 1


def test_equals_a_plain_loop_for_any_chunk_size(monkeypatch):
    first, second = system(1, 30), system(2, 30)
    random = np.random.default_rng(7)
    differences = []
    for _ in range(500):
        drawn = random.integers(30, size=30)
        scores = [
            [np.mean(means_.per_image[drawn, 0]), *ratio(sum(counts.per_image[image] for image in drawn))]
            for means_, counts in (first, second)
        ]
        differences.append(np.subtract(scores[1], scores[0]))
    differences = np.array(differences)
    for chunk in (2**22, 31, 100):
        monkeypatch.setattr(significance, "_CHUNK", chunk)
        result = paired_bootstrap(first, second, resamples=500, seed=7)
        assert list(result) == ["cider", "precision", "squared"]
        for column, comparison in enumerate(result.values()):
            low, high = np.percentile(differences[:, column], [2.5, 97.5])
            far = np.abs(differences[:, column] - comparison.difference) >= abs(comparison.difference)
            assert (comparison.low, comparison.high) == pytest.approx((low, high))
            assert comparison.p == pytest.approx((far.sum() + 1) / 501)
            assert (comparison.resamples, comparison.seed) == (500, 7)


def test_metrics_do_not_depend_on_each_other():
    first, second = system(1), system(2)
    together = paired_bootstrap(first, second, resamples=300)
    assert together["cider"] == paired_bootstrap(first[:1], second[:1], resamples=300)["cider"]
    assert together != paired_bootstrap(first, second, resamples=300, seed=1)


def test_scores_are_those_over_all_images():
    first, second = system(1), system(2)
    result = paired_bootstrap(first, second, resamples=10)
    assert result["cider"].first == pytest.approx(first[0].per_image.mean())
    assert result["precision"].second == pytest.approx(second[1].per_image[:, 0].sum() / second[1].per_image[:, 1].sum())


def test_large_gain_is_significant_despite_variation_between_images():
    random = np.random.default_rng(0)
    hardness = random.normal(1, 0.5, 400)
    first = [means({"cider": hardness + random.normal(0, 0.1, 400)})]
    second = [means({"cider": hardness + 0.05 + random.normal(0, 0.1, 400)})]
    comparison = paired_bootstrap(first, second, resamples=2000)["cider"]
    assert comparison.p == 1 / 2001
    assert 0 < comparison.low < 0.05 < comparison.high


def test_p_is_uniform_without_a_gain():
    """300 pairs of equal systems: p is uniform, so its distribution function is the diagonal."""
    p = []
    for seed in range(300):
        values = np.random.default_rng(seed).normal(size=(2, 80))
        p.append(paired_bootstrap([means({"x": values[0]})], [means({"x": values[1]})], resamples=300, seed=seed)["x"].p)
    gap = np.abs(np.sort(p) - np.arange(1, 301) / 300).max()
    assert gap < 1.63 / np.sqrt(300)  # Kolmogorov-Smirnov, 1 %
    assert 0.02 < np.mean(np.array(p) < 0.05) < 0.09


def test_interval_is_that_of_normal_theory():
    values = np.random.default_rng(3).normal(0.1, 1, (2, 1000))
    comparison = paired_bootstrap([means({"x": values[0]})], [means({"x": values[1]})])["x"]
    gain = values[1] - values[0]
    half = 1.96 * gain.std() / np.sqrt(1000)
    assert (comparison.low, comparison.high) == pytest.approx((gain.mean() - half, gain.mean() + half), abs=0.05 * half)


def test_interval_has_its_nominal_coverage():
    held = 0
    for seed in range(300):
        random = np.random.default_rng(seed)
        first, gain = random.normal(size=80), random.normal(0.2, 1, 80)
        comparison = paired_bootstrap([means({"x": first})], [means({"x": first + gain})], resamples=300, seed=seed)["x"]
        held += comparison.low <= 0.2 <= comparison.high
    assert 0.91 < held / 300 < 0.98


@given(st.integers(0, 100))
def test_corpus_bleu(seed):
    random = np.random.default_rng(seed)
    vocabulary = np.array(["a", "dog", "runs", "on", "sand"])
    references = [[list(random.choice(vocabulary, 6))] for _ in range(12)]
    scores = [bleu_scores(references, [list(random.choice(vocabulary, 5)) for _ in range(12)]) for _ in range(2)]
    names = ("bleu_1", "bleu_2", "bleu_3", "bleu_4")
    result = paired_bootstrap(*([Statistics(names, score.statistics, corpus_bleu)] for score in scores), resamples=50)
    assert list(result) == list(names)
    assert [comparison.first for comparison in result.values()] == pytest.approx(list(scores[0].corpus))
    assert [comparison.second for comparison in result.values()] == pytest.approx(list(scores[1].corpus))


def test_results_can_be_written_as_json():
    comparison = paired_bootstrap(system(1), system(2), resamples=10)["cider"]
    assert {type(value) for value in asdict(comparison).values()} == {float, int}


@pytest.mark.parametrize(
    ("first", "second", "message"),
    [
        ({"cider": [1.0, 2.0]}, {"cider": [1.0]}, "over 1 and 2 images"),
        ({"cider": [1.0]}, {"rouge_l": [1.0]}, r"\['cider'\] and \['rouge_l'\]"),
        ({"cider": []}, {"cider": []}, "over 0 images"),
        ({"cider": [1.0, 2.0]}, {"cider": [1.0, float("nan")]}, "cider: the value of image 1 is not finite"),
    ],
    ids=["images", "metrics", "none", "nan"],
)
def test_systems_that_cannot_be_compared(first, second, message):
    with pytest.raises(ValueError, match=message):
        paired_bootstrap([means(first)], [means(second)], resamples=10)


def test_resamples_are_counted():
    with pytest.raises(ValueError, match="resamples is 0"):
        paired_bootstrap(system(1), system(2), resamples=0)
