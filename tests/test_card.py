"""The card of a checkpoint: what is measured, what is recorded of training, what the card says of both."""

import json
import re
import shutil
import subprocess
from pathlib import Path

import pytest
import torch
import yaml
from datasets import Dataset
from huggingface_hub import ModelCard
from PIL import Image

from hf_attncap import AttnCapForConditionalGeneration, Captioner
from hf_attncap.cli import main
from hf_attncap.metrics import CaptionMetrics
from model_card.build_card import build_card, write_card
from training import measure
from training.arguments import SettingError
from training.limits import doubles, genders, numbers, unusual, writing
from training.pack import pack
from training.record import earlier_stages, elapsed, provenance

REFERENCES = [["A black dog is running .", "two red dogs", "a house while it rains"], ["a child in the rain"]]
ABOUT = {
    "title": "A tiny captioner",
    "license": "apache-2.0",
    "repository": "someone/tiny",
    "dataset": {"name": "Colours", "id": "someone/colours"},
    "origins": ["Captions: our own."],
}
STAGE = {
    "settings": {"learning_rate": 0.0005, "encoder_learning_rate": 1e-5, "seed": 7},
    "images": 6000,
    "frozen_backbone": False,
    "steps": 1125,
    "best_step": 750,
    "epochs": 3.0,
    "seconds": 5400,
    "hardware": "an abacus",
    "log": [],
}


@pytest.fixture
def checkpoint(tiny_checkpoint, tmp_path) -> Path:
    return shutil.copytree(tiny_checkpoint, tmp_path / "tiny")


@pytest.fixture(scope="module")
def captioned(tmp_path_factory, pictures) -> Path:
    """A Parquet file of captioned pictures."""
    names = [f"image-{number}" for number in range(4)]
    images = [{"bytes": picture.read_bytes(), "path": None} for picture in (pictures * 4)[:4]]
    rows = {"image": images, "image_id": names, "captions": [REFERENCES[number % 2] for number in range(4)]}
    path = tmp_path_factory.mktemp("captioned") / "four.parquet"
    Dataset.from_dict(rows).to_parquet(str(path))
    return path


def test_the_card_names_a_stage_that_is_dilated(checkpoint):
    assert "dilated" not in str(build_card(checkpoint))
    config = json.loads((checkpoint / "config.json").read_text(encoding="utf-8"))
    (checkpoint / "config.json").write_text(json.dumps(config | {"dilate_last_stage": True}), encoding="utf-8")
    assert f"{config['encoder_channels']} windows, last stage dilated" in str(build_card(checkpoint))


def test_card_says_where_the_captioner_looks(checkpoint):
    figures = {"photographs": 12, "words": 34, "too_small": 1, "hits": 0.625, "chance": 0.25, "other_photographs": 0.375}
    figures |= {"hits_minus_chance": [0.375, 0.2, 0.5], "hits_minus_other_photographs": [0.25, -0.125, 0.5]}
    few = {"photographs": 1, "words": 2, "too_small": 0}
    (checkpoint / "pointing.json").write_text(json.dumps({"captions": {"own": figures, "references": few}}))
    card = str(build_card(checkpoint))
    assert "Objects of 12 photographs" in card and "| references |" not in card
    assert "| own | 34 | 62.5 | 25.0 | 37.5 | +25.0 (-12.5 to +50.0) |" in card
    of_people = {**figures, "photographs": 14}  # some of the boxed have no word of the captioner's own
    (checkpoint / "pointing.json").write_text(json.dumps({"captions": {"own": figures, "references": of_people}}))
    assert "Objects of 14 photographs" in str(build_card(checkpoint))
    (checkpoint / "pointing.json").unlink()
    assert "Where it looks" not in str(build_card(checkpoint))


