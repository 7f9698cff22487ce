"""Exported folders load without the package and give the same captions."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from transformers import AutoModelForImageTextToText, AutoProcessor, pipeline
from transformers.dynamic_module_utils import get_relative_import_files

from hf_attncap import hub
from hf_attncap.hub import export_to_hub
from hf_attncap.modeling_attncap import AttnCapForConditionalGeneration
from hf_attncap.pipeline_attncap import AttnCapPipeline

make_pipeline: Any = pipeline  # its overloads know only the library's own tasks
CODE = {path.name for path in Path(hub.__file__).parent.glob("*_attncap.py")}

# Run without the package: what each way of loading gives.
ELSEWHERE = """
import json, sys
sys.modules["hf_attncap"] = None
import torch
from transformers import (AutoConfig, AutoImageProcessor, AutoModel, AutoModelForImageTextToText, AutoProcessor,
                          AutoTokenizer, pipeline)

folder, picture, scratch = sys.argv[1:]
saved = scratch + '/saved'
trusted = {"trust_remote_code": True}
found = {}
captioner = pipeline("image-to-text", model=folder, device="cpu", **trusted)
found["image-to-text"] = captioner(picture, num_beams=2)
found["without task"] = pipeline(model=folder, device="cpu", **trusted)(picture, num_beams=2)
found["stock"] = pipeline("image-text-to-text", model=folder, device="cpu", **trusted)(picture, text="a dog")
captioner.save_pretrained(saved)
found["saved again"] = pipeline(model=saved, device="cpu", **trusted)(picture, num_beams=2)

inputs = AutoProcessor.from_pretrained(folder, **trusted)(images=captioner.preprocess(picture)["pixel_values"][0], do_resize=False,
                                                          do_rescale=False, do_normalize=False, return_tensors="pt")
model = AutoModelForImageTextToText.from_pretrained(folder, **trusted)
found["ids"] = model.generate(**inputs).tolist()
with torch.no_grad():
    found["logits"] = model(**inputs).logits[0, -1].tolist()
    found["features"] = AutoModel.from_pretrained(folder, **trusted)(**inputs).last_hidden_state[0, -1].tolist()
again = scratch + '/again'
for part in (model, captioner.processor):
    part.save_pretrained(again)
resaved = AutoModelForImageTextToText.from_pretrained(again, **trusted)
with torch.no_grad():
    found["logits of parts saved again"] = resaved(**inputs).logits[0, -1].tolist()
parts = [resaved, *(auto.from_pretrained(again, **trusted) for auto in (AutoModel, AutoConfig, AutoProcessor, AutoImageProcessor))]
found["pipeline of parts saved again"] = pipeline("image-to-text", model=again, device="cpu", **trusted)(picture, num_beams=2)
found["homes of parts saved again"] = [type(part).__module__ for part in parts]
loaded = [AutoConfig, AutoImageProcessor, AutoTokenizer]
found["classes"] = [type(auto.from_pretrained(folder, **trusted)).__name__ for auto in loaded]
found["homes"] = sorted({type(part).__module__.split(".")[0] for part in (captioner, model, captioner.processor)})
for name, options in (("private url", {}), ("allowed url", {"allow_private_urls": True, "timeout": 5})):
    try:
        captioner("http://127.0.0.1:9/a.png", **options)
    except ValueError as error:
        found[name] = str(error)
try:
    pipeline("image-to-text", model=folder)
except ValueError as error:
    found["without trust"] = str(error)
