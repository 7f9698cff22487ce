"""`results.json`: how good a finished captioner is, on sets of captioned images, for its card and for comparisons."""

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
from hf_attncap.atomic import atomic_write
from hf_attncap.metrics import CaptionMetrics, CaptionScores, tokenize
from hf_attncap.visualize import is_own_plot, save_plot

from .error_analysis import limits

RESULTS = "results.json"
BATCH = 32
TIMED = 20  # pictures, one by one
WARM_UP = 3
INTERVALS = ("bleu_4", "cider")
DECODING = ("num_beams", "max_new_tokens", "length_penalty", "no_repeat_ngram_size", "repetition_penalty")


def measure(checkpoint: str | Path, files: Sequence[str], split: str | None = None, image_dir: str | None = None) -> dict[str, Any]:
    """Captions sets of images with a checkpoint's own decoding settings, scores the captions and takes the time.

    Images that cannot be read are left out, with a warning that names them.

    Args:
        checkpoint: folder of a captioner.
        files: sets of captioned images, each in any format that training reads.
        split: of files that hold several.
        image_dir: where paths of images begin; default: the folder of the file.

    Returns:
        What `results.json` holds beside `pictures`: `sets` as `measure_set` gives them, in the order of the files, `decoding`,
        `tokenizer`, `speed` (on images of the first file), and what made them (`commit` of the code or None, `versions`, `date`).

    Raises:
        SettingError: for data that cannot be read, or a file that is given twice.
        OSError: for a checkpoint that cannot be loaded.
    """
    names = name_sets(files)
    rows = [captioned_images(file, split, image_dir) for file in files]
    captioner = Captioner.from_pretrained(checkpoint)
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
    """What `results.json` holds of one set of rows with `image`, `image_id` and `captions`.

    Returns:
        `data`, `scores` and the 95 % bootstrap `intervals` of some of them, `limits`, and by image id the `captions`, the first
        of the `references` and the `cider`.
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
        "limits": limits({id: tokenize(text) for id, text in captions.items()}, tokens, cider),
        "captions": captions,
        "references": {id: own[0] for id, own in references.items()},
        "cider": {id: round(value, 4) for id, value in cider.items()},
    }


def name_sets(files: Sequence[str]) -> list[str]:
    """A name for each file: its own with its folder's, or the paths as they were given where two of these are the same.

    Raises:
        SettingError: a file is given twice.
    """
    if len({Path(file).resolve() for file in files}) < len(files):
        raise SettingError(f"`images` names a file twice: {', '.join(files)}. Give each once.")
    short = [Path(*Path(file).parts[-2:]).as_posix() for file in files]  # reports are shared: they hold no more of a path
    return short if len(set(short)) == len(files) else list(files)


def _decoding(captioner: Captioner) -> dict[str, Any]:
    """The settings of generation that matter for scores; of repeatable tokens the words."""
    settings = captioner.model.generation_config.to_dict()
    said = {name: settings[name] for name in DECODING if settings.get(name) is not None}
    if (tokens := settings.get("repeatable_token_ids")) is not None:
        said["repeatable_words"] = " ".join(captioner.processor.tokenizer.convert_ids_to_tokens(tokens))
    return said


def captioned_images(file: str, split: str | None = None, image_dir: str | None = None) -> Any:
    """Rows with `image`, `image_id` and `captions` of a file in any format that training reads, without unreadable images."""
    return load_data(DataArguments(train_file=file, train_split=split, image_dir=image_dir, skip_broken_images=True)).train


def caption(captioner: Captioner, rows: Any) -> tuple[dict[str, str], CaptionScores, list[dict[str, float]]]:
    """Captions of rows with `image`, `image_id` and `captions`, with the captioner's own settings; their scores and `signals`."""
    captions: dict[str, str] = {}
    signals: list[dict[str, float]] = []
    for start in tqdm(range(0, len(rows), BATCH), desc="captions", unit="batches", mininterval=10):
        batch = rows[start : start + BATCH]
        results = captioner.caption(batch["image"], batch_size=BATCH)
        captions |= zip(batch["image_id"], (result.text for result in results))
        signals += (result.signals for result in results)
    return captions, CaptionMetrics(dict(zip(rows["image_id"], rows["captions"]))).score(captions), signals


