"""How many images per second does `attncap caption FOLDER --output` caption, compared with other ways to caption a folder?

    python -m benchmarks.bulk_throughput photographs --output bulk_throughput.json

All candidates read the same files with the released checkpoint and its default decoding. Each round runs all candidates over all
files, in random order. Loading the model is not counted; walking the folder, decoding and writing the output are. The worker
processes start anew in each round, and that is counted.
"""

import random
import statistics
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from transformers import pipeline

from benchmarks.speed.inputs import exported_name
from benchmarks.speed.measure import Row, create_parser, parse_options, report
from hf_attncap import Captioner
from hf_attncap.bulk import Target, caption_inputs, caption_to_target
from hf_attncap.captioner import CHECKPOINT
from hf_attncap.inputs import find_inputs
from hf_attncap.writers import WRITERS

COLUMNS = {
    "name": "way",
    "engine": "engine",
    "batch": "batch",
    "workers": "workers",
    "images_per_second": "images per second",
    "times_as_fast": "times as fast as single calls",
}
SINGLE = "`Captioner.caption` for each file"
FOLDER = "`attncap caption FOLDER --output`"
PIPELINE = '`pipeline("image-captioning")`'
Candidate = Callable[[list[str]], Any]


def caption_folder(captioner: Captioner, folder: str, batch: int, workers: int) -> None:
    """What `attncap caption FOLDER --output captions.jsonl` does with a loaded model."""
    with tempfile.TemporaryDirectory() as scratch:
        output = Path(scratch) / "captions.jsonl"
        target = Target(output, output.with_name("journal"), WRITERS["jsonl"]())
        options = {"batch_size": batch, "workers": workers, "attention": False}
        totals = caption_to_target(
            target, find_inputs([folder]), {}, batch, lambda rest, _: caption_inputs(captioner, rest, **options), lambda *_: None
        )
    if totals.failed:
        raise ValueError(f"{totals.failed} images of {folder} cannot be captioned: give a folder of photographs.")


def make_candidates(args: Any, folder: str) -> list[tuple[Row, Candidate]]:
    """The rows and functions of all candidates. A function captions some files; those of folders caption all files in it."""
    captioner = Captioner.from_pretrained(args.checkpoint, device=args.device)
    loaded = {"torch float32": captioner} | {exported_name(path): Captioner.from_pretrained(path) for path in args.exported}
    found: list[tuple[Row, Candidate]] = []
    for engine, model in loaded.items():
        row = {"engine": engine, "batch": 1, "workers": 0}
        found.append(({"name": SINGLE, **row}, lambda files, model=model: [model.caption(file) for file in files]))
        for workers in args.workers:
            row = {"engine": engine, "batch": args.batch, "workers": workers}
            found.append(
                ({"name": FOLDER, **row}, lambda _, model=model, count=workers: caption_folder(model, folder, args.batch, count))
            )
    make: Any = pipeline  # its types do not know the tasks of other packages
    stock = make("image-captioning", model=str(args.checkpoint), device=args.device)
    for batch in (1, args.batch):
        row = {"name": PIPELINE, "engine": "torch float32", "batch": batch, "workers": 0}
        found.append((row, lambda files, size=batch: list(stock(files, batch_size=size))))
    return found


def main(argv: Sequence[str] | None = None) -> None:
    options = create_parser(__doc__, __file__)
    options.prog = "python -m benchmarks.bulk_throughput"
    options.add_argument("folder", type=Path, help="a folder of photographs")
    options.add_argument("--checkpoint", type=Path, default=CHECKPOINT, help="default: the released checkpoint")
    options.add_argument("--exported", type=Path, nargs="*", default=[], help="exported folders of the checkpoint")
    options.add_argument("--batch", type=int, default=32, help="images per batch (default: %(default)s)")
    options.add_argument("--workers", type=int, nargs="*", default=[0, 2], help="numbers of worker processes (default: 0 and 2)")
    args = parse_options(options, argv)
    files = [item.name for item in find_inputs([str(args.folder)])]
    candidates = make_candidates(args, str(args.folder))
    times: list[list[float]] = [[] for _ in candidates]
    generator = random.Random(0)
    for _, caption in candidates:
        caption(files[: args.batch])  # the first call allocates
    for _ in range(args.rounds):
        for number in generator.sample(range(len(candidates)), len(candidates)):
            start = time.perf_counter()
            candidates[number][1](files)
            times[number].append(time.perf_counter() - start)
    rows = [
        row | {"images": len(files), "seconds": [round(value, 3) for value in spent]} for (row, _), spent in zip(candidates, times)
    ]
    single = {row["engine"]: statistics.median(row["seconds"]) for row in rows if row["name"] == SINGLE}
    for row in rows:
        median = statistics.median(row["seconds"])
        row["images_per_second"] = round(len(files) / median, 2)
        row["times_as_fast"] = round(single[row["engine"]] / median, 3)
    report(args, COLUMNS, rows)


if __name__ == "__main__":
    main()
