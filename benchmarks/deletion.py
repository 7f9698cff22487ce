"""Which map finds the regions that a word depends on? Deletion and insertion curves of importance, attention and a random order.

    python benchmarks/deletion.py --images validation.parquet --limit 200 --figure deletion.jpg --output deletion.json

Each caption is decoded again with a part of the regions hidden from the decoder. The score is the probability of each word, given
the words before it. Deletion hides the regions in the order of the word's map, the highest first. Insertion starts with all
regions hidden and shows them in that order (Petsiuk, Das and Saenko, 2018, "RISE: Randomized input sampling for explanation of
black-box models"). A good map has a small area under its deletion curve and a large area under its insertion curve.

A hidden region is replaced by one of two means. `image` is the mean of all regions of the same image. (`word_importance` uses the
mean of the visible regions, which is ill-defined if nearly all are hidden.) It removes positions, but the decoder can still read
most of the image's content from it. `set` is the mean of all regions of all images of the run, which contains nothing of the image.
Only words are scored whose log-probability falls by at least 1 nat when all regions are replaced. With `image` these are few.

The random order is the mean of 5 orders per image. Curves are means over words, in two units: the probability, divided by its mean
with nothing hidden, and the log-probability in nats, minus the one with nothing hidden. Areas are computed over the share of
regions, from 0 to 1, with the trapezoidal rule. Differences have 95 % intervals from the paired bootstrap over images.

Importance is itself computed by hiding regions, so this test favours it by construction. The pointing game
(`pointing_photographs.py`) does not.
"""

import argparse
import sys
from collections.abc import Iterable, Iterator
from itertools import islice
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pyarrow.parquet
import torch
from matplotlib.figure import Figure
from pointing_photographs import as_generated, run_info

from hf_attncap import Captioner
from hf_attncap.atomic import atomic_write, write_json
from hf_attncap.images import load_image
from hf_attncap.importance import token_log_probabilities, variants_per_pass, word_importance
from hf_attncap.metrics.significance import Statistics, paired_bootstrap
from hf_attncap.words_attncap import CaptionPieces

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
    """The D scored words of the caption of one image, which depend on its regions.

    Attributes:
        words: the number of words of the caption.
        whole: (D,), log-probabilities with nothing hidden.
        log_p: for each of ORDERS the log-probabilities (2, S, D, F): deletion and insertion, S orders, D words, F shares.
    """

    words: int
    whole: np.ndarray
    log_p: dict[str, np.ndarray]


def steps(regions: int) -> np.ndarray:
    """Numbers of hidden regions from 0 to all N, about evenly spaced: int (F,)."""
    return np.unique(np.linspace(0, regions, STEPS + 1).round().astype(int))


def leading(maps: np.ndarray, counts: np.ndarray) -> np.ndarray:
    """The highest regions of maps (..., N), for each count (F,): bool (..., F, N)."""
    ranks = np.argsort(np.argsort(-maps, axis=-1, kind="stable"), axis=-1)  # (..., N)
    return ranks[..., None, :] < counts[:, None]


@torch.inference_mode()
def log_probabilities(
    model: Any, regions: torch.Tensor, sequence: torch.Tensor, pieces: CaptionPieces, hidden: np.ndarray, fill: torch.Tensor
) -> np.ndarray:
    """Log-probabilities of the W words of a caption (T + 1), with hidden regions of (N, C) replaced by `fill` (C).

    Args:
        hidden: bool (..., N).

    Returns:
        (..., W) float32, the sum over the pieces of each word.
    """
    variants = torch.from_numpy(hidden.reshape(-1, len(regions))).to(regions.device)  # (V, N)
    found = []
    for some in variants.split(variants_per_pass(model, regions[None], sequence[None, None])):
        shown = torch.where(some[..., None], fill, regions)  # (v, N, C)
        found.append(token_log_probabilities(model, shown, sequence.expand(len(some), 1, -1))[:, 0])  # (v, T)
    return pieces.add_up(torch.cat(found).mT.float().cpu().numpy()).T.reshape(*hidden.shape[:-1], -1)  # (..., W)


