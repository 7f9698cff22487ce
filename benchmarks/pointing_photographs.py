"""Do attention and importance point at the objects that words name? The pointing game on hand-boxed photographs of Flickr8k.

    python benchmarks/pointing_photographs.py --images validation.parquet --output pointing_photographs.json

`boxes.json` lists photographs of the validation split and the objects in each: words for the object, and its boxes (left, top,
right, bottom) as fractions of width and height. Objects that fill more than half of a photograph are left out. Two kinds of
captions are scored: generated ones, and the references, which the model decodes with teacher forcing. Each word has two maps: its
attention, and its importance (`hf_attncap.importance.word_importance`). A map hits if the centre of its highest region lies in one
of the word's boxes (Zhang et al., 2018, "Top-down neural attention by excitation backprop").

There are two baselines. Chance is the share of all regions whose centres lie in the boxes. "Other photographs" is the share of
words of other photographs whose highest region lies there, which also a model that always attends to the centre would reach. Words
whose boxes contain no centre of a region cannot be hit; they are counted but not scored. `mass_inside` is reported for attention
only, because importance can be negative and its maps have no common sum. Intervals are 95 % paired bootstraps over photographs.
"""

import argparse
import json
import sys
from collections.abc import Iterable, Mapping, Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, Literal, NamedTuple, get_args

import numpy as np
import pyarrow.parquet
import torch
from PIL import Image
from pointing import SIDE, within

from hf_attncap import Captioner
from hf_attncap.atomic import write_json
from hf_attncap.images import load_image
from hf_attncap.importance import word_importance
from hf_attncap.metrics.significance import Statistics, paired_bootstrap
from hf_attncap.processing_attncap import IGNORED_LABEL
from hf_attncap.words_attncap import CaptionPieces

BOXES = Path(__file__).with_name("boxes.json")
COLUMNS = ("photographs", "words", "too_small", "hits", "chance", "other_photographs", "mass_inside", "area")

Box = Sequence[float]
Kind = Literal["attention", "importance"]
Caption = tuple[list[str], dict[Kind, np.ndarray]]  # T words and their maps (T, H, W)


class Pointed(NamedTuple):
    """A word of a caption: the highest region of its map, the regions that are hits, and how much of the map lies in its boxes."""

    photograph: str
    word: str
    peak: int
    inside: np.ndarray  # (H * W,) bool
    mass: float
    area: float


def point(photograph: str, word: str, weights: np.ndarray, boxes: Sequence[Box]) -> Pointed:
    """Score a word by a map of weights (H, W). If they sum to 1, the mass of a uniform map equals the area of the boxes."""
    inside = np.any([within([SIDE * edge for edge in box], weights.shape) for box in boxes], axis=0)  # (H, W)
    shares = covered(boxes, weights.shape)  # (H, W)
    return Pointed(photograph, word, int(weights.argmax()), inside.ravel(), float((weights * shares).sum()), float(shares.mean()))


def covered(boxes: Sequence[Box], grid: tuple[int, ...]) -> np.ndarray:
    """The share of each region of the grid (H, W) that is covered by boxes, from 0 to 1."""
    cuts = [  # coverage is constant between two of them
        np.unique([*np.linspace(0, 1, size + 1), *(box[k] for box in boxes for k in edges)])
        for size, edges in zip(grid, ((1, 3), (0, 2)))
    ]
    y, x = ((cut[1:] + cut[:-1]) / 2 for cut in cuts)  # (R,), (S,)
    inside = np.any(
        [((y > top) & (y < bottom))[:, None] & ((x > left) & (x < right)) for left, top, right, bottom in boxes], axis=0
    )  # (R, S)
    areas = inside * np.diff(cuts[0])[:, None] * np.diff(cuts[1])  # (R, S)
    shares = np.zeros(grid)
    np.add.at(shares, ((y * grid[0]).astype(int)[:, None], (x * grid[1]).astype(int)), areas)
    return shares * shares.size


