"""The model card: measurements, error analysis, training record, rendering."""

import json
import re
import shutil
import subprocess
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from datasets import Dataset
from hf_attncap.model_card import measure
from hf_attncap.model_card.build_card import build_card, write_card
from hf_attncap.model_card.error_analysis import analyse_errors, doubles, genders, numbers, unusual, writing
from hf_attncap.training.arguments import SettingError
from hf_attncap.training.checkpoints.pack import pack
from hf_attncap.training.checkpoints.record import earlier_stages, elapsed, provenance
from huggingface_hub import ModelCard
from PIL import Image

from hf_attncap import AttnCapForConditionalGeneration, Captioner
from hf_attncap.cli import main
from hf_attncap.metrics import CaptionMetrics
from hf_attncap.visualize import save_plot

REFERENCES = [["A black dog is running .", "two red dogs", "a house while it rains"], ["a child in the rain"]]
ABOUT = {
    "title": "A tiny captioner",
    "license": "other",
    "license_name": "colours-1.0",
    "license_link": "https://example.com/colours",
    "repository": "someone/tiny",
    "datasets": [{"name": "Colours", "id": "someone/colours"}],
    "independent": ["Colours test split: CIDEr 12.3"],
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


def test_card_names_the_more_accurate_map(checkpoint):
    figures = {"photographs": 12, "words": 34, "too_small": 1, "hits": 0.625, "chance": 0.25, "other_photographs": 0.375}
    figures |= {"hits_minus_chance": [0.375, 0.2, 0.5], "hits_minus_other_photographs": [0.25, -0.125, 0.5]}
    importance = figures | {"photographs": 14, "hits": 0.75}
    few = {"photographs": 1, "words": 2, "too_small": 0}

    def text(own: list[float], references: dict) -> str:
        maps = {"attention": figures, "importance": importance, "importance_minus_attention": own}
        (checkpoint / "pointing.json").write_text(json.dumps({"captions": {"own": maps, "references": references}}))
        return str(build_card(checkpoint))

    card = text([0.125, 0.0625, 0.25], {"attention": few, "importance": few})
    assert "Objects in 14 photographs" in card and "reference captions" not in card
    assert "| its own captions | attention | 34 | 62.5 | 25.0 | 37.5 | +25.0 (-12.5 to +50.0) |  |" in card
    assert "| its own captions | importance | 34 | 75.0 | 25.0 | 37.5 | +25.0 (-12.5 to +50.0) | +12.5 (+6.2 to +25.0) |" in card
    assert "- For its own captions: the importance." in card
    assert "- For its own captions: the attention." in text([-0.1, -0.2, -0.05], {"attention": few, "importance": few})
    both = text([0.1, -0.1, 0.2], {"attention": figures, "importance": figures, "importance_minus_attention": [0.3, 0.2, 0.4]})
    assert "- For its own captions: no measurable difference" in both
    assert "- For the reference captions: the importance." in both
    (checkpoint / "pointing.json").unlink()
    assert "Attention and importance" not in str(build_card(checkpoint))


def test_card_lists_the_runs_of_averaged_weights_with_their_starts(checkpoint):
    critical = {**STAGE, "settings": {**STAGE["settings"], "self_critical": True}}
    longer = {**STAGE, "steps": 77}
    inner = {"blend": [{"share": 1, "stages": []}, {"share": 2, "stages": [critical]}]}
    parts = [{"share": 1, "stages": []}, {"share": 0.5, "stages": [longer, inner, critical]}, {"share": 2, "stages": [inner]}]
    (checkpoint / "training.json").write_text(json.dumps([STAGE, {"blend": parts}]))
    card = str(build_card(checkpoint))
    rows = re.findall(r"^\| (\d) \| encoder and decoder, ([\w-]+) \| ([^|]*) \|", card, re.MULTILINE)
    assert rows == [
        ("1", "cross-entropy", "not recorded"),
        ("2", "cross-entropy", "run 1"),
        ("3", "self-critical", "run 2"),
        ("4", "self-critical", "mean of run 2 (weight 1), run 3 (weight 2)"),
        ("5", "self-critical", "run 1"),
    ]
    final = "mean of run 1 (weight 1), run 4 (weight 0.5), (mean of run 1 (weight 1), run 5 (weight 2)) (weight 2)"
    assert f"The weights of this model are the {final}." in card
    new = {**STAGE, "settings": {**STAGE["settings"], "backbone_weights": "lite.pth"}}
    (checkpoint / "training.json").write_text(json.dumps([new]))
    card = str(build_card(checkpoint))
    assert "The weights of this model" not in card and "| the pretrained backbone |" in card


def test_card_names_trained_part_and_loss_of_each_run(checkpoint):
    critical = {**STAGE["settings"], "self_critical": True, "cross_entropy_weight": 0.25}
    (checkpoint / "training.json").write_text(
        json.dumps([{**STAGE, "frozen_backbone": True}, {**STAGE, "settings": critical, "frozen_backbone": False}])
    )
    card = str(build_card(checkpoint))
    assert (
        "| 1 | decoder, cross-entropy |" in card
        and "| 2 | encoder and decoder, self-critical (weight 0.75) and cross-entropy (0.25) |" in card
    )


@pytest.mark.usefixtures("coarse_plots")
def test_card_shows_what_was_measured(checkpoint, captioned, pictures, capsys):
    (checkpoint / "about.yaml").write_text(yaml.safe_dump(ABOUT))
    (checkpoint / "training.json").write_text(json.dumps([STAGE]))
    settings = json.loads((checkpoint / "generation_config.json").read_text()) | {"_from_model_config": False}
    (checkpoint / "generation_config.json").write_text(json.dumps({**settings, "repeatable_token_ids": [4, 5]}))
    assert main(["card", str(checkpoint), "--images", str(captioned), "--pictures", str(pictures[0])]) == 0
    assert capsys.readouterr().out.strip() == str(checkpoint / "README.md")

    results = json.loads((checkpoint / "results.json").read_text())
    rows = Dataset.from_parquet(str(captioned))
    captioner = Captioner.from_pretrained(checkpoint)
    captions = {row["image_id"]: captioner.caption(row["image"]["bytes"]).text for row in rows}
    scores = CaptionMetrics(dict(zip(rows["image_id"], rows["captions"]))).score(captions)
    (found,) = results["sets"]
    assert found["captions"] == captions and found["scores"] == pytest.approx(dict(scores))
    assert found["data"] == {"file": f"{captioned.parent.name}/four.parquet", "split": None, "images": 4, "references": 8}
    assert found["intervals"] == {kind: pytest.approx(scores.intervals()[kind]) for kind in ("bleu_4", "cider")}
    words = " ".join(captioner.processor.tokenizer.convert_ids_to_tokens([4, 5]))
    assert results["decoding"] == {"num_beams": 3, "max_new_tokens": 8, "length_penalty": 0.7, "repeatable_words": words}
    assert results["speed"]["ms"] > 0

    card = ModelCard.load(checkpoint / "README.md")
    found = {result.metric_name: result for result in card.data.eval_results}
    assert found["CIDEr"].metric_value == pytest.approx(100 * scores["cider"], abs=0.01)
    assert found["BLEU-4"].metric_args["num_beams"] == 3 and found["BLEU-4"].dataset_type == "someone/colours"
    assert (card.data.library_name, card.data.datasets) == ("transformers", ["someone/colours"])
    terms = ("other", "colours-1.0", "https://example.com/colours")
    assert (card.data.license, card.data.license_name, card.data.license_link) == terms
    text = card.text
    assert "Licence of the weights: [colours-1.0](https://example.com/colours)." in text
    assert "- Colours test split: CIDEr 12.3" in text and "12.3" not in str(card.data)
    low, high = (f"{100 * bound:.1f}" for bound in scores.intervals()["cider"])
    assert re.search(rf"^\| Colours \| 4 \| 8 \|.*\| {100 * scores['cider']:.1f} \({low} to {high}\) \|$", text, re.MULTILINE)
    assert "| 1 | encoder and decoder, cross-entropy | not recorded | 6,000 | 0.0005, encoder 1e-05 | 3 | 1,125 | 750 |" in text
    assert "| 90 min | an abacus |" in text
    assert "Captions: our own." in text
    for name, caption in captions.items():
        assert f"| {name} | {caption} |" in text
    picture = re.search(r"!\[(.*)\]\((picture_.*jpg)\)", text)
    assert picture and picture[1] == captioner.caption(pictures[0]).text
    assert "{{" not in text and "None" not in text
    assert "sets with fewer than 100 images" in text and "Images with writing" not in text
    save_plot(captioner.explain(pictures[0]).plot_importance(), checkpoint.parent / "both_maps.jpg")
    assert (checkpoint / picture[2]).read_bytes() == (checkpoint.parent / "both_maps.jpg").read_bytes()

    first = checkpoint / picture[2]
    another = shutil.copy(pictures[0], checkpoint.parent / "another.png")
    assert main(["card", str(checkpoint), "--pictures", str(another)]) == 0
    assert not first.exists() and (checkpoint / "picture_another.jpg").exists()


def test_each_of_several_sets_has_its_scores(checkpoint, captioned, tmp_path, capsys):
    rows = Dataset.from_parquet(str(captioned))
    (tmp_path / "other").mkdir()
    second = tmp_path / "other" / "four.parquet"
    rows.select([0, 1, 2]).to_parquet(str(second))
    files = ["--images", str(captioned), str(second)]
    (checkpoint / "about.yaml").write_text(yaml.safe_dump(ABOUT))
    assert main(["card", str(checkpoint), *files]) == 1  # before anything is measured
    assert "`datasets` lists 1, but 2 files are measured" in capsys.readouterr().err
    assert not (checkpoint / "results.json").exists()

    datasets = [*ABOUT["datasets"], {"name": "Other", "id": "someone/other", "split": "validation"}]
    (checkpoint / "about.yaml").write_text(yaml.safe_dump(ABOUT | {"datasets": datasets}))
    assert main(["card", str(checkpoint), *files]) == 0
    results = json.loads((checkpoint / "results.json").read_text())
    assert [own["data"]["file"] for own in results["sets"]] == [f"{captioned.parent.name}/four.parquet", "other/four.parquet"]
    assert [own["data"]["images"] for own in results["sets"]] == [4, 3]
    assert results["speed"]["ms"] > 0 and not results["sets"][0].keys() & {"speed", "decoding", "commit", "date"}
    card = ModelCard.load(checkpoint / "README.md")
    assert card.data.datasets == ["someone/colours", "someone/other"]
    found = {(one.dataset_name, one.dataset_split, one.metric_name): one.metric_value for one in card.data.eval_results}
    assert len(found) == 12
    for own, key in zip(results["sets"], (("Colours", None), ("Other", "validation"))):
        assert found[*key, "CIDEr"] == pytest.approx(100 * own["scores"]["cider"], abs=0.01)
    assert "| Colours | 4 | 8 |" in card.text and "| Other, validation | 3 | 7 |" in card.text
    assert [len(re.findall(rf"^\| image-{number} \|", card.text, re.MULTILINE)) for number in range(4)] == [2, 2, 2, 1]

    assert main(["card", str(checkpoint), "--images", str(captioned), str(captioned)]) == 1
    assert "is given twice" in capsys.readouterr().err
    (checkpoint / "about.yaml").write_text(yaml.safe_dump(ABOUT | {"datasets": [{"name": "Colours"}] * 2}))
    assert main(["card", str(checkpoint)]) == 1
    assert "the Hub needs them to differ" in capsys.readouterr().err
    (checkpoint / "about.yaml").unlink()
    assert f"| {captioned.parent.name}/four.parquet | 4 |" in str(build_card(checkpoint))


def test_sets_of_many_images_have_their_errors_in_one_table(checkpoint):
    def measured(name: str, images: int, men: int) -> dict:
        ids = [f"{name}-{number}" for number in range(images)]
        captions = {id: tokens(*["a man and a man"] * (place < men) or ["two signs"])[0] for place, id in enumerate(ids)}
        references = {id: tokens(*["a man"] * 5) for id in ids}
        cider = {id: place / images for place, id in enumerate(ids)}
        scores = dict.fromkeys(("bleu_1", "bleu_2", "bleu_3", "bleu_4", "rouge_l", "cider"), 0.5)
        return {
            "data": {"file": name, "split": None, "images": images, "references": 5 * images},
            "scores": scores,
            "intervals": {"bleu_4": [0.4, 0.6], "cider": [0.3, 0.7]},
            "limits": analyse_errors(captions, references, cider),
            "captions": {id: " ".join(caption) for id, caption in captions.items()},
            "references": dict.fromkeys(ids, "a man"),
            "cider": cider,
        }

    common = {"decoding": {}, "tokenizer": "PTB", "speed": {"ms": 1, "hardware": "an abacus"}, "commit": None}
    common |= {"versions": {"torch": "2", "transformers": "5"}, "date": "2026-01-01"}
    sets = [measured("big", 1200, 7), measured("small", 20, 3), measured("middle", 100, 5)]
    (checkpoint / "results.json").write_text(json.dumps(common | {"sets": sets}))
    text = build_card(checkpoint).text
    assert "| | big | middle |\n|---|---|---|\n" in text
    assert "| Images of men, not women | 1200 | 100 |" in text
    assert "| - captions that mention men / women / both / neither | 7 / 0 / 0 / 1193 | 5 / 0 / 0 / 95 |" in text
    assert '| Captions that repeat words around "and", such as "a man and a man" | 7 of 1,200 | 5 of 100 |' in text
    assert "| - mean CIDEr of these captions |  |  |" in text and "sets with fewer than 100 images" in text
    assert "| small | 20 | 100 | 50.0 | 50.0 | 50.0 | 50.0 (40.0 to 60.0) | 50.0 | 50.0 (30.0 to 70.0) |" in text
    assert "- big: for 0 of 0 images of women, the caption mentions only men. For 0 of 1200 images of men," in text
    assert text.count("| lowest tenth: big-") == 3
    shown = re.findall(r"^\| (?:lowest tenth: )?((?:small|big|middle)-\S+) \|", text, flags=re.M)
    assert len(shown) == len(set(shown)) > 15, "an image is shown twice"


def test_card_of_an_earlier_version_is_replaced(checkpoint):
    (checkpoint / "README.md").write_text(
        "<!-- Rendered by `attncap card`, which replaces it: words of your own belong into it. -->"
    )
    assert "## Model" in write_card(checkpoint).read_text()


def test_card_of_a_checkpoint_without_other_files_has_only_its_model(checkpoint):
    card = build_card(checkpoint)
    assert card.data.eval_results is None and card.data.model_name is None
    assert "## Model" in card.text
    assert not re.search("## (Scores|Independent|Intended|Examples|Limitations|Bias|Training|Data)|None", card.text)
    model = AttnCapForConditionalGeneration.from_pretrained(checkpoint)
    count = sum(parameter.numel() for parameter in model.parameters())
    assert f"| parameters | {count / 1e6:.1f} million |" in card.text


@pytest.mark.usefixtures("coarse_plots")
def test_card_of_pictures_only(checkpoint, pictures):
    for _ in range(2):
        assert main(["card", str(checkpoint), "--pictures", str(pictures[0])]) == 0
    text = (checkpoint / "README.md").read_text()
    assert "](picture_" in text and "## Scores" not in text


def test_first_snippet_runs(checkpoint, pictures, remote_code, monkeypatch, capsys):
    """With this package for a checkpoint, and with transformers only for an exported folder."""
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


@pytest.mark.usefixtures("coarse_plots")
def test_export_copies_the_files_of_the_card(checkpoint, pictures):
    assert main(["card", str(checkpoint), "--pictures", str(pictures[0])]) == 0
    (checkpoint / "training.json").write_text(json.dumps([STAGE]))
    (checkpoint / "about.yaml").write_text(yaml.safe_dump(ABOUT))
    (checkpoint / "pointing.json").write_text(json.dumps({"captions": {}}))
    exported = checkpoint.parent / "exported"
    assert main(["export-hub", str(checkpoint), str(exported)]) == 0
    assert {"training.json", "about.yaml", "pointing.json", "README.md", f"picture_{pictures[0].stem}.jpg"} <= {
        file.name for file in exported.iterdir()
    }
    text = (exported / "README.md").read_text()
    assert "an abacus" in text and 'model="someone/tiny"' in text


def test_handwritten_card_is_not_replaced(checkpoint, captioned, capsys):
    (checkpoint / "README.md").write_text("# Mine\n")
    assert main(["card", str(checkpoint), "--images", str(captioned)]) == 1
    assert "was written by hand: move it away" in capsys.readouterr().err
    assert not (checkpoint / "results.json").exists()
    assert main(["export-hub", str(checkpoint), str(checkpoint.parent / "exported")]) == 0
    assert (checkpoint.parent / "exported" / "README.md").read_text() == (checkpoint / "README.md").read_text() == "# Mine\n"


@pytest.mark.parametrize(
    ("about", "message"),
    [
        ("titel: x\n", "about.yaml has unknown fields (titel): use base_model"),
        ("just words\n", "is not a mapping"),
        ("a: [", "is not valid YAML"),
        ("title: 5\n", "`title` is 5; expected a text"),
        ("summary: [a]\n", "`summary` is ['a']; expected a text"),
        ("license:\n", "`license` is None; expected a text"),
        ("repository: {a: b}\n", "`repository` is {'a': 'b'}; expected a text"),
        ("base_model: 1.5\n", "`base_model` is 1.5; expected a text"),
        ("datasets: Flickr8k\n", "`datasets` is 'Flickr8k'; expected a list with one entry"),
        ("datasets: {name: a}\n", "expected a list with one entry for each measured file"),
        ("datasets: [{name: a}, {id: flickr8k}]\n", "expected a list with one entry"),
        ("datasets: [{name: 8}]\n", "`datasets` is [{'name': 8}]; expected a list"),
        ("independent: CIDEr 66\n", "`independent` is 'CIDEr 66'; expected a list of texts"),
        ("license: mit\nlicense_name: a\n", "`license_name` and `license_link` need `license: other`"),
        ("license_link: a\n", "`license_name` and `license_link` need `license: other`"),
        ("origins: one sentence\n", "`origins` is 'one sentence'; expected a list of texts"),
        ("origins: [1]\n", "`origins` is [1]; expected a list of texts"),
        ("1: 2\na: 3\n", "about.yaml has unknown fields (1, a): use"),
    ],
)
def test_invalid_about_yaml_is_explained(checkpoint, capsys, about, message):
    (checkpoint / "about.yaml").write_text(about)
    assert main(["card", str(checkpoint)]) == 1
    assert message in capsys.readouterr().err
    with pytest.raises(SettingError) as error:  # of a run that fine-tunes the checkpoint
        provenance(str(checkpoint))
    assert message.removeprefix("about.yaml") in str(error.value) and "about.yaml" in str(error.value)


def test_folder_without_captioner_is_refused_before_anything_is_measured(tmp_path, capsys):
    assert main(["card", str(tmp_path), "--images", "none.parquet"]) == 1
    assert "has no config.json or no model.safetensors" in capsys.readouterr().err


def test_pictures_with_the_same_name_are_refused(checkpoint, pictures, tmp_path, capsys):
    (tmp_path / "other").mkdir()
    twin = shutil.copy(pictures[0], tmp_path / "other")
    assert main(["card", str(checkpoint), "--pictures", str(pictures[0]), str(twin)]) == 1
    assert "rename one picture" in capsys.readouterr().err and not (checkpoint / "results.json").exists()


@pytest.mark.usefixtures("coarse_plots")
def test_other_files_in_the_folder_are_not_replaced(checkpoint, pictures, capsys):
    strip, results = checkpoint / f"picture_{pictures[0].stem}.jpg", checkpoint / "results.json"
    with Image.open(pictures[0]) as image:
        image.convert("RGB").save(strip, comment=b"my own")
    for file, content in ((strip, strip.read_bytes()), (strip, b"a photo"), (results, b'["my own"]'), (results, b"not JSON")):
        file.write_bytes(content)
        assert main(["card", str(checkpoint), "--pictures", str(pictures[0])]) == 1
        assert f"{file} was not " in capsys.readouterr().err and file.read_bytes() == content
        file.unlink()
    for _ in range(2):  # it replaces its own plot
        assert main(["card", str(checkpoint), "--pictures", str(pictures[0])]) == 0
    assert Image.open(strip).width > 300


def test_plots_of_the_card_are_small_and_wide_enough_for_the_hub(checkpoint, tmp_path):
    """Three plots of long captions take less than a megabyte, at twice the width of the Hub's column."""
    random = np.random.default_rng(0)
    files = [tmp_path / f"{number}.png" for number in range(3)]
    for file in files:
        noise = Image.fromarray(random.integers(0, 256, (64, 64, 3), dtype=np.uint8))  # finer than most photographs
        noise.resize((640, 480), Image.Resampling.BICUBIC).save(file)
    assert main(["card", str(checkpoint), "--pictures", *map(str, files)]) == 0
    drawn = sorted(checkpoint.glob("picture_*"))
    assert [file.name for file in drawn] == ["picture_0.jpg", "picture_1.jpg", "picture_2.jpg"]
    assert sum(file.stat().st_size for file in drawn) < 1e6
    for file in drawn:
        with Image.open(file) as image:
            assert image.format == "JPEG" and image.width == pytest.approx(1600, abs=2)


@pytest.mark.usefixtures("coarse_plots")
def test_a_new_card_removes_the_plots_of_an_earlier_one(checkpoint, pictures):
    """Only those that its results name and that carry the mark; earlier versions wrote PNG."""
    result = Captioner.from_pretrained(checkpoint).caption(pictures[0])
    names = ["picture_old.png", "picture_replaced_by_hand.png", "picture_mine.png"]
    for name in names:
        save_plot(result.plot_attention(), checkpoint / name)
    shutil.copy(pictures[1], checkpoint / names[1])  # it has no mark
    listed = [{"file": name, "caption": "a"} for name in (*names[:2], "picture_gone.png")]
    (checkpoint / "results.json").write_text(json.dumps({"pictures": listed}))
    assert main(["card", str(checkpoint), "--pictures", str(pictures[0])]) == 0
    left = sorted(file.name for file in checkpoint.glob("picture_*"))
    assert left == sorted([f"picture_{pictures[0].stem}.jpg", *names[1:]])


@pytest.mark.usefixtures("coarse_plots")
def test_a_results_file_cannot_name_files_outside_the_folder(checkpoint, pictures, tmp_path, capsys):
    precious = tmp_path / "picture_precious.png"
    save_plot(Captioner.from_pretrained(checkpoint).caption(pictures[0]).plot_attention(), precious)
    (checkpoint / "results.json").write_text(json.dumps({"pictures": [{"file": "../picture_precious.png", "caption": "a"}]}))
    assert main(["card", str(checkpoint), "--pictures", str(pictures[0])]) == 0
    assert precious.exists()


def test_unreadable_images_are_skipped(checkpoint, pictures, tmp_path, caplog):
    lines = [{"image": str(picture), "captions": REFERENCES[0]} for picture in pictures]
    (tmp_path / "broken.jpg").write_bytes(pictures[0].read_bytes()[:300])
    (tmp_path / "data.jsonl").write_text("\n".join(map(json.dumps, [{"image": "broken.jpg", "captions": ["a dog"]}, *lines])))
    (found,) = measure.measure(Captioner.from_pretrained(checkpoint), [str(tmp_path / "data.jsonl")])["sets"]
    assert len(found["captions"]) == len(pictures) == found["data"]["images"]
    assert "1 broken images are left out" in caplog.text and "broken.jpg" in caplog.text


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


def test_doubles_repeat_words_around_and():
    doubled = ["a man and a man run", "two dogs and two dogs"]
    found = doubles(by_id(*doubled, "a man and a dog", "and a man", "man and man", "a man and a"))
    assert found == {"images": 6, "doubled": 2}


def test_writing_counts_where_any_reference_mentions_it():
    references = {"a": tokens("a sign", "a dog"), "b": tokens("the shirt says no"), "c": tokens("a dog")}
    found = writing(by_id("a dog by a sign", "a man", "a sign"), references, {"a": 1.0, "b": 0.5, "c": 9.0})
    assert found == {"images": 2, "mentioned": 1, "cider": 0.75}


def test_fifths_are_ordered_from_common_to_rare_words():
    references = {
        str(number): tokens("a dog" if number < 8 else "odd", f"word{number}" if number == 9 else "dog") for number in range(10)
    }
    cider = {str(number): float(number) for number in range(10)}
    found = unusual(references, cider)
    assert found["images"] == 10 and found["cider_by_fifth"][-1] == 8.5 and len(found["cider_by_fifth"]) == 5


def test_elapsed_seconds_end_at_the_last_log_entry():
    assert elapsed([]) == 0
    assert elapsed([{"loss": 1.0, "elapsed": 3.5}, {"elapsed": 7.0}, {"loss": 2.0}]) == 7


def test_checkpoints_without_record_have_no_earlier_stages(checkpoint):
    assert earlier_stages(None) == earlier_stages(str(checkpoint)) == []
    (checkpoint / "training.json").write_text(json.dumps([STAGE]))
    assert earlier_stages(str(checkpoint)) == [STAGE]


def test_unreadable_provenance_names_its_file(checkpoint):
    assert provenance(None) is None and provenance(str(checkpoint)) is None
    (checkpoint / "about.yaml").write_text("origins: [")
    with pytest.raises(SettingError, match="about.yaml of .* is not valid YAML"):
        provenance(str(checkpoint))


def test_commit_is_that_of_the_repository_of_this_code(tmp_path, monkeypatch):
    """It is None if the package is installed inside another repository."""
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
    kept = {name: ABOUT[name] for name in ("license", "license_name", "license_link", "origins")}
    assert yaml.safe_load((packed / "about.yaml").read_text()) == kept
    assert AttnCapForConditionalGeneration.from_pretrained(packed).dtype == torch.float32
