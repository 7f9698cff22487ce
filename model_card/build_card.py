"""Render the model card of a checkpoint: `README.md`, from `template.md` and the files in the checkpoint's folder.

- `config.json` and the headers of the weights
- `results.json`: scores and errors, from `attncap card --eval-data`
- `calibration.json` and `calibration.jpg`, from `attncap calibrate`
- `pointing.json`, from `benchmarks/pointing_photographs.py`
- `training.json`: the stages of training
- `about.yaml`: your own text, see `about.py`

All except the first are optional. No number is written by hand, except those of `independent` in `about.yaml`.
"""

import json
import math
import random
from pathlib import Path
from typing import Any

from hf_attncap.training.checkpoints.about import check_count, read_about
from huggingface_hub import EvalResult, ModelCard, ModelCardData
from safetensors import safe_open

from hf_attncap import __version__
from hf_attncap.atomic import atomic_write
from hf_attncap.hub import ABOUT, CALIBRATION, CALIBRATION_CHART, POINTING, RECORD, RESULTS
from hf_attncap.metrics.significance import FEW_IMAGES

TEMPLATE = Path(__file__).with_name("template.md")
CARD = "README.md"
MARK = "Rendered by `attncap card`"
EXAMPLES, FAILURES, SEED = 5, 3, 0
SCORES = {**{f"bleu_{n}": f"BLEU-{n}" for n in (1, 2, 3, 4)}, "rouge_l": "ROUGE-L", "cider": "CIDEr"}
WORD_ATTENTION = {
    "none": "over image regions",
    "score": "over image regions; the previous word is part of the query",
    "channel": "over image regions, and over the components of the previous word",
    "history": "over image regions, and over all previous words",
}
CAPTIONS = {"own": "its own captions", "references": "the reference captions"}
MAPS = ("attention", "importance")


def build_card(checkpoint: str | Path) -> ModelCard:
    """The card of a checkpoint.

    Raises:
        FileNotFoundError: the folder has no configuration or weights.
        ValueError: `about.yaml` is not valid, or another file has an unknown format.
    """
    folder = Path(checkpoint)
    config, about = _config(folder), read_about(folder)
    results, stages = _read(folder / RESULTS) or {}, _read(folder / RECORD) or []
    if not isinstance(results, dict):
        raise ValueError(f"{folder / RESULTS} was not written by `attncap card`: move it away.")
    sets = _name_sets(about, results.get("sets", []), folder)
    title = about.get("title") or folder.resolve().name
    parts = {
        "mark": MARK,
        "version": __version__,
        "title": title,
        "about": about,
        "path": about.get("repository") or (folder.resolve().name if folder.is_absolute() else folder.as_posix()),
        "remote_code": "auto_map" in config,
        "model": list(_model(folder, config).items()),
        "training": _training(stages),
        "license": {kind: about.get(f"license{kind}") for kind in ("", "_name", "_link")},
        "pictures": results.get("pictures", []),
        "results": results if sets else None,
        "sets": [_set(own) for own in sets],
        "few": FEW_IMAGES,
        "pointing": _pointing(folder / POINTING),
        "confidence": _confidence(folder, config, {own["data"]["file"]: own["label"] for own in sets}),
    }
    return ModelCard.from_template(_metadata(title, about, sets, results), template_path=str(TEMPLATE), **parts)


def check_card(checkpoint: str | Path, measured: int = 0) -> None:
    """Raise the errors of `write_card` before the checkpoint is measured.

    Args:
        measured: the number of files on which the checkpoint will be measured. Default: `results.json` stays unchanged.
    """
    folder = Path(checkpoint)
    _refuse_handwritten(folder)
    if measured:
        _config(folder)
        check_count(read_about(folder), measured, folder)
    else:
        build_card(folder)


def write_card(checkpoint: str | Path) -> Path:
    """Render the card of a checkpoint to its `README.md`.

    Raises:
        FileExistsError: `README.md` was written by hand.
        FileNotFoundError, ValueError: as `build_card`.
    """
    file = Path(checkpoint) / CARD
    _refuse_handwritten(checkpoint)
    card = str(build_card(checkpoint))
    with atomic_write(file) as stream:
        stream.write(card)
    return file


def is_ours(checkpoint: str | Path) -> bool:
    """Whether `README.md` may be replaced: it does not exist, or was rendered."""
    file = Path(checkpoint) / CARD
    return not file.exists() or MARK in file.read_text(encoding="utf-8")


def _refuse_handwritten(checkpoint: str | Path) -> None:
    if not is_ours(checkpoint):
        raise FileExistsError(f"{Path(checkpoint) / CARD} was written by hand: move it away, and put your text in {ABOUT}.")


def _config(folder: Path) -> dict[str, Any]:
    config = _read(folder / "config.json")
    if config is None or not any(folder.glob("model*.safetensors")):
        raise FileNotFoundError(f"'{folder}' has no config.json or no model.safetensors: give the folder of a saved captioner.")
    return config


