"""The exponential moving average (EMA) of the weights during training, which varies less than the weights of single steps."""

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
    """Updates average = d * average + (1 - d) * weights after each step; batch norm statistics are not averaged.

    d = min(decay, (1 + n) / (10 + n)) after n earlier steps, as in TensorFlow's `ExponentialMovingAverage` with `num_updates`, so
    that the average does not depend on the initial weights for long.

    Args:
        model: the model whose weights are averaged; a copy of it holds the average.
        decay: 0 to 1.
    """

    def __init__(self, model: torch.nn.Module, decay: float):
        self.model, self.decay, self._current_decay = model, decay, decay
        self.average = AveragedModel(model, multi_avg_fn=self._update)

    def _update(self, averaged: Any, current: Any, steps: Any) -> None:
        get_ema_multi_avg_fn(self._current_decay)(averaged, current, steps)

    def on_optimizer_step(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self._current_decay = min(self.decay, (1 + state.global_step) / (10 + state.global_step))
        self.average.update_parameters(self.model)

    @property
    def nbytes(self) -> int:
        return sum(parameter.nbytes for parameter in self.average.module.parameters())

    @torch.no_grad()
    def copy_to_model(self) -> None:
        """Replace the weights of the model by the average."""
        if self.average.n_averaged:
            for own, averaged in zip(self.model.parameters(), self.average.module.parameters(), strict=True):
                own.copy_(averaged)

    @contextmanager
    def in_model(self) -> Iterator[None]:
        """Within the block, the model has the average as its weights."""
        live = [parameter.detach().clone() for parameter in self.model.parameters()]
        self.copy_to_model()
        try:
            yield
        finally:
            with torch.no_grad():
                for own, before in zip(self.model.parameters(), live, strict=True):
                    own.copy_(before)

    def save_live(self, folder: str) -> None:
        """Save the live weights, from which training continues, in a checkpoint that holds the average."""
        live = {name: parameter.detach().contiguous() for name, parameter in self.model.named_parameters()}
        save_file(live, Path(folder) / LIVE_WEIGHTS_FILE)

    @torch.no_grad()
    def resume(self, folder: str) -> None:
        """Continue from a checkpoint whose weights the model has loaded: they become the average, and its live weights those of
        the model. A checkpoint of a run without an average has no live weights; the average then starts from its weights.
        """
        for averaged, own in zip(self.average.module.parameters(), self.model.parameters(), strict=True):
            averaged.copy_(own)
        self.average.n_averaged.fill_(1)
        file = Path(folder) / LIVE_WEIGHTS_FILE
        if file.exists():
            live = load_file(file)
            for name, parameter in self.model.named_parameters():
                parameter.copy_(live[name])
