"""`results.json`: the scores and errors of a checkpoint on sets of captioned images, for its card and for comparisons."""

import json
import os
import statistics
import subprocess
import time
from collections.abc import Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import torch
import transformers
from hf_attncap.training.arguments import DataArguments, SettingError
from hf_attncap.training.checkpoints.record import hardware
from hf_attncap.training.data.splits import load_data
from tqdm.auto import tqdm

from hf_attncap import Captioner
from hf_attncap.atomic import write_json
from hf_attncap.hub import RESULTS
from hf_attncap.metrics import CaptionMetrics, CaptionScores, tokenize
from hf_attncap.visualize import is_own_plot, save_plot

from .error_analysis import analyse_errors

BATCH = 32
TIMED, WARM_UP = 20, 3  # images, one at a time
INTERVALS = ("bleu_4", "cider")
DECODING = ("num_beams", "max_new_tokens", "length_penalty", "no_repeat_ngram_size", "repetition_penalty")


def update_results(
    checkpoint: str | Path, files: Sequence[str], split: str | None, image_dir: str | None, pictures: Sequence[str]
) -> None:
    """Measure a checkpoint on `files`, plot `pictures`, and update its `results.json`.

    Plots of an earlier call that the card no longer shows are removed.

    Raises:
        SettingError, OSError, hf_attncap.images.ImageError: as `measure` and `plot_pictures`; `results.json` is then unchanged.
    """
    folder = Path(checkpoint)
    results = _read_results(folder / RESULTS, measured_again=bool(files))
    earlier = _own_plots(folder, results)
    plots = _plot_files(folder, pictures)
    captioner = Captioner.from_pretrained(folder)
    if pictures:
        results["pictures"] = plot_pictures(captioner, pictures, plots)
    if files:
        results |= measure(captioner, files, split, image_dir)
    write_json(folder / RESULTS, results)
    for name in earlier - {picture["file"] for picture in results.get("pictures", [])}:
        (folder / name).unlink()


def measure(captioner: Captioner, files: Sequence[str], split: str | None = None, image_dir: str | None = None) -> dict[str, Any]:
    """Caption sets of images with the checkpoint's own generation settings, score the captions and measure the time.

    Unreadable images are skipped, with a warning that names them.

    Args:
        captioner: the captioner to measure.
        files: sets of captioned images, each in any format that training reads.
        split: of files with several splits.
        image_dir: base folder of relative image paths. Default: the folder of the file.

    Returns:
        The content of `results.json`, except `pictures`: `sets` as in `measure_set`, in the order of the files, `decoding`,
        `tokenizer`, `speed` (on images of the first file), `commit` of the code or None, `versions` and `date`.

    Raises:
        SettingError: data cannot be read, or a file is given twice.
    """
    names = name_sets(files)
    rows = [captioned_images(file, split, image_dir) for file in files]
    return {
        "decoding": _decoding(captioner),
        "tokenizer": "PTB, as pycocoevalcap",
        "speed": speed(captioner, rows[0]),
        "commit": commit(),
        "versions": {"torch": torch.__version__, "transformers": transformers.__version__},
        "date": datetime.now(UTC).date().isoformat(),
        "sets": [measure_set(captioner, name, split, own) for name, own in zip(names, rows)],
    }


def measure_set(captioner: Captioner, name: str, split: str | None, rows: Any) -> dict[str, Any]:
    """Measure one set of rows with `image`, `image_id` and `captions`.

    Returns:
        `data`, `scores`, 95 % bootstrap `intervals` of some of them, `limits` (the error analysis), and by image id the `captions`,
        the first of the `references`, and the `cider`.
    """
    references = dict(zip(rows["image_id"], rows["captions"]))
    captions, scores, _ = caption(captioner, rows)
    cider = dict(zip(scores.ids, scores.per_image["cider"].tolist()))
    tokens = {id: [tokenize(reference) for reference in own] for id, own in references.items()}
    intervals = scores.intervals()
    return {
        "data": {"file": name, "split": split, "images": len(rows), "references": sum(map(len, references.values()))},
        "scores": {kind: float(value) for kind, value in scores.items()},
        "intervals": {kind: list(intervals[kind]) for kind in INTERVALS},
        "limits": analyse_errors({id: tokenize(text) for id, text in captions.items()}, tokens, cider),
        "captions": captions,
        "references": {id: own[0] for id, own in references.items()},
        "cider": {id: round(value, 4) for id, value in cider.items()},
    }


def name_sets(files: Sequence[str]) -> list[str]:
    """A name for each file: file name and folder, or the path as given if two of these are equal.

    Raises:
        SettingError: a file is given twice.
    """
    if len({Path(file).resolve() for file in files}) < len(files):
        raise SettingError(f"A file of captioned images is given twice ({', '.join(files)}): give each file once.")
    short = [Path(*Path(file).parts[-2:]).as_posix() for file in files]  # results are shared, so they hold no full paths
    return short if len(set(short)) == len(files) else list(files)


