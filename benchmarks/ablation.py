"""What does each part of the model contribute? Trains, scores and compares a run per row of `ablation.yaml` and seed.

    python -m benchmarks.ablation --train_file train.parquet --validation_file validation.parquet \
        --backbone_weights mobilenet_v2.safetensors --runs runs/ablation --results model_card/results/ablation

Interrupted runs are resumed and existing results kept, so the command can be repeated until all rows are done. `--table` prints a
table of the results so far. With `--grammar`, it has a column for the share of captions that parse, from `grammar.py`.
"""

import argparse
import json
import logging
import statistics
import subprocess
import sys
import time
from collections.abc import Iterator
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import yaml
from hf_attncap.model_card.measure import caption, commit
from hf_attncap.training.arguments import DataArguments, SettingError
from hf_attncap.training.data.splits import load_data
from hf_attncap.training.settings import CONFIGS

from hf_attncap import Captioner
from hf_attncap.atomic import write_json
from hf_attncap.metrics import CaptionMetrics
from hf_attncap.metrics.score import CaptionScores
from hf_attncap.metrics.significance import Comparison, means, paired_bootstrap

ROOT = Path(__file__).parents[1]
PLAN = Path(__file__).with_suffix(".yaml")
ROW_FIELDS = {"what", "against", "seeds"}  # the other fields of a row are settings of its runs
SCORES = ("bleu_1", "bleu_4", "cider", "bad_endings", "repeated_words", "vocabulary")
TIMES_100 = {"bleu_1", "bleu_4", "cider", "bad_endings", "repeated_words", "full_parse"}

logger = logging.getLogger(__name__)


class Row(NamedTuple):
    """A row of the table. `settings` are those of the base configuration with the changes of the row."""

    name: str
    what: str
    against: str | None
    seeds: list[int]
    settings: dict[str, Any]


def read_plan() -> list[Row]:
    plan = yaml.safe_load(PLAN.read_text(encoding="utf-8"))
    base = yaml.safe_load((CONFIGS / plan["base"]).read_text(encoding="utf-8"))
    rows = []
    for name, row in plan["rows"].items():
        own = {key: value for key, value in row.items() if key not in ROW_FIELDS}
        model = {**base["model_config"], **plan.get("model_config", {}), **row.get("model_config", {})}
        settings = {**base, **plan["settings"], **own, "model_config": model}
        rows.append(Row(name, row["what"], row.get("against"), row.get("seeds", plan["seeds"]), settings))
    return rows


def runs(rows: list[Row]) -> Iterator[tuple[Row, int]]:
    """The first seed of all rows, then the second and so on, so that every row has a result early."""
    for place in range(max(len(row.seeds) for row in rows)):
        yield from ((row, row.seeds[place]) for row in rows if place < len(row.seeds))


def run(row: Row, seed: int, args: argparse.Namespace) -> dict[str, Any]:
    """Train a run, caption the validation images and score the captions; returns the content of its results file."""
    folder = Path(args.runs) / f"{row.name}-seed{seed}"
    folder.mkdir(parents=True, exist_ok=True)
    config = folder / "settings.yaml"
    config.write_text(yaml.safe_dump(row.settings), encoding="utf-8")
    files = {name: getattr(args, name) for name in ("train_file", "validation_file", "backbone_weights")}
    options = {**files, "feature_cache": args.runs, "output_dir": folder, "seed": seed, "resume_from_checkpoint": "last"}
    start = time.monotonic()
    if not (folder / "metrics.json").exists():
        words = [word for name, value in options.items() for word in (f"--{name}", str(value))]
        command = [sys.executable, "-m", "hf_attncap.training.train", "--config", str(config), "--disable_tqdm", "true", *words]
        subprocess.run(command, cwd=ROOT, check=True)
    seconds = time.monotonic() - start
    rows = load_data(DataArguments(train_file=args.validation_file)).train
    captions, scores, _ = caption(Captioner.from_pretrained(folder), rows)
    log = json.loads((folder / "trainer_state.json").read_text(encoding="utf-8"))["log_history"]
    return {
        "row": row.name,
        "seed": seed,
        "settings": row.settings,
        "commit": commit(),
        "date": datetime.now(UTC).date().isoformat(),
        "seconds_of_the_last_start": round(seconds),
        "scores": {name: float(value) for name, value in scores.items()},
        "loss": [{"step": entry["step"], "loss": round(entry["loss"], 4)} for entry in log if "loss" in entry],
        "captions": captions,
    }


