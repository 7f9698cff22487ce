"""The order of the house: imports run one way, the Hub's code stands alone, importing registers and `--help` is quick."""

import ast
import os
import subprocess
import sys
from pathlib import Path

import pytest
from transformers import AutoConfig, AutoModel, AutoModelForImageTextToText
from transformers.models.auto.image_processing_auto import IMAGE_PROCESSOR_MAPPING
from transformers.models.auto.processing_auto import PROCESSOR_MAPPING
from transformers.pipelines import PIPELINE_REGISTRY

import hf_attncap

ROOT = Path(__file__).parent.parent
PACKAGE = ROOT / "hf_attncap"
REMOTE = sorted(PACKAGE.glob("*_attncap.py"))
# Top floor first; files of one line stand on one floor. `__init__` only hands out names.
FLOORS = [
    {"__main__"},
    {"cli"},
    {"demo"},
    {"bulk"},
    {"writers"},
    {"export"},
    {"captioner"},
    {"inference"},
    {"confidence", "importance", "visualize"},
    {"hub"},
    {"images"},
    {"pipeline_attncap"},
    {"processing_attncap"},
    {"image_processing_attncap"},
    {"modeling_attncap"},
    {"decoder_attncap", "encoder_attncap", "generation_attncap", "loss_attncap"},
    {"attention_attncap", "lstm_attncap", "cache_attncap", "backbone_attncap", "word_vectors_attncap"},
    {"configuration_attncap"},
    {"efficientnet_lite_attncap", "pictures_attncap"},
    {"metrics"},
    {"atomic"},
]
METRICS_FLOORS = [
    {"__init__"},
    {"report", "trainer"},
    {"score"},
    {"matching", "reward"},
    {"bleu", "cider", "diversity", "files", "java", "modules", "ptb", "rouge", "significance"},
    {"ngrams", "ptb_rules"},
]
FLOOR = {name: -height for height, names in enumerate(FLOORS) for name in names}
METRICS_FLOOR = {name: -height for height, names in enumerate(METRICS_FLOORS) for name in names}
ALWAYS_THERE = {"torch", "torchvision", "transformers", "huggingface_hub", "safetensors", "numpy", "PIL"}


def python_files(folder: str) -> list[Path]:
    return sorted(path for path in (ROOT / folder).rglob("*.py"))


def imports(tree: ast.AST) -> list[tuple[int, str, str]]:
    """(dots, module, name) of every import of a file, also of those inside functions."""
    found = []
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            found += [(0, alias.name, "") for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            found += [(node.level, node.module or "", alias.name) for alias in node.names]
    return found


def imported_files(path: Path) -> set[tuple[str, ...]]:
    """The files of the package that a file of the package imports, as parts of their paths in it."""
    used = set()
    folder = path.relative_to(PACKAGE).parts[:-1]
    for dots, module, name in imports(ast.parse(path.read_text(encoding="utf-8"))):
        if dots == 0 and module.split(".")[0] != "hf_attncap":
            continue
        inside = tuple(part for part in (module if dots else module.partition(".")[2]).split(".") if part)
        start = folder[: len(folder) - dots + 1] if dots else ()
        parts = (*start, *inside) or (hf_attncap._HOMES.get(name, name),)
        if parts == start:
            parts = (*start, name)  # from . import name
        if not parts[0].startswith("__"):
            used.add(parts)
    return used


def neighbours(path: Path) -> set[str]:
    """What on the floors of the house a file imports."""
    return {parts[0] for parts in imported_files(path)}


def floor_of(path: Path) -> str:
    return path.relative_to(PACKAGE).with_suffix("").parts[0]


def test_imports_run_one_way():
    for path in python_files("hf_attncap"):
        own = floor_of(path)
        if own == "__init__":
            continue
        assert own in FLOOR, f"{path.name} has no floor in {Path(__file__).name}"
        for other in neighbours(path) - {own, "training", "model_card"}:
            assert FLOOR[other] < FLOOR[own], f"{path.name} imports {other}, which is not below it"


def test_imports_run_one_way_among_the_metrics():
    for path in sorted((PACKAGE / "metrics").glob("*.py")):
        assert path.stem in METRICS_FLOOR, f"{path.name} has no floor in {Path(__file__).name}"
        for parts in imported_files(path):
            below = parts == ("atomic",) or (parts[0] == "metrics" and METRICS_FLOOR[parts[1]] < METRICS_FLOOR[path.stem])
            assert below, f"{path.name} imports {parts}"


def test_only_the_command_line_reaches_training_and_the_card():
    for path in python_files("hf_attncap"):
        tops = {module.split(".")[0] for dots, module, _ in imports(ast.parse(path.read_text(encoding="utf-8"))) if not dots}
        reached = (neighbours(path) | tops) & {"training", "model_card"}
        assert not reached or path.name == "cli.py", f"{path.name} imports {reached}"


def test_metrics_need_no_torch():
    for path in python_files("hf_attncap/metrics"):
        tops = {module.split(".")[0] for dots, module, _ in imports(ast.parse(path.read_text(encoding="utf-8"))) if not dots}
        assert not tops & {"torch", "torchvision", "transformers"}, path


def guarded(tree: ast.Module) -> set[int]:
    """Lines inside `try`."""
    tries = [node for node in ast.walk(tree) if isinstance(node, ast.Try)]
    return {inner.lineno for node in tries for inner in ast.walk(node) if isinstance(inner, ast.stmt)}


@pytest.mark.parametrize("path", REMOTE, ids=lambda path: path.stem)
def test_code_for_the_hub_stands_alone(path):
    tree = ast.parse(path.read_text(encoding="utf-8"))
    inside_try = guarded(tree)
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom) and node.level:
            flat = node.level == 1 and node.module and node.module.endswith("_attncap") and "." not in node.module
            assert flat and (PACKAGE / f"{node.module}.py").exists(), f"line {node.lineno}: only `from .x_attncap import` is copied"
        elif isinstance(node, (ast.Import, ast.ImportFrom)):
            modules = [node.module] if isinstance(node, ast.ImportFrom) else [alias.name for alias in node.names]
            for top in {str(module).split(".")[0] for module in modules}:
                known = top in sys.stdlib_module_names or top in ALWAYS_THERE or node.lineno in inside_try
                assert known and top != "hf_attncap", f"line {node.lineno}: {top} may be absent where the code is loaded"