def _decoding(captioner: Captioner) -> dict[str, Any]:
    """The generation settings that matter for scores, with the words of repeatable tokens."""
    settings = captioner.model.generation_config.to_dict()
    decoding = {name: settings[name] for name in DECODING if settings.get(name) is not None}
    if (tokens := settings.get("repeatable_token_ids")) is not None:
        decoding["repeatable_words"] = " ".join(captioner.processor.tokenizer.convert_ids_to_tokens(tokens))
    return decoding


def captioned_images(file: str, split: str | None = None, image_dir: str | None = None) -> Any:
    """Rows with `image`, `image_id` and `captions` of a file in any format that training reads, without unreadable images."""
    return load_data(DataArguments(train_file=file, train_split=split, image_dir=image_dir, skip_broken_images=True)).train


def caption(captioner: Captioner, rows: Any) -> tuple[dict[str, str], CaptionScores, list[dict[str, float]]]:
    """Captions of rows with `image`, `image_id` and `captions`, with the model's own generation settings; scores and `signals`."""
    captions: dict[str, str] = {}
    signals: list[dict[str, float]] = []
    for start in tqdm(range(0, len(rows), BATCH), desc="captions", unit="batches", mininterval=10):
        batch = rows[start : start + BATCH]
        results = captioner.caption(batch["image"], batch_size=BATCH)
        captions |= zip(batch["image_id"], (result.text for result in results))
        signals += (result.signals for result in results)
    return captions, CaptionMetrics(dict(zip(rows["image_id"], rows["captions"]))).score(captions), signals


def speed(captioner: Captioner, rows: Any) -> dict[str, Any]:
    """Median milliseconds from a decoded image to its caption and attention, for up to 20 images, one at a time."""
    times = []
    for image in rows[: WARM_UP + TIMED]["image"]:
        start = time.perf_counter()
        captioner.caption(image)
        times.append(1000 * (time.perf_counter() - start))
    return {"ms": round(statistics.median(times[WARM_UP:] or times), 1), "hardware": hardware()}


def commit() -> str | None:
    """The commit of this code, with `-dirty` if files differ; None if this file is not part of a repository."""
    try:
        if not _git("ls-files", Path(__file__).name):
            return None
        return _git("describe", "--always", "--dirty", "--abbrev=40", "--exclude=*") or None
    except FileNotFoundError:
        return None


def _git(*command: str) -> str:
    """The output of a git command in the folder of this file; empty if it fails."""
    return subprocess.run(["git", *command], cwd=Path(__file__).parent, capture_output=True, text=True).stdout.strip()


def plot_pictures(captioner: Captioner, pictures: Sequence[str], plots: Sequence[Path]) -> list[dict[str, str]]:
    """Plot attention and importance of each picture to one of the JPEG files `plots`; returns its `file` name and `caption`.

    Raises:
        hf_attncap.images.ImageError: a picture cannot be read.
    """
    results = captioner.explain(list(pictures))
    for plot, result in zip(plots, results):
        save_plot(result.plot_importance(), plot)
    return [{"file": plot.name, "caption": result.text} for plot, result in zip(plots, results)]


def _plot_files(folder: Path, pictures: Sequence[str]) -> list[Path]:
    """The files for the plots of pictures in a checkpoint's folder.

    Raises:
        SettingError: two pictures have the same name, or one of the files exists and is not a plot.
    """
    plots = [folder / f"picture_{Path(picture).stem}.jpg" for picture in pictures]
    if len(set(plots)) < len(plots):
        names = ", ".join(sorted(plot.name for plot in plots))
        raise SettingError(f"Plots of pictures with the same name would replace each other ({names}): rename one picture.")
    for plot in plots:
        if os.path.lexists(plot) and not is_own_plot(plot):
            raise SettingError(f"{plot} was not written by `attncap card`, which would replace it: move it away.")
    return plots


def _read_results(file: Path, measured_again: bool) -> dict[str, Any]:
    """The results of an earlier `attncap card`, or only their pictures if the checkpoint is measured again."""
    if not file.exists():
        return {}
    try:
        results = json.loads(file.read_text(encoding="utf-8"))
    except ValueError:
        results = None
    if not isinstance(results, dict) or not results.keys() & {"pictures", "sets"}:
        raise SettingError(f"{file} was not written by `attncap card`, which would replace it: move it away.")
    if measured_again:
        return {"pictures": results["pictures"]} if "pictures" in results else {}
    return results


def _own_plots(folder: Path, results: dict[str, Any]) -> set[str]:
    """The names of the plots that an earlier `attncap card` wrote to the folder."""
    names = {picture["file"] for picture in results.get("pictures", [])}
    return {name for name in names if Path(name).name == name and is_own_plot(folder / name)}
