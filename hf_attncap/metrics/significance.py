"""Bootstrap intervals of scores and paired bootstrap tests of two systems, over the captioned images."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass

import numpy as np

FEW_IMAGES = 100  # with fewer, bootstrap intervals are unreliable
# Resampled images in memory at a time; 3 arrays of so many 8-byte numbers need about 100 MB.
_CHUNK = 2**22


@dataclass(frozen=True)
class Statistics:
    """Per-image terms of a system's metrics. The metrics of any set of images follow from the sum of its terms.

    Attributes:
        names: the K metrics.
        per_image: float64 (I, S), the terms of each image; row i is the same image in both systems.
        from_totals: computes the metrics from sums over I images: (..., S) -> (..., K).
    """

    names: tuple[str, ...]
    per_image: np.ndarray
    from_totals: Callable[[np.ndarray], np.ndarray]


@dataclass(frozen=True)
class Comparison:
    """One metric of two systems on the same images.

    Attributes:
        first, second: the metric over all images.
        difference: second - first.
        low, high: 95 % percentile interval of the difference.
        p: two-sided p-value of the hypothesis of no difference, above 0 and at most 1; see `paired_bootstrap`.
        resamples, seed: the settings of the bootstrap.
    """

    first: float
    second: float
    difference: float
    low: float
    high: float
    p: float
    resamples: int
    seed: int


def means(values: Mapping[str, np.ndarray]) -> Statistics:
    """Statistics of metrics that are means over images (ROUGE-L, CIDEr), from name -> (I,)."""
    per_image = np.stack([np.asarray(value, dtype=np.float64) for value in values.values()], axis=-1)  # (I, K)
    return Statistics(tuple(values), per_image, lambda totals: totals / len(per_image))


def paired_bootstrap(
    first: Sequence[Statistics], second: Sequence[Statistics], *, resamples: int = 10_000, seed: int = 0
) -> dict[str, Comparison]:
    """Compares two systems on the same images, with one set of resamples for all metrics.

    Each resample draws I images with replacement and scores both systems on them (Koehn 2004, "Statistical Significance Tests for
    Machine Translation Evaluation"). The interval holds the middle 95 % of the resampled differences (Efron & Tibshirani 1993,
    chapter 13). p is (1 + the number of resampled differences at least as far from the observed difference as that is from 0) /
    (1 + resamples). So p is never 0, and it is 1 for a system against itself. The test covers variation between images, not between
    training runs. CIDEr keeps the document frequencies of all images.

    Args:
        first, second: the statistics of the two systems: the same metrics and the same images in the same order.
        resamples: default 10,000, about a second for 5,000 images.
        seed: of the resampling; the same seed gives the same result.

    Returns:
        Metric -> `Comparison`, in the order of `first`.

    Raises:
        ValueError: the metrics or the numbers of images of the systems differ, there are no images, or a value is not finite.
    """
    images = _check(first, second)
    names = [name for statistics in first for name in statistics.names]
    whole = np.ones((1, images))
    observed = _scores(first, whole)[0], _scores(second, whole)[0]  # (K,) each
    differences = np.concatenate(
        [_scores(second, weights) - _scores(first, weights) for weights in _resampled(resamples, images, seed)]
    )  # (R, K)
    difference = observed[1] - observed[0]
    low, high = np.quantile(differences, [0.025, 0.975], axis=0)
    # The tolerance keeps ties despite rounding errors of the sums.
    far = np.abs(differences - difference) >= np.abs(difference) * (1 - 1e-9)  # (R, K)
    p = (1 + far.sum(axis=0)) / (1 + resamples)
    columns = zip(*(column.tolist() for column in (*observed, difference, low, high, p)))
    return {name: Comparison(*column, resamples=resamples, seed=seed) for name, column in zip(names, columns)}


def bootstrap(system: Sequence[Statistics], *, resamples: int = 10_000, seed: int = 0) -> dict[str, tuple[float, float]]:
    """95 % percentile intervals of one system's metrics by name; images are resampled as in `paired_bootstrap`.

    Raises:
        ValueError: there are no images, `resamples` is below 1, or a value is not finite.
    """
    images = _check(system, system)
    scores = np.concatenate([_scores(system, weights) for weights in _resampled(resamples, images, seed)])  # (R, K)
    low, high = np.quantile(scores, [0.025, 0.975], axis=0).tolist()
    return dict(zip((name for statistics in system for name in statistics.names), zip(low, high)))


def _resampled(resamples: int, images: int, seed: int) -> Iterator[np.ndarray]:
    """The weights of all resamples, in chunks (R, I) that fit in memory."""
    if resamples < 1:
        raise ValueError(f"resamples is {resamples}; give at least 1")
    random = np.random.default_rng(seed)
    step = max(1, _CHUNK // images)
    for start in range(0, resamples, step):
        yield _weights(random, min(step, resamples - start), images)


def _weights(random: np.random.Generator, resamples: int, images: int) -> np.ndarray:
    """float64 (R, I): how often each image occurs in each resample; rows sum to I."""
    drawn = random.integers(images, size=(resamples, images))  # (R, I)
    drawn += images * np.arange(resamples)[:, None]
    counts = np.bincount(drawn.ravel(), minlength=resamples * images)
    return counts.reshape(resamples, images).astype(np.float64)


def _scores(system: Sequence[Statistics], weights: np.ndarray) -> np.ndarray:
    """The metrics of each weighting of the images: (R, I) -> (R, K)."""
    return np.concatenate([statistics.from_totals(weights @ statistics.per_image) for statistics in system], axis=-1)


def _check(first: Sequence[Statistics], second: Sequence[Statistics]) -> int:
    """The number of images; raises if the systems cannot be compared."""
    ours, theirs = ([name for statistics in system for name in statistics.names] for system in (first, second))
    if ours != theirs or not ours or len(set(ours)) < len(ours):
        raise ValueError(f"the systems' metrics are {ours} and {theirs}; give both the same, each once, in the same order")
    counts = sorted({len(statistics.per_image) for statistics in (*first, *second)})
    if len(counts) > 1 or not counts[0]:
        raise ValueError(f"the metrics are over {' and '.join(map(str, counts))} images; give both systems the same, at least one")
    for statistics in (*first, *second):
        if not np.isfinite(statistics.per_image).all():
            row = int(np.argwhere(~np.isfinite(statistics.per_image))[0, 0])
            raise ValueError(f"{', '.join(statistics.names)}: the value of image {row} is not finite")
    return counts[0]
