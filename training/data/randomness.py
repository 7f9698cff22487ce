"""Chance that a resumed run repeats: which captions of an image are taken, and how its picture is cropped and coloured."""

import hashlib
import random
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from transformers import TrainerCallback


@dataclass(frozen=True)
class Moment:
    """What is drawn for an image in one epoch."""

    seed: int
    epoch: int

    def of(self, image_id: str) -> random.Random:
        """A generator for an image."""
        return random.Random(self._number(image_id))

    @contextmanager
    def ruling(self, image_id: str) -> Iterator[None]:
        """torch draws on the CPU for an image, and afterwards goes on as if nothing had been drawn."""
        before = torch.get_rng_state()
        torch.default_generator.manual_seed(self._number(image_id))
        try:
            yield
        finally:
            torch.set_rng_state(before)

    def _number(self, image_id: str) -> int:
        text = f"{self.seed} {self.epoch} {image_id}"
        return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=7).digest())


class Chance(TrainerCallback):
    """What is drawn for an image: a function of the seed, the epoch and the image's id, and of nothing drawn before.

    So it does not matter which process or worker reads the image, how far ahead, and whether the run was resumed in between. Among
    the Trainer's callbacks it learns of each new epoch; the workers of a data loader see that in the memory they share with it.

    Args:
        seed: that of the run.
    """

    def __init__(self, seed: int):
        self._seed = seed
        self._epoch = torch.zeros((), dtype=torch.int64).share_memory_()

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self._epoch.fill_(int(state.epoch or 0) - 1)

    def on_epoch_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        # Counted, as `state.epoch` is a share of `max_steps` where a stream does not say how long it is.
        self._epoch.add_(1)

    def of(self, image_id: str) -> random.Random:
        """A generator for an image in this epoch."""
        return self._now().of(image_id)

    def ruling(self, image_id: str) -> AbstractContextManager[None]:
        """torch draws on the CPU for an image in this epoch, and afterwards goes on as if nothing had been drawn."""
        return self._now().ruling(image_id)

    def turn(self, image_id: str, turns: int) -> int:
        """Whose turn it is in this epoch, 0 to `turns` - 1: each once in so many epochs, beginning anywhere."""
        return (Moment(self._seed, -1).of(image_id).randrange(turns) + int(self._epoch)) % turns

    def _now(self) -> Moment:
        return Moment(self._seed, int(self._epoch))
