"""Which map finds the regions that a word depends on? Deletion and insertion curves of importance, attention and a random order.

    python benchmarks/deletion.py --images validation.parquet --limit 200 --figure deletion.jpg --output deletion.json

Each caption is decoded again with a part of the regions hidden from the decoder. What is measured is the probability of each word,
given the words before it. Deletion hides the regions in the order of the word's map, the highest first. Insertion begins with all
regions hidden and shows them in that order (Petsiuk, Das and Saenko, 2018, "RISE: Randomized input sampling for explanation of
black-box models"). A good map has a small area under its deletion curve and a large area under its insertion curve.

A hidden region is replaced by one of two means, and each gives a test of its own. `image` is the mean of all regions of the same
image, whatever is hidden. (`word_importance` takes the mean of the regions that are left, which is ill-defined when nearly all are
hidden.) It takes away where things are, but the decoder still reads from it most of what the image shows. `set` is the mean of all
regions of all images of the run, which says nothing about the image. Only words are scored that depend on what is hidden: their
log-probability falls by at least 1 nat when all regions are replaced. With `image` these are few.

The random order is the mean over 5 orders for each image. Curves are means over words, in two units: the probability, as a share of
its mean with nothing hidden, and the log-probability, in nats above that with nothing hidden (negative). Areas are over shares
from 0 to 1 by the trapezoidal rule. Differences have 95 % intervals by the paired bootstrap over images.

Importance is itself measured by hiding regions, so this test favours it by construction. The pointing game
(`pointing_photographs.py`) does not.
"""

import argparse
import json
import sys
from collections.abc import Iterable, Iterator
from datetime import UTC, datetime
from itertools import islice
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pyarrow.parquet
import torch
from matplotlib.figure import Figure
from pointing_photographs import as_generated

from hf_attncap import Captioner
from hf_attncap.images import load_image
from hf_attncap.importance import token_log_probabilities, variants_per_pass, word_importance
from hf_attncap.metrics.significance import Statistics, paired_bootstrap
from hf_attncap.pipeline_attncap import CaptionPieces

ORDERS = ("importance", "attention", "random")
CURVES = ("deletion", "insertion")
FILLS = ("image", "set")
UNITS = ("probability", "log_probability")
STEPS = 10  # between the F = 11 shares of hidden regions
RANDOM_ORDERS = 5
LEAST_FALL = 1.0  # nats
BATCH = 16
COLOURS = {"importance": "#1b9e77", "attention": "#d95f02", "random": "#777777"}


class Traced(NamedTuple):
    """The D words of one image's caption that depend on its regions.

    Attributes:
        words: how many words the caption has in all.
        whole: (D,), their log-probabilities with nothing hidden.
        log_p: for each of ORDERS their log-probabilities (2, S, D, F), of deletion and insertion, of S orders, at F shares.
    """

    words: int
    whole: np.ndarray
    log_p: dict[str, np.ndarray]


def steps(regions: int) -> np.ndarray:
    """Numbers of regions from none to all N of them, in about even steps: int (F,)."""
    return np.unique(np.linspace(0, regions, STEPS + 1).round().astype(int))


def leading(maps: np.ndarray, counts: np.ndarray) -> np.ndarray:
    """Which regions are the first ones of maps (..., N), the highest first, for each count (F,): bool (..., F, N)."""
    ranks = np.argsort(np.argsort(-maps, axis=-1, kind="stable"), axis=-1)  # (..., N)
    return ranks[..., None, :] < counts[:, None]


