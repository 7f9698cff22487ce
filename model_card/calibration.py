"""`attncap calibrate`: fits `CaptionResult.confidence` on captioned images, and shows on others what it is worth."""

import hashlib
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from hf_attncap.training.arguments import SettingError

from hf_attncap import Captioner
from hf_attncap.atomic import atomic_write
from hf_attncap.confidence import estimate_confidence
from hf_attncap.configuration_attncap import SIGNALS

from .measure import caption, captioned_images, commit, name_sets

REPORT, CHART = "calibration.json", "calibration.jpg"
THRESHOLD = 0.5  # of CIDEr-D: captions from here on are good
FEWEST = 10  # good captions, and others, in each half
BINS, IN_A_BIN = 10, 10  # at most as many bins, of at least as many images
RIDGE = 1.0  # on weights of standardised signals
RESAMPLES = 1000


def calibrate(
    checkpoint: str | Path, files: Sequence[str], split: str | None = None, image_dir: str | None = None
) -> dict[str, Any]:
    """Fits the confidence on half of the images and measures it on the other half.

    A caption is good if its CIDEr-D is at least 0.5 against the references of its image, with the document frequencies of the
    images of its file. The hash of an image's id decides which half the image is in.

    Args:
        checkpoint: folder of a captioner. Its `config.json` gets the calibration, and the report is written beside it, as
            `calibration.json` and as a chart, `calibration.jpg`.
        files: sets of captioned images, each in any format that training reads. The report tells of each and of all together.
        split: of files that hold several.
        image_dir: where paths of images begin; default: the folder of the file.

    Returns:
        The report: `calibration`, and for the images that it was not fitted on, `sets`.

    Raises:
        SettingError: for data that cannot be read, or too few good or other captions.
        OSError: for a checkpoint that cannot be loaded, or that cannot be written to.
    """
    folder = Path(checkpoint)
    if not (folder / "config.json").is_file():
        raise SettingError(f"'{folder}' has no config.json: name the folder of a saved captioner.")
    names = name_sets(files)
    captioner = Captioner.from_pretrained(folder)
    sets = [_caption_set(captioner, file, split, image_dir) for file in files]
    data = {name: np.concatenate([part[name] for part in sets]) for name in sets[0]}
    fitted = data["fitted"]
    for half, name in ((fitted, "fitted on"), (~fitted, "measured on")):
        good = int(data["good"][half].sum())
        if min(good, int(half.sum()) - good) < FEWEST:
            raise SettingError(
                f"Of the {int(half.sum())} images that the confidence would be {name}, {good} have a good caption (CIDEr of at "
                f"least {THRESHOLD}): at least {FEWEST} good and {FEWEST} other captions are needed, give more images."
            )
    weights, bias = fit_logistic(np.stack([data[name][fitted] for name in SIGNALS], axis=1), data["good"][fitted])
    calibration = {
        "weights": {name: round(float(weight), 6) for name, weight in zip(SIGNALS, weights)},
        "bias": round(bias, 6),
        "threshold": THRESHOLD,
        "images": int(fitted.sum()),
    }
    named = dict(zip(names, sets))
    named |= {"all": data} if len(sets) > 1 else {}
    measured = {name: _measure(calibration, part) for name, part in named.items()}
    report = {"calibration": calibration, "sets": measured, "split": split, "commit": commit()}
    _write(folder, report)
    return report


def _caption_set(captioner: Captioner, file: str, split: str | None, image_dir: str | None) -> dict[str, np.ndarray]:
    """Arrays (I) of one set of images: the signals, `cider`, `good`, and `fitted`: whether the image is of the first half."""
    rows = captioned_images(file, split, image_dir)
    captions, scores, signals = caption(captioner, rows)
    cider = dict(zip(scores.ids, scores.per_image["cider"].tolist()))
    values = np.array([cider[name] for name in captions])  # (I)
    half = [hashlib.sha256(name.encode()).digest()[0] % 2 == 0 for name in captions]
    own = {name: np.array([signal[name] for signal in signals]) for name in SIGNALS}
    return {**own, "cider": values, "good": values >= THRESHOLD, "fitted": np.array(half)}


def fit_logistic(features: np.ndarray, good: np.ndarray) -> tuple[np.ndarray, float]:
    """Logistic regression by Newton's method, with a small ridge penalty on the weights of standardised features.

    Args:
        features: (I, F).
        good: (I), bool.

    Returns:
        Weights (F) of the features as they were given, and the bias.
    """
    mean, scale = features.mean(axis=0), features.std(axis=0)  # (F), (F)
    scale = np.where(scale > 0, scale, 1.0)
    inputs = np.column_stack([(features - mean) / scale, np.ones(len(features))])  # (I, F + 1)
    penalty = np.diag([*[RIDGE] * features.shape[1], 0.0])
    weights = np.zeros(inputs.shape[1])  # (F + 1)

    def loss(weights: np.ndarray) -> float:
        logits = inputs @ weights
        return float(np.logaddexp(0, logits).sum() - logits @ good + weights @ penalty @ weights / 2)

    for _ in range(100):
        p = 0.5 * (1 + np.tanh(0.5 * inputs @ weights))  # (I)
        gradient = inputs.T @ (p - good) + penalty @ weights
        step = np.linalg.solve((inputs * (p * (1 - p))[:, None]).T @ inputs + penalty, gradient)
        share = 1.0
        while loss(weights - share * step) > loss(weights) and share > 1e-6:  # far from the minimum a whole step may be too long
            share /= 2
        weights = weights - share * step
        if np.abs(gradient).max() < 1e-8:
            break
    return weights[:-1] / scale, float(weights[-1] - (weights[:-1] * mean / scale).sum())