def _read(path: Path) -> Any:
    try:
        return json.loads(path.read_text(encoding="utf-8")) if path.exists() else None
    except ValueError as error:
        raise ValueError(f"{path} was not written by hf_attncap (not valid JSON: {error}): move it away.") from error


def _name_sets(about: dict[str, Any], sets: list[dict[str, Any]], folder: Path) -> list[dict[str, Any]]:
    """The measured sets with `name`, `type` and `split` for the metadata, and `label` for the tables."""
    if sets:
        check_count(about, len(sets), folder)
    datasets = about.get("datasets") or [{"name": own["data"]["file"]} for own in sets]
    named = []
    for own, dataset in zip(sets, datasets):
        split = own["data"]["split"] or dataset.get("split")
        label = dataset["name"] + (f", {split}" if split else "")
        named.append({**own, "name": dataset["name"], "type": dataset.get("id") or dataset["name"], "split": split, "label": label})
    if len({(own["type"], own["split"]) for own in named}) < len(named):
        raise ValueError(f"{folder / ABOUT}: two of `datasets` have the same id (or name) and split; the Hub needs them to differ.")
    return named


def _metadata(title: str, about: dict[str, Any], sets: list[dict[str, Any]], results: dict[str, Any]) -> ModelCardData:
    scored: dict[str, Any] = {}
    if sets:
        decoding = {**results["decoding"], "tokenizer": results["tokenizer"], "commit": results["commit"]}
        scored["model_name"] = title
        scored["eval_results"] = [
            EvalResult(
                task_type="image-to-text",
                dataset_type=own["type"],
                dataset_name=own["name"],
                dataset_split=own["split"],
                metric_type=kind.partition("_")[0] if kind.startswith(("bleu", "rouge")) else kind,
                metric_name=name,
                metric_value=round(100 * own["scores"][kind], 2),
                metric_args=decoding,
            )
            for own in sets
            for kind, name in SCORES.items()
        ]
    ids = [dataset["id"] for dataset in about.get("datasets", []) if "id" in dataset]
    return ModelCardData(
        language="en",
        license=about.get("license"),
        license_name=about.get("license_name"),
        license_link=about.get("license_link"),
        library_name="transformers",
        pipeline_tag="image-to-text",
        tags=["image-captioning", "attncap", "attention"],
        base_model=about.get("base_model"),
        datasets=list(dict.fromkeys(ids)) or None,
        metrics=["bleu", "rouge", "cider"] if sets else None,
        **scored,
    )


def _model(folder: Path, config: dict[str, Any]) -> dict[str, str]:
    """The rows of the model table."""
    files = sorted(folder.glob("model*.safetensors"))
    parameters = 0
    for file in files:
        with safe_open(file, "np") as weights:
            shapes = {name: weights.get_slice(name).get_shape() for name in weights.keys()}  # noqa: SIM118
        buffers = ("running_mean", "running_var", "_tracked")  # of batch norm
        parameters += sum(math.prod(shape) for name, shape in shapes.items() if not name.endswith(buffers))
    grid = config.get("grid_size")
    return {
        "encoder": f"{config['backbone']}, {config['encoder_channels']} output channels" + (f", grid {grid}" if grid else ""),
        "decoder": f"LSTM with {config['hidden_size']} units, word embeddings with {config['word_embed_dim']} dimensions",
        "attention": WORD_ATTENTION[config["word_attention"]],
        "vocabulary": f"{config['vocab_size']:,}",
        "parameters": f"{parameters / 1e6:.1f} million",
        "weights": f"{sum(file.stat().st_size for file in files) / 1e6:.1f} MB",
    }


