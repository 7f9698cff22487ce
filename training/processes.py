"""Checks and communication for the processes of a distributed run."""

from collections.abc import Callable
from typing import Any

from accelerate import PartialState
from accelerate.utils import gather_object
from transformers import TrainingArguments

from .arguments import SettingError


def check_processes(training: TrainingArguments) -> None:
    """Refuse distributed set-ups that would train on wrong captions or fail during a run.

    Raises:
        SettingError: several GPUs in one process (`nn.DataParallel`), or `dispatch_batches`.
    """
    if training.n_gpu > 1:
        raise SettingError(
            f"One process has {training.n_gpu} GPUs, and training needs one process per GPU: start it with "
            f"`torchrun --nproc_per_node {training.n_gpu}` or `accelerate launch --num_processes {training.n_gpu}`, or choose one "
            "GPU with CUDA_VISIBLE_DEVICES=0."
        )
    loading: Any = training.accelerator_config
    if loading.dispatch_batches:
        raise SettingError(
            "`accelerator_config`: `dispatch_batches` cannot join batches whose captions differ in length: remove it; each process "
            "reads its own images."
        )


def run_on_all_ranks(action: Callable[[], Any]) -> list[Any]:
    """Run `action` on every process and return the results of all, in the order of their ranks.

    Raises:
        SettingError: on all processes, if `action` raised it on one of them, so that none waits for a process that ended. (After
            any other error, the others end when their process group times out, see `ddp_timeout`.)
    """
    try:
        outcome = (action(), "")
    except SettingError as error:
        outcome = (None, str(error))
    outcomes = gather_object([outcome])
    for _, message in outcomes:
        if message:
            raise SettingError(message)
    return [result for result, _ in outcomes]


def run_on_main_rank(action: Callable[[], Any]) -> Any:
    """Run `action` on the main process and return its result on all; raises like `run_on_all_ranks`."""
    return run_on_all_ranks(lambda: action() if PartialState().is_main_process else None)[0]