def test_card_says_how_blended_weights_came_to_be(checkpoint):
    critical = {**STAGE, "settings": {**STAGE["settings"], "self_critical": True}}
    distilled = {**STAGE, "settings": {**STAGE["settings"], "distill_from": ["one", "two"]}, "steps": 77}
    parts = [{"share": 1, "stages": []}, {"share": 2, "stages": [critical]}, {"share": 0.5, "stages": [distilled, critical]}]
    (checkpoint / "training.json").write_text(json.dumps([STAGE, {"blend": parts}]))
    card = str(build_card(checkpoint))
    assert "1 → mean of [as it was (share 1); 2 (share 2); 3 → 2 (share 0.5)]." in card
    assert [
        re.search(rf"^\| {row} \| .*decoder, {what} \|", card, re.MULTILINE) is not None
        for row, what in ((1, "cross-entropy"), (2, "self-critical"), (3, "cross-entropy, distilled from one, two"))
    ] == [True] * 3
    assert card.count("an abacus |") == 3
    (checkpoint / "training.json").write_text(json.dumps([STAGE]))
    assert "How the weights came" not in str(build_card(checkpoint))


def test_card_says_what_learned_in_each_stage_and_of_what(checkpoint):
    critical = {**STAGE["settings"], "self_critical": True, "bleu_weight": 0.5, "cross_entropy_weight": 0.25}
    contrastive = {**STAGE, "settings": {**STAGE["settings"], "contrastive": True}, "frozen_backbone": False}
    (checkpoint / "training.json").write_text(json.dumps([contrastive, {**STAGE, "settings": critical}]))
    card = str(build_card(checkpoint))
    assert (
        "| 1 | encoder, contrastive |" in card
        and "| 2 | encoder and decoder, self-critical on CIDEr-D and 0.5 x BLEU-4, 0.25 of it cross-entropy |" in card
    )


def test_card_holds_what_was_measured(checkpoint, captioned, pictures, capsys):
    (checkpoint / "about.yaml").write_text(yaml.safe_dump(ABOUT))
    (checkpoint / "training.json").write_text(json.dumps([STAGE]))
    assert main(["card", str(checkpoint), "--images", str(captioned), "--pictures", str(pictures[0])]) == 0
    assert capsys.readouterr().out.strip() == str(checkpoint / "README.md")

    results = json.loads((checkpoint / "results.json").read_text())
    rows = Dataset.from_parquet(str(captioned))
    captioner = Captioner.from_pretrained(checkpoint)
    captions = {row["image_id"]: captioner.caption(row["image"]["bytes"]).text for row in rows}
    scores = CaptionMetrics(dict(zip(rows["image_id"], rows["captions"]))).score(captions)
    assert results["captions"] == captions and results["scores"] == pytest.approx(dict(scores))
    assert results["data"] == {"file": "four.parquet", "split": None, "images": 4, "references": 8}
    assert results["decoding"] == {"num_beams": 3, "max_new_tokens": 8, "length_penalty": 0.7}
    assert results["speed"]["ms"] > 0

    card = ModelCard.load(checkpoint / "README.md")
    found = {result.metric_name: result for result in card.data.eval_results}
    assert found["CIDEr"].metric_value == pytest.approx(100 * scores["cider"], abs=0.01)
    assert found["BLEU-4"].metric_args["num_beams"] == 3 and found["BLEU-4"].dataset_type == "someone/colours"
    assert (card.data.license, card.data.library_name, card.data.datasets) == ("apache-2.0", "transformers", ["someone/colours"])
    text = card.text
    assert "| encoder and decoder, cross-entropy | 6,000 | 0.0005, encoder 1e-05 | 3 | 1,125 | 750 | 90 min | an abacus |" in text
    assert "Captions: our own." in text
    for name, caption in captions.items():
        assert f"| {name} | {caption} |" in text
    picture = re.search(r"!\[(.*)\]\((picture_.*png)\)", text)
    assert picture and picture[1] == captioner.caption(pictures[0]).text
    assert Image.open(checkpoint / picture[2]).width > 300
    assert "{{" not in text and "None" not in text
    assert "So few images" in text and "Of 0 images" not in text

    first = checkpoint / picture[2]
    another = shutil.copy(pictures[0], checkpoint.parent / "another.png")
    assert main(["card", str(checkpoint), "--pictures", str(another)]) == 0
    assert not first.exists() and (checkpoint / "picture_another.png").exists()