json.dump(found, open(scratch + '/found.json', 'w'))
"""


@pytest.fixture(scope="module")
def checkpoint(tiny_checkpoint, tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("run") / "checkpoint"
    shutil.copytree(tiny_checkpoint, folder)
    for left_by_training in ("optimizer.pt", "trainer_state.json", "training_args.bin"):
        (folder / left_by_training).write_text("")
    (folder / "README.md").write_text("# A captioner\n")
    return folder


@pytest.fixture(scope="module")
def exported(checkpoint, tmp_path_factory) -> Path:
    return export_to_hub(str(checkpoint), tmp_path_factory.mktemp("hub") / "new" / "captioner-v1.0")


@pytest.fixture
def picture(pictures) -> str:
    return str(pictures[0])


@pytest.fixture(scope="module")
def elsewhere(exported, pictures, tmp_path_factory) -> dict[str, Any]:
    scratch = tmp_path_factory.mktemp("elsewhere")
    environment = {**os.environ, "HF_MODULES_CACHE": str(scratch / "modules"), "HF_HUB_OFFLINE": "1"}
    command = [sys.executable, "-I", "-c", ELSEWHERE, str(exported), str(pictures[0]), str(scratch)]
    done = subprocess.run(command, cwd=scratch, env=environment, capture_output=True, text=True, stdin=subprocess.DEVNULL)
    assert done.returncode == 0, done.stderr
    return json.loads((scratch / "found.json").read_text())


def test_files_of_the_exported_folder(checkpoint, exported):
    saved = {"model.safetensors", "generation_config.json", "tokenizer.json", "tokenizer_config.json", "README.md"}
    assert {path.name for path in exported.iterdir()} == saved | {"config.json", "processor_config.json"} | CODE
    for name in saved:
        assert (exported / name).read_bytes() == (checkpoint / name).read_bytes()
    config = json.loads((exported / "config.json").read_text())
    assert set(config.pop("auto_map")) == {"AutoConfig", "AutoModel", "AutoModelForImageTextToText"}
    assert list(config.pop("custom_pipelines")) == ["image-to-text"]
    assert config == json.loads((checkpoint / "config.json").read_text())


def test_remote_code_is_complete(exported):
    referred = [*hub.MODEL_CLASSES.values(), *hub.IMAGE_PROCESSOR_CLASS.values(), *hub.PROCESSOR_CLASS.values()]
    referred += [entry["impl"] for entry in hub.CUSTOM_PIPELINES.values()]
    for reference in referred:
        module, name = reference.split(".")
        assert f"class {name}(" in (exported / f"{module}.py").read_text()
        assert all(Path(file).is_file() for file in get_relative_import_files(exported / f"{module}.py"))
    for file in CODE:
        assert "hf_attncap" not in [line.split()[1] for line in (exported / file).read_text().splitlines() if "import" in line[:6]]


def test_captions_are_equal_without_the_package(elsewhere, checkpoint, picture):
    captioner = make_pipeline("image-captioning", model=str(checkpoint), device="cpu")
    expected = captioner(picture, num_beams=2)
    for way in ("image-to-text", "without task", "saved again", "pipeline of parts saved again"):
        assert elsewhere[way][0]["generated_text"] == expected[0]["generated_text"]
        assert elsewhere[way][0]["score"] == pytest.approx(expected[0]["score"], abs=1e-5)
    continued = captioner(picture, text="a dog")[0]["generated_text"]
    assert elsewhere["stock"][0]["generated_text"] == continued

    inputs = captioner.processor(images=Image.open(picture), return_tensors="pt")
    assert elsewhere["ids"] == captioner.model.generate(**inputs).tolist()
    with torch.no_grad():
        logits = captioner.model(**inputs).logits[0, -1]
        features = captioner.model.model(**inputs).last_hidden_state[0, -1]
    torch.testing.assert_close(torch.tensor(elsewhere["logits"]), logits)
    torch.testing.assert_close(torch.tensor(elsewhere["features"]), features)


def test_remote_code_runs_only_with_trust_remote_code(elsewhere):
    assert elsewhere["homes"] == ["transformers_modules"]
    assert elsewhere["classes"][:2] == ["AttnCapConfig", "AttnCapImageProcessor"]
    assert "trust_remote_code=True" in elsewhere["without trust"]


def test_urls_are_checked_without_the_package(elsewhere):
    assert elsewhere["private url"].startswith("http://127.0.0.1:9/a.png is refused: 127.0.0.1 is 127.0.0.1, not a public address")
    assert elsewhere["allowed url"].startswith("http://127.0.0.1:9/a.png could not be fetched (")


def test_models_with_remote_code_are_saved_with_it(elsewhere):
    assert elsewhere["logits of parts saved again"] == elsewhere["logits"]
    for home in elsewhere["homes of parts saved again"]:
        assert home.startswith("transformers_modules.again.")


def test_installed_package_replaces_the_remote_code(exported, checkpoint, picture, remote_code):
    [expected] = make_pipeline("image-captioning", model=str(checkpoint), device="cpu")(picture)
    plain = make_pipeline("image-captioning", model=str(exported), device="cpu")
    assert type(plain) is AttnCapPipeline
    for captioner in (plain, make_pipeline("image-to-text", model=str(exported), device="cpu", trust_remote_code=True)):
        assert type(captioner.model) is AttnCapForConditionalGeneration
        [caption] = captioner(picture)
        assert caption == {**expected, "score": pytest.approx(expected["score"], abs=1e-5)}


def test_export_does_not_change_the_classes(exported, checkpoint, tmp_path):
    assert exported.is_dir()
    AutoModelForImageTextToText.from_pretrained(checkpoint).save_pretrained(tmp_path)
    AutoProcessor.from_pretrained(checkpoint).save_pretrained(tmp_path)
    assert not list(tmp_path.glob("*.py"))
    for file in tmp_path.glob("*.json"):
        assert "auto_map" not in file.read_text() and "custom_pipelines" not in file.read_text()


def test_checkpoint_fine_tuned_from_an_export_refers_to_no_missing_code(exported, tmp_path):
    AttnCapForConditionalGeneration.from_pretrained(exported).save_pretrained(tmp_path)
    assert not {"auto_map", "custom_pipelines"} & set(json.loads((tmp_path / "config.json").read_text()))


def test_an_export_can_be_exported_again(exported, tmp_path):
    again = export_to_hub(exported, tmp_path)  # there, but empty
    assert {path.name: path.read_bytes() for path in again.iterdir()} == {
        path.name: path.read_bytes() for path in exported.iterdir()
    }


def test_weights_in_several_files(checkpoint, tmp_path):
    source = tmp_path / "sharded"
    AutoModelForImageTextToText.from_pretrained(checkpoint).save_pretrained(source, max_shard_size="1MB")
    AutoProcessor.from_pretrained(checkpoint).save_pretrained(source)
    assert len(list(source.glob("*.safetensors"))) > 1
    out = export_to_hub(source, tmp_path / "out")
    whole = AutoModelForImageTextToText.from_pretrained(checkpoint).state_dict()
    for name, value in AutoModelForImageTextToText.from_pretrained(out).state_dict().items():
        assert torch.equal(value, whole[name])


def test_failed_export_leaves_no_files(checkpoint, tmp_path, monkeypatch):
    copies, copy = [], shutil.copyfile

    def full_disk(source, target):
        copies.append(copy(source, target))
        if len(copies) == 5:
            raise OSError("No space left on device")

    monkeypatch.setattr("hf_attncap.hub.shutil.copyfile", full_disk)
    with pytest.raises(OSError, match="No space left"):
        export_to_hub(checkpoint, tmp_path / "out")
    assert len(copies) == 5 and not list(tmp_path.iterdir())


def test_existing_files_are_not_overwritten(checkpoint, tmp_path):
    (tmp_path / "notes.txt").write_text("mine")
    for out in (tmp_path, tmp_path / "notes.txt"):
        with pytest.raises(FileExistsError, match="not an empty folder"):
            export_to_hub(checkpoint, out)
    assert [path.name for path in tmp_path.iterdir()] == ["notes.txt"]


def test_errors_name_checkpoints_that_cannot_be_exported(checkpoint, tmp_path):
    out = tmp_path / "out"
    with pytest.raises(FileNotFoundError, match="nowhere.*is not a folder"):
        export_to_hub(tmp_path / "nowhere", out)
    other = tmp_path / "other"
    other.mkdir()
    (other / "config.json").write_text(json.dumps({"model_type": "blip"}))
    with pytest.raises(ValueError, match="other.*'blip'"):
        export_to_hub(other, out)
    for missing, name in [("config.json", "configuration"), ("processor_config.json", "processor"), ("*.safetensors", "weights")]:
        part = tmp_path / f"without {name}"
        shutil.copytree(checkpoint, part, ignore=shutil.ignore_patterns(missing))
        with pytest.raises(FileNotFoundError, match=f"lacks the {name} "):
            export_to_hub(part, out)
    assert not out.exists()
