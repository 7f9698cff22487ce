"""How long does one caption take from the shell, including start-up, and how much memory does it need?

    python -m benchmarks.speed.startup_memory --exported runs/int8 --output startup_memory.json

Each run is a new process. The first round is not counted, so the files are in the page cache. Memory is the peak resident set size
of the process.
"""

import os
import random
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path

from .inputs import exported_name, find_photographs
from .measure import Row, create_parser, parse_options, report, summary

COLUMNS = {"name": "command", "seconds": "s", "memory_mib": "peak memory, MiB", "times_as_fast": "times as fast as the checkpoint"}
CAPTION_COMMAND = "attncap caption photo.jpg"
IMPORT_COMMAND = 'python -c "import torch, transformers"'


def run(command: Sequence[str], threads: int | None) -> tuple[float, float]:
    """Milliseconds and peak memory in MiB of a command."""
    more = {} if threads is None else {"OMP_NUM_THREADS": str(threads)}
    with tempfile.TemporaryFile("w+") as errors:
        start = time.perf_counter()
        process = subprocess.Popen(
            command, stdout=subprocess.DEVNULL, stderr=errors, env={**os.environ, "HF_HUB_OFFLINE": "1", **more}
        )
        _, status, usage = os.wait4(process.pid, 0)
        spent = 1000 * (time.perf_counter() - start)
        process.returncode = os.waitstatus_to_exitcode(status)
        errors.seek(0)
        if process.returncode:
            sys.exit(f"{' '.join(command)} failed: {errors.read()[-2000:]}")
    return spent, usage.ru_maxrss / 1024


def main(argv: Sequence[str] | None = None) -> None:
    options = create_parser(__doc__, __file__)
    options.add_argument("--checkpoint", type=Path, help="default: the released checkpoint")
    options.add_argument("--exported", type=Path, nargs="*", default=[], help="exported folders of the checkpoint")
    options.add_argument("--photographs", type=Path, help="a folder; its first photograph is used (default: from scikit-image)")
    args = parse_options(options, argv)
    python = sys.executable
    caption = [python, "-m", "hf_attncap", "caption", str(find_photographs(args.photographs)[0])]
    model = ["--model", str(args.checkpoint)] if args.checkpoint else []
    commands = {IMPORT_COMMAND: [python, "-c", "import torch, transformers"]}
    commands[CAPTION_COMMAND] = [*caption, *model]
    for exported in args.exported:
        commands[f"{CAPTION_COMMAND} --model {exported_name(exported)}"] = [*caption, "--model", str(exported)]
    times: dict[str, list[float]] = {name: [] for name in commands}
    memory: dict[str, list[float]] = {name: [] for name in commands}
    generator = random.Random(0)
    for number in range(args.rounds + 1):
        for name in generator.sample(list(commands), len(commands)):
            spent, peak = run(commands[name], args.threads)
            if number:  # the first round reads the files into the page cache
                times[name].append(spent)
                memory[name].append(peak)
    rows: list[Row] = []
    reference = statistics.median(times[CAPTION_COMMAND])
    for name, found in times.items():
        seconds = {"seconds": round(statistics.median(found) / 1000, 3), "memory_mib": round(statistics.median(memory[name]))}
        ratio = round(reference / statistics.median(found), 3)
        rows.append({"name": name, **summary(found), **seconds, "times_as_fast": ratio})
    report(args, COLUMNS, rows)


if __name__ == "__main__":
    main()
