"""`attncap calibrate`: fit `CaptionResult.confidence` on captioned images and evaluate it on others."""

import hashlib
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from hf_attncap.training.arguments import SettingError

from hf_attncap import Captioner
from hf_attncap.atomic import atomic_files
from hf_attncap.confidence_attncap import SIGNALS, estimate_confidence
from hf_attncap.hub import CALIBRATION, CALIBRATION_CHART

from .measure import caption, captioned_images, commit, name_sets

GOOD_CIDER = 0.5  # the CIDEr-D from which a caption is good
FEWEST = 10  # good captions, and others, in each half
BINS, LEAST_PER_BIN = 10, 10  # of the reliability diagram
RIDGE = 1.0  # penalty on the weights of standardised signals
RESAMPLES = 1000


def calibrate(
    checkpoint: str | Path, files: Sequence[str], split: str | None = None, image_dir: str | None = None
) -> dict[str, Any]:
    """Fit the confidence on half of the images and evaluate it on the other half.

    A caption is good if its CIDEr-D against the references of its image is at least 0.5. Document frequencies come from the images
    of the same file. The hash of the image id determines the half of an image.

    Args:
        checkpoint: folder of a captioner. The calibration is written to its `config.json`, the report to `calibration.json` and a
            chart to `calibration.jpg`.
        files: sets of captioned images, each in any format that training reads. The report covers each set and all together.
        split: of files with several splits.
        image_dir: base folder of relative image paths. Default: the folder of the file.

    Returns:
        The report: the `calibration`, and its evaluation on the other half of the images in `sets`.

    Raises:
        SettingError: data cannot be read, or there are too few good or other captions.
        OSError: the checkpoint cannot be loaded or written.
    """
    folder = Path(checkpoint)
    if not (folder / "config.json").is_file():
        raise SettingError(f"'{folder}' has no config.json: give the folder of a saved captioner.")
    names = name_sets(files)
    captioner = Captioner.from_pretrained(folder)
    sets = [_caption_set(captioner, file, split, image_dir) for file in files]
    data = {name: np.concatenate([part[name] for part in sets]) for name in sets[0]}
    fitted = data["fitted"]
    for half, purpose in ((fitted, "fitting"), (~fitted, "evaluation")):
        good = int(data["good"][half].sum())
        if min(good, int(half.sum()) - good) < FEWEST:
            raise SettingError(
                f"{good} of the {int(half.sum())} images for {purpose} have a good caption (CIDEr at least {GOOD_CIDER}), but at "
                f"least {FEWEST} good and {FEWEST} other captions are needed: give more images."
            )
    weights, bias = fit_logistic(np.stack([data[name][fitted] for name in SIGNALS], axis=1), data["good"][fitted])
    calibration = {
        "weights": {name: round(float(weight), 6) for name, weight in zip(SIGNALS, weights)},
        "bias": round(bias, 6),
        "threshold": GOOD_CIDER,
        "images": int(fitted.sum()),
    }
    named = dict(zip(names, sets))
    named |= {"all": data} if len(sets) > 1 else {}
    evaluated = {name: _evaluate(calibration, part) for name, part in named.items()}
    report = {"calibration": calibration, "sets": evaluated, "split": split, "commit": commit()}
    config = json.loads((folder / "config.json").read_text(encoding="utf-8")) | {"confidence": calibration}
    with atomic_files(folder) as new:
        _draw(report, new / CALIBRATION_CHART)
        (new / CALIBRATION).write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")
        (new / "config.json").write_text(json.dumps(config, indent=2, sort_keys=True) + "\n", encoding="utf-8")
    return report


def _caption_set(captioner: Captioner, file: str, split: str | None, image_dir: str | None) -> dict[str, np.ndarray]:
    """Arrays (I) of a set of images: the signals, `cider`, `good`, and `fitted` (whether the image is used for fitting)."""
    rows = captioned_images(file, split, image_dir)
    captions, scores, signals = caption(captioner, rows)
    cider = dict(zip(scores.ids, scores.per_image["cider"].tolist()))
    values = np.array([cider[name] for name in captions])  # (I)
    half = [hashlib.sha256(name.encode()).digest()[0] % 2 == 0 for name in captions]
    own = {name: np.array([signal[name] for signal in signals]) for name in SIGNALS}
    return {**own, "cider": values, "good": values >= GOOD_CIDER, "fitted": np.array(half)}


