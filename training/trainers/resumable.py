"""`ResumableTrainer`: complete checkpoints, exact resuming, and an error instead of weights that are not finite."""

import shutil
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from transformers import EarlyStoppingCallback, Seq2SeqTrainer
from transformers.trainer import TRAINER_STATE_NAME
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR, get_last_checkpoint, sort_checkpoints

from hf_attncap.atomic import UNFINISHED, atomic_files, remove_folder, remove_unfinished, replace_folder

from ..arguments import SettingError
from ..checkpoints.record import elapsed


class ResumableTrainer(Seq2SeqTrainer):
    """`Seq2SeqTrainer` whose runs can be interrupted at any moment.

    A folder is named `checkpoint-N` only when it is complete. A resumed run ends with the weights of an uninterrupted run.

    Raises:
        SettingError: in training, at a step whose loss is not finite; when weights are saved that are not finite; when a checkpoint
            cannot be written. Earlier checkpoints stay.
    """

    _unfinished: Path | None = None  # the folder of the checkpoint that is being written
    _start: float | None = None  # when training began
    _before: float | None = None  # seconds of a resumed run before it was interrupted

    def train(self, *args: Any, **kwargs: Any) -> Any:
        self._start, self._before = time.time(), None
        if self.args.should_save:
            remove_unfinished(self._output)
        self.accelerator.wait_for_everyone()
        return super().train(*args, **kwargs)

    def evaluate(self, *args: Any, **kwargs: Any) -> dict[str, float]:
        device = self.args.device
        # Training must not depend on the random numbers of evaluations, because a resumed run does not repeat all of them.
        with torch.random.fork_rng([device] if device.type == "cuda" else []):
            return super().evaluate(*args, **kwargs)

    def get_train_dataloader(self) -> Any:
        loader: Any = super().get_train_dataloader()
        # Each start of the workers takes a random number. A resumed run starts them at other times, so the number must not come
        # from the generator of training.
        loader.base_dataloader.generator = torch.Generator().manual_seed(self.args.seed)
        return loader

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """Also logs `elapsed`: seconds of training and evaluation, including those before an interruption."""
        if self._start is not None:
            if self._before is None:
                self._before = elapsed(self.state.log_history)
            logs["elapsed"] = round(self._before + time.time() - self._start, 1)
        super().log(logs, start_time)

    def training_step(self, *args: Any, **kwargs: Any) -> torch.Tensor:
        loss = super().training_step(*args, **kwargs)
        if not torch.isfinite(loss):
            raise SettingError(f"The loss of step {self.state.global_step + 1} is {float(loss)}: {self._advice()}.")
        return loss

    def _advice(self) -> str:
        args = self.args
        half = next((f", train without `{name}`" for name in ("fp16", "bf16") if getattr(args, name)), "")
        return (
            f"lower `learning_rate` (now {args.learning_rate:g}), set `max_grad_norm` (now {args.max_grad_norm:g}) to 1 or less"
            f"{half}; {_how_to_resume(last_checkpoint(self._output))}"
        )

    def _run_epoch(self, *args: Any, **kwargs: Any) -> None:
        if self.state.global_step >= self.state.max_steps:
            self.control.should_training_stop = True
        # The base class makes a step before it checks this, even if the checkpoint was made at the last step.
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
        with disk_errors(self._output, f"The checkpoint of step {self.state.global_step}", self._checkpoint_size()):
            self._unfinished = unfinished.parent
            try:
                super()._save_checkpoint(model, trial)
            finally:
                self._unfinished = None
            best = self._output / f"{PREFIX_CHECKPOINT_DIR}-{self.state.best_global_step}"
            if best == checkpoint or best.is_dir():
                self.state.best_model_checkpoint = str(best)
            self.accelerator.wait_for_everyone()  # each process writes the state of its random number generators
            if self.args.should_save:
                self.state.save_to_json(str(unfinished / TRAINER_STATE_NAME))
                replace_folder(unfinished, checkpoint)
                _rotate(self._output, self.args.save_total_limit, self.state.best_model_checkpoint)
                remove_unfinished(self._output)
            self.accelerator.wait_for_everyone()

    def _checkpoint_size(self) -> int:
        """The approximate size of a checkpoint in bytes."""
        tensors = list(self.model.state_dict().values())  # type: ignore[union-attr]
        if not self.args.save_only_model:
            states = self.optimizer.state.values()  # type: ignore[union-attr]
            tensors += [value for state in states for value in state.values() if isinstance(value, torch.Tensor)]
        return sum(tensor.nbytes for tensor in tensors)

    def _finalize_training(self, *args: Any, **kwargs: Any) -> Any:
        best = self.state.best_model_checkpoint
        if self.args.should_save and self.args.save_total_limit == 1 and best is not None:
            # The base class does the same, but leaves a part of a checkpoint if it is killed meanwhile.
            for checkpoint in self._output.glob(f"{PREFIX_CHECKPOINT_DIR}-*"):
                if checkpoint != Path(best):
                    remove_folder(checkpoint)
            remove_unfinished(self._output)
        return super()._finalize_training(*args, **kwargs)

    def _save(self, output_dir: str | None = None, state_dict: dict | None = None) -> None:
        weights: dict[str, torch.Tensor] = self.model.state_dict()  # type: ignore[union-attr]
        if not all(weight.isfinite().all() for weight in weights.values()):
            raise SettingError(f"The weights of step {self.state.global_step} are not finite: {self._advice()}.")
        if self._unfinished is not None or not self.args.should_save:
            return super()._save(output_dir, state_dict)
        folder = Path(output_dir or str(self.args.output_dir))
        size = sum(weight.nbytes for weight in weights.values())
        with disk_errors(folder, "The captioner", size), atomic_files(folder) as files:
            super()._save(str(files), state_dict)


