"""`compute_metrics` for transformers' Seq2SeqTrainer."""

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from .score import CaptionMetrics

PADDING = -100  # with which the Trainer pads rows of ids


def caption_compute_metrics(
    references: Sequence[Sequence[str]], decode: Callable[[list[list[int]]], list[str]]
) -> Callable[[Any], dict[str, float]]:
    """`compute_metrics` for a `Seq2SeqTrainer` with `predict_with_generate=True`.

    Args:
        references: all captions of each of the I images, in the order of the evaluation dataset, which has one row per image.
        decode: converts rows of generated ids without padding to captions without special tokens, such as
            `lambda ids: processor.batch_decode(ids, skip_special_tokens=True)`.

    Returns:
        A function that maps an `EvalPrediction`, whose `predictions` are (R, T) ids, to the scores of `CaptionMetrics`. The Trainer
        adds the prefix `eval_`; use `metric_for_best_model="cider"`. Rows after the end of the dataset, which pad the last batch of
        several processes, are ignored. It raises a ValueError if there are fewer rows than images, or no ids.

    Raises:
        ValueError, TypeError: as `CaptionMetrics`; images without references are named by their row.
    """
    metrics = CaptionMetrics({f"row {row}": captions for row, captions in enumerate(references)})

    def compute_metrics(prediction: Any) -> dict[str, float]:
        ids = prediction.predictions[0] if isinstance(prediction.predictions, tuple) else prediction.predictions  # (R, T)
        _check_ids(ids, len(metrics.ids))
        captions = decode([row[row != PADDING].tolist() for row in ids[: len(metrics.ids)]])
        return metrics.score(dict(zip(metrics.ids, captions))).corpus

    return compute_metrics


def _check_ids(ids: Any, images: int) -> None:
    if not (isinstance(ids, np.ndarray) and ids.ndim == 2 and np.issubdtype(ids.dtype, np.integer)):
        found = f"of shape {ids.shape} and type {ids.dtype}" if isinstance(ids, np.ndarray) else f"a {type(ids).__name__}"
        raise ValueError(
            f"Captions are scored from generated ids, (rows, length) integers, but the predictions are {found}: set "
            "`predict_with_generate=True` in Seq2SeqTrainingArguments, and do not change `eval_do_concat_batches`."
        )
    if len(ids) < images:
        raise ValueError(
            f"There are captions for {len(ids)} images but references for {images}: give the references of exactly the images "
            "of the evaluation dataset, one entry per row."
        )
    # Rows after the last image must repeat the first ones, as the padding of several processes does.
    first_rows = np.resize(np.arange(images), len(ids))[images:]  # 0 to images - 1, repeated
    if len(ids) >= 2 * images and not (ids[images:] == ids[first_rows]).all():
        raise ValueError(
            f"There are captions for {len(ids)} rows but references for {images} images: evaluate on one row per image, with all "
            "its references, not on one row per caption."
        )
