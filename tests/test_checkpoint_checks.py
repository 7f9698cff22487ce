"""A damaged or made-up checkpoint is refused in one sentence that names the file and the way out."""

import json
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from hf_attncap.cli import main

WEIGHTS, CONFIG, PROCESSOR = "model.safetensors", "config.json", "processor_config.json"
TOKENIZER, GENERATION = "tokenizer.json", "generation_config.json"
Damage = Callable[[Path], Any]


def values(file: str, **changes: Any) -> Damage:
    """Other values in a JSON file."""

    def damage(folder: Path) -> None:
        content = json.loads((folder / file).read_text())
        (folder / file).write_text(json.dumps({**content, **changes}))

    return damage


def image_values(**changes: Any) -> Damage:
    def damage(folder: Path) -> None:
        content = json.loads((folder / PROCESSOR).read_text())
        content["image_processor"] |= changes
        (folder / PROCESSOR).write_text(json.dumps(content))

    return damage


def text(file: str, content: str) -> Damage:
    return lambda folder: (folder / file).write_text(content)


def without(file: str) -> Damage:
    return lambda folder: (folder / file).unlink()


def weights(change: Callable[[dict[str, torch.Tensor]], Any]) -> Damage:
    def damage(folder: Path) -> None:
        tensors = load_file(folder / WEIGHTS)
        change(tensors)
        save_file(tensors, folder / WEIGHTS, metadata={"format": "pt"})

    return damage


def first_bytes(folder: Path) -> None:
    (folder / WEIGHTS).write_bytes((folder / WEIGHTS).read_bytes()[:100_000])


def vocabulary(change: Callable[[dict[str, int]], Any]) -> Damage:
    def damage(folder: Path) -> None:
        content = json.loads((folder / TOKENIZER).read_text())
        change(content["model"]["vocab"])
        (folder / TOKENIZER).write_text(json.dumps(content))

    return damage


def pickled(folder: Path) -> None:
    (folder / WEIGHTS).unlink()
    torch.save({}, folder / "pytorch_model.bin")


CASES = {
    "a missing tensor": (weights(lambda t: t.pop("lm_head.weight")), f"{WEIGHTS} lacks the weights lm_head.weight: use the config"),
    "an extra tensor": (weights(lambda t: t.update(x=torch.zeros(2))), f"{WEIGHTS} also has the weights x: use the config"),
    "a wrong shape": (
        weights(lambda t: t.update({"lm_head.weight": torch.zeros(3, 12)})),
        r"`lm_head.weight` of the shape \(3, 12\), but the config needs \(\d+, 12\): use the config.json that belongs",
    ),
    "integers": (weights(lambda t: t.update({"lm_head.bias": t["lm_head.bias"].int()})), "`lm_head.bias` of the type I32"),
    "no number": (weights(lambda t: t["lm_head.bias"].fill_(torch.nan)), "values in `lm_head.bias` that are not finite"),
    "half of the weights": (first_bytes, f"{WEIGHTS} is damaged or truncated .*: copy or download it again"),
    "an absurd header": (text(WEIGHTS, "\x7f" * 8 + "{}"), f"{WEIGHTS} is damaged or truncated"),
    "no weights": (without(WEIGHTS), f"{WEIGHTS} is missing.*save the model and its processor there with `save_pretrained`"),
    "pickled weights": (pickled, f"{WEIGHTS} is missing, and other kinds of weights are not read"),
    "no config": (without(CONFIG), f"{CONFIG} is missing: save the model"),
    "a config in no JSON": (text(CONFIG, "{"), f"{CONFIG} is not JSON .*: copy or download it again"),
    "a list as config": (text(CONFIG, "[1]"), f"{CONFIG} holds a list, not a JSON object"),
    "a very deep config": (text(CONFIG, "[" * 10**5), f"{CONFIG} is not JSON"),
    "another model": (text(CONFIG, '{"model_type": "bert"}'), "it is of type 'bert', not 'attncap'"),
    "a negative size": (values(CONFIG, hidden_size=-5), "`hidden_size` is -5, but it must be at least 1"),
    "a size in words": (values(CONFIG, hidden_size="big"), "'hidden_size' expected int, got str.*: correct the value"),
    "another size": (values(CONFIG, hidden_size=17), r"but the config needs \(.*17.*\): use the config.json"),
    "a vocabulary of terabytes": (values(CONFIG, vocab_size=10**12), r"the config needs \(1000000000000,\): use"),
    "a vocabulary beyond numbers": (values(CONFIG, vocab_size=10**30), f"{CONFIG}: there is no model of these sizes"),
    "an absurd grid": (values(CONFIG, grid_size=10**6), f"{CONFIG}: `grid_size` is 1000000: set it to at most 1024"),
    "an unknown dtype": (values(CONFIG, dtype="foo"), f"{CONFIG} cannot be used .*foo.*: correct the value"),
    "no tokenizer": (without(TOKENIZER), f"{TOKENIZER} is missing: save the model"),
    "a tokenizer in no JSON": (text(TOKENIZER, "{"), f"{TOKENIZER} is not JSON"),
    "an empty tokenizer": (text(TOKENIZER, "{}"), f"{TOKENIZER}, .* cannot be used"),
    "a larger tokenizer": (vocabulary(lambda v: v.update(zebra=len(v))), r"has \d+ tokens, but the model has \d+: use"),
    "a smaller tokenizer": (vocabulary(lambda v: v.popitem()), r"has \d+ tokens, but the model has \d+: use"),
    "a list as tokenizer's config": (text("tokenizer_config.json", "[]"), "tokenizer_config.json holds a list"),
    "no processor": (without(PROCESSOR), f"{PROCESSOR} is missing: save the model"),
    "an empty processor": (text(PROCESSOR, "{}"), f"{PROCESSOR} cannot be used"),
    "huge images": (image_values(size={"height": 10**6, "width": 10**6}), "`size` is 1000000 x 1000000: set .* from 1 to 4096"),
    "images without rows": (image_values(size={"height": 0, "width": 64}), "`size` is 0 x 64: set"),
    "a deviation of 0": (image_values(image_std=[0, 0, 0]), r"`image_std` is \[0, 0, 0\]: set it to that of the model's config"),
    "a million beams": (values(GENERATION, num_beams=10**6), "`num_beams` is 1000000: set it to a whole number from 1 to 256"),
    "beams in words": (values(GENERATION, num_beams="three"), "`num_beams` is 'three': set it"),
    "captions without end": (values(GENERATION, max_new_tokens=10**9), "`max_new_tokens` is 1000000000: set it"),
    "an unknown token": (values(GENERATION, decoder_start_token_id=10**6), "`decoder_start_token_id` is 1000000: set it"),
    "a penalty in words": (values(GENERATION, length_penalty="x"), "`length_penalty` is 'x': set it to a number"),
    "generation settings in no JSON": (text(GENERATION, "{"), f"{GENERATION} is not JSON"),
}  # fmt: skip


