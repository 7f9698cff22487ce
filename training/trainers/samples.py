"""Captions of a few validation images at every evaluation, with where the captioner looked: what no score shows."""

import importlib
import json
import logging
import random
import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from datasets import Dataset
from PIL import Image
from transformers import TrainerCallback
from transformers.integrations.integration_utils import TensorBoardCallback

from hf_attncap.captioner import Captioner, CaptionResult

logger = logging.getLogger(__name__)

FOLDER = "samples"
DOTS = 80  # an inch: a film strip of six panels a row is about 1,100 pixels wide
BATCH = 4  # images in a pass


@dataclass
class Sample:
    """What the captioner said of an image, and the file of its film strip."""

    image_id: str
    references: list[str]
    result: CaptionResult
    picture: Path


class SampleCaptions(TrainerCallback):
    """At every evaluation, captions images with the weights that are evaluated and the captioner's own generation settings.

    The captions go to the log and to `output_dir/samples/step-000123/captions.jsonl` (`samples/final/` once training has ended),
    with `image_id`, `caption`, `references` and `picture`, the name of the film strip beside it. To TensorBoard, W&B and trackio
    they go as well where the run reports there. The main process does all this alone. The random numbers of the run stay what they
    would be, and anything that fails is a warning: hours of training must not end over a picture.

    Args:
        images: rows with `image`, `captions` and `image_id`; their pictures are read anew each time.
        callbacks: of the Trainer, among them TensorBoard's, whose writer is used.
    """

    def __init__(self, images: Dataset, callbacks: Sequence[TrainerCallback]):
        self.images, self.callbacks = images, callbacks
        self.trained = False

    def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.trained = True

    def on_evaluate(
        self, args: Any, state: Any, control: Any, model: Any = None, processing_class: Any = None, **kwargs: Any
    ) -> None:
        if not state.is_world_process_zero:
            return
        folder = Path(args.output_dir) / FOLDER / ("final" if self.trained else f"step-{state.global_step:06}")
        try:
            with _same_names():
                samples = self._caption(Captioner(model, processing_class), folder)
                for sample in samples:
                    logger.warning("step %d, image %s: %s", state.global_step, sample.image_id, sample.result.text)
                _write(samples, folder)
                _report(samples, state.global_step, args.report_to, self.callbacks)
        except Exception as error:  # of many kinds: disks, pictures, memory, trackers
            logger.warning("samples: not all could be brought to %s: %s: %s", folder, type(error).__name__, error)

    def _caption(self, captioner: Captioner, folder: Path) -> list[Sample]:
        rows: list[Any] = [self.images[row] for row in range(len(self.images))]
        results = captioner.caption([row["image"] for row in rows], batch_size=BATCH)
        return [
            Sample(row["image_id"], row["captions"], result, folder / f"{number}-{_file_stem(row['image_id'])}.jpg")
            for number, (row, result) in enumerate(zip(rows, results), 1)
        ]


@contextmanager
def _same_names() -> Iterator[None]:
    """Numbers that trackers draw for the names of their files are not missing afterwards; the Trainer keeps torch's."""
    own, arrays = random.getstate(), np.random.get_state()
    try:
        yield
    finally:
        random.setstate(own)
        np.random.set_state(arrays)


def _file_stem(image_id: str) -> str:
    """The id, which may be a path or a URL, as part of a file's name."""
    return re.sub(r"[^\w.-]+", "_", Path(image_id).stem)[:60]


def _write(samples: list[Sample], folder: Path) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    lines = []
    for sample in samples:
        sample.result.plot_attention().savefig(sample.picture, dpi=DOTS)
        line = {"image_id": sample.image_id, "caption": sample.result.text, "references": sample.references}
        lines.append(json.dumps({**line, "picture": sample.picture.name}, ensure_ascii=False) + "\n")
    (folder / "captions.jsonl").write_text("".join(lines), encoding="utf-8")


def _report(samples: list[Sample], step: int, report_to: list[str], callbacks: Sequence[TrainerCallback]) -> None:
    named = {f"{FOLDER}/{sample.picture.stem}": sample for sample in samples}
    for callback in callbacks:
        if isinstance(callback, TensorBoardCallback) and callback.tb_writer:
            for name, sample in named.items():
                callback.tb_writer.add_text(name, sample.result.text, step)
                with Image.open(sample.picture) as picture:
                    callback.tb_writer.add_image(name, np.asarray(picture), step, dataformats="HWC")
    for package in {"wandb", "trackio"} & set(report_to):
        tracker: Any = importlib.import_module(package)
        pictures = {name: tracker.Image(str(sample.picture), caption=sample.result.text) for name, sample in named.items()}
        tracker.log({**pictures, "train/global_step": step})
