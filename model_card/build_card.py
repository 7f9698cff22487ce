"""The model card of a checkpoint: `README.md`, rendered from `template.md` and the files in the checkpoint's folder.

No figure is typed by hand, except those in `independent`. The card reads:

- `config.json` and the headers of the weights
- `results.json`: what `attncap card --images` measured
- `calibration.json` and `calibration.jpg`: what `attncap calibrate` measured
- `pointing.json`: what `benchmarks/pointing_photographs.py` found
- `training.json`: the stages that training recorded
- `about.yaml`: your own text; its lines are described in `about.py`

Each of them but the first two may be missing.
"""

import json
import math
import random
from pathlib import Path
from typing import Any

from hf_attncap.training.checkpoints.about import ABOUT, check_count, read_about
from huggingface_hub import EvalResult, ModelCard, ModelCardData
from safetensors import safe_open

from hf_attncap.atomic import atomic_write

TEMPLATE = Path(__file__).with_name("template.md")
CARD = "README.md"
MARK = "Rendered by `attncap card`"
SHOWN, FAILURES, SEED = 5, 3, 0
FEW = 100  # images; of fewer the scores vary too much, and the limits count too little
SCORES = {
    "bleu_1": "BLEU-1",
    "bleu_2": "BLEU-2",
    "bleu_3": "BLEU-3",
    "bleu_4": "BLEU-4",
    "rouge_l": "ROUGE-L",
    "cider": "CIDEr",
}
WORD_ATTENTION = {
    "none": "over regions",
    "score": "over regions; the previous word is part of the query",
    "channel": "over regions and over the components of the previous word",
    "history": "over regions and over all previous words",
}
CAPTIONS = {"own": "its own captions", "references": "the reference captions"}
MAPS = ("attention", "importance")
FROM_HUB = """from transformers import pipeline

captioner = pipeline("image-to-text", model="{name}", trust_remote_code=True)
print(captioner("photo.jpg"))"""
FROM_FOLDER = """from hf_attncap import Captioner

result = Captioner.from_pretrained("{name}").explain("photo.jpg")
print(result.text)
result.plot_importance("photo_importance.png")"""


def build_card(checkpoint: str | Path) -> ModelCard:
    """The card of a checkpoint; `save` it as `README.md`.

    Raises:
        FileNotFoundError: the folder lacks a configuration or weights.
        ValueError: `about.yaml` is no mapping of the lines above, or a file has another form than this version writes.
    """
    folder = Path(checkpoint)
    config, about = _config(folder), read_about(folder / ABOUT)
    results, stages = _results(folder / "results.json"), _read(folder / "training.json") or []
    sets = _name_sets(about, results.get("sets", []), str(folder / ABOUT))
    name = about.get("repository") or (folder.resolve().name if folder.is_absolute() else folder.as_posix())
    title = about.get("title") or folder.resolve().name
    code = FROM_HUB if "auto_map" in config else FROM_FOLDER
    parts = {
        "mark": MARK,
        "title": title,
        "summary": about.get("summary") or "An image captioner that shows which image regions it used for each word.",
        "snippet": code.format(name=name),
        "model": list(_model(folder, config).items()),
        **_training(stages),
        "license": {kind: about.get(f"license{kind}") for kind in ("", "_name", "_link")},
        "origins": about.get("origins", []),
        "pictures": results.get("pictures", []),
        "results": results if sets else None,
        "sets": [_measured(own) for own in sets],
        "few": FEW,
        "independent": about.get("independent", []),
        "pointing": _pointing(folder / "pointing.json"),
        "confidence": _confidence(folder, config, {own["data"]["file"]: own["label"] for own in sets}),
    }
    return ModelCard.from_template(_metadata(title, about, sets, results), template_path=str(TEMPLATE), **parts)


def check_card(checkpoint: str | Path, measured: int = 0) -> None:
    """Raises what `write_card` would raise, before anything that takes long.

    Args:
        measured: number of files that the checkpoint is to be measured on, anew. Default: `results.json` stays as it is.
    """
    folder = Path(checkpoint)
    _check_ours(folder)
    if measured:
        _config(folder)
        check_count(read_about(folder / ABOUT), measured, str(folder / ABOUT))
    else:
        build_card(folder)


