"""The documentation agrees with the code and the measured results: links, names, options, signatures, scores and captions."""

import importlib
import inspect
import json
import re
import shlex
from dataclasses import MISSING, fields
from pathlib import Path

import matplotlib
import pytest
import skimage
import yaml
from hf_attncap.training.arguments import GROUPS, parse_arguments
from pages import PAGES, ROOT, SCRIPT, blocks, command_options, help_text, read, shell_commands
from transformers import Seq2SeqTrainingArguments

import hf_attncap
from hf_attncap import Captioner


def anchors(page: str) -> set[str]:
    """The anchors of a page's headings, as GitHub makes them."""
    text = re.sub(r"^```.*?^```", "", read(page), flags=re.S | re.M)
    headings = re.findall(r"^#+ (.+)$", text, flags=re.M)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


@pytest.mark.parametrize("page", PAGES)
def test_links_of_a_page_lead_to_files_and_headings(page):
    links = re.findall(r"\]\(([^)\s]+)\)", read(page))
    for link in links:
        if link.startswith("https://"):
            continue
        path, _, anchor = link.partition("#")
        target = ((ROOT / page).parent / path).resolve() if path else ROOT / page
        assert target.exists(), link
        if anchor:
            assert anchor in anchors(str(target.relative_to(ROOT))), link


@pytest.mark.parametrize("page", [page for page in PAGES if page != "README.md"])
def test_a_page_begins_with_whom_it_is_for(page):
    assert read(page).split("\n\n")[1].startswith("This page is for ")


@pytest.mark.parametrize("page", PAGES)
def test_files_that_a_page_names_exist(page):
    names = re.findall(r"`((?:hf_attncap|training|model_card|tests|benchmarks|docs|\.ci)/[\w/.]+\w)`", read(page))
    assert not [name for name in names if not (ROOT / name).exists()]


def test_signatures_in_the_reference_are_those_of_the_code():
    lines = [line for block in blocks("text", "docs/reference.md") for line in block.splitlines()]
    assert len(lines) > 25
    for line in lines:
        assert line == line.partition("(")[0] + signature(line.partition("(")[0]), line


def signature(name: str) -> str:
    """The parameters and defaults of a function, class or method of `hf_attncap`."""
    parts = ["hf_attncap", *name.split(".")]
    modules = [".".join(parts[:end]) for end in range(1, len(parts)) if not parts[end - 1][0].isupper()]
    found = importlib.import_module(modules[-1])
    for part in parts[len(modules) :]:
        found = getattr(found, part)
    bare = [
        parameter.replace(annotation=inspect.Parameter.empty)
        for parameter in inspect.signature(found).parameters.values()
        if parameter.name != "self"
    ]
    return str(inspect.Signature(bare))


def test_command_line_options_in_the_reference_are_those_of_the_code():
    sections = re.findall(r"^### attncap (\S+).*?\n(.*?)(?=^### |\Z)", read("docs/reference.md"), flags=re.S | re.M)
    assert {name for name, _ in sections} == set(re.findall(r"^    ([a-z][a-z-]+)", help_text(), flags=re.M))
    for name, text in sections:
        listed = {option for row in re.findall(r"^\| (`--.*?) \|", text, flags=re.M) for option in re.findall(r"--[\w-]+", row)}
        if name != "train":
            assert listed == command_options(name), name


def test_training_options_in_the_table_are_those_of_the_code():
    inherited = {item.name for item in fields(Seq2SeqTrainingArguments)}
    own = [item for group in GROUPS for item in fields(group) if item.name not in inherited]
    assert all(item.default is not MISSING for item in own)
    defaults = {item.name: f"{item.default:g}" if isinstance(item.default, float) else str(item.default) for item in own}
    expected = {name: "" if default == "None" else f"`{default}`" for name, default in defaults.items()}
    options = re.search(r"^## Options\n(.*?)^## ", read("docs/training.md"), flags=re.S | re.M)
    assert options
    assert dict(re.findall(r"^\| `(\w+)` \| (.*?) ?\| ", options[1], flags=re.M)) == expected


