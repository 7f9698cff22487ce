"""Do attention and importance point at the objects that words name? The pointing game on generated scenes.

    python benchmarks/pointing.py --backbone_weights mobilenet_v2.safetensors --runs runs/pointing --output pointing.json

A scene has three or four objects of different shapes and colours in the nine cells of a grid. A captioner with each
`word_attention` is trained on scenes and tested on others, with sets of cells that do not occur in training. The score covers the
shapes that the caption names and the scene contains. A map hits if its highest region has its centre in the box of the object:
the attention map (`hits`) or the importance map (`importance_hits`) (Zhang et al., 2018, "Top-down neural attention by excitation
backprop"). Chance is the share of all regions whose centres lie in the box.
"""

import argparse
import io
import json
import logging
import statistics
import subprocess
import sys
from collections.abc import Iterator, Sequence
from datetime import UTC, datetime
from itertools import combinations
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from datasets import Dataset
from PIL import Image, ImageDraw

from hf_attncap.atomic import write_json

ROOT = Path(__file__).parents[1]
SIDE = 224
CELL = SIDE // 3
COLOURS = {
    "red": (205, 35, 35),
    "green": (30, 150, 50),
    "blue": (40, 70, 205),
    "yellow": (235, 205, 40),
    "purple": (130, 50, 160),
    "black": (25, 25, 25),
}
SHAPES = ("circle", "square", "triangle", "cross", "ring", "bar")
KINDS = ("none", "score", "channel", "history")
HALF_WIDTH = {"encoder_channels": 256, "hidden_size": 256, "attention_dim": 128}  # half an hour per seed on two CPU cores
HELD_OUT = 5  # one of this many sets of cells is for testing

logger = logging.getLogger(__name__)


class Thing(NamedTuple):
    """An object of a scene; its box is (left, top, right, bottom) in pixels."""

    shape: str
    colour: str
    box: tuple[int, int, int, int]


def layouts(count: int, held_out: bool) -> list[tuple[int, ...]]:
    """The sets of `count` of the nine cells for testing (`held_out`) or for training."""
    found = list(combinations(range(9), count))
    return [cells for place, cells in enumerate(found) if (place % HELD_OUT == 0) == held_out]