def trace(
    model: Any,
    regions: torch.Tensor,
    sequence: torch.Tensor,
    pieces: CaptionPieces,
    maps: dict[str, np.ndarray],
    fill: torch.Tensor,
) -> Traced:
    """The curves of the caption of an image.

    Args:
        regions, sequence: (N, C) and (T + 1).
        pieces: the W words of the sequence.
        maps: importance and attention of the words (W, N); "random": S maps (S, N) for all words.
        fill: (C), replaces hidden regions.
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
def encode(captioner: Captioner, rows: Iterable[dict[str, Any]]) -> tuple[list[tuple[Any, list[str]]], torch.Tensor]:
    """Encode images once.

    Returns:
        Batches of encoder outputs (B, N, C), each with the first reference of its images if there are any, and the mean of all
        regions (C).

    Raises:
        ValueError: there are no images.
    """
    rows, batches, means = iter(rows), [], []
    while batch := list(islice(rows, BATCH)):
        pictures = [load_image(row["image"]["bytes"]) for row in batch]
        inputs = captioner.processor(images=pictures, return_tensors="pt").to(captioner.model.device)
        encoded = captioner.model.get_encoder()(inputs["pixel_values"])
        batches.append((encoded, [row["captions"][0] for row in batch if "captions" in row]))
        means.append(encoded.last_hidden_state.double().mean(dim=1))  # (B, C)
    if not batches:
        raise ValueError("There is no image to caption: give at least two.")
    return batches, torch.cat(means).mean(dim=0).to(captioner.model.dtype)


@torch.inference_mode()
def trace_images(
    captioner: Captioner, batches: Iterable[tuple[Any, list[str]]], mean: torch.Tensor
) -> tuple[dict[str, list[Traced]], np.ndarray]:
    """The curves of references, or of generated captions without references, for each of FILLS; and the F shares of regions.

    Args:
        batches: encoder outputs with references, from `encode`.
        mean: (C), of the regions of all images.
    """
    model: Any = captioner.model
    random = np.random.default_rng(0)
    found: dict[str, list[Traced]] = {fill: [] for fill in FILLS}
    count = 1
    for encoded, references in batches:
        sequences = as_generated(captioner, references) if references else model.generate(encoder_outputs=encoded)  # (B, T + 1)
        attention, _ = model.caption_attentions(sequences, encoder_outputs=encoded)  # (B, T, H, W)
        importance = word_importance(model, sequences, encoded)  # (B, T, H, W)
        for regions, sequence, weights, falls in zip(
            encoded.last_hidden_state,
            sequences,
            attention.flatten(2).float().cpu().numpy(),
            importance.flatten(2).cpu().numpy(),
        ):
            count = len(regions)
            pieces = CaptionPieces(captioner.processor.tokenizer, sequence.tolist())
            maps = {"importance": pieces.add_up(falls), "attention": pieces.merge(weights)}  # (W, N) each
            maps["random"] = random.random((RANDOM_ORDERS, count))  # (S, N)
            for fill, value in zip(FILLS, (regions.mean(dim=0), mean)):
                found[fill].append(trace(model, regions, sequence, pieces, maps, value))
    return found, steps(count) / count


def in_units(traced: Traced, order: str) -> np.ndarray:
    """Both curves of an order in each of UNITS, summed over the words of an image: (2, 2, F)."""
    log_p = traced.log_p[order]  # (2, S, D, F)
    lost = log_p - traced.whole[:, None]  # (2, S, D, F)
    return np.stack([each.mean(axis=1).sum(axis=1) for each in (np.exp(log_p), lost)], axis=1)


def summarize(traced: list[Traced], at: np.ndarray) -> dict[str, Any]:
    """Curves at the shares (F,), areas under them, and differences of importance and the others with 95 % intervals.

    Raises:
        ValueError: fewer than two images have words that depend on their regions.
    """
    scored = [image for image in traced if len(image.whole)]
    if len(scored) < 2:
        raise ValueError(f"Only {len(scored)} of {len(traced)} images have words that depend on their regions: give more images.")
    norms = np.array([[np.exp(image.whole).sum(), len(image.whole)] for image in scored])  # (I, 2), for each of UNITS
    names = [(curve, unit) for curve in CURVES for unit in UNITS]
    curves: dict[str, Any] = {curve: {unit: {} for unit in UNITS} for curve in CURVES}
    areas: dict[str, Any] = {curve: {unit: {} for unit in UNITS} for curve in CURVES}
    statistics = {}
    for order in ORDERS:
        sums = np.stack([in_units(image, order) for image in scored])  # (I, 2, 2, F)
        means = sums.sum(axis=0) / norms.sum(axis=0)[:, None]  # (2, 2, F)
        under = (sums[..., 1:] + sums[..., :-1]) / 2 @ np.diff(at)  # (I, 2, 2)
        per_image = np.concatenate([under.reshape(-1, 4), norms], axis=1, dtype=np.float64)  # (I, 6)
        statistics[order] = Statistics(
            tuple(map(str, names)), per_image, lambda totals: totals[..., :4] / np.tile(totals[..., 4:], 2)
        )
        for (curve, unit), mean, area in zip(
            names, means.reshape(4, -1), under.sum(axis=0).ravel() / np.tile(norms.sum(axis=0), 2)
        ):
            curves[curve][unit][order] = mean.tolist()
            areas[curve][unit][order] = float(area)
    for other in ORDERS[1:]:
        changes = paired_bootstrap([statistics[other]], [statistics["importance"]])
        for (curve, unit), change in zip(names, changes.values()):
            areas[curve][unit][f"importance_minus_{other}"] = [change.difference, change.low, change.high]
    return {
        "images_scored": len(scored),
        "words_scored": int(norms[:, 1].sum()),
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
            f"{fill}: {figures['words_scored']} of {found['words']} words in {figures['images_scored']} of {found['images']} "
            f"images are scored. Their log-probability falls by at least {LEAST_FALL:g} nat when all regions are hidden."
        )
    lines.append(
        "Importance is itself computed by hiding regions, so this test favours it by construction. The pointing game does not."
    )
    return "\n".join(lines)


def draw(fills: dict[str, Any], path: Path) -> None:
    """Plot the curves in probability to an image file, with one row of panels per fill."""
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
    panels[0, 0].set_ylim(bottom=0)  # of all panels, after everything is drawn
    with atomic_write(path, "wb") as file:
        figure.savefig(file, format=path.suffix[1:], dpi=72)


def read_rows(path: str, columns: list[str], limit: int | None) -> Iterator[dict[str, Any]]:
    """The first rows of a Parquet file, with one batch in memory at a time.

    Raises:
        ValueError: a column is missing.
    """
    file = pyarrow.parquet.ParquetFile(path)
    missing = [column for column in columns if column not in file.schema_arrow.names]
    if missing:
        raise ValueError(f"{path} has no column {' and no '.join(missing)}, only {', '.join(file.schema_arrow.names)}.")
    batches = file.iter_batches(batch_size=BATCH, columns=columns)
    return islice((row for batch in batches for row in batch.to_pylist()), limit)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--images", required=True, help="Parquet file with a column image (and captions, for --references)")
    parser.add_argument("--limit", type=int, help="use only the first N images (default: all)", metavar="N")
    parser.add_argument("--references", action="store_true", help="use the first reference of each image, not the model's caption")
    parser.add_argument("--model", help="folder of a captioner (default: the checkpoint in the package)")
    parser.add_argument("--figure", type=Path, help="image file for a plot of the curves")
    parser.add_argument("--output", type=Path, help="file for the results, as JSON")
    args = parser.parse_args()
    columns = ["image", "captions"] if args.references else ["image"]
    captioner = Captioner.from_pretrained(args.model)
    batches, mean = encode(captioner, read_rows(args.images, columns, args.limit))
    traced, at = trace_images(captioner, batches, mean)
    found = {
        "images": len(traced["set"]),
        "words": sum(image.words for image in traced["set"]),
        "fills": {fill: summarize(images, at) for fill, images in traced.items()},
    }
    print(table(found))
    if args.figure:
        draw(found["fills"], args.figure)
    if args.output:
        captions = "references" if args.references else "own"
        write_json(args.output, {**run_info(args.model), "images_file": Path(args.images).name, "captions": captions, **found})


if __name__ == "__main__":
    try:
        main()
    except (OSError, ValueError) as error:
        sys.exit(f"error: {error}")
