"""`results.json`: how good a finished captioner is, on captioned pictures, for its card and for comparisons."""

import json
import os
import statistics
import subprocess
import time
from collections.abc import Collection, Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import torch
import transformers
from tqdm.auto import tqdm

from hf_attncap import Captioner
from hf_attncap.atomic import atomic_write
from hf_attncap.metrics import CaptionMetrics, CaptionScores, tokenize
from hf_attncap.visualize import is_strip, save_strip

from .arguments import DataArguments, SettingError
from .data import load_data
from .limits import limits
from .record import hardware

RESULTS = "results.json"
BATCH = 32
TIMED = 20  # pictures, one by one
WARM_UP = 3
DECODING = ("num_beams", "max_new_tokens", "length_penalty", "no_repeat_ngram_size", "repetition_penalty")


def measure(checkpoint: str | Path, file: str, split: str | None = None, image_dir: str | None = None) -> dict[str, Any]:
    """Captions pictures with a checkpoint's own decoding settings, scores the captions and takes the time.

    Pictures that cannot be read are left out, with a warning that names them: the scores are of the others.

    Args:
        checkpoint: folder of a captioner.
        file: captioned pictures in any format that training reads.
        split: of a file that holds several.
        image_dir: where paths of pictures begin; default: the folder of the file.

    Returns:
        What `results.json` holds: `data`, `decoding`, `scores`, `limits`, `speed`, `captions` by image id, the first of the
        `references` of each, each caption's `cider`, and what made them (`commit` of the code or None, `versions`, `date`).

    Raises:
        SettingError: for data that cannot be read.
        OSError: for a checkpoint that cannot be loaded.
    """
    rows = captioned_images(file, split, image_dir)
    captioner = Captioner.from_pretrained(checkpoint)
    references = dict(zip(rows["image_id"], rows["captions"]))
    captions, scores, _ = caption(captioner, rows)
    cider = dict(zip(scores.ids, scores.per_image["cider"].tolist()))
    tokens = {name: [tokenize(reference) for reference in own] for name, own in references.items()}
    settings = captioner.model.generation_config.to_dict()
    return {
        "data": {"file": Path(file).name, "split": split, "images": len(rows), "references": sum(map(len, references.values()))},
        "decoding": {name: settings[name] for name in DECODING if settings.get(name) is not None},
        "tokenizer": "PTB, as pycocoevalcap",
        "scores": {name: float(value) for name, value in scores.items()},
        "limits": limits({name: tokenize(text) for name, text in captions.items()}, tokens, cider),
        "speed": speed(captioner, rows),
        "captions": captions,
        "references": {name: own[0] for name, own in references.items()},
        "cider": {name: round(value, 4) for name, value in cider.items()},
        "commit": commit(),
        "versions": {"torch": torch.__version__, "transformers": transformers.__version__},
        "date": datetime.now(UTC).date().isoformat(),
    }


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


def draw_pictures(checkpoint: str | Path, pictures: Sequence[str], drawn: Collection[str] = ()) -> list[dict[str, str]]:
    """Film strips of where the captioner looked, one for each picture, as PNG in the checkpoint's folder.

    Args:
        checkpoint: folder of a captioner.
        pictures: files.
        drawn: names in the folder that earlier film strips have, and that may be replaced.

    Returns:
        `file` (its name) and `caption` of each.

    Raises:
        hf_attncap.images.ImageError: a picture cannot be read.
        SettingError: two of them would have the same name, or another file in the folder has it.
    """
    names = [f"picture_{Path(picture).stem}.png" for picture in pictures]
    if len(set(names)) < len(names):
        raise SettingError(f"Pictures of one name would replace each other: {', '.join(sorted(names))}. Rename one of them.")
    places = [Path(checkpoint) / name for name in names]
    for place in places:
        if os.path.lexists(place) and place.name not in drawn and not is_strip(place):
            raise SettingError(f"{place} was not drawn by `attncap card`, which would replace it: move it away.")
    results = Captioner.from_pretrained(checkpoint).caption(list(pictures))
    for place, result in zip(places, results):
        save_strip(result.plot_attention(), place)
    return [{"file": name, "caption": result.text} for name, result in zip(names, results)]


def update_results(
    checkpoint: str | Path, file: str | None, split: str | None, image_dir: str | None, pictures: Sequence[str]
) -> None:
    """Measures a checkpoint on `file`, draws `pictures`, and puts what was asked for in the place of what its `results.json` says.

    Raises:
        SettingError, OSError, hf_attncap.images.ImageError: as `measure` and `draw_pictures`; the results stay as they were.
    """
    place = Path(checkpoint) / RESULTS
    results = _read_results(place)
    drawn = _drawn(results)
    if pictures:
        results["pictures"] = draw_pictures(checkpoint, pictures, drawn)
    if file is not None:
        results |= measure(checkpoint, file, split, image_dir)
    with atomic_write(place) as stream:
        stream.write(json.dumps(results, indent=1) + "\n")
    for name in drawn - {picture["file"] for picture in results.get("pictures", [])}:
        (Path(checkpoint) / name).unlink(missing_ok=True)


def _read_results(place: Path) -> dict[str, Any]:
    """What an earlier `attncap card` found; nothing if there was none."""
    if not place.exists():
        return {}
    try:
        results = json.loads(place.read_text(encoding="utf-8"))
    except ValueError:
        results = None
    if not isinstance(results, dict) or not results.keys() & {"pictures", "captions"}:
        raise SettingError(f"{place} was not written by `attncap card`, which would replace it: move it away.")
    return results


def _drawn(results: dict[str, Any]) -> set[str]:
    """The names of the pictures that an earlier `attncap card` drew in the folder."""
    names = {picture["file"] for picture in results.get("pictures", [])}
    return {name for name in names if name.startswith("picture_") and Path(name).name == name}