@torch.inference_mode()
def log_probabilities(
    model: Any, regions: torch.Tensor, sequence: torch.Tensor, pieces: CaptionPieces, hidden: np.ndarray, fill: torch.Tensor
) -> np.ndarray:
    """The log-probabilities of the W words of a caption (T + 1) with `fill` (C) for the hidden of regions (N, C).

    Args:
        hidden: bool (..., N).

    Returns:
        (..., W) float32, a word's being the sum over its pieces.
    """
    variants = torch.from_numpy(hidden.reshape(-1, len(regions))).to(regions.device)  # (V, N)
    found = []
    for some in variants.split(variants_per_pass(model, regions[None], sequence[None, None])):
        shown = torch.where(some[..., None], fill, regions)  # (v, N, C)
        found.append(token_log_probabilities(model, shown, sequence.expand(len(some), 1, -1))[:, 0])  # (v, T)
    return pieces.add_up(torch.cat(found).mT).T.reshape(*hidden.shape[:-1], -1)  # (..., W)


def trace(
    model: Any,
    regions: torch.Tensor,
    sequence: torch.Tensor,
    pieces: CaptionPieces,
    maps: dict[str, np.ndarray],
    fill: torch.Tensor,
) -> Traced:
    """The curves of a caption of an image.

    Args:
        regions, sequence: (N, C) and (T + 1).
        pieces: the W words of the sequence.
        maps: importance and attention of the words (W, N); "random", S maps (S, N) for all words.
        fill: (C), in place of a hidden region.
    """
    count = len(regions)
    extremes = np.stack([np.zeros(count, dtype=bool), np.ones(count, dtype=bool)])  # (2, N)
    whole, blank = log_probabilities(model, regions, sequence, pieces, extremes, fill)  # (W) each
    chosen = np.flatnonzero(whole - blank >= LEAST_FALL)  # (D)
    log_p = {}
    for order in ORDERS if len(chosen) else ():
        of_words = order != "random"
        first = leading(maps[order][chosen] if of_words else maps[order], steps(count))  # (D or S, F, N)
        found = log_probabilities(model, regions, sequence, pieces, np.stack([first, ~first]), fill)  # (2, D or S, F, W)
        if of_words:
            log_p[order] = np.take_along_axis(found, chosen[None, :, None, None], axis=-1)[:, None, ..., 0]  # (2, 1, D, F)
        else:
            log_p[order] = found[..., chosen].swapaxes(-1, -2)  # (2, S, D, F)
    return Traced(len(whole), whole[chosen], log_p)


@torch.inference_mode()
def encode(captioner: Captioner, rows: Iterable[dict[str, Any]]) -> Iterator[tuple[list[dict[str, Any]], Any]]:
    """Batches of rows with their encoder outputs (B, N, C)."""
    rows = iter(rows)
    while batch := list(islice(rows, BATCH)):
        pictures = [load_image(row["image"]["bytes"]) for row in batch]
        inputs = captioner.processor(images=pictures, return_tensors="pt").to(captioner.model.device)
        yield batch, captioner.model.get_encoder()(inputs["pixel_values"])


def mean_region(captioner: Captioner, rows: Iterable[dict[str, Any]]) -> torch.Tensor:
    """The mean of all regions of all images, which have one grid: (C).

    Raises:
        ValueError: there is no image.
    """
    means = [mean for _, encoded in encode(captioner, rows) for mean in encoded.last_hidden_state.double().mean(dim=1)]  # (C) each
    if not means:
        raise ValueError("There is no image to caption: give at least two.")
    return torch.stack(means).mean(dim=0).to(captioner.model.dtype)


@torch.inference_mode()
def trace_images(
    captioner: Captioner, rows: Iterable[dict[str, Any]], mean: torch.Tensor, references: bool
) -> tuple[dict[str, list[Traced]], np.ndarray]:
    """For each of FILLS the curves of the captions of images, and the F shares of regions; `mean` (C) is that of all images."""
    model: Any = captioner.model
    random = np.random.default_rng(0)
    found: dict[str, list[Traced]] = {fill: [] for fill in FILLS}
    count = 1
    for batch, encoded in encode(captioner, rows):
        if references:
            sequences = as_generated(captioner, [row["captions"][0] for row in batch])  # (B, T + 1)
        else:
            sequences = model.generate(encoder_outputs=encoded)  # (B, T + 1)
        weights, _ = model.caption_attentions(sequences, encoder_outputs=encoded)  # (B, T, H, W)
        falls = word_importance(model, sequences, encoded)  # (B, T, H, W)
        for regions, sequence, looked, fell in zip(encoded.last_hidden_state, sequences, weights.flatten(2), falls.flatten(2)):
            count = len(regions)
            pieces = CaptionPieces(captioner.processor.tokenizer, sequence.tolist())
            maps = {"importance": pieces.add_up(fell), "attention": pieces.merge(looked)}  # (W, N) each
            maps["random"] = random.random((RANDOM_ORDERS, count))  # (S, N)
            for fill, value in zip(FILLS, (regions.mean(dim=0), mean)):
                found[fill].append(trace(model, regions, sequence, pieces, maps, value))
    return found, steps(count) / count


