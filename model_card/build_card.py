"""The model card of a checkpoint: `README.md`, rendered from `template.md` and what the folder says of itself.

No figure is typed by hand. Of the folder are read: `config.json` and the headers of the weights; `results.json`, what
`attncap card --images` measured; `calibration.json` and `calibration.jpg`, what
`attncap calibrate` measured; `pointing.json`, what `benchmarks/pointing_photographs.py` found; `training.json`, the stages that
training recorded; `about.yaml`, the words of a person:

    title: My captioner
    summary: What it is and for whom.
    license: apache-2.0                      # of the weights, as the Hub names licences
    repository: user/name                    # where it will be on the Hub
    base_model: user/name                    # if it is fine-tuned from another
    dataset: {name: Flickr8k, id: flickr8k}  # what it was measured on; the id is the Hub's
    origins: [sentences on data, initial weights and their licences]

Each of these files, and each line of the last, may be missing.
"""

import json
import math
import random
from pathlib import Path
from typing import Any

import yaml
from huggingface_hub import EvalResult, ModelCard, ModelCardData
from safetensors import safe_open

from hf_attncap.atomic import atomic_write

TEMPLATE = Path(__file__).with_name("template.md")
ABOUT = "about.yaml"
CARD = "README.md"
LINES = {"title": str, "summary": str, "license": str, "repository": str, "base_model": str, "dataset": dict, "origins": list}
KINDS = {str: "a text", dict: "a mapping with a name", list: "a list of texts"}
MARK = "Rendered by `attncap card`, which replaces it: words of your own belong into about.yaml."
SHOWN, FAILURES, SEED = 10, 5, 0
FEW = 100  # images, of which scores depend on which they are
SCORES = {
    "bleu_1": "BLEU-1",
    "bleu_2": "BLEU-2",
    "bleu_3": "BLEU-3",
    "bleu_4": "BLEU-4",
    "rouge_l": "ROUGE-L",
    "cider": "CIDEr",
}
WORD_ATTENTION = {
    "none": "over regions alone",
    "score": "over regions; the last word has a say",
    "channel": "over regions and the components of the last word",
    "history": "over regions and all words so far",
}
FROM_HUB = """from transformers import pipeline

captioner = pipeline("image-to-text", model="{name}", trust_remote_code=True)
print(captioner("photo.jpg"))"""
FROM_FOLDER = """from hf_attncap import Captioner

result = Captioner.from_pretrained("{name}").caption("photo.jpg")
print(result.text)
result.plot_attention("photo_attention.png")"""


def build_card(checkpoint: str | Path) -> ModelCard:
    """The card of a checkpoint; `save` it as `README.md`.

    Raises:
        FileNotFoundError: the folder lacks a configuration or weights.
        ValueError: `about.yaml` is no mapping of the lines above.
    """
    folder = Path(checkpoint)
    config, about = _read(folder / "config.json"), _about(folder / ABOUT)
    if config is None or not any(folder.glob("model*.safetensors")):
        raise FileNotFoundError(f"'{folder}' has no config.json or no model.safetensors: name the folder of a saved captioner.")
    results, stages = _read(folder / "results.json"), _read(folder / "training.json") or []
    if results is not None and not isinstance(results, dict):
        raise ValueError(f"{folder / 'results.json'} was not written by `attncap card`: move it away.")
    dataset = about.get("dataset") or ({"name": results["data"]["file"]} if results and "data" in results else {})
    name = about.get("repository") or (folder.resolve().name if folder.is_absolute() else folder.as_posix())
    title = about.get("title") or folder.resolve().name
    code = FROM_HUB if "auto_map" in config else FROM_FOLDER
    parts = {
        "mark": MARK,
        "title": title,
        "summary": about.get("summary") or "A captioner that shows where it looked for each word.",
        "snippet": code.format(name=name),
        "model": list(_model(folder, config).items()),
        **_training(stages),
        "origins": about.get("origins", []),
        "pictures": (results or {}).get("pictures", []),
        "dataset": dataset.get("name"),
        "split": results and _split(results, dataset),
        "results": results if results and "scores" in results else None,
        "pointing": _pointing(_read(folder / "pointing.json")),
        "confidence": _confidence(folder, config),
    }
    measured = parts["results"]
    if measured:
        parts |= _measured(measured)
    return ModelCard.from_template(_metadata(title, about, dataset, measured), template_path=str(TEMPLATE), **parts)


def write_card(checkpoint: str | Path) -> Path:
    """`README.md` of a checkpoint, whole or not at all.

    Raises:
        FileExistsError: there is one that a person wrote.
        FileNotFoundError, ValueError: as `build_card`.
    """
    file = Path(checkpoint) / CARD
    if not is_ours(checkpoint):
        raise FileExistsError(f"{file} was written by hand: move it away, and its words into {ABOUT} if they are to stay.")
    card = str(build_card(checkpoint))
    with atomic_write(file) as stream:
        stream.write(card)
    return file