def fit_logistic(features: np.ndarray, good: np.ndarray) -> tuple[np.ndarray, float]:
    """Logistic regression by Newton's method, with a small ridge penalty on the weights of standardised features.

    Args:
        features: (I, F).
        good: (I), bool.

    Returns:
        The weights (F) of the original features, and the bias.
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
        rate = 1.0
        while loss(weights - rate * step) > loss(weights) and rate > 1e-6:  # a full step can be too long far from the minimum
            rate /= 2
        weights = weights - rate * step
        if np.abs(gradient).max() < 1e-8:
            break
    return weights[:-1] / scale, float(weights[-1] - (weights[:-1] * mean / scale).sum())


def auroc(values: np.ndarray, good: np.ndarray) -> float:
    """The probability that a good caption has a higher value than another one (ties count half); NaN if one kind is missing.

    Args:
        values, good: (I).
    """
    positives = int(good.sum())
    negatives = len(good) - positives
    if not positives or not negatives:
        return float("nan")
    _, place, counts = np.unique(values, return_inverse=True, return_counts=True)
    ranks = (np.cumsum(counts) - (counts - 1) / 2)[place]  # (I), from 1; ties have their mean rank
    return float((ranks[good].sum() - positives * (positives + 1) / 2) / (positives * negatives))


def _evaluate(calibration: dict[str, Any], data: dict[str, np.ndarray]) -> dict[str, Any]:
    """The quality of the confidence on the images of a set that were not used for fitting."""
    data = {name: values[~data["fitted"]] for name, values in data.items()}
    confidence, good, score = estimate_confidence(calibration, data), data["good"], data["score"]  # (I) each
    if not len(good):
        return {"images": 0}
    order = np.argsort(-confidence, kind="stable")
    return {
        "images": len(good),
        "good": _rounded(good.mean()),
        "auroc": _interval(lambda rows: auroc(confidence[rows], good[rows]), len(good)),
        "auroc_of_score": _interval(lambda rows: auroc(score[rows], good[rows]), len(good)),
        "brier": _rounded(((confidence - good) ** 2).mean()),
        "reliability": reliability(confidence, good),
        "coverage": [_covered(share / 10, order, confidence, data) for share in range(1, 11)],
    }


def reliability(confidence: np.ndarray, good: np.ndarray) -> list[dict[str, Any]]:
    """Mean confidence and fraction of good captions in bins of equal size, from the least confident on."""
    parts = np.array_split(np.argsort(confidence, kind="stable"), max(min(BINS, len(good) // LEAST_PER_BIN), 1))
    return [
        {"images": len(part), "confidence": _rounded(confidence[part].mean()), "good": _rounded(good[part].mean())}
        for part in parts
    ]


def _covered(share: float, order: np.ndarray, confidence: np.ndarray, data: dict[str, np.ndarray]) -> dict[str, float]:
    """For the most confident share of the captions, the fraction that is not good (the risk) and the mean CIDEr."""
    kept = order[: max(round(share * len(order)), 1)]
    return {
        "coverage": share,
        "min_confidence": _rounded(confidence[kept].min()),
        "risk": _rounded(1 - data["good"][kept].mean()),
        "cider": _rounded(data["cider"][kept].mean()),
    }


def _interval(value: Any, images: int) -> list[float | None]:
    """A value for all images and the bounds of its 95 % bootstrap interval; None if one kind of caption is missing."""
    random = np.random.default_rng(0)
    resampled = [value(random.integers(images, size=images)) for _ in range(RESAMPLES)]
    if np.isnan(resampled).all():
        return [None] * 3
    return [_rounded(figure) for figure in (value(np.arange(images)), *np.nanquantile(resampled, [0.025, 0.975]))]


def _rounded(value: Any) -> float:
    return round(float(value), 4)


def _draw(report: dict[str, Any], file: Path) -> None:
    """Write the reliability diagram and the risk-coverage curve, with one line per set, as JPEG."""
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