def in_units(traced: Traced, order: str) -> np.ndarray:
    """Sums over an image's words of both curves of an order, for each of UNITS: (2, 2, F)."""
    log_p = traced.log_p[order]  # (2, S, D, F)
    lost = log_p - traced.whole[:, None]  # (2, S, D, F)
    return np.stack([each.mean(axis=1).sum(axis=1) for each in (np.exp(log_p), lost)], axis=1)


def summarize(traced: list[Traced], at: np.ndarray) -> dict[str, Any]:
    """Curves at the shares (F,), the areas under them, and how much larger those of importance are, with 95 % intervals.

    Raises:
        ValueError: fewer than two images have words that depend on their regions.
    """
    scored = [image for image in traced if len(image.whole)]
    if len(scored) < 2:
        raise ValueError(f"Words that depend on their regions are in {len(scored)} of {len(traced)} images: give more images.")
    parts = np.array([[np.exp(image.whole).sum(), len(image.whole)] for image in scored])  # (I, 2), for each of UNITS
    names = [(curve, unit) for curve in CURVES for unit in UNITS]
    curves: dict[str, Any] = {curve: {unit: {} for unit in UNITS} for curve in CURVES}
    areas: dict[str, Any] = {curve: {unit: {} for unit in UNITS} for curve in CURVES}
    statistics = {}
    for order in ORDERS:
        sums = np.stack([in_units(image, order) for image in scored])  # (I, 2, 2, F)
        means = sums.sum(axis=0) / parts.sum(axis=0)[:, None]  # (2, 2, F)
        under = (sums[..., 1:] + sums[..., :-1]) / 2 @ np.diff(at)  # (I, 2, 2)
        per_image = np.concatenate([under.reshape(-1, 4), parts], axis=1, dtype=np.float64)  # (I, 6)
        statistics[order] = Statistics(
            tuple(map(str, names)), per_image, lambda totals: totals[..., :4] / np.tile(totals[..., 4:], 2)
        )
        for (curve, unit), mean, area in zip(
            names, means.reshape(4, -1), under.sum(axis=0).ravel() / np.tile(parts.sum(axis=0), 2)
        ):
            curves[curve][unit][order] = mean.tolist()
            areas[curve][unit][order] = float(area)
    for other in ORDERS[1:]:
        changes = paired_bootstrap([statistics[other]], [statistics["importance"]])
        for (curve, unit), change in zip(names, changes.values()):
            areas[curve][unit][f"importance_minus_{other}"] = [change.difference, change.low, change.high]
    return {
        "images_scored": len(scored),
        "words_scored": int(parts[:, 1].sum()),
        "areas": areas,
        "shares": at.tolist(),
        "curves": curves,
    }