def is_ours(checkpoint: str | Path) -> bool:
    """Whether a checkpoint's card may be written: there is none, or one that was rendered."""
    file = Path(checkpoint) / CARD
    return not file.exists() or MARK in file.read_text(encoding="utf-8")


def _read(path: Path) -> Any:
    try:
        return json.loads(path.read_text(encoding="utf-8")) if path.exists() else None
    except ValueError as error:
        raise ValueError(f"{path} was not written by hf_attncap, it holds no JSON ({error}): move it away.") from error


def _about(path: Path) -> dict[str, Any]:
    try:
        about = yaml.safe_load(path.read_text(encoding="utf-8")) if path.exists() else {}
    except yaml.YAMLError as error:
        raise ValueError(f"{path} cannot be read as YAML: {' '.join(str(error).split())}.") from error
    about = {} if about is None else about
    check_about(about, str(path))
    return about


def check_about(about: Any, place: str) -> None:
    """Raises a ValueError, naming the place, for what is not the content of an `about.yaml`."""
    if not isinstance(about, dict) or about.keys() - LINES.keys():
        what = ", ".join(sorted(map(str, about.keys() - LINES.keys()))) if isinstance(about, dict) else "no mapping"
        raise ValueError(f"{place} has {what}: it may have only {', '.join(sorted(LINES))}, as `name: value`.")
    values = {**about, **{f"dataset: {name}": value for name, value in _items(about.get("dataset"))}}
    for name, value in values.items():
        several = isinstance(value, list) and all(isinstance(item, str) for item in value)
        kind = LINES.get(name, str)
        if not (isinstance(value, kind) if kind is not list else several):
            raise ValueError(f"{place}: `{name}` is {value!r:.60}; expected {KINDS[kind]}.")
    if "dataset" in about and not {"name"} <= about["dataset"].keys() <= {"name", "id", "split"}:
        raise ValueError(
            f"{place}: `dataset` has {', '.join(map(str, about['dataset']))}; expected name, and perhaps id and split."
        )


def _items(value: Any) -> list[tuple[Any, Any]]:
    return list(value.items()) if isinstance(value, dict) else []


def _metadata(title: str, about: dict[str, Any], dataset: dict[str, Any], results: dict[str, Any] | None) -> ModelCardData:
    scored: dict[str, Any] = {}
    if results:
        decoding = {**results["decoding"], "tokenizer": results["tokenizer"], "commit": results["commit"]}
        scored["model_name"] = title
        scored["eval_results"] = [
            EvalResult(
                task_type="image-to-text",
                dataset_type=dataset.get("id") or dataset["name"],
                dataset_name=dataset["name"],
                dataset_split=_split(results, dataset),
                metric_type=kind.partition("_")[0] if kind.startswith(("bleu", "rouge")) else kind,
                metric_name=name,
                metric_value=round(100 * results["scores"][kind], 2),
                metric_args=decoding,
            )
            for kind, name in SCORES.items()
        ]
    return ModelCardData(
        language="en",
        license=about.get("license"),
        library_name="transformers",
        pipeline_tag="image-to-text",
        tags=["image-captioning", "attncap", "attention"],
        base_model=about.get("base_model"),
        datasets=[dataset["id"]] if dataset.get("id") else None,
        metrics=["bleu", "rouge", "cider"] if results else None,
        **scored,
    )


def _split(results: dict[str, Any], dataset: dict[str, Any]) -> str | None:
    return results.get("data", {}).get("split") or dataset.get("split")


def _model(folder: Path, config: dict[str, Any]) -> dict[str, str]:
    files = sorted(folder.glob("model*.safetensors"))
    parameters = 0
    for file in files:
        with safe_open(file, "np") as weights:
            shapes = {name: weights.get_slice(name).get_shape() for name in weights.keys()}  # noqa: SIM118
        # What batch norm counts is no parameter.
        counted = {name: shape for name, shape in shapes.items() if not name.endswith(("running_mean", "running_var", "_tracked"))}
        for shape in counted.values():
            parameters += math.prod(shape)
    grid = config.get("grid_size")
    return {
        "encoder": f"{config['backbone']}, {config['encoder_channels']} windows"
        + (", last stage dilated" if config.get("dilate_last_stage") else "")
        + (f", grid {grid}" if grid else ""),
        "decoder": f"LSTM of {config['hidden_size']}, words of {config['word_embed_dim']}",
        "attention": WORD_ATTENTION[config["word_attention"]],
        "vocabulary": f"{config['vocab_size']:,}",
        "parameters": f"{parameters / 1e6:.1f} million",
        "weights": f"{sum(file.stat().st_size for file in files) / 1e6:.1f} MB",
    }