def test_importing_the_package_registers_its_classes():
    config = AutoConfig.for_model("attncap", backbone="squeezenet1_1", encoder_channels=8, vocab_size=9, hidden_size=8)
    assert type(config) is hf_attncap.AttnCapConfig
    assert type(AutoModel.from_config(config)) is hf_attncap.AttnCapModel
    assert type(AutoModelForImageTextToText.from_config(config)) is hf_attncap.AttnCapForConditionalGeneration
    assert PROCESSOR_MAPPING[type(config)] is hf_attncap.AttnCapProcessor
    assert type(config) in IMAGE_PROCESSOR_MAPPING
    assert PIPELINE_REGISTRY.check_task("image-captioning")[1]["impl"] is hf_attncap.AttnCapPipeline
    hf_attncap.register()  # again does no harm


def test_every_public_name_is_there():
    assert set(hf_attncap._HOMES) < set(hf_attncap.__all__)
    for name in hf_attncap.__all__:
        assert getattr(hf_attncap, name).__name__ == name
    assert set(hf_attncap.__all__) <= set(dir(hf_attncap))
    with pytest.raises(AttributeError, match="'hf_attncap' has no attribute 'Captoiner'"):
        hf_attncap.Captoiner  # noqa: B018


@pytest.mark.parametrize(
    "start",
    [
        ["-m", "hf_attncap"],
        ["-W", "ignore", "-m", "hf_attncap"],
        ["-c", "import sys; sys.argv[0] = '/usr/bin/attncap'; from hf_attncap.cli import main; main()"],
    ],
    ids=["module", "module with options of Python", "console script"],
)
def test_help_does_not_wait_for_torch(start):
    if not (PACKAGE / "cli.py").exists():
        pytest.skip("no command line yet")
    shown = subprocess.run(
        [sys.executable, *start, "--help"],
        cwd=ROOT,
        env={**os.environ, "PYTHONPROFILEIMPORTTIME": "1"},
        capture_output=True,
        text=True,
        timeout=60,
        check=True,
    )
    imported = {line.rpartition("|")[2].strip() for line in shown.stderr.splitlines()}
    assert "usage" in shown.stdout and "argparse" in imported
    assert not imported & {"torch", "transformers", "numpy"}


def test_no_file_names_a_registry_or_this_machine():
    places = {"pypi.org", "pythonhosted.org", "anaconda.org", f"{Path.home()}/", f"{ROOT.parent}/"} - {"//"}
    for folder in ("hf_attncap", "training", "model_card", "benchmarks"):
        for path in python_files(folder):
            text = path.read_text(encoding="utf-8")
            assert not [place for place in places if place in text], path