def table(found: dict[str, Any]) -> str:
    """The areas as Markdown."""
    differences = [f"importance_minus_{other}" for other in ORDERS[1:]]
    titles = ["fill", "curve", "unit", *ORDERS, *(name.replace("_", " ") for name in differences)]
    lines = ["| " + " | ".join(titles) + " |", "|---" * len(titles) + "|"]
    for fill, figures in found["fills"].items():
        for curve, better in zip(CURVES, ("lower", "higher")):
            for unit in UNITS:
                areas = figures["areas"][curve][unit]
                cells = [fill, f"{curve} ({better} is better)", unit.replace("_", "-")]
                cells += [f"{areas[order]:.3f}" for order in ORDERS]
                cells += ["{:+.3f} ({:+.3f} to {:+.3f})".format(*areas[name]) for name in differences]
                lines.append("| " + " | ".join(cells) + " |")
    lines.append("")
    for fill, figures in found["fills"].items():
        lines.append(
            f"{fill}: {figures['words_scored']} of {found['words']} words are scored, in {figures['images_scored']} of "
            f"{found['images']} images. Their log-probability falls by at least {LEAST_FALL:g} nat when all regions are hidden."
        )
    lines.append(
        "Importance is itself measured by hiding regions, so this test favours it by construction. The pointing game does not."
    )
    return "\n".join(lines)


def draw(fills: dict[str, Any], path: Path) -> None:
    """The curves in probability as an image file, a row of panels for each fill; the ending of its name tells the format."""
    figure = Figure((8, 2.9 * len(fills)), layout="constrained")
    panels = figure.subplots(len(fills), 2, sharey=True, squeeze=False)
    for row, (fill, figures) in zip(panels, fills.items()):
        for axes, curve, state in zip(row, CURVES, ("hidden", "shown")):
            for order, values in figures["curves"][curve]["probability"].items():
                label = f"{order} (area {figures['areas'][curve]['probability'][order]:.3f})"
                axes.plot(figures["shares"], values, marker=".", color=COLOURS[order], label=label)
            axes.set(title=f"{curve} ({fill} mean)", xlabel=f"share of regions {state}", xlim=(0, 1))
            axes.grid(alpha=0.3)
            axes.legend(fontsize="small")
        row[0].set_ylabel("probability of the words\n(1 = nothing hidden)")
    panels[0, 0].set_ylim(bottom=0)  # of all, once everything is drawn
    figure.savefig(path, dpi=72)


def read_rows(path: str, columns: list[str], limit: int | None) -> Iterator[dict[str, Any]]:
    """The first rows of a Parquet file, a batch in memory at a time.

    Raises:
        ValueError: a column is missing.
    """
    file = pyarrow.parquet.ParquetFile(path)
    missing = [column for column in columns if column not in file.schema_arrow.names]
    if missing:
        raise ValueError(f"{path} has no column {' and no '.join(missing)}, but: {', '.join(file.schema_arrow.names)}.")
    batches = file.iter_batches(batch_size=BATCH, columns=columns)
    return islice((row for batch in batches for row in batch.to_pylist()), limit)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--images", required=True, help="Parquet file with a column image (and captions, for --references)")
    parser.add_argument("--limit", type=int, help="only that many images, the first ones; default: all")
    parser.add_argument(
        "--references", action="store_true", help="trace the first reference of each image, not the model's caption"
    )
    parser.add_argument("--model", help="a captioner's folder; default: the package's own checkpoint")
    parser.add_argument("--figure", type=Path, help="a picture of the curves; its ending tells the format")
    parser.add_argument("--output", type=Path)
    args = parser.parse_args()
    columns = ["image", "captions"] if args.references else ["image"]
    captioner = Captioner.from_pretrained(args.model)
    rows = read_rows(args.images, columns, args.limit)
    mean = mean_region(captioner, read_rows(args.images, ["image"], args.limit))
    traced, at = trace_images(captioner, rows, mean, args.references)
    found = {
        "images": len(traced["set"]),
        "words": sum(image.words for image in traced["set"]),
        "fills": {fill: summarize(images, at) for fill, images in traced.items()},
    }
    print(table(found))
    if args.figure:
        draw(found["fills"], args.figure)
    if args.output:
        record = {
            "date": datetime.now(UTC).date().isoformat(),
            "model": Path(args.model).resolve().name if args.model else "hf_attncap/checkpoint",
            "images_file": Path(args.images).name,
            "captions": "references" if args.references else "own",
            **found,
        }
        args.output.write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    try:
        main()
    except (OSError, ValueError) as error:
        sys.exit(f"error: {error}")