def _set(own: dict[str, Any]) -> dict[str, Any]:
    """What the template shows of a measured set."""
    errors = own["limits"]
    ids = sorted(own["captions"], key=lambda name: (own["cider"][name], name))
    worst = ids[: max(len(ids) // 10, 1)]
    chosen = random.Random(SEED)
    examples = chosen.sample(sorted(ids), min(EXAMPLES, len(ids)))
    worst = [name for name in worst if name not in examples]
    failures = chosen.sample(worst, min(FAILURES, len(worst)))
    return {
        "label": own["label"],
        "images": own["data"]["images"],
        "references": own["data"]["references"],
        "scores": [_score(own, kind) for kind in SCORES],
        "examples": [_example(own, name) for name in examples],
        "failures": [_example(own, name) for name in failures],
        "numbers": errors["numbers"],
        "genders": errors["genders"],
        "doubles": errors["doubles"],
        "writing": {**errors["writing"], "cider": f"{100 * errors['writing']['cider']:.1f}"},
        "fifths": [f"{100 * value:.1f}" for value in errors["unusual"]["cider_by_fifth"]],
    }


def _score(own: dict[str, Any], kind: str) -> str:
    """A score times 100, with its 95 % interval if it has one."""
    value = f"{100 * own['scores'][kind]:.1f}"
    if kind not in own["intervals"]:
        return value
    low, high = (f"{100 * bound:.1f}" for bound in own["intervals"][kind])
    return f"{value} ({low} to {high})"


def _confidence(folder: Path, config: dict[str, Any], labels: dict[str, str]) -> dict[str, Any] | None:
    """What the template shows of the calibration in the configuration, or None.

    Args:
        labels: names for the sets that are also in the table of scores, by file.
    """
    report, calibration = _read(folder / CALIBRATION), config.get("confidence")
    if report is None or calibration is None or report["calibration"] != calibration:
        return None
    sets = []
    for name, found in report["sets"].items():
        if found["images"] and found["auroc"][0] is not None:
            areas = {kind: "{:.3f} ({:.3f} to {:.3f})".format(*found[kind]) for kind in ("auroc", "auroc_of_score")}
            cider = {str(part["coverage"]): f"{100 * part['cider']:.1f}" for part in found["coverage"]}
            good = {str(part["coverage"]): f"{100 - 100 * part['risk']:.0f}" for part in found["coverage"]}
            own = {"name": labels.get(name, name), "images": found["images"], "brier": f"{found['brier']:.3f}"}
            sets.append({**own, **areas, "cider": cider, "good": good})
    chart = CALIBRATION_CHART if (folder / CALIBRATION_CHART).is_file() else None
    return {**calibration, "sets": sets, "chart": chart}


def _pointing(path: Path) -> dict[str, list[dict[str, Any]]] | None:
    """Rows of the pointing game, one per kind of captions and map, and for each kind of captions the better map, if any."""
    rows, verdicts = [], []
    for kind, found in (_read(path) or {"captions": {}})["captions"].items():
        if "importance_minus_attention" not in found:  # fewer than two photographs
            continue
        difference = found["importance_minus_attention"]
        for name in MAPS:
            figures = found[name]
            shares = {share: f"{100 * figures[share]:.1f}" for share in ("hits", "chance", "other_photographs")}
            more = _signed(figures["hits_minus_other_photographs"])
            gain = _signed(difference) if name == "importance" else ""
            counts = {count: figures[count] for count in ("photographs", "words")}
            rows.append({"captions": CAPTIONS[kind], "map": name, "more": more, "gain": gain, **shares, **counts})
        better = "importance" if difference[1] > 0 else "attention" if difference[2] < 0 else None
        verdicts.append({"captions": CAPTIONS[kind], "better": better})
    return {"rows": rows, "verdicts": verdicts} if rows else None


def _signed(interval: list[float]) -> str:
    """A difference in per cent, with its 95 % interval."""
    return "{:+.1f} ({:+.1f} to {:+.1f})".format(*(100 * value for value in interval))


def _example(own: dict[str, Any], name: str) -> dict[str, str]:
    texts = {"caption": own["captions"][name], "reference": own["references"][name]}
    cells = {kind: " ".join(text.split()).replace("|", "\\|") for kind, text in texts.items()}
    return {"id": name, "cider": f"{100 * own['cider'][name]:.0f}", **cells}


def _training(record: list[dict[str, Any]]) -> dict[str, Any]:
    """The runs of a training record, each once, with the weights from which it started; and the average, if the last step is one.

    An average (`blend` in the record) lists the `stages` that led to each of its checkpoints, after those before the average.
    """
    runs: list[tuple[dict[str, Any], str]] = []

    def follow(stages: list[dict[str, Any]], weights: str) -> str:
        """The name of the weights after `stages`, when training starts from `weights`."""
        for stage in stages:
            if "blend" in stage:
                parts = [(follow(part["stages"], weights), part["share"]) for part in stage["blend"]]
                weights = "mean of " + ", ".join(
                    f"{f'({name})' if ',' in name else name} (weight {weight:g})" for name, weight in parts
                )
            else:
                if (stage, weights) not in runs:
                    runs.append((stage, weights))
                weights = f"run {runs.index((stage, weights)) + 1}"
        return weights

    pretrained = bool(record) and "backbone_weights" in record[0].get("settings", {})
    final = follow(record, "the pretrained backbone" if pretrained else "not recorded")
    rows = [{"number": number, "start": start, **_stage(stage)} for number, (stage, start) in enumerate(runs, 1)]
    return {"runs": rows, "average": final if final.startswith("mean") else None}


def _stage(stage: dict[str, Any]) -> dict[str, Any]:
    settings = stage["settings"]
    trained = "decoder" if stage["frozen_backbone"] else "encoder and decoder"
    loss = "self-critical" if settings.get("self_critical") else "cross-entropy"
    if weight := settings.get("cross_entropy_weight"):
        loss += f" (weight {1 - weight:g}) and cross-entropy ({weight:g})"
    rates = [settings.get("learning_rate"), settings.get("encoder_learning_rate")]
    return {
        "name": f"{trained}, {loss}",
        "learning_rate": ", encoder ".join(f"{rate:g}" for rate in rates if rate is not None),
        "images": "a stream" if stage["images"] is None else f"{stage['images']:,}",
        "epochs": f"{stage['epochs']:g}",
        "steps": f"{stage['steps']:,}",
        "best_step": f"{stage['best_step']:,}" if stage["best_step"] else "last",
        "time": f"{stage['seconds'] / 60:.0f} min",
        "hardware": stage["hardware"],
    }