@pytest.mark.parametrize("name", CASES)
def test_a_damaged_checkpoint_is_refused_in_one_sentence(tiny_checkpoint, pictures, tmp_path, capfd, name):
    damage, message = CASES[name]
    folder = tmp_path / "model"
    shutil.copytree(tiny_checkpoint, folder)
    damage(folder)
    assert main(["caption", "--model", str(folder), str(pictures[0])]) == 1
    out, err = capfd.readouterr()
    assert out == "" and err.count("\n") == 1 and len(err) < 700
    assert err.startswith(f"attncap: The folder '{folder}' cannot be loaded as a captioner: ")
    assert re.search(message, err), err


def test_a_folder_that_names_other_code_runs_none_of_it(tiny_checkpoint, pictures, tmp_path, capfd):
    folder = tmp_path / "model"
    shutil.copytree(tiny_checkpoint, folder)
    (folder / "evil.py").write_text("raise SystemExit('executed')")
    values(CONFIG, auto_map={"AutoConfig": "evil.Evil", "AutoModelForImageTextToText": "evil.Evil"})(folder)
    assert main(["caption", "--model", str(folder), str(pictures[0])]) == 0
    assert "executed" not in "".join(capfd.readouterr())


def generation_value(**changes: Any) -> Damage:
    def damage(folder: Path) -> None:
        values("export.json", generation=json.loads((folder / "export.json").read_text())["generation"] | changes)(folder)

    return damage


EXPORTS = {
    "a list": (text("export.json", "[]"), r"export.json holds a list, not a JSON object\): export the checkpoint again"),
    "no JSON": (text("export.json", "{"), "is damaged .*: export the checkpoint again"),
    "an absurd width": (values("export.json", width=10**9), "`width` in export.json is 1000000000, but .* from 1 to 4096"),
    "an absurd grid": (values("export.json", grid=[10**6, 1]), "`grid.0.` in export.json is 1000000"),
    "a million beams": (generation_value(num_beams=10**6), "`num_beams` in export.json is 1000000"),
    "captions without end": (generation_value(max_new_tokens=10**9), "`max_new_tokens` in export.json is 1000000000"),
    "another tokenizer": (generation_value(eos_token_id=[10**6]), "token ids that are not in tokenizer.json"),
    "an unknown setting": (generation_value(magic=1), "is damaged .*magic.*: export the checkpoint again"),
    "no tokenizer": (without(TOKENIZER), "tokenizer.json is missing.*: export the checkpoint again"),
    "a damaged tokenizer": (text(TOKENIZER, "[]"), "is damaged .*: export the checkpoint again"),
    "no settings": (without("export.json"), "graphs of an export, but no export.json: export the checkpoint again"),
    "a damaged graph": (text("step.onnx", "graph"), "The graph 'step' of .* cannot be loaded .*: export again"),
    "no graph": (without("encoder.onnx"), "The graph 'encoder' of .* cannot be loaded .*: export again"),
}  # fmt: skip


@pytest.mark.parametrize("name", EXPORTS)
def test_a_damaged_export_is_refused_in_one_sentence(make_export, pictures, tmp_path, capfd, name):
    damage, message = EXPORTS[name]
    folder = tmp_path / "export"
    shutil.copytree(make_export(), folder)
    damage(folder)
    assert main(["caption", "--model", str(folder), str(pictures[0])]) == 1
    out, err = capfd.readouterr()
    assert out == "" and err.count("\n") == 1 and err.startswith("attncap: ") and str(folder) in err
    assert re.search(message, err), err