def scene(random: np.random.Generator, held_out: bool) -> tuple[Image.Image, list[Thing]]:
    """An image and its objects, whose shapes and colours are all different."""
    count = int(random.integers(3, 5))
    choices = layouts(count, held_out)
    cells = random.permutation(choices[random.integers(len(choices))])
    shapes, colours = random.permutation(SHAPES)[:count], random.permutation(list(COLOURS))[:count]
    ground = random.integers(150, 256, 3) + random.normal(0, 8, (SIDE, SIDE, 3))
    image = Image.fromarray(ground.clip(0, 255).astype(np.uint8))
    things = []
    for cell, shape, colour in zip(cells, shapes, colours):
        size = int(random.integers(44, CELL - 6))
        left, top = (int(place * CELL + random.integers(0, CELL - size)) for place in (cell % 3, cell // 3))
        thing = Thing(str(shape), str(colour), (left, top, left + size, top + size))
        draw(ImageDraw.Draw(image), thing)
        things.append(thing)
    return image, things


def draw(canvas: ImageDraw.ImageDraw, thing: Thing) -> None:
    left, top, right, bottom = thing.box
    middle, third, fill = (left + right) // 2, (right - left) // 3, COLOURS[thing.colour]
    if thing.shape == "circle":
        canvas.ellipse(thing.box, fill=fill)
    elif thing.shape == "ring":
        canvas.ellipse(thing.box, outline=fill, width=third // 2)
    elif thing.shape == "square":
        canvas.rectangle(thing.box, fill=fill)
    elif thing.shape == "triangle":
        canvas.polygon([(middle, top), (right, bottom), (left, bottom)], fill=fill)
    elif thing.shape == "bar":
        canvas.rectangle((left, top + third, right, bottom - third), fill=fill)
    else:
        canvas.rectangle((left, top + third, right, bottom - third), fill=fill)
        canvas.rectangle((left + third, top, right - third, bottom), fill=fill)


def captions(random: np.random.Generator, things: list[Thing], count: int = 5) -> list[str]:
    """Captions that name the objects in random order, so that positions in caption and image are independent."""
    found = []
    for _ in range(count):
        names = [f"a {things[i].colour} {things[i].shape}" for i in random.permutation(len(things))]
        found.append(" , ".join(names[:-1]) + f" and {names[-1]}")
    return found


def write_scenes(path: Path, count: int, seed: int) -> None:
    def rows() -> Iterator[dict[str, Any]]:
        random = np.random.default_rng(seed)
        for number in range(count):
            image, things = scene(random, held_out=False)
            buffer = io.BytesIO()
            image.save(buffer, format="PNG")
            yield {
                "image": {"bytes": buffer.getvalue(), "path": None},
                "captions": captions(random, things),
                "image_id": str(number),
            }

    Dataset.from_list(list(rows())).to_parquet(str(path))


def train(kind: str, seed: int, args: argparse.Namespace, scenes: Path) -> Path:
    """Train a captioner on generated scenes; an interrupted run is resumed."""
    folder = args.runs / f"{kind}-seed{seed}"
    if (folder / "metrics.json").exists():
        return folder
    options = {
        "config": "flickr8k_mobilenet_v2_decoder.yaml",
        "train_file": scenes,
        "backbone_weights": args.backbone_weights,
        "feature_cache": args.runs,
        "output_dir": folder,
        "model_config": json.dumps({**HALF_WIDTH, "word_attention": kind, "alpha_c": args.alpha_c, "label_smoothing": 0.0}),
        "min_count": 1,
        "seed": seed,
        "num_train_epochs": args.epochs,
        "predict_with_generate": False,
        "use_cpu": True,
        "bf16": True,
        "resume_from_checkpoint": "last",
        "disable_tqdm": True,
    }
    words = [word for name, value in options.items() for word in (f"--{name}", str(value))]
    subprocess.run([sys.executable, "-m", "hf_attncap.training.train", *words], cwd=ROOT, check=True)
    return folder


def point(folder: Path, count: int, seed: int) -> dict[str, float | None]:
    """Play the game with a captioner on `count` test scenes; values are None if it names no shape of a scene."""
    from hf_attncap import Captioner

    captioner = Captioner.from_pretrained(folder)
    random = np.random.default_rng(seed)
    scenes = [scene(random, held_out=True) for _ in range(count)]
    hits, importance_hits, chances, named, total, sharpness = [], [], [], 0, 0, []
    for start in range(0, count, 50):
        part = scenes[start : start + 50]
        for (_, things), result in zip(part, captioner.explain([image for image, _ in part], batch_size=50)):
            places = {thing.shape: thing for thing in things}
            total += len(things)
            assert result.attention is not None and result.importance is not None
            pairs = dict(zip(result.words[1:], zip(result.words, result.attention[1:], result.importance[1:])))
            for shape, (colour, weights, falls) in pairs.items():
                if shape not in places:
                    continue
                named += places[shape].colour == colour
                inside = within(places[shape].box, weights.shape)
                hits.append(bool(inside.flat[weights.argmax()]))
                importance_hits.append(bool(inside.flat[falls.argmax()]))
                chances.append(inside.mean())
                sharpness.append(weights.max() * weights.size)
    return {
        "hits": _mean(hits),
        "importance_hits": _mean(importance_hits),
        "chance": _mean(chances),
        "shapes": len(hits) / total,
        "shapes_with_colour": named / total,
        "peak_times_even": _mean(sharpness),
    }


def _mean(values: list[Any]) -> float | None:
    return float(statistics.fmean(values)) if values else None


def within(box: Sequence[float], grid: tuple[int, ...]) -> np.ndarray:
    """The regions of the grid (H, W) whose centres lie in a box (left, top, right, bottom) in pixels."""
    y, x = ((np.arange(size) + 0.5) * SIDE / size for size in grid)
    left, top, right, bottom = box
    return ((y >= top) & (y <= bottom))[:, None] & ((x >= left) & (x <= right))[None]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--backbone_weights", required=True)
    parser.add_argument("--runs", required=True, type=Path, help="folder for scenes, cached features and checkpoints")
    parser.add_argument("--output", type=Path, help="file for the results, as JSON")
    parser.add_argument("--seeds", type=int, nargs="+", default=[1, 2, 3])
    parser.add_argument("--scenes", type=int, default=3000)
    parser.add_argument("--tests", type=int, default=500)
    parser.add_argument("--epochs", type=float, default=6)
    parser.add_argument("--alpha_c", type=float, default=1.0)
    args = parser.parse_args()
    args.runs.mkdir(parents=True, exist_ok=True)
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(message)s")
    scenes = args.runs / f"scenes-{args.scenes}.parquet"
    if not scenes.exists():
        write_scenes(scenes, args.scenes, seed=0)
    found = []
    for seed in args.seeds:
        for kind in KINDS:
            scores = point(train(kind, seed, args, scenes), args.tests, seed=1_000)
            logger.info("%s, seed %d: %s", kind, seed, {name: value and round(value, 3) for name, value in scores.items()})
            found.append({"word_attention": kind, "seed": seed, **scores})
    if args.output:
        settings = {name: getattr(args, name) for name in ("scenes", "tests", "epochs", "alpha_c")}
        write_json(args.output, {"date": datetime.now(UTC).date().isoformat(), **settings, "runs": found})


if __name__ == "__main__":
    try:
        main()
    except subprocess.CalledProcessError as error:
        sys.exit(error.returncode)  # training printed the error