def table(rows: list[Row], results: Path, validation_file: str, grammar: Path | None) -> str:
    """A Markdown table: mean and range over the seeds, and the CIDEr difference to the row `against` with its 95 % interval."""
    images = load_data(DataArguments(train_file=validation_file)).train
    metrics = CaptionMetrics(dict(zip(images["image_id"], images["captions"])))
    files = {row.name: _files(row, results) for row in rows}
    scores = {name: [metrics.score(json.loads(file.read_text("utf-8"))["captions"]) for file in own] for name, own in files.items()}
    if not any(files.values()):
        sys.exit(f"error: {results} has no results of the rows of ablation.yaml; train them without --table.")
    names = [*SCORES, "full_parse"] if grammar else SCORES
    parsed = json.loads(grammar.read_text("utf-8"))["results"] if grammar else {}
    lines = [
        "| row | what | seeds | " + " | ".join(name.replace("_", " ") for name in names) + " | CIDEr against | p |",
        "|---|---|---|" + "---|" * len(names) + "---|---|",
    ]
    for row in rows:
        if not scores[row.name]:
            continue
        values = [_spread(name, [score[name] for score in scores[row.name]]) for name in SCORES]
        if grammar:
            if missing := [file.stem for file in files[row.name] if file.stem not in parsed]:
                sys.exit(f"error: {grammar} has no results of {', '.join(missing)}; run grammar.py on all results files")
            values.append(_spread("full_parse", [parsed[file.stem]["full_parse"] for file in files[row.name]]))
        difference = ["", ""]
        if row.against and scores[row.against]:
            found = against(scores[row.against], scores[row.name])
            interval = f"{100 * found.low:+.1f} to {100 * found.high:+.1f}"
            difference = [
                f"{row.against}: {100 * found.difference:+.1f} ({interval})",
                f"{found.p:.3f}" if found.p >= 0.0005 else "< 0.001",
            ]
        lines.append("| " + " | ".join([row.name, row.what, str(len(scores[row.name])), *values, *difference]) + " |")
    return "\n".join(lines)


def against(first: list[CaptionScores], second: list[CaptionScores]) -> Comparison:
    """Compare CIDEr of two rows by the paired bootstrap, with each image's CIDEr averaged over the seeds."""
    averaged = [np.mean([score.per_image["cider"] for score in scores], axis=0) for scores in (first, second)]
    return paired_bootstrap(*([means({"cider": cider})] for cider in averaged))["cider"]


def _files(row: Row, results: Path) -> list[Path]:
    files = [results / f"{row.name}-seed{seed}.json" for seed in row.seeds]
    return [file for file in files if file.exists()]


def _spread(name: str, values: list[float]) -> str:
    scale = 100 if name in TIMES_100 else 1
    middle = f"{scale * statistics.mean(values):.1f}"
    return middle if len(values) == 1 else f"{middle} ({scale * min(values):.1f} to {scale * max(values):.1f})"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--train_file")
    parser.add_argument("--validation_file", required=True)
    parser.add_argument("--backbone_weights")
    parser.add_argument("--runs", help="folder for checkpoints and cached features")
    parser.add_argument("--results", required=True, type=Path, help="folder with a JSON file per run")
    parser.add_argument("--only", nargs="*", help="rows to run; default: all")
    parser.add_argument("--table", action="store_true", help="print the table; do not train")
    parser.add_argument("--grammar", type=Path, help="output of grammar.py, for a column of the table")
    args = parser.parse_args()
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(message)s")
    rows = read_plan()
    if args.table:
        print(table(rows, args.results, args.validation_file, args.grammar))
        return
    args.results.mkdir(parents=True, exist_ok=True)
    for row, seed in runs([row for row in rows if not args.only or row.name in args.only]):
        file = args.results / f"{row.name}-seed{seed}.json"
        if not file.exists():
            logger.info("%s, seed %d", row.name, seed)
            found = run(row, seed, args)
            write_json(file, found)
            logger.info("%s, seed %d: CIDEr %.1f", row.name, seed, 100 * found["scores"]["cider"])


if __name__ == "__main__":
    try:
        main()
    except subprocess.CalledProcessError as error:
        sys.exit(error.returncode)  # training printed the error
    except (OSError, SettingError) as error:
        sys.exit(f"error: {error}")
