"""Functions that the speed scripts share: options, the machine, times of candidates, tables and JSON files.

A script runs several candidates, for example one model in two data types, and compares their times. This module does not import
torch, because a script may measure the memory that torch needs.
"""

import argparse
import math
import os
import platform
import random
import re
import shlex
import statistics
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from datetime import UTC, datetime
from importlib import metadata
from pathlib import Path
from typing import Any

from hf_attncap.atomic import write_json

ROOT = Path(__file__).parent.parent.parent
FLAGS = ("avx2", "avx512f", "avx512_vnni", "avx512_bf16", "avx_vnni", "amx_bf16", "amx_int8")
PACKAGES = ("hf_attncap", "torch", "torchvision", "transformers", "onnxruntime", "openvino", "numpy", "pillow")
ROUNDS, QUICK_ROUNDS = 7, 5
SECONDS, QUICK_SECONDS = 0.3, 0.05  # the calls of a candidate in one round take at least this long
MAX_CALLS = 50  # per round
NOT_MEASURED = "not measured"
Candidate = Callable[[], Any]
Row = dict[str, Any]


def create_parser(description: str | None, file: str) -> argparse.ArgumentParser:
    """A parser with the options that all scripts have. `file` is the file of the script."""
    program = f"python -m benchmarks.speed.{Path(file).stem}"
    parser = argparse.ArgumentParser(prog=program, description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="fewer cases and shorter runs")
    parser.add_argument("--rounds", type=int, help=f"rounds of measurements (default: {ROUNDS}, with --quick {QUICK_ROUNDS})")
    parser.add_argument("--device", default="cpu", help="cpu or cuda (default: %(default)s)")
    parser.add_argument("--threads", type=int, help="threads of torch (default: all cores)")
    parser.add_argument("--output", type=Path, help="file for the results, as JSON")
    return parser


def parse_options(parser: argparse.ArgumentParser, argv: Sequence[str] | None) -> argparse.Namespace:
    """The options of a script, with the defaults that depend on others, its command line and the load of the machine."""
    words = list(sys.argv[1:] if argv is None else argv)
    args = parser.parse_args(words)
    args.command = f"{parser.prog} {shlex.join(Path(word).name if word.startswith('/') else word for word in words)}".strip()
    args.rounds = args.rounds or (QUICK_ROUNDS if args.quick else ROUNDS)
    args.seconds = QUICK_SECONDS if args.quick else SECONDS
    args.load_before = os.getloadavg()[0]
    if args.threads and "torch" in sys.modules:  # a script without it passes the number to its processes
        import torch

        torch.set_num_threads(args.threads)
    return args


def describe_machine(device: str = "cpu") -> dict[str, Any]:
    """The processor, the cores that this process may use, the instructions of `FLAGS`, the memory, and the name of the GPU."""
    about = Path("/proc/cpuinfo")
    text = about.read_text() if about.exists() else ""
    name = re.search(r"^model name\s*: (.+)$", text, flags=re.M)
    flags = re.search(r"^flags\s*: (.+)$", text, flags=re.M)
    found = {
        "cpu": name[1] if name else platform.processor() or platform.machine(),
        "cores": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count(),
        "instructions": [flag for flag in FLAGS if flags and flag in flags[1].split()],
        "memory_gib": round(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30, 1),
        "system": platform.system(),
    }
    if device != "cpu":
        import torch

        found["gpu"] = torch.cuda.get_device_name(device)
    return found


def versions() -> dict[str, str]:
    """The versions of Python and of those `PACKAGES` that are installed."""
    installed = {distribution.metadata["Name"].lower().replace("-", "_") for distribution in metadata.distributions()}
    return {"python": platform.python_version(), **{name: metadata.version(name) for name in PACKAGES if name in installed}}