def test_card_of_a_bare_checkpoint_leaves_out_what_nobody_knows(checkpoint):
    card = build_card(checkpoint)
    assert card.data.eval_results is None and card.data.model_name is None
    assert "## The model" in card.text and not re.search("## (Scores|Examples|Limits|Training|Data)|None", card.text)
    model = AttnCapForConditionalGeneration.from_pretrained(checkpoint)
    count = sum(parameter.numel() for parameter in model.parameters())
    assert f"| parameters | {count / 1e6:.1f} million |" in card.text


def test_card_of_pictures_alone(checkpoint, pictures):
    for _ in range(2):
        assert main(["card", str(checkpoint), "--pictures", str(pictures[0])]) == 0
    text = (checkpoint / "README.md").read_text()
    assert "](picture_" in text and "## Scores" not in text


def test_first_snippet_runs(checkpoint, pictures, remote_code, monkeypatch, capsys):
    """Of a checkpoint with this package, and of what is exported with transformers alone."""
    assert main(["export-hub", str(checkpoint), str(checkpoint.parent / "exported")]) == 0
    write_card(checkpoint)
    Image.open(pictures[0]).convert("RGB").save(checkpoint.parent / "photo.jpg")
    monkeypatch.chdir(checkpoint.parent)
    text = Captioner.from_pretrained(checkpoint).caption("photo.jpg").text
    for folder, told in ((checkpoint, "from hf_attncap"), (checkpoint.parent / "exported", "trust_remote_code")):
        snippet = re.search("```python\n(.*?)```", (folder / "README.md").read_text(), re.DOTALL)[1]
        assert told in snippet
        capsys.readouterr()
        exec(compile(snippet, "snippet", "exec"), {"__name__": "card"})
        assert text in capsys.readouterr().out


def test_export_takes_along_what_the_card_is_made_of(checkpoint):
    (checkpoint / "training.json").write_text(json.dumps([STAGE]))
    (checkpoint / "about.yaml").write_text(yaml.safe_dump(ABOUT))
    (checkpoint / "pointing.json").write_text(json.dumps({"captions": {}}))
    exported = checkpoint.parent / "exported"
    assert main(["export-hub", str(checkpoint), str(exported)]) == 0
    assert {"training.json", "about.yaml", "pointing.json", "README.md"} <= {file.name for file in exported.iterdir()}
    text = (exported / "README.md").read_text()
    assert "an abacus" in text and 'model="someone/tiny"' in text


def test_words_of_a_person_are_not_replaced(checkpoint, capsys):
    (checkpoint / "README.md").write_text("# Mine\n")
    assert main(["card", str(checkpoint)]) == 1
    assert "was written by hand: move it away" in capsys.readouterr().err
    assert main(["export-hub", str(checkpoint), str(checkpoint.parent / "exported")]) == 0
    assert (checkpoint.parent / "exported" / "README.md").read_text() == (checkpoint / "README.md").read_text() == "# Mine\n"


@pytest.mark.parametrize(
    ("about", "message"),
    [
        ("titel: x\n", "about.yaml has titel: it may have only base_model"),
        ("just words\n", "no mapping"),
        ("a: [", "cannot be read as YAML"),
        ("title: 5\n", "`title` is 5; expected a text"),
        ("summary: [a]\n", "`summary` is ['a']; expected a text"),
        ("license:\n", "`license` is None; expected a text"),
        ("repository: {a: b}\n", "`repository` is {'a': 'b'}; expected a text"),
        ("base_model: 1.5\n", "`base_model` is 1.5; expected a text"),
        ("dataset: Flickr8k\n", "`dataset` is 'Flickr8k'; expected a mapping with a name"),
        ("dataset: {id: flickr8k}\n", "`dataset` has id; expected name"),
        ("dataset: {name: 8}\n", "`dataset: name` is 8; expected a text"),
        ("origins: one sentence\n", "`origins` is 'one sentence'; expected a list of texts"),
        ("origins: [1]\n", "`origins` is [1]; expected a list of texts"),
        ("1: 2\na: 3\n", "about.yaml has 1, a: it may have only"),
    ],
)
def test_strange_lines_about_a_checkpoint_are_named(checkpoint, capsys, about, message):
    (checkpoint / "about.yaml").write_text(about)
    assert main(["card", str(checkpoint)]) == 1
    assert message in capsys.readouterr().err
    with pytest.raises(SettingError) as error:  # of a run that goes on from there
        provenance(str(checkpoint))
    assert message.removeprefix("about.yaml") in str(error.value) and "about.yaml" in str(error.value)


