"""The processes of a run: how they may be set up, and what they do together, so that none waits for one that gave up."""

from collections.abc import Callable
from typing import Any

from accelerate import PartialState
from accelerate.utils import gather_object
from transformers import TrainingArguments

from .arguments import SettingError


def check_processes(training: TrainingArguments) -> None:
    """Refuses ways of running on several devices that would train on wrong captions, or fail in the middle of a run.

    Raises:
        SettingError: several GPUs in one process (`nn.DataParallel`); `dispatch_batches`, which joins batches of different lengths.
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
            "`accelerator_config`: `dispatch_batches` cannot join batches whose captions differ in length: leave it out, as each "
            "process reads its own images."
        )


def together(action: Callable[[], Any]) -> list[Any]:
    """What `action` returns on each process, in their order, known to all; each waits for all others.

    Raises:
        SettingError: on all processes, if `action` raised it on one of them. (A process that dies of anything else ends the
            others at the latest after the time-out of their process group, `ddp_timeout`.)
    """
    try:
        outcome = (action(), "")
    except SettingError as error:
        outcome = (None, str(error))
    outcomes = gather_object([outcome])
    for _, refusal in outcomes:
        if refusal:
            raise SettingError(refusal)
    return [result for result, _ in outcomes]


def on_main_process(action: Callable[[], Any]) -> Any:
    """What `action` returns on the main process, which alone runs it, known to all; raises as `together` does."""
    return together(lambda: action() if PartialState().is_main_process else None)[0]