def time_candidates(candidates: Mapping[str, Candidate], args: argparse.Namespace) -> dict[str, dict[str, float]]:
    """Milliseconds per call of each candidate: median, minimum and maximum over the rounds, and the median of the CPU time.

    Each round runs all candidates, in random order, so that a change in the machine's load affects all of them. Each candidate
    first runs once untimed, because the others have displaced its data and kernels from the caches.
    """
    synchronize = _synchronizer(args.device)
    calls = {}
    for name, candidate in candidates.items():
        candidate()  # the first call compiles and allocates
        synchronize()
        start = time.perf_counter()
        candidate()
        synchronize()
        spent = time.perf_counter() - start
        calls[name] = max(1, min(MAX_CALLS, math.ceil(args.seconds / spent)))
    wall: dict[str, list[float]] = {name: [] for name in candidates}
    cpu: dict[str, list[float]] = {name: [] for name in candidates}
    generator = random.Random(0)
    for _ in range(args.rounds):
        for name in generator.sample(list(candidates), len(candidates)):
            candidates[name]()
            synchronize()
            start = time.perf_counter(), time.process_time()
            for _ in range(calls[name]):
                candidates[name]()
            synchronize()
            wall[name].append(1000 * (time.perf_counter() - start[0]) / calls[name])
            cpu[name].append(1000 * (time.process_time() - start[1]) / calls[name])
    return {name: summary(times) | {"cpu_ms": round(statistics.median(cpu[name]), 3)} for name, times in wall.items()}


def summary(times: Sequence[float]) -> dict[str, float]:
    """The median, minimum and maximum of times in milliseconds."""
    return {"ms": round(statistics.median(times), 3), "lowest_ms": round(min(times), 3), "highest_ms": round(max(times), 3)}


def _synchronizer(device: str) -> Callable[[], Any]:
    """A function that waits until the device has finished its work."""
    if device == "cpu":
        return lambda: None
    import torch

    return lambda: torch.cuda.synchronize(device)


def markdown_table(columns: Mapping[str, str], rows: Sequence[Row]) -> str:
    """A Markdown table of rows. `columns` maps field names to headings."""
    lines = ["| " + " | ".join(columns.values()) + " |"]
    lines.append("|" + "|".join("---:" if _is_number(rows, name) else "---" for name in columns) + "|")
    lines += ["| " + " | ".join(format_value(row.get(name)) for name in columns) + " |" for row in rows]
    return "\n".join(lines)


def _is_number(rows: Sequence[Row], name: str) -> bool:
    return all(isinstance(row.get(name), (int, float, type(None))) for row in rows)


def format_value(value: Any) -> str:
    """The text of a table cell: floats with three significant digits, integers and text unchanged, nothing for None."""
    if value is None:
        return ""
    if not isinstance(value, float):
        return f"{value:,}" if isinstance(value, int) else str(value)
    if not value:
        return "0"
    digits = max(0, 2 - math.floor(math.log10(abs(value))))
    return f"{value:,.{min(digits, 3)}f}"


def report(args: argparse.Namespace, columns: Mapping[str, str], rows: Sequence[Row], **more: Any) -> None:
    """Print the machine, the versions and the table. Write them to `--output`, with all fields of the rows and `more`."""
    import torch

    found = {
        "command": args.command,
        "date": datetime.now(UTC).date().isoformat(),
        "machine": describe_machine(args.device),
        "versions": versions(),
        "device": args.device,
        "threads": torch.get_num_threads(),
        "rounds": args.rounds,
        "load": [round(args.load_before, 2), round(os.getloadavg()[0], 2)],
        **more,
        "columns": dict(columns),
        "rows": list(rows),
    }
    print(describe_run(found) + "\n\n" + markdown_table(columns, rows) + "\n", flush=True)
    if args.output:
        write_json(args.output, found)


def describe_run(found: dict[str, Any]) -> str:
    """The machine, the versions, the number of rounds and the load in one line."""
    machine, packages = found["machine"], found["versions"]
    named = ", ".join(f"{name} {packages[name]}" for name in packages if name not in ("numpy", "pillow", "torchvision"))
    device = machine.get("gpu") or f"{machine['cpu']} ({', '.join(machine['instructions'])})"
    return (
        f"{device}, {machine['cores']} cores, {found['threads']} threads; {named}; "
        f"medians of {found['rounds']} interleaved rounds; load {found['load'][0]} to {found['load'][1]}"
    )