def auroc(values: np.ndarray, good: np.ndarray) -> float:
    """How often a good caption has a higher value than another one, ties counting half; NaN where one kind is missing.

    Args:
        values, good: (I).
    """
    positives = int(good.sum())
    negatives = len(good) - positives
    if not positives or not negatives:
        return float("nan")
    _, place, counts = np.unique(values, return_inverse=True, return_counts=True)
    ranks = (np.cumsum(counts) - (counts - 1) / 2)[place]  # (I), from 1, the mean of ties
    return float((ranks[good].sum() - positives * (positives + 1) / 2) / (positives * negatives))


def _measure(calibration: dict[str, Any], data: dict[str, np.ndarray]) -> dict[str, Any]:
    """What the confidence is worth on the half of a set that it was not fitted on."""
    data = {name: values[~data["fitted"]] for name, values in data.items()}
    confidence, good, score = estimate_confidence(calibration, data), data["good"], data["score"]  # (I) each
    if not len(good):
        return {"images": 0}
    order = np.argsort(-confidence, kind="stable")
    bins = reliability(confidence, good)
    return {
        "images": len(good),
        "good": _rounded(good.mean()),
        "auroc": _interval(lambda rows: auroc(confidence[rows], good[rows]), len(good)),
        "auroc_of_score": _interval(lambda rows: auroc(score[rows], good[rows]), len(good)),
        "auroc_gain": _interval(lambda rows: auroc(confidence[rows], good[rows]) - auroc(score[rows], good[rows]), len(good)),
        "brier": _rounded(((confidence - good) ** 2).mean()),
        "brier_of_the_mean": _rounded(good.mean() * (1 - good.mean())),
        "calibration_error": _rounded(sum(abs(b["confidence"] - b["good"]) * b["images"] for b in bins) / len(good)),
        "reliability": bins,
        "coverage": [_covered(share / 10, order, confidence, data) for share in range(1, 11)],
    }


def reliability(confidence: np.ndarray, good: np.ndarray) -> list[dict[str, Any]]:
    """Bins of as many images each, from the least confident on: mean confidence against the share of good captions."""
    parts = np.array_split(np.argsort(confidence, kind="stable"), max(min(BINS, len(good) // IN_A_BIN), 1))
    return [
        {"images": len(part), "confidence": _rounded(confidence[part].mean()), "good": _rounded(good[part].mean())}
        for part in parts
    ]


def _covered(share: float, order: np.ndarray, confidence: np.ndarray, data: dict[str, np.ndarray]) -> dict[str, float]:
    """What the most confident share of the captions is worth: the share that is not good (the risk) and the mean CIDEr."""
    kept = order[: max(round(share * len(order)), 1)]
    return {
        "coverage": share,
        "min_confidence": _rounded(confidence[kept].min()),
        "risk": _rounded(1 - data["good"][kept].mean()),
        "cider": _rounded(data["cider"][kept].mean()),
    }


def _interval(value: Any, images: int) -> list[float | None]:
    """A figure of all images, and the bounds of its 95 % bootstrap interval; None where one kind of caption is missing."""
    random = np.random.default_rng(0)
    drawn = [value(random.integers(images, size=images)) for _ in range(RESAMPLES)]
    found = [value(np.arange(images)), *np.nanquantile(drawn, [0.025, 0.975])] if not np.isnan(drawn).all() else [np.nan] * 3
    return [None if np.isnan(figure) else _rounded(figure) for figure in found]


def _rounded(value: Any) -> float:
    return round(float(value), 4)


def _write(folder: Path, report: dict[str, Any]) -> None:
    """The report, its chart, and the calibration in the configuration, which comes last: each whole or not at all."""
    file = folder / "config.json"
    config = json.loads(file.read_text(encoding="utf-8")) | {"confidence": report["calibration"]}
    with atomic_write(file) as settings, atomic_write(folder / CHART, "wb") as chart, atomic_write(folder / REPORT) as stream:
        stream.write(json.dumps(report, indent=1) + "\n")
        _draw(report, chart)
        settings.write(json.dumps(config, indent=2, sort_keys=True) + "\n")


def _draw(report: dict[str, Any], file: Any) -> None:
    """The reliability diagram and the risk against the coverage, one line per set, as JPEG."""
    from matplotlib.figure import Figure

    figure = Figure((9, 4), dpi=90, layout="constrained")
    left, right = figure.subplots(1, 2)
    left.plot([0, 1], [0, 1], color="grey", linestyle=":", label="perfect")
    for name, found in report["sets"].items():
        if found["images"]:
            bins, curve = found["reliability"], found["coverage"]
            label = f"{name} ({found['images']} images)"
            left.plot([b["confidence"] for b in bins], [b["good"] for b in bins], marker="o", label=label)
            right.plot([c["coverage"] for c in curve], [c["risk"] for c in curve], marker="o", label=label)
    left.set(xlabel="confidence", ylabel="share of good captions", xlim=(0, 1), ylim=(0, 1), title="Reliability")
    right.set(xlabel="share of images captioned", ylabel="share of captions that are not good", xlim=(0, 1), ylim=(0, 1))
    right.set_title("Risk against coverage")
    left.legend(fontsize=8, loc="lower right")
    figure.savefig(file, format="jpeg")
