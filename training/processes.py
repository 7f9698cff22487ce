"""What the processes of a run do together, so that none waits for one that gave up."""

from collections.abc import Callable
from typing import Any

from accelerate import PartialState
from accelerate.utils import gather_object

from .arguments import SettingError


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