def test_folder_without_captioner_is_refused_before_anything_is_measured(tmp_path, capsys):
    assert main(["card", str(tmp_path), "--images", "none.parquet"]) == 1
    assert "has no config.json or no model.safetensors" in capsys.readouterr().err


def test_pictures_of_one_name_are_refused(checkpoint, pictures, tmp_path, capsys):
    (tmp_path / "other").mkdir()
    twin = shutil.copy(pictures[0], tmp_path / "other")
    assert main(["card", str(checkpoint), "--pictures", str(pictures[0]), str(twin)]) == 1
    assert "Rename one" in capsys.readouterr().err and not (checkpoint / "results.json").exists()


def test_files_of_others_in_the_folder_are_not_replaced(checkpoint, pictures, capsys):
    strip, results = checkpoint / f"picture_{pictures[0].stem}.png", checkpoint / "results.json"
    for file, content in ((strip, "a photograph"), (results, '["my own"]'), (results, "not JSON")):
        file.write_text(content)
        assert main(["card", str(checkpoint), "--pictures", str(pictures[0])]) == 1
        assert f"{file} was not " in capsys.readouterr().err and file.read_text() == content
        file.unlink()
    for _ in range(2):  # its own it replaces
        assert main(["card", str(checkpoint), "--pictures", str(pictures[0])]) == 0
    assert Image.open(strip).width > 300


def test_a_results_file_leads_to_no_file_outside_the_folder(checkpoint, pictures, tmp_path, capsys):
    precious = tmp_path / "picture_precious.png"
    precious.touch()
    (checkpoint / "results.json").write_text(json.dumps({"pictures": [{"file": "../picture_precious.png", "caption": "a"}]}))
    assert main(["card", str(checkpoint), "--pictures", str(pictures[0])]) == 0
    assert precious.exists()


def test_pictures_that_cannot_be_read_are_left_out_of_what_is_measured(checkpoint, pictures, tmp_path, caplog):
    lines = [{"image": str(picture), "captions": REFERENCES[0]} for picture in pictures]
    (tmp_path / "broken.jpg").write_bytes(pictures[0].read_bytes()[:300])
    (tmp_path / "data.jsonl").write_text("\n".join(map(json.dumps, [{"image": "broken.jpg", "captions": ["a dog"]}, *lines])))
    found = measure.measure(checkpoint, str(tmp_path / "data.jsonl"))
    assert len(found["captions"]) == len(pictures) == found["data"]["images"]
    assert "1 broken pictures are left out" in caplog.text and "broken.jpg" in caplog.text


def tokens(*captions: str) -> list[list[str]]:
    return [caption.split() for caption in captions]


def by_id(*captions: str) -> dict[str, list[str]]:
    return dict(zip("abcdef", tokens(*captions)))


def test_numbers_count_where_three_references_agree():
    references = {
        "a": tokens("two dogs", "two black dogs", "a pair", "two and two", "dogs"),
        "b": tokens("three men", "three men", "three of two men"),
        "c": tokens("two dogs", "two dogs", "dogs"),  # two alone agree
        "d": tokens("two men three dogs", "two men three dogs", "two men three dogs"),  # two numbers
        "e": tokens("two", "two", "two"),
    }
    found = numbers(by_id("two dogs run", "two men", "two dogs", "two", "a dog"), references)
    assert found == {"images": 3, "same": 1, "other": 1, "none": 1}