def test_configurations_in_the_experiment_log_are_valid():
    runs = re.findall(r"`(\w+\.yaml[^`]*)`", read("docs/experiments.md"))
    assert len(runs) > 20
    for run in runs:
        start = [] if "_decoder.yaml" in run else ["--model_name_or_path", "before"]
        given = ["--train_file", "a.json", "--feature_cache", "b", "--output_dir", "c", "--use_cpu", "True"]
        parse_arguments(["--config", *shlex.split(run), *start, *given])


def test_scores_in_readme_and_results_are_those_of_the_checkpoint():
    found = json.loads((ROOT / "hf_attncap" / "checkpoint" / "results.json").read_text())["sets"]
    rows = dict(re.findall(r"^\| ((?:Flickr8k|COCO), [\d,]+) \| (.+) \|$", read("README.md"), flags=re.M))
    for own, title in zip(found, ("Flickr8k, 1,000", "COCO, 120")):
        scores, intervals = own["scores"], own["intervals"]
        shown = []
        for kind in ("bleu_1", "bleu_4", "rouge_l", "cider"):
            value = f"{100 * scores[kind]:.1f}"
            low, high = (f"{100 * bound:.1f}" for bound in intervals.get(kind, (0, 0)))
            shown.append(f"{value} ({low} to {high})" if kind in ("bleu_4", "cider") else value)
        assert rows[title] == " | ".join(shown)
    flickr8k, coco = (own["scores"] for own in found)
    figures = (
        rf"\*\*{100 * flickr8k['bleu_4']:.1f}\*\* \| \*\*{100 * flickr8k['cider']:.1f}\*\* \| \*\*{100 * coco['cider']:.1f}\*\*"
    )
    assert re.search(rf"^\| \*\*released:.*{figures}", read("RESULTS.md"), flags=re.M)


def test_captions_and_confidences_shown_are_those_of_the_checkpoint():
    """Of the photographs in the tables of RESULTS.md and the experiment log that are installed here."""
    captioner, checked = Captioner.from_pretrained(), 0
    folders = [Path(skimage.__file__).parent / "data", Path(matplotlib.get_data_path()) / "sample_data"]
    for page in ("RESULTS.md", "docs/experiments.md"):
        rows = re.findall(r"^\| `(\S+)` \| .+? \| (.+?) \| (0\.\d\d) \|", read(page), flags=re.M)
        assert len(rows) >= 4
        for name, text, confidence in rows:
            for path in (folder / name for folder in folders if (folder / name).exists()):
                result = captioner.caption(path)
                assert result.text == text and result.confidence == pytest.approx(float(confidence), abs=0.02), name
                checked += 1
    assert checked >= 10


def test_memory_over_many_images_is_as_measured():
    rows = json.loads((ROOT / "model_card" / "results" / "bulk_memory.json").read_text())["rows"]
    found = re.search(
        r"had ([\d.]+) MiB of memory after ([\d,]+) images and ([\d.]+) MiB after ([\d,]+)", read("docs/many_images.md")
    )
    assert found
    shown = [(int(found[number + 1].replace(",", "")), float(found[number])) for number in (1, 3)]
    assert shown == [(row["images"], row["memory_mib"]) for row in (rows[0], rows[-2])]  # the last row: output written


def test_scripts_are_executable_and_named_where_they_are_used():
    assert (ROOT / SCRIPT).stat().st_mode & 0o111 and SCRIPT in read("RESULTS.md")


def test_versions_in_citation_and_changelog_are_that_of_the_package():
    assert yaml.safe_load(read("CITATION.cff"))["version"] == hf_attncap.__version__
    assert f"## [{hf_attncap.__version__}]" in read("CHANGELOG.md")


def test_hosted_checks_run_the_commands_of_the_project():
    jobs = yaml.safe_load(read(".github/workflows/tests.yml"))["jobs"]
    steps = {name: [step["run"] for step in job["steps"] if "run" in step] for name, job in jobs.items()}
    assert steps["checks"] == [".ci/run"] and steps["supported-versions"] == [".ci/supported_versions ${{ matrix.versions }}"]
    tests = next(command for command in shell_commands("README.md") if "pytest" in command)
    for command in steps["windows"]:
        assert command.removeprefix("python -m ") in tests
