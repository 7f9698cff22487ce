"""Does the memory of `attncap caption --output` stay flat over many images?

    python -m benchmarks.bulk_memory --images 50000 --output bulk_memory.json

It generates small images, captions them with a tiny random model, and notes the resident memory of the process as the number of
captions grows. The first row is taken after the first thousand images, when all libraries have allocated what they need.
"""

import argparse
import os
import shlex
import sys
import tempfile
import time
from collections.abc import Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image

from benchmarks.speed.measure import Row, describe_machine, markdown_table, versions
from benchmarks.speed.models import CHECKPOINT, force_length, random_model
from hf_attncap import AttnCapImageProcessor, AttnCapProcessor, Captioner
from hf_attncap.atomic import write_json
from hf_attncap.bulk import Target, Totals, caption_inputs, caption_to_target
from hf_attncap.inputs import find_inputs
from hf_attncap.writers import WRITERS
from hf_attncap.writers import Row as OutputRow

COLUMNS = {"images": "images", "memory_mib": "resident memory, MiB", "images_per_second": "images per second"}
TINY: dict[str, Any] = {"encoder_channels": 16, "hidden_size": 16, "attention_dim": 8}
IMAGES_PER_FOLDER = 1000


def make_images(folder: Path, count: int) -> None:
    """Writes `count` different PNG files of 32 x 32 pixels, in subfolders."""
    random = np.random.default_rng(0)
    for number in range(count):
        path = folder / f"{number // IMAGES_PER_FOLDER:04}" / f"{number:06}.png"
        path.parent.mkdir(exist_ok=True)
        blocks = Image.fromarray(random.integers(0, 256, (4, 4, 3), dtype=np.uint8))
        blocks.resize((32, 32), Image.Resampling.NEAREST).save(path, compress_level=1)


def tiny_captioner() -> Captioner:
    """A random captioner whose captions have four tokens."""
    model = random_model("mobilenet_v3_small", **TINY)
    force_length(model, 4)
    model.generation_config.update(num_beams=1, length_penalty=1.0)
    processor = AttnCapImageProcessor(size={"height": 32, "width": 32})
    return Captioner(model, AttnCapProcessor(processor, AttnCapProcessor.from_pretrained(CHECKPOINT).tokenizer))


def memory_mib() -> float:
    """The resident memory of this process."""
    return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE") / 2**20


def measure(folder: Path, args: argparse.Namespace) -> list[Row]:
    """Captions the images of a folder into a file beside it."""
    captioner, rows, start = tiny_captioner(), [], time.perf_counter()

    def report(row: OutputRow | None, totals: Totals) -> None:
        nonlocal start
        if row is not None and totals.images % args.every == 0:
            spent, start = time.perf_counter() - start, time.perf_counter()
            rate = round(args.every / spent, 1)
            rows.append({"images": totals.images, "memory_mib": round(memory_mib(), 1), "images_per_second": rate})
            print(rows[-1], file=sys.stderr, flush=True)

    output, writer = folder.with_name(f"captions.{args.format}"), WRITERS[args.format]()
    target = Target(output, output.with_name(f"{output.name}.attncap"), writer)
    writer.check()  # imports pyarrow before the first measurement
    options = {"batch_size": args.batch_size, "workers": args.workers, "attention": False}
    inputs = find_inputs([str(folder)])
    caption_to_target(target, inputs, {}, args.batch_size, lambda rest, _: caption_inputs(captioner, rest, **options), report)
    rows.append({"images": args.images, "memory_mib": round(memory_mib(), 1), "images_per_second": None, "what": "output written"})
    return rows


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--images", type=int, default=50_000, help="default: %(default)s")
    parser.add_argument("--every", type=int, default=1000, help="images between two measurements (default: %(default)s)")
    parser.add_argument("--format", choices=list(WRITERS), default="parquet", help="default: %(default)s")
    parser.add_argument("--batch-size", type=int, default=32, help="default: %(default)s")
    parser.add_argument("--workers", type=int, default=0, help="default: %(default)s")
    parser.add_argument("--output", type=Path, help="file for the results, as JSON")
    words = list(sys.argv[1:] if argv is None else argv)
    args = parser.parse_args(words)
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch) / "images"
        folder.mkdir()
        make_images(folder, args.images)
        rows = measure(folder, args)
    print(markdown_table(COLUMNS, rows))
    if args.output:
        found = {
            "command": f"python -m benchmarks.bulk_memory {shlex.join(words)}",
            "date": datetime.now(UTC).date().isoformat(),
            "machine": describe_machine(),
            "versions": versions(),
            "threads": torch.get_num_threads(),
            "columns": COLUMNS,
            "rows": rows,
        }
        write_json(args.output, found)


if __name__ == "__main__":
    main()