def write_card(checkpoint: str | Path) -> Path:
    """`README.md` of a checkpoint, whole or not at all.

    Raises:
        FileExistsError: there is one that a person wrote.
        FileNotFoundError, ValueError: as `build_card`.
    """
    file = Path(checkpoint) / CARD
    _check_ours(checkpoint)
    card = str(build_card(checkpoint))
    with atomic_write(file) as stream:
        stream.write(card)
    return file


def is_ours(checkpoint: str | Path) -> bool:
    """Whether a checkpoint's card may be written: there is none, or one that was rendered."""
    file = Path(checkpoint) / CARD
    return not file.exists() or MARK in file.read_text(encoding="utf-8")


def _check_ours(checkpoint: str | Path) -> None:
    if not is_ours(checkpoint):
        file = Path(checkpoint) / CARD
        raise FileExistsError(f"{file} was written by hand: move it away, and put the text that is to stay in {ABOUT}.")


def _config(folder: Path) -> dict[str, Any]:
    config = _read(folder / "config.json")
    if config is None or not any(folder.glob("model*.safetensors")):
        raise FileNotFoundError(f"'{folder}' has no config.json or no model.safetensors: name the folder of a saved captioner.")
    return config


def _results(path: Path) -> dict[str, Any]:
    results = _read(path)
    if results is None:
        return {}
    if not isinstance(results, dict):
        raise ValueError(f"{path} was not written by `attncap card`: move it away.")
    if "captions" in results:
        raise ValueError(f"{path} has the form of an earlier version: measure again with `attncap card --images`.")
    return results


def _read(path: Path) -> Any:
    try:
        return json.loads(path.read_text(encoding="utf-8")) if path.exists() else None
    except ValueError as error:
        raise ValueError(f"{path} was not written by hf_attncap, it holds no JSON ({error}): move it away.") from error


def _name_sets(about: dict[str, Any], sets: list[dict[str, Any]], place: str) -> list[dict[str, Any]]:
    """The measured sets with the `name`, `type` and `split` that the metadata and the tables have for them."""
    if sets:
        check_count(about, len(sets), place)
    datasets = about.get("datasets") or [{"name": own["data"]["file"]} for own in sets]
    named = []
    for own, dataset in zip(sets, datasets):
        split = own["data"]["split"] or dataset.get("split")
        label = dataset["name"] + (f", {split}" if split else "")
        named.append({**own, "name": dataset["name"], "type": dataset.get("id") or dataset["name"], "split": split, "label": label})
    if len({(own["type"], own["split"]) for own in named}) < len(named):
        raise ValueError(f"{place}: two of `datasets` have the same id (or name) and split; the Hub could not tell them apart.")
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
        "encoder": f"{config['backbone']}, {config['encoder_channels']} output channels" + (f", grid {grid}" if grid else ""),
        "decoder": f"LSTM with {config['hidden_size']} units, word embeddings with {config['word_embed_dim']} dimensions",
        "attention": WORD_ATTENTION[config["word_attention"]],
        "vocabulary": f"{config['vocab_size']:,}",
        "parameters": f"{parameters / 1e6:.1f} million",
        "weights": f"{sum(file.stat().st_size for file in files) / 1e6:.1f} MB",
    }


