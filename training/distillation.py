"""Distillation: a captioner learns the word probabilities of other captioners, its teachers, along with the captions.

Hinton et al. (2015), "Distilling the knowledge in a neural network", at temperature 1; word by word behind the true words, as in
Kim and Rush (2016), "Sequence-level knowledge distillation". Several teachers teach their mean: one captioner learns an ensemble.
"""

from collections.abc import Sequence
from typing import Any

import torch
from huggingface_hub.errors import StrictDataclassError
from torch.nn import functional as F

from hf_attncap import AttnCapForConditionalGeneration, AttnCapProcessor
from hf_attncap.processing_attncap import IGNORED_LABEL

from .arguments import SettingError
from .dropout import silence


class Teachers:
    """Trained captioners whose mean word probabilities are learned; they stay as they are.

    Args:
        folders: checkpoints, in folders or on the Hub.
        processor: the student's, whose words and pictures are what the teachers know too.
        student: the captioner that learns.
        cached: pictures come as maps of the student's frozen blocks, so the teachers' must be the same.

    Raises:
        SettingError: a folder is no captioner, or one of other words, pictures or frozen blocks; it is named.
    """

    def __init__(self, folders: Sequence[str], processor: AttnCapProcessor, student: Any, cached: bool):
        self._captioners = [_load(folder, processor) for folder in folders]
        for folder, teacher in zip(folders, self._captioners):
            if cached and not _same_frozen_blocks(teacher.model.encoder, student.model.encoder):
                raise SettingError(
                    f"`distill_from`: {folder} has other frozen blocks than this captioner, whose maps `feature_cache` keeps: give "
                    "teachers that began with the same backbone and `trainable_blocks`, or leave the cache out."
                )

    @torch.no_grad()
    def probabilities(self, inputs: dict[str, Any]) -> torch.Tensor:
        """What the teachers say on average, (P, V), at the P positions of the batch's labels (B, k, T) that are words or ends."""
        where = inputs["labels"].flatten(0, -2) != IGNORED_LABEL  # (R, T)
        mean: Any = 0
        for teacher in self._captioners:
            logits = teacher.to(where.device)(**inputs).logits[where]  # (P, V)
            mean = mean + logits.float().softmax(dim=-1) / len(self._captioners)
        return mean

    def loss(self, inputs: dict[str, Any], logits: torch.Tensor) -> torch.Tensor:
        """Cross-entropy of the student's logits (R, T, V) against the teachers' mean, summed over words and ends."""
        learned = logits[inputs["labels"].flatten(0, -2) != IGNORED_LABEL].float()  # (P, V)
        return F.cross_entropy(learned, self.probabilities(inputs), reduction="sum")


def _load(folder: str, processor: AttnCapProcessor) -> Any:
    try:
        teacher: Any = AttnCapForConditionalGeneration.from_pretrained(folder, dtype=torch.float32)
        own = AttnCapProcessor.from_pretrained(folder)
    except (OSError, StrictDataclassError) as error:
        raise SettingError(f"`distill_from`: {folder} cannot be loaded as a captioner: {str(error).splitlines()[0]}") from error
    if own.tokenizer.get_vocab() != processor.tokenizer.get_vocab():
        raise SettingError(f"`distill_from`: {folder} has another vocabulary than the captioner that is to learn from it.")
    if own.image_processor.to_dict() != processor.image_processor.to_dict():
        raise SettingError(f"`distill_from`: {folder} sees pictures in another size or normalisation than this captioner.")
    # Blocks that learn in the student make no difference here: a silent captioner in training skips what is behind a caption's end.
    teacher.requires_grad_(False)
    silence(teacher)
    return teacher


def _same_frozen_blocks(teacher: Any, student: Any) -> bool:
    if len(teacher.blocks()) != len(student.blocks()):
        return False
    pairs = zip(teacher.blocks()[: student.frozen_blocks], student.blocks()[: student.frozen_blocks])
    for theirs, ours in pairs:
        wanted, found = ours.state_dict(), theirs.state_dict()
        if wanted.keys() != found.keys() or not all(torch.equal(value, found[name]) for name, value in wanted.items()):
            return False
    return teacher.frozen_blocks == student.frozen_blocks