class EarlyStopping(EarlyStoppingCallback):
    """`EarlyStoppingCallback` for resumed runs: the checkpoint gives the count of evaluations without improvement, the settings
    give the patience.

    (`restore_callback_states_from_checkpoint` restores both, so that the patience could not be raised.)
    """

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        super().on_train_begin(args, state, control, **kwargs)
        # The checkpoint has no state of this callback if its run did not use early stopping, and the Trainer needs one for saving.
        stored = state.stateful_callbacks.setdefault(type(self).__name__, self.state())
        self.early_stopping_patience_counter = stored["attributes"]["early_stopping_patience_counter"]
        control.should_training_stop = self.early_stopping_patience_counter >= self.early_stopping_patience


def last_checkpoint(output: Path) -> Path | None:
    """The checkpoint of the latest step in the output folder of a run."""
    found = get_last_checkpoint(str(output)) if output.is_dir() else None
    return Path(found) if found else None


@contextmanager
def disk_errors(output: Path, what: str, size: int) -> Iterator[None]:
    """Turn errors of writing `what`, of about `size` bytes, to a run's folder into one sentence.

    Raises:
        SettingError: names the folder, the reason and the free space.
    """
    try:
        yield
    except (OSError, SafetensorError, RuntimeError) as error:
        # torch reports a full disk as a RuntimeError with this word; other RuntimeErrors have other causes.
        if isinstance(error, RuntimeError) and "inline_container" not in str(error):
            raise
        remove_unfinished(output)
        free = shutil.disk_usage(output).free
        raise SettingError(
            f"{what} cannot be written to {output}: it needs {size / 1e6:.3g} MB and {free / 1e6:.3g} MB are free "
            f"({str(error).splitlines()[0]}); free some space or set `save_total_limit`; {_how_to_resume(last_checkpoint(output))}."
        ) from error


def _rotate(output: Path, limit: int | None, best: str | None) -> None:
    """Remove the oldest checkpoints until `limit` remain; the newest and the best one always stay."""
    checkpoints = [Path(path) for path in sort_checkpoints(str(output), use_mtime=True)]
    kept = {*checkpoints[-1:], *([Path(best)] if best else [])}
    surplus = len(checkpoints) - max(limit, len(kept)) if limit and limit > 0 else 0
    for checkpoint in [path for path in checkpoints if path not in kept][: max(surplus, 0)]:
        remove_folder(checkpoint)


def _how_to_resume(last: Path | None) -> str:
    return f"`--resume_from_checkpoint last` continues from {last}" if last else "there is no checkpoint to resume from yet"