def speed(captioner: Captioner, rows: Any) -> dict[str, Any]:
    """Milliseconds from a decoded picture to its caption and attention, one picture at a time: median of up to 20."""
    times = []
    for image in rows[: WARM_UP + TIMED]["image"]:
        start = time.perf_counter()
        captioner.caption(image)
        times.append(1000 * (time.perf_counter() - start))
    return {"ms": round(statistics.median(times[WARM_UP:] or times), 1), "hardware": hardware()}


def commit() -> str | None:
    """The commit of the code, with `-dirty` behind it where files differ; None outside its repository, also in another's."""
    try:
        if not _git("ls-files", Path(__file__).name):
            return None
        return _git("describe", "--always", "--dirty", "--abbrev=40", "--exclude=*") or None
    except FileNotFoundError:
        return None


def _git(*command: str) -> str:
    """What git says in the folder of this file, nothing where it fails."""
    return subprocess.run(["git", *command], cwd=Path(__file__).parent, capture_output=True, text=True).stdout.strip()


def draw_pictures(checkpoint: str | Path, pictures: Sequence[str]) -> list[dict[str, str]]:
    """Film strips of attention and importance, one for each picture, as JPEG in the checkpoint's folder.

    Args:
        checkpoint: folder of a captioner.
        pictures: files.

    Returns:
        `file` (its name) and `caption` of each.

    Raises:
        hf_attncap.images.ImageError: a picture cannot be read.
        SettingError: two of them would have the same name, or another file in the folder has it.
    """
    names = [f"picture_{Path(picture).stem}.jpg" for picture in pictures]
    if len(set(names)) < len(names):
        raise SettingError(f"Pictures of one name would replace each other: {', '.join(sorted(names))}. Rename one of them.")
    places = [Path(checkpoint) / name for name in names]
    for place in places:
        if os.path.lexists(place) and not is_own_plot(place):
            raise SettingError(f"{place} was not drawn by `attncap card`, which would replace it: move it away.")
    results = Captioner.from_pretrained(checkpoint).explain(list(pictures))
    for place, result in zip(places, results):
        save_plot(result.plot_importance(), place)
    return [{"file": name, "caption": result.text} for name, result in zip(names, results)]


def update_results(
    checkpoint: str | Path, files: Sequence[str], split: str | None, image_dir: str | None, pictures: Sequence[str]
) -> None:
    """Measures a checkpoint on `files`, draws `pictures`, and puts what was asked for in the place of what its `results.json` says.

    Film strips that an earlier call drew and that no picture of the card replaces are removed.

    Raises:
        SettingError, OSError, hf_attncap.images.ImageError: as `measure` and `draw_pictures`; the results stay as they were.
    """
    folder = Path(checkpoint)
    results = _read_results(folder / RESULTS, measured_anew=bool(files))
    earlier = _drawn(folder, results)
    if pictures:
        results["pictures"] = draw_pictures(checkpoint, pictures)
    if files:
        results |= measure(checkpoint, files, split, image_dir)
    with atomic_write(folder / RESULTS) as stream:
        stream.write(json.dumps(results, indent=1) + "\n")
    for name in earlier - {picture["file"] for picture in results.get("pictures", [])}:
        (folder / name).unlink()


def _read_results(place: Path, measured_anew: bool) -> dict[str, Any]:
    """What an earlier `attncap card` found; nothing if there was none.

    Of results that are to be measured anew only the pictures are kept.
    """
    if not place.exists():
        return {}
    try:
        results = json.loads(place.read_text(encoding="utf-8"))
    except ValueError:
        results = None
    if not isinstance(results, dict) or not results.keys() & {"pictures", "captions", "sets"}:
        raise SettingError(f"{place} was not written by `attncap card`, which would replace it: move it away.")
    if measured_anew:
        return {"pictures": results["pictures"]} if "pictures" in results else {}
    return results


def _drawn(folder: Path, results: dict[str, Any]) -> set[str]:
    """The names of the film strips that an earlier `attncap card` drew in the folder."""
    names = {picture["file"] for picture in results.get("pictures", [])}
    return {name for name in names if Path(name).name == name and is_own_plot(folder / name)}