def point_captions(photograph: str, captions: Iterable[Caption], things: list[dict[str, Any]], kind: Kind) -> list[Pointed]:
    """The words of captions that name one of the `things` of a photograph, with the boxes of all things with this word."""
    found = []
    for words, maps in captions:
        for word, weights in zip(words, maps[kind], strict=True):
            boxes = [box for thing in things if word in thing["words"] for box in thing["boxes"]]
            if boxes:
                found.append(point(photograph, word, weights, boxes))
    return found


def as_generated(captioner: Captioner, references: list[str]) -> torch.Tensor:
    """References as token ids in the form that `generate` returns, with the start token: (R, T + 1) on the model's device."""
    config = captioner.model.config
    labels = captioner.processor(text_target=references, return_tensors="pt")["labels"]  # (R, T)
    ids = labels.masked_fill(labels == IGNORED_LABEL, config.pad_token_id)
    return torch.cat([ids.new_full((len(ids), 1), config.bos_token_id), ids], dim=1).to(captioner.model.device)


@torch.inference_mode()
def read_references(captioner: Captioner, image: Image.Image, references: list[str]) -> list[Caption]:
    """References with the maps of their words, from decoding with teacher forcing."""
    model, processor = captioner.model, captioner.processor
    pixel_values = processor(images=image, return_tensors="pt")["pixel_values"]  # (1, 3, height, width)
    sequences = as_generated(captioner, references)  # (R, T + 1)
    encoded = model.get_encoder()(pixel_values.to(model.device))  # (1, N, C)
    attention, _ = model.caption_attentions(sequences, encoder_outputs=encoded)  # (R, T, H, W)
    importance = word_importance(model, sequences, encoded)  # (R, T, H, W)
    captions = [CaptionPieces(processor.tokenizer, row) for row in sequences.tolist()]
    return [
        (pieces.words, {"attention": pieces.merge(weights), "importance": pieces.add_up(falls)})
        for pieces, weights, falls in zip(captions, attention.float().cpu().numpy(), importance.cpu().numpy())
    ]


def scored_words(pointed: list[Pointed]) -> tuple[list[Pointed], list[str], np.ndarray]:
    """The W words that can be hit, the names of their photographs, and the index of each word's photograph (W,)."""
    scored = [word for word in pointed if word.inside.any()]
    names = sorted({word.photograph for word in scored})
    return scored, names, np.array([names.index(word.photograph) for word in scored], dtype=int)


def summary(pointed: list[Pointed]) -> dict[str, Any]:
    """The values of a table row, with 95 % intervals of the difference between hits and each baseline."""
    scored, names, photograph = scored_words(pointed)
    counts = {"photographs": len(names), "words": len(scored), "too_small": len(pointed) - len(scored)}
    if len(names) < 2:
        return counts
    inside = np.stack([word.inside for word in scored])  # (W, N)
    reached = inside[:, [word.peak for word in scored]]  # (W, W): the highest region of the column's word hits the row's word
    other = photograph[:, None] != photograph  # (W, W)
    values = {
        "hits": reached.diagonal().astype(float),
        "chance": inside.mean(axis=1),
        "other_photographs": (reached & other).sum(axis=1) / other.sum(axis=1),
        "mass_inside": np.array([word.mass for word in scored]),
        "area": np.array([word.area for word in scored]),
    }
    figures: dict[str, Any] = {name: float(value.mean()) for name, value in values.items()}
    for bound in ("chance", "other_photographs"):
        found = paired_bootstrap(*([_ratio(values[name], photograph)] for name in (bound, "hits")))["share"]
        figures[f"hits_minus_{bound}"] = [found.difference, found.low, found.high]
    return {**counts, **figures}


def compare(attention: list[Pointed], importance: list[Pointed]) -> dict[str, Any]:
    """The summaries of attention and importance of the same words, and the difference of their hits with its 95 % interval."""
    found: dict[str, Any] = {"attention": summary(attention), "importance": summary(importance)}
    found["importance"].pop("mass_inside", None)  # importance can be negative, and its sums differ
    first, names, photograph = scored_words(attention)
    second, _, _ = scored_words(importance)
    if len(names) >= 2:
        hits = (np.array([word.inside[word.peak] for word in words], dtype=float) for words in (first, second))  # (W,) each
        change = paired_bootstrap(*([_ratio(each, photograph)] for each in hits))["share"]
        found["importance_minus_attention"] = [change.difference, change.low, change.high]
    return found


