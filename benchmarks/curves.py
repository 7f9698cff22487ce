"""Plot the training loss (or the reward of self-critical training) and the validation CIDEr of runs.

    python benchmarks/curves.py runs/decoder runs/encoder runs/self_critical --output curves.png --log training_log.json

Each folder is the output of a run, with its `trainer_state.json`. `--log` writes the plotted data as JSON.
"""

import argparse
import json
import sys
from pathlib import Path
from typing import Any

from hf_attncap.training.checkpoints.record import LOGGED
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from hf_attncap.atomic import atomic_write, write_json


def read_log(folder: Path) -> list[dict[str, Any]]:
    """The log entries of a run, with `step` and the values that training records keep."""
    history = json.loads((folder / "trainer_state.json").read_text(encoding="utf-8"))["log_history"]
    entries = [{name: round(entry[name], 5) for name in ("step", *LOGGED) if name in entry} for entry in history]
    return [entry for entry in entries if len(entry) > 1]


def plot(name: str, log: list[dict[str, Any]], above: Axes, below: Axes) -> None:
    objective = "reward" if any("reward" in entry for entry in log) else "loss"
    for axes, curves in ((above, (objective, f"eval_{objective}")), (below, ("eval_cider",))):
        for curve in curves:
            # The first entry of a step counts: a run ends with an evaluation of its best weights, logged at the last step.
            points = {entry["step"]: entry[curve] for entry in reversed(log) if curve in entry}
            if points:
                scale = 100 if curve == "eval_cider" else 1
                label = curve.replace("eval_", "validation ").replace("cider", "CIDEr").replace("reward", "reward of samples")
                axes.plot(
                    *zip(*((step, scale * value) for step, value in sorted(points.items()))),
                    marker="." * curve.startswith("eval"),
                    label=label,
                )
        if axes.lines:
            axes.legend()
        axes.grid(alpha=0.3)
    above.set_title(name)
    below.set_xlabel("step")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folders", nargs="+", type=Path)
    parser.add_argument("--output", required=True, type=Path, help="image file of the plot")
    parser.add_argument("--log", type=Path)
    args = parser.parse_args()
    logs = {folder.name: read_log(folder) for folder in args.folders}
    figure = Figure((4.5 * len(logs), 5.5), layout="constrained")
    axes = figure.subplots(2, len(logs), squeeze=False)
    for place, (name, log) in enumerate(logs.items()):
        plot(name, log, *axes[:, place])
    with atomic_write(args.output, "wb") as file:
        figure.savefig(file, format=args.output.suffix[1:], dpi=100)
    if args.log:
        write_json(args.log, logs)


if __name__ == "__main__":
    try:
        main()
    except OSError as error:
        sys.exit(f"error: {error}")
