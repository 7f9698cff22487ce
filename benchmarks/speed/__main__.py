"""Runs all speed scripts one after the other, without the largest models. Each script writes a JSON file.

    python -m benchmarks.speed --exported runs/float32 runs/int8 --output_dir model_card/results/speed
    python -m benchmarks.speed.pages --write        # then the tables of README.md and docs/speed.md

ResNet-152 is measured by `python -m benchmarks.speed.encoder` and `python -m benchmarks.speed.end_to_end --backbones resnet152`.
"""

import argparse
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path

SCRIPTS = ("startup_memory", "end_to_end", "decoding", "encoder", "scaling", "training")
TAKE_EXPORTED = ("startup_memory", "end_to_end", "encoder")  # scripts with the option --exported
ENCODER_BACKBONES = ["--backbones", "mobilenet_v3_large", "resnet50"]


def commands(args: argparse.Namespace) -> list[list[str]]:
    """The command of each script. Each script is a process of its own, so that scripts do not share memory and threads."""
    found = []
    for script in args.only or SCRIPTS:
        words = [sys.executable, "-m", f"benchmarks.speed.{script}", "--device", args.device]
        words += ["--quick"] if args.quick else []
        words += ["--exported", *map(str, args.exported)] if args.exported and script in TAKE_EXPORTED else []
        words += ENCODER_BACKBONES if script == "encoder" else []
        found.append([*words, "--output", str(args.output_dir / f"{script}.json")])
    return found


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="fewer cases and shorter runs")
    parser.add_argument("--device", default="cpu", help="cpu or cuda (default: %(default)s)")
    parser.add_argument("--exported", type=Path, nargs="*", default=[], help="exported folders of the released checkpoint")
    parser.add_argument("--only", nargs="*", choices=SCRIPTS, help="scripts to run (default: all)")
    parser.add_argument("--output_dir", type=Path, required=True, help="folder for the JSON files")
    args = parser.parse_args(argv)
    args.output_dir.mkdir(parents=True, exist_ok=True)
    for command in commands(args):
        start = time.monotonic()
        print(f"## {command[2].rpartition('.')[2]}\n", flush=True)
        subprocess.run(command, check=True)
        print(f"({time.monotonic() - start:.0f} s)\n", flush=True)


if __name__ == "__main__":
    main()