def _measured(results: dict[str, Any]) -> dict[str, Any]:
    """What the template says of results."""
    limits, scores = results["limits"], results["scores"]
    ids = sorted(results["captions"], key=lambda name: (results["cider"][name], name))
    worst = ids[: max(len(ids) // 10, 1)]
    chosen = random.Random(SEED)
    examples = chosen.sample(sorted(ids), min(SHOWN, len(ids)))
    failures = chosen.sample(worst, min(FAILURES, len(worst)))
    return {
        "decoding": ", ".join(f"{name} {value}" for name, value in results["decoding"].items()),
        "few": len(ids) < FEW,
        "scores": [{"name": name, "value": f"{100 * scores[kind]:.1f}"} for kind, name in SCORES.items()],
        "examples": [_example(results, name) for name in examples],
        "failures": [_example(results, name) for name in failures],
        "numbers": limits["numbers"],
        "genders": limits["genders"],
        "doubles": limits["doubles"],
        "writing": {**limits["writing"], "cider": f"{100 * limits['writing']['cider']:.1f}"},
        "fifths": [f"{100 * value:.1f}" for value in limits["unusual"]["cider_by_fifth"]],
    }


def _confidence(folder: Path, config: dict[str, Any]) -> dict[str, Any] | None:
    """What the template says of a calibration: of the one that the configuration holds, or nothing."""
    report, own = _read(folder / "calibration.json"), config.get("confidence")
    if report is None or own is None or report["calibration"] != own:
        return None
    sets = []
    for name, found in report["sets"].items():
        if found["images"] and found["auroc"][0] is not None:
            areas = {kind: "{:.3f} ({:.3f} to {:.3f})".format(*found[kind]) for kind in ("auroc", "auroc_of_score")}
            halves = {str(half["coverage"]): f"{100 * half['cider']:.1f}" for half in found["coverage"]}
            shares = {str(half["coverage"]): f"{100 - 100 * half['risk']:.0f}" for half in found["coverage"]}
            own = {"name": name, "images": found["images"], "brier": f"{found['brier']:.3f}"}
            sets.append({**own, **areas, "cider": halves, "good": shares})
    chart = "calibration.jpg" if (folder / "calibration.jpg").is_file() else None
    return {**report["calibration"], "sets": sets, "chart": chart}


def _pointing(found: dict[str, Any] | None) -> list[dict[str, Any]]:
    """What the pointing game says of the captioner's own captions and of references that it was made to say."""
    lines = []
    for kind, figures in (found or {"captions": {}})["captions"].items():
        if "hits" in figures:  # there are none of fewer than two photographs
            difference, low, high = (f"{100 * value:+.1f}" for value in figures["hits_minus_other_photographs"])
            shares = {name: f"{100 * figures[name]:.1f}" for name in ("hits", "chance", "other_photographs")}
            counts = {name: figures[name] for name in ("photographs", "words")}
            lines.append({"captions": kind, "more": f"{difference} ({low} to {high})", **shares, **counts})
    return lines


def _example(results: dict[str, Any], name: str) -> dict[str, str]:
    texts = {"caption": results["captions"][name], "reference": results["references"][name]}
    cells = {kind: " ".join(text.split()).replace("|", "\\|") for kind, text in texts.items()}
    return {"id": name, "cider": f"{100 * results['cider'][name]:.0f}", **cells}


def _training(record: list[dict[str, Any]]) -> dict[str, Any]:
    """The runs that `training.json` tells of, each once, and how the weights came of them if they are a mean."""
    runs: list[dict[str, Any]] = []

    def path(stages: list[dict[str, Any]]) -> str:
        steps = []
        for stage in stages:
            if "blend" in stage:
                parts = [f"{path(part['stages']) or 'as it was'} (share {part['share']:g})" for part in stage["blend"]]
                steps.append(f"mean of [{'; '.join(parts)}]")
                continue
            if stage not in runs:
                runs.append(stage)
            steps.append(str(runs.index(stage) + 1))
        return " → ".join(steps)

    whole = path(record)
    return {
        "stages": [_stage(number, run) for number, run in enumerate(runs, 1)],
        "lineage": whole if any("blend" in stage for stage in record) else None,
    }


def _stage(number: int, stage: dict[str, Any]) -> dict[str, Any]:
    settings = stage["settings"]
    learned = "decoder" if stage["frozen_backbone"] else "encoder and decoder"
    name = "self-critical" if settings.get("self_critical") else "cross-entropy"
    if weight := settings.get("bleu_weight"):
        name += f" on CIDEr-D and {weight:g} x BLEU-4"
    if share := settings.get("cross_entropy_weight"):
        name += f", {share:g} of it cross-entropy"
    if settings.get("contrastive"):
        learned, name = "encoder", "contrastive"
    if teachers := settings.get("distill_from"):
        name += f", distilled from {', '.join(teachers)}"
    rates = [settings.get("learning_rate"), settings.get("encoder_learning_rate")]
    return {
        "number": number,
        "name": f"{learned}, {name}",
        "learning_rate": ", encoder ".join(f"{rate:g}" for rate in rates if rate is not None),
        "images": "a stream" if stage["images"] is None else f"{stage['images']:,}",
        "epochs": f"{stage['epochs']:g}",
        "steps": f"{stage['steps']:,}",
        "best_step": stage["best_step"] or "the last",
        "time": f"{stage['seconds'] / 60:.0f} min",
        "hardware": stage["hardware"],
    }