def _ratio(values: np.ndarray, photograph: np.ndarray) -> Statistics:
    """The mean of the words' values (W,) as sums per photograph, for the bootstrap over photographs."""
    sums = np.stack([np.bincount(photograph, values), np.bincount(photograph)], axis=1)  # (I, 2)
    return Statistics(("share",), sums, lambda totals: totals[..., :1] / totals[..., 1:])


def read_photographs(path: str, names: Iterable[str]) -> list[dict[str, Any]]:
    """The rows of a Parquet file whose `image_id` is one of the names, with `captions` and a decoded `image`."""
    chosen = pyarrow.parquet.read_table(path, columns=["image", "image_id", "captions"], filters=[("image_id", "in", list(names))])
    return [{**row, "image": load_image(row["image"]["bytes"])} for row in chosen.to_pylist()]


def play(model: str | None, rows: list[dict[str, Any]], boxes: Mapping[str, list[dict[str, Any]]]) -> dict[str, Any]:
    """Play the game with a captioner on rows with `image`, `image_id` and `captions`."""
    captioner = Captioner.from_pretrained(model)
    captions: dict[str, dict[str, list[Caption]]] = {"own": {}, "references": {}}
    for row, result in zip(rows, captioner.explain([row["image"] for row in rows])):
        assert result.attention is not None and result.importance is not None
        own: Caption = (result.words, {"attention": result.attention, "importance": result.importance})
        captions["own"][row["image_id"]] = [own]
        captions["references"][row["image_id"]] = read_references(captioner, row["image"], row["captions"])
    return {
        name: compare(
            *(
                [
                    word
                    for photograph in photographs
                    for word in point_captions(photograph, photographs[photograph], boxes[photograph], kind)
                ]
                for kind in get_args(Kind)
            )
        )
        for name, photographs in captions.items()
    }


def table(found: dict[str, dict[str, Any]]) -> str:
    """The results as a Markdown table, in per cent."""

    def shown(value: Any) -> str:
        if isinstance(value, list):
            return "{:+.1f} ({:+.1f} to {:+.1f})".format(*(100 * bound for bound in value))
        return f"{100 * value:.1f}" if isinstance(value, float) else str(value)

    columns = (*COLUMNS, "hits_minus_chance", "hits_minus_other_photographs", "hits_minus_attention")
    titles = ("captions", "map", *(name.replace("_", " ") for name in columns))
    lines = ["| " + " | ".join(titles) + " |", "|---" * len(titles) + "|"]
    for name, maps in found.items():
        for kind in get_args(Kind):
            figures = dict(maps[kind])
            if kind == "importance" and "importance_minus_attention" in maps:
                figures["hits_minus_attention"] = maps["importance_minus_attention"]
            lines.append(f"| {name} | {kind} | " + " | ".join(shown(figures.get(column, "-")) for column in columns) + " |")
    return "\n".join(lines)


def run_info(model: str | None) -> dict[str, str]:
    """The date, and the name of the model."""
    name = Path(model).resolve().name if model else "hf_attncap/checkpoint"
    return {"date": datetime.now(UTC).date().isoformat(), "model": name}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--images", required=True, help="Parquet file of Flickr8k's validation split: image, image_id, captions")
    parser.add_argument("--model", help="folder of a captioner (default: the checkpoint in the package)")
    parser.add_argument("--output", type=Path, help="file for the results, as JSON")
    args = parser.parse_args()
    boxes = json.loads(BOXES.read_text(encoding="utf-8"))
    rows = read_photographs(args.images, boxes)
    missing = sorted(boxes.keys() - {row["image_id"] for row in rows})
    if missing:
        parser.error(f"{args.images} lacks {len(missing)} of the {len(boxes)} boxed photographs, such as {missing[0]}.")
    found = play(args.model, rows, boxes)
    print(table(found))
    if args.output:
        write_json(args.output, {**run_info(args.model), "captions": found})


if __name__ == "__main__":
    try:
        main()
    except OSError as error:
        sys.exit(f"error: {error}")
