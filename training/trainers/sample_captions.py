"""`SampleCaptions`: captions of a few validation images at every evaluation, with attention plots."""

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

from hf_attncap.atomic import atomic_write
from hf_attncap.captioner import Captioner, CaptionResult

logger = logging.getLogger(__name__)

FOLDER = "samples"
DPI = 80  # a plot with six panels per row is about 1,100 pixels wide
BATCH = 4


@dataclass
class Sample:
    """The caption of an image, and the file of its attention plot."""

    image_id: str
    references: list[str]
    result: CaptionResult
    plot: Path


class SampleCaptions(TrainerCallback):
    """Captions images at every evaluation, with the evaluated weights and the model's own generation settings.

    Writes the captions to the log and to `output_dir/samples/step-000123/captions.jsonl` (`samples/final/` after training), with
    `image_id`, `caption`, `references` and `picture`, the name of the attention plot in the same folder. Also reports them to
    TensorBoard, W&B and trackio if the run does. Only the main process does this. It does not change the random numbers of the
    run. An error is logged as a warning, so that it cannot end a run of hours.

    Args:
        images: rows with `image`, `captions` and `image_id`; the images are read again at each evaluation.
        callbacks: the callbacks of the Trainer, for the writer of its TensorBoard callback.
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
            with _keep_random_state():
                samples = self._caption(Captioner(model, processing_class), folder)
                for sample in samples:
                    logger.warning("step %d, image %s: %s", state.global_step, sample.image_id, sample.result.text)
                _write(samples, folder)
                _report(samples, state.global_step, args.report_to, self.callbacks)
        except Exception as error:  # disks, images, memory and trackers raise many kinds
            logger.warning("samples: could not write all of them to %s: %s: %s", folder, type(error).__name__, error)

    def _caption(self, captioner: Captioner, folder: Path) -> list[Sample]:
        rows: list[Any] = [self.images[row] for row in range(len(self.images))]
        results = captioner.caption([row["image"] for row in rows], batch_size=BATCH)
        return [
            Sample(row["image_id"], row["captions"], result, folder / f"{number}-{_file_stem(row['image_id'])}.jpg")
            for number, (row, result) in enumerate(zip(rows, results), 1)
        ]


@contextmanager
def _keep_random_state() -> Iterator[None]:
    """Restores the states that trackers change when they choose file names at random; the Trainer restores torch's."""
    python, numpy = random.getstate(), np.random.get_state()
    try:
        yield
    finally:
        random.setstate(python)
        np.random.set_state(numpy)


def _file_stem(image_id: str) -> str:
    """The id, which may be a path or a URL, as part of a file name."""
    return re.sub(r"[^\w.-]+", "_", Path(image_id).stem)[:60]


def _write(samples: list[Sample], folder: Path) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    lines = []
    for sample in samples:
        with atomic_write(sample.plot, "wb") as file:
            sample.result.plot_attention().savefig(file, format="jpeg", dpi=DPI)
        line = {"image_id": sample.image_id, "caption": sample.result.text, "references": sample.references}
        lines.append(json.dumps({**line, "picture": sample.plot.name}, ensure_ascii=False) + "\n")
    with atomic_write(folder / "captions.jsonl") as file:
        file.writelines(lines)


def _report(samples: list[Sample], step: int, report_to: list[str], callbacks: Sequence[TrainerCallback]) -> None:
    named = {f"{FOLDER}/{sample.plot.stem}": sample for sample in samples}
    for callback in callbacks:
        if isinstance(callback, TensorBoardCallback) and callback.tb_writer:
            for name, sample in named.items():
                callback.tb_writer.add_text(name, sample.result.text, step)
                with Image.open(sample.plot) as plot:
                    callback.tb_writer.add_image(name, np.asarray(plot), step, dataformats="HWC")
    for package in {"wandb", "trackio"} & set(report_to):
        tracker: Any = importlib.import_module(package)
        plots = {name: tracker.Image(str(sample.plot), caption=sample.result.text) for name, sample in named.items()}
        tracker.log({**plots, "train/global_step": step})