def test_genders_count_where_references_agree_and_none_differs():
    men, women = tokens("a man", "a boy runs", "a guy", "someone"), tokens("a girl", "her dog", "two women")
    references = {"a": men, "b": men, "c": women, "d": women, "e": [*men, *women], "f": tokens("a man", "a man")}
    found = genders(by_id("a man", "a person", "a man and a woman", "a boy", "a man", "a man"), references)
    assert found["men"] == {"images": 2, "same": 1, "other": 0, "both": 0, "neither": 1}
    assert found["women"] == {"images": 2, "same": 0, "other": 1, "both": 1, "neither": 0}


def test_doubles_are_the_same_words_around_and():
    doubled = ["a man and a man run", "two dogs and two dogs"]
    found = doubles(by_id(*doubled, "a man and a dog", "and a man", "man and man", "a man and a"))
    assert found == {"images": 6, "doubled": 2}


def test_writing_counts_where_any_reference_speaks_of_it():
    references = {"a": tokens("a sign", "a dog"), "b": tokens("the shirt says no"), "c": tokens("a dog")}
    found = writing(by_id("a dog by a sign", "a man", "a sign"), references, {"a": 1.0, "b": 0.5, "c": 9.0})
    assert found == {"images": 2, "mentioned": 1, "cider": 0.75}


def test_fifths_go_from_usual_to_unusual_words():
    references = {
        str(number): tokens("a dog" if number < 8 else "odd", f"word{number}" if number == 9 else "dog") for number in range(10)
    }
    cider = {str(number): float(number) for number in range(10)}
    found = unusual(references, cider)
    assert found["images"] == 10 and found["cider_by_fifth"][-1] == 8.5 and len(found["cider_by_fifth"]) == 5


def test_seconds_of_an_interrupted_run_are_those_until_its_last_entry():
    assert elapsed([]) == 0
    assert elapsed([{"loss": 1.0, "elapsed": 3.5}, {"elapsed": 7.0}, {"loss": 2.0}]) == 7


def test_checkpoints_without_record_have_no_earlier_stages(checkpoint):
    assert earlier_stages(None) == earlier_stages(str(checkpoint)) == []
    (checkpoint / "training.json").write_text(json.dumps([STAGE]))
    assert earlier_stages(str(checkpoint)) == [STAGE]


def test_provenance_is_read_or_its_file_named(checkpoint):
    assert provenance(None) is None and provenance(str(checkpoint)) is None
    (checkpoint / "about.yaml").write_text("origins: [")
    with pytest.raises(SettingError, match="about.yaml of .* cannot be read as YAML"):
        provenance(str(checkpoint))


def test_commit_is_the_one_of_this_code_alone(tmp_path, monkeypatch):
    """Not of a repository that an installed package happens to lie in."""
    for command in (["init", "-q"], ["-c", "user.name=a", "-c", "user.email=b", "commit", "-q", "--allow-empty", "-m", "x"]):
        subprocess.run(["git", *command], cwd=tmp_path, check=True)
    (tmp_path / "measure.py").touch()
    monkeypatch.setattr(measure, "__file__", str(tmp_path / "measure.py"))
    assert measure.commit() is None
    subprocess.run(["git", "add", "measure.py"], cwd=tmp_path, check=True)
    assert re.fullmatch("[0-9a-f]{40}-dirty", measure.commit() or "")


def test_packed_checkpoint_keeps_its_record_and_provenance(checkpoint, tmp_path):
    model = AttnCapForConditionalGeneration.from_pretrained(checkpoint)
    torch.nn.init.normal_(model.model.encoder.windows.weight)  # the fixture's do not fit half precision
    model.save_pretrained(checkpoint)
    (checkpoint / "training.json").write_text(json.dumps([STAGE]))
    (checkpoint / "about.yaml").write_text(yaml.safe_dump(ABOUT))
    packed = pack(checkpoint, tmp_path / "packed")
    assert json.loads((packed / "training.json").read_text()) == [STAGE]
    kept = {"license": "apache-2.0", "origins": ["Captions: our own."]}
    assert yaml.safe_load((packed / "about.yaml").read_text()) == kept
    assert AttnCapForConditionalGeneration.from_pretrained(packed).dtype == torch.float32