def _measured(own: dict[str, Any]) -> dict[str, Any]:
    """What the template says of a measured set."""
    limits = own["limits"]
    ids = sorted(own["captions"], key=lambda name: (own["cider"][name], name))
    worst = ids[: max(len(ids) // 10, 1)]
    chosen = random.Random(SEED)
    examples = chosen.sample(sorted(ids), min(SHOWN, len(ids)))
    failures = chosen.sample(worst, min(FAILURES, len(worst)))
    return {
        "label": own["label"],
        "images": own["data"]["images"],
        "references": own["data"]["references"],
        "scores": [_score(own, kind) for kind in SCORES],
        "examples": [_example(own, name) for name in examples],
        "failures": [_example(own, name) for name in failures],
        "numbers": limits["numbers"],
        "genders": limits["genders"],
        "doubles": limits["doubles"],
        "writing": {**limits["writing"], "cider": f"{100 * limits['writing']['cider']:.1f}"},
        "fifths": [f"{100 * value:.1f}" for value in limits["unusual"]["cider_by_fifth"]],
    }


def _score(own: dict[str, Any], kind: str) -> str:
    """A score times 100, with its 95 % interval if it has one."""
    value = f"{100 * own['scores'][kind]:.1f}"
    if kind not in own["intervals"]:
        return value
    low, high = (f"{100 * bound:.1f}" for bound in own["intervals"][kind])
    return f"{value} ({low} to {high})"


def _confidence(folder: Path, config: dict[str, Any], labels: dict[str, str]) -> dict[str, Any] | None:
    """What the template says of a calibration: of the one that the configuration holds, or nothing.

    Sets that the scores are of too have the `labels` that they have there.
    """
    report, own = _read(folder / "calibration.json"), config.get("confidence")
    if report is None or own is None or report["calibration"] != own:
        return None
    sets = []
    for name, found in report["sets"].items():
        if found["images"] and found["auroc"][0] is not None:
            areas = {kind: "{:.3f} ({:.3f} to {:.3f})".format(*found[kind]) for kind in ("auroc", "auroc_of_score")}
            halves = {str(half["coverage"]): f"{100 * half['cider']:.1f}" for half in found["coverage"]}
            shares = {str(half["coverage"]): f"{100 - 100 * half['risk']:.0f}" for half in found["coverage"]}
            own = {"name": labels.get(name, name), "images": found["images"], "brier": f"{found['brier']:.3f}"}
            sets.append({**own, **areas, "cider": halves, "good": shares})
    chart = "calibration.jpg" if (folder / "calibration.jpg").is_file() else None
    return {**report["calibration"], "sets": sets, "chart": chart}


def _pointing(path: Path) -> dict[str, list[dict[str, Any]]] | None:
    """Rows of the pointing game, one for each kind of captions and map, and for each kind which map is better, if one is."""
    lines, verdicts = [], []
    for kind, found in (_read(path) or {"captions": {}})["captions"].items():
        if not found.keys() >= set(MAPS):
            raise ValueError(f"{path} has the form of an earlier version: make it again with benchmarks/pointing_photographs.py.")
        if "importance_minus_attention" not in found:  # there are no figures of fewer than two photographs
            continue
        difference = found["importance_minus_attention"]
        for name in MAPS:
            figures = found[name]
            shares = {share: f"{100 * figures[share]:.1f}" for share in ("hits", "chance", "other_photographs")}
            more = _signed(figures["hits_minus_other_photographs"])
            gain = _signed(difference) if name == "importance" else ""
            counts = {count: figures[count] for count in ("photographs", "words")}
            lines.append({"captions": CAPTIONS[kind], "map": name, "more": more, "gain": gain, **shares, **counts})
        better = "importance" if difference[1] > 0 else "attention" if difference[2] < 0 else None
        verdicts.append({"captions": CAPTIONS[kind], "better": better})
    return {"lines": lines, "verdicts": verdicts} if lines else None


def _signed(interval: list[float]) -> str:
    """A difference of shares in per cent, with its 95 % interval."""
    return "{:+.1f} ({:+.1f} to {:+.1f})".format(*(100 * value for value in interval))


def _example(own: dict[str, Any], name: str) -> dict[str, str]:
    texts = {"caption": own["captions"][name], "reference": own["references"][name]}
    cells = {kind: " ".join(text.split()).replace("|", "\\|") for kind, text in texts.items()}
    return {"id": name, "cider": f"{100 * own['cider'][name]:.0f}", **cells}


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
    if share := settings.get("cross_entropy_weight"):
        name += f" (weight {1 - share:g}) and cross-entropy ({share:g})"
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
