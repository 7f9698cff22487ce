"""`training.json`: the stages of training that led to a checkpoint, with settings, logs, time and hardware."""

import json
import os
import platform
import shutil
from collections.abc import Sequence
from dataclasses import fields
from pathlib import Path
from typing import Any

import torch
import transformers
import yaml
from transformers.utils.hub import cached_file

from hf_attncap import AttnCapProcessor
from hf_attncap.hub import ABOUT, RECORD

from ..arguments import SettingError
from .about import parse_about

PROVENANCE = ("license", "license_name", "license_link", "origins")  # fields of about.yaml that also hold for fine-tuned weights
# Not recorded: paths, what is logged or uploaded, what depends on the machine, and what the code sets itself.
PATHS = {
    "output_dir", "feature_cache", "model_name_or_path", "train_file", "validation_file", "image_dir", "validation_image_dir",
    "data_dir",
}  # fmt: skip
LOGGING = {
    "disable_tqdm",
    "report_to",
    "run_name",
    "logging_steps",
    "num_logged_images",
    "push_to_hub",
    "hub_token",
    "hub_model_id",
}
MACHINE = {"dataloader_num_workers", "dataloader_pin_memory", "use_cpu", "resume_from_checkpoint", "save_total_limit"}
SET_BY_CODE = {"remove_unused_columns", "use_cache", "logging_nan_inf_filter", "prediction_loss_only"}
NOT_RECORDED = PATHS | LOGGING | MACHINE | SET_BY_CODE
FILES = {"backbone_weights", "word_vectors"}  # paths of which only the file name is recorded
ALWAYS_RECORDED = ("learning_rate", "seed", "num_train_epochs")
LOGGED = ("loss", "reward", "sample_length", "learning_rate", "eval_loss", "eval_cider", "eval_bleu_4", "eval_vocabulary")


def earlier_stages(model_name_or_path: str | None) -> list[dict[str, Any]]:
    """The training record of a checkpoint, a folder or a name on the Hub; empty if it has none."""
    text = _read(model_name_or_path, RECORD)
    return json.loads(text) if text else []


def provenance(model_name_or_path: str | None) -> str | None:
    """The licence, data and origins in the `about.yaml` of a checkpoint, as YAML; None if it has none.

    Raises:
        SettingError: the `about.yaml` is not valid.
    """
    try:
        about = parse_about(_read(model_name_or_path, ABOUT) or "", f"{ABOUT} of {model_name_or_path}")
    except ValueError as error:
        raise SettingError(str(error)) from error
    kept = {name: about[name] for name in PROVENANCE if name in about}
    return yaml.safe_dump(kept, sort_keys=False, allow_unicode=True, width=132) if kept else None


def _read(model_name_or_path: str | None, name: str) -> str | None:
    """The text of a file of a checkpoint; None if there is no checkpoint or no such file."""
    if model_name_or_path is None:
        return None
    try:
        file = cached_file(
            model_name_or_path, name, _raise_exceptions_for_missing_entries=False, _raise_exceptions_for_connection_errors=False
        )
    except (OSError, ValueError) as error:
        raise SettingError(f"{model_name_or_path!r} is not a checkpoint: {' '.join(str(error).split())}") from error
    return Path(file).read_text(encoding="utf-8") if file else None


def stage(groups: tuple[Any, ...], state: Any, images: int | None, frozen_backbone: bool) -> dict[str, Any]:
    """The record of a run.

    Args:
        groups: its argument dataclasses; values that differ from their defaults are recorded, without paths.
        state: the state of the Trainer at the end.
        images: the number of training images; None for a stream.
        frozen_backbone: whether the backbone was frozen.

    Returns:
        `settings`, `images`, `frozen_backbone`, `steps`, `best_step` (None if the last weights were kept), `epochs`, `seconds` of
        training and evaluation (including those before an interruption), `hardware`, `versions` and `log`.
    """
    log = [{name: entry[name] for name in ("step", *LOGGED) if name in entry} for entry in state.log_history]
    settings = {name: value for group in groups for name, value in _changed(group).items()}
    return {
        "settings": settings,
        "images": images,
        "frozen_backbone": frozen_backbone,
        "steps": state.global_step,
        "best_step": (settings.get("load_best_model_at_end") and state.best_global_step) or None,
        "epochs": round(state.epoch or 0, 3),
        "seconds": round(elapsed(state.log_history)),
        "hardware": hardware(),
        "versions": {"torch": torch.__version__, "transformers": transformers.__version__},
        "log": [entry for entry in log if len(entry) > 1],
    }


def averaged_record(checkpoints: Sequence[str | Path], weights: Sequence[float]) -> list[dict[str, Any]]:
    """The record of an average: the stages that all checkpoints share, then `blend`, a list of each one's `share` (its weight in
    the average) and its other `stages`. (The names are those of existing checkpoints.)"""
    records = [earlier_stages(str(checkpoint)) for checkpoint in checkpoints]
    shared = 0
    while all(len(record) > shared and record[shared] == records[0][shared] for record in records):
        shared += 1
    parts = [{"share": weight, "stages": record[shared:]} for weight, record in zip(weights, records)]
    return [*records[0][:shared], {"blend": parts}]


def copy_metadata(checkpoint: str | Path, out: str | Path) -> None:
    """Copy a checkpoint's processor, training record and provenance to a folder with weights that were made from it."""
    AttnCapProcessor.from_pretrained(checkpoint).save_pretrained(out)
    if (Path(checkpoint) / RECORD).exists():
        shutil.copyfile(Path(checkpoint) / RECORD, Path(out) / RECORD)
    origins = provenance(str(checkpoint))
    if origins and not (Path(out) / ABOUT).exists():
        (Path(out) / ABOUT).write_text(origins, encoding="utf-8")


def elapsed(log_history: list[dict[str, Any]]) -> float:
    """Seconds of a run up to its last log entry."""
    return max((entry.get("elapsed", 0.0) for entry in log_history), default=0.0)


def hardware() -> str:
    """The names of the GPUs, or of the CPU with the number of threads in use."""
    if torch.cuda.is_available():
        processes = int(os.environ.get("WORLD_SIZE", "1"))
        return f"{processes} x {torch.cuda.get_device_name()}"
    return f"{_cpu()}, {torch.get_num_threads()} threads"


def _cpu() -> str:
    info = Path("/proc/cpuinfo")
    lines = info.read_text(encoding="utf-8").splitlines() if info.exists() else []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor() or platform.machine()


def _changed(group: Any) -> dict[str, Any]:
    """The settings of a group that differ from the defaults."""
    # An instance of the class itself would set up the devices of the process again, and the Trainer could not continue.
    kind = type(group)
    default = type(kind.__name__, (kind,), {"_setup_devices": torch.device("cpu"), "distributed_state": None})()
    values = {item.name: getattr(group, item.name) for item in fields(group) if item.init and item.name not in NOT_RECORDED}
    changed = {name: value for name, value in values.items() if name in ALWAYS_RECORDED or value != getattr(default, name)}
    changed |= {name: Path(changed[name]).name for name in FILES & changed.keys() if changed[name]}
    return {name: getattr(value, "value", value) for name, value in changed.items()}  # the value of an enumeration member
