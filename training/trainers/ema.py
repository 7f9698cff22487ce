"""The exponential average of the weights that training goes through: steadier than the last ones, and what a run hands out."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn
from transformers import TrainerCallback

LIVE_WEIGHTS_FILE = "live_weights.safetensors"


class WeightAverage(TrainerCallback):
    """After each step, average = d * average + (1 - d) * weights; batch norm statistics are the model's own.

    d = min(decay, (1 + n) / (10 + n)) after n earlier steps, as TensorFlow's `ExponentialMovingAverage` has it with `num_updates`:
    else the weights that training began with would stay in the average for long.

    Args:
        model: whose weights are averaged; a copy of it holds the average.
        decay: 0 to 1.
    """

    def __init__(self, model: torch.nn.Module, decay: float):
        self.model, self.decay, self._now = model, decay, decay
        self.average = AveragedModel(model, multi_avg_fn=self._blend)

    def _blend(self, averaged: Any, current: Any, steps: Any) -> None:
        get_ema_multi_avg_fn(self._now)(averaged, current, steps)

    def on_optimizer_step(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self._now = min(self.decay, (1 + state.global_step) / (10 + state.global_step))
        self.average.update_parameters(self.model)

    @property
    def nbytes(self) -> int:
        return sum(parameter.nbytes for parameter in self.average.module.parameters())

    @torch.no_grad()
    def hand_over(self) -> None:
        """The average into the model."""
        if self.average.n_averaged:
            for own, averaged in zip(self.model.parameters(), self.average.module.parameters(), strict=True):
                own.copy_(averaged)

    @contextmanager
    def in_model(self) -> Iterator[None]:
        """The model has the average as its weights for a while."""
        live = [parameter.detach().clone() for parameter in self.model.parameters()]
        self.hand_over()
        try:
            yield
        finally:
            with torch.no_grad():
                for own, before in zip(self.model.parameters(), live, strict=True):
                    own.copy_(before)

    def save_live(self, folder: str) -> None:
        """The weights that training goes on from, beside the average that the checkpoint itself holds."""
        live = {name: parameter.detach().contiguous() for name, parameter in self.model.named_parameters()}
        save_file(live, Path(folder) / LIVE_WEIGHTS_FILE)

    @torch.no_grad()
    def resume(self, folder: str) -> None:
        """Take a checkpoint's weights, which the model has loaded, for the average, and the live ones beside them for the model.

        A run that did not average before begins its average with them.
        """
        for averaged, own in zip(self.average.module.parameters(), self.model.parameters(), strict=True):
            averaged.copy_(own)
        self.average.n_averaged.fill_(1)
        file = Path(folder) / LIVE_WEIGHTS_FILE
        if file.exists():
            live = load_file(file)
            for name, parameter in self.model.named_parameters():
                parameter.copy_(live[name])
