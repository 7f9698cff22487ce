"""`training.json`: how a captioner came to be, stage by stage; it lies beside the weights and goes along from stage to stage."""

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

from ..arguments import SettingError
from .about import check_about

RECORD = "training.json"
ABOUT = "about.yaml"
PROVENANCE = ("license", "license_name", "license_link", "origins")  # lines of it that hold for what is made of the weights, too
# They say where files lay on one machine, or what a run shows, and not what was learned.
PLACES = {"output_dir", "feature_cache", "model_name_or_path", "train_file", "validation_file", "image_dir", "data_dir"}
FILES = {"backbone_weights", "word_vectors"}  # or names of weights; of a path its last part is kept
SHOWN = {"disable_tqdm", "report_to", "run_name", "logging_steps", "num_logged_images", "push_to_hub", "hub_token", "hub_model_id"}
MACHINE = {"dataloader_num_workers", "dataloader_pin_memory", "use_cpu", "resume_from_checkpoint", "save_total_limit"}
SET_BY_CODE = {"remove_unused_columns", "use_cache", "logging_nan_inf_filter", "prediction_loss_only"}
NOT_RECORDED = PLACES | SHOWN | MACHINE | SET_BY_CODE | {"validation_image_dir"}
ALWAYS = ("learning_rate", "seed", "num_train_epochs")
LOGGED = ("loss", "reward", "sample_length", "learning_rate", "eval_loss", "eval_cider", "eval_bleu_4", "eval_vocabulary")


def earlier_stages(model_name_or_path: str | None) -> list[dict[str, Any]]:
    """The stages that a checkpoint, a folder or a name on the Hub, went through; none if it does not say."""
    text = _text(model_name_or_path, RECORD)
    return json.loads(text) if text else []


def provenance(model_name_or_path: str | None) -> str | None:
    """What the `about.yaml` of a checkpoint says of licence, data and weights it came from, as YAML; None if it does not say.

    Raises:
        SettingError: it is no YAML, or no mapping of the lines of a card.
    """
    try:
        about = yaml.safe_load(_text(model_name_or_path, ABOUT) or "")
        check_about(about or {}, f"{ABOUT} of {model_name_or_path}")
    except yaml.YAMLError as error:
        raise SettingError(f"{ABOUT} of {model_name_or_path} cannot be read as YAML: {' '.join(str(error).split())}.") from error
    except ValueError as error:
        raise SettingError(str(error)) from error
    kept = {name: about[name] for name in PROVENANCE if name in about} if about else {}
    return yaml.safe_dump(kept, sort_keys=False, allow_unicode=True, width=132) if kept else None


def _text(model_name_or_path: str | None, name: str) -> str | None:
    """What a file of a checkpoint holds; None without a checkpoint or file."""
    if model_name_or_path is None:
        return None
    try:
        file = cached_file(
            model_name_or_path, name, _raise_exceptions_for_missing_entries=False, _raise_exceptions_for_connection_errors=False
        )
    except (OSError, ValueError) as error:
        raise SettingError(f"{model_name_or_path!r} is no checkpoint: {' '.join(str(error).split())}") from error
    return Path(file).read_text(encoding="utf-8") if file else None


def stage(groups: tuple[Any, ...], state: Any, images: int | None, frozen_backbone: bool) -> dict[str, Any]:
    """What is recorded of a run.

    Args:
        groups: its arguments; what differs from their defaults is kept, without paths.
        state: the Trainer's, at the end.
        images: how many it trained on; None for a stream.

    Returns:
        `settings`, `images`, `frozen_backbone`, `steps`, `best_step` (None where the last weights were kept), `epochs`,
        `seconds` of training and evaluations, over all its parts if it was interrupted, `hardware`, `versions` and `log`.
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


def blended(checkpoints: Sequence[str | Path], shares: Sequence[float]) -> list[dict[str, Any]]:
    """The record of a mean of weights: the stages that all share, then `blend`, a list of each one's `share` and own `stages`."""
    records = [earlier_stages(str(checkpoint)) for checkpoint in checkpoints]
    together = 0
    while all(len(record) > together and record[together] == records[0][together] for record in records):
        together += 1
    parts = [{"share": share, "stages": record[together:]} for share, record in zip(shares, records)]
    return [*records[0][:together], {"blend": parts}]


def hand_on(checkpoint: str | Path, out: str | Path) -> None:
    """What goes along with weights made of a checkpoint's: its processor, its record and its provenance, if it has them."""
    AttnCapProcessor.from_pretrained(checkpoint).save_pretrained(out)
    if (Path(checkpoint) / RECORD).exists():
        shutil.copyfile(Path(checkpoint) / RECORD, Path(out) / RECORD)
    origins = provenance(str(checkpoint))
    if origins and not (Path(out) / ABOUT).exists():
        (Path(out) / ABOUT).write_text(origins, encoding="utf-8")


def elapsed(log_history: list[dict[str, Any]]) -> float:
    """Seconds of a run until its last log entry."""
    return max((entry.get("elapsed", 0.0) for entry in log_history), default=0.0)


def hardware() -> str:
    """What computes: the GPUs, or the CPU and how many threads of it."""
    if torch.cuda.is_available():
        processes = int(os.environ.get("WORLD_SIZE", "1"))
        return f"{processes} x {torch.cuda.get_device_name()}"
    return f"{_processor()}, {torch.get_num_threads()} threads"


def _processor() -> str:
    info = Path("/proc/cpuinfo")
    lines = info.read_text(encoding="utf-8").splitlines() if info.exists() else []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor() or platform.machine()


def _changed(group: Any) -> dict[str, Any]:
    """The settings of a group that are not as an instance without arguments has them."""
    # An instance of the class itself would set up the devices of the process anew, and the Trainer could not go on.
    kind = type(group)
    default = type(kind.__name__, (kind,), {"_setup_devices": torch.device("cpu"), "distributed_state": None})()
    values = {item.name: getattr(group, item.name) for item in fields(group) if item.init and item.name not in NOT_RECORDED}
    changed = {name: value for name, value in values.items() if name in ALWAYS or value != getattr(default, name)}
    changed |= {name: Path(changed[name]).name for name in FILES & changed.keys() if changed[name]}
    return {name: getattr(value, "value", value) for name, value in changed.items()}  # of enumerations
