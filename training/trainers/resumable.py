"""transformers' Trainer made safe: whole checkpoints, exact continuation, and an end where going on would spoil the weights."""

import time
from pathlib import Path
from typing import Any

import torch
from transformers import Seq2SeqTrainer
from transformers.trainer import TRAINER_STATE_NAME
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR

from ..arguments import SettingError
from ..checkpoints.record import elapsed
from .checkpoint_files import UNFINISHED, appear, clear, discard, going_on, last_checkpoint, replacing, rotate, writing


class ResumableTrainer(Seq2SeqTrainer):
    """`Seq2SeqTrainer` whose runs can be interrupted at any moment.

    A checkpoint has its name only while it is whole. A run that goes on from one ends with the weights of a run that was never
    interrupted.

    Raises:
        SettingError: while training, at the step whose loss is not finite; instead of saving weights that are not; if the disk
            does not take a checkpoint. The checkpoints from before stay.
    """

    _unfinished: Path | None = None  # where a checkpoint is being written
    _start: float | None = None  # when training began
    _before: float | None = None  # seconds of a run's earlier parts

    def train(self, *args: Any, **kwargs: Any) -> Any:
        self._start, self._before = time.time(), None
        if self.args.should_save:
            clear(self._output)
        self.accelerator.wait_for_everyone()
        return super().train(*args, **kwargs)

    def evaluate(self, *args: Any, **kwargs: Any) -> dict[str, float]:
        device = self.args.device
        # What is drawn in training must not depend on evaluations: not all of them are made again by a run that goes on.
        with torch.random.fork_rng([device] if device.type == "cuda" else []):
            return super().evaluate(*args, **kwargs)

    def get_train_dataloader(self) -> Any:
        loader: Any = super().get_train_dataloader()
        # Each start of its workers takes a random number, which must not be one of training's: a run that goes on starts them at
        # other times.
        loader.base_dataloader.generator = torch.Generator().manual_seed(self.args.seed)
        return loader

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """With all that is logged from training on goes `elapsed`: seconds of training and evaluations, of all parts of a run."""
        if self._start is not None:
            if self._before is None:
                self._before = elapsed(self.state.log_history)
            logs["elapsed"] = round(self._before + time.time() - self._start, 1)
        super().log(logs, start_time)

    def training_step(self, *args: Any, **kwargs: Any) -> torch.Tensor:
        loss = super().training_step(*args, **kwargs)
        if not torch.isfinite(loss):
            raise SettingError(f"The loss of step {self.state.global_step + 1} is {float(loss)}: {self._way_out()}.")
        return loss

    def _way_out(self) -> str:
        args = self.args
        half = next((f", train without `{name}`" for name in ("fp16", "bf16") if getattr(args, name)), "")
        return (
            f"lower `learning_rate` (now {args.learning_rate:g}), set `max_grad_norm` (now {args.max_grad_norm:g}) to 1 or less"
            f"{half}; {going_on(last_checkpoint(self._output))}"
        )

    def _run_epoch(self, *args: Any, **kwargs: Any) -> None:
        if self.state.global_step >= self.state.max_steps:
            self.control.should_training_stop = True
        # The base class makes a step before it looks, also if the checkpoint that it goes on from was the last one.
        if not self.control.should_training_stop:
            super()._run_epoch(*args, **kwargs)

    @property
    def _output(self) -> Path:
        return Path(str(self.args.output_dir))

    def _get_output_dir(self, trial: Any) -> str:
        return str(self._unfinished or super()._get_output_dir(trial))

    def _save_checkpoint(self, model: torch.nn.Module, trial: Any) -> None:
        name = f"{PREFIX_CHECKPOINT_DIR}-{self.state.global_step}"
        checkpoint, unfinished = self._output / name, self._output / UNFINISHED / name
        with writing(self._output, f"The checkpoint of step {self.state.global_step}", self._checkpoint_size()):
            self._unfinished = unfinished.parent
            try:
                super()._save_checkpoint(model, trial)
            finally:
                self._unfinished = None
            best = self._output / f"{PREFIX_CHECKPOINT_DIR}-{self.state.best_global_step}"
            if best == checkpoint or best.is_dir():
                self.state.best_model_checkpoint = str(best)
            self.accelerator.wait_for_everyone()  # each writes the state of its random numbers
            if self.args.should_save:
                self.state.save_to_json(str(unfinished / TRAINER_STATE_NAME))
                appear(unfinished, checkpoint)
                rotate(self._output, self.args.save_total_limit, self.state.best_model_checkpoint)
                clear(self._output)
            self.accelerator.wait_for_everyone()

    def _checkpoint_size(self) -> int:
        """About how many bytes a checkpoint takes."""
        tensors = list(self.model.state_dict().values())  # type: ignore[union-attr]
        if not self.args.save_only_model:
            states = self.optimizer.state.values()  # type: ignore[union-attr]
            tensors += [value for state in states for value in state.values() if isinstance(value, torch.Tensor)]
        return sum(tensor.nbytes for tensor in tensors)

    def _finalize_training(self, *args: Any, **kwargs: Any) -> Any:
        best = self.state.best_model_checkpoint
        if self.args.should_save and self.args.save_total_limit == 1 and best is not None:
            # As the base class would, which leaves half of one if it is killed meanwhile.
            for checkpoint in self._output.glob(f"{PREFIX_CHECKPOINT_DIR}-*"):
                if checkpoint != Path(best):
                    discard(checkpoint)
            clear(self._output)
        return super()._finalize_training(*args, **kwargs)

    def _save(self, output_dir: str | None = None, state_dict: dict | None = None) -> None:
        weights: dict[str, torch.Tensor] = self.model.state_dict()  # type: ignore[union-attr]
        if not all(weight.isfinite().all() for weight in weights.values()):
            raise SettingError(f"Step {self.state.global_step} made weights that are not finite: {self._way_out()}.")
        if self._unfinished is not None or not self.args.should_save:
            return super()._save(output_dir, state_dict)
        folder = Path(output_dir or str(self.args.output_dir))
        size = sum(weight.nbytes for weight in weights.values())
        with writing(folder, "The captioner", size), replacing(folder) as files:
            super()._save(str(files), state_dict)
