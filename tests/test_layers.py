"""Layers of the package: imports run one way, remote code stands alone, importing registers the classes, `--help` is fast."""

import ast
import os
import re
import subprocess
import sys
from graphlib import TopologicalSorter
from pathlib import Path

import pytest
from transformers import AutoConfig, AutoModel, AutoModelForImageTextToText
from transformers.models.auto.image_processing_auto import IMAGE_PROCESSOR_MAPPING
from transformers.models.auto.processing_auto import PROCESSOR_MAPPING
from transformers.pipelines import PIPELINE_REGISTRY

import hf_attncap

ROOT = Path(__file__).parent.parent
PACKAGE = ROOT / "hf_attncap"
FOLDERS = {"hf_attncap": PACKAGE, "hf_attncap.training": ROOT / "training", "hf_attncap.model_card": ROOT / "model_card"}
REMOTE = sorted(PACKAGE.glob("*_attncap.py"))
# The top layer first. A module imports only from layers below its own. `__init__` only hands out names.
LAYERS = {
    "hf_attncap": [
        {"__main__"},
        {"cli"},
        {"caption_command", "explain_command", "space"},
        {"ray_captions"},
        {"parser", "batches", "bulk", "demo"},
        {"captioner", "export"},
        {"torch_engine"},
        {"export_web"},
        {"result", "runtime", "export_graphs"},
        {"importance", "optimize", "checkpoint_checks", "summary", "numpy_search", "image_workers"},
        {"engine", "visualize", "convolutions"},
        {"html_page"},
        {"hub", "writers"},
        {"inputs"},
        {"images", "journal"},
        {"pipeline_attncap"},
        {"captions_attncap", "images_attncap"},
        {"processing_attncap"},
        {"image_processing_attncap"},
        {"modeling_attncap"},
        {"decoder_attncap", "encoder_attncap", "generation_attncap", "loss_attncap"},
        {"search_attncap"},
        {"attention_attncap", "lstm_attncap", "cache_attncap", "backbone_attncap"},
        {"configuration_attncap"},
        {"confidence_attncap", "efficientnet_lite_attncap", "urls_attncap", "occlusion", "word_vectors", "words_attncap"},
        {"image_files_attncap", "metrics"},
        {"atomic", "console", "export_weights", "onednn"},
    ],
    "hf_attncap.metrics": [
        {"evaluate_modules"},
        {"__init__"},
        {"report", "trainer"},
        {"score"},
        {"matching", "reward"},
        {"bleu", "cider", "diversity", "files", "java", "modules", "ptb", "rouge", "significance"},
        {"ngrams", "ptb_rules"},
    ],
    "hf_attncap.model_card": [{"build_card", "calibration"}, {"measure"}, {"error_analysis"}],
    "hf_attncap.training": [
        {"train"},
        {"model", "trainers"},
        {"data", "checkpoints"},
        {"processes"},
        {"arguments"},
        {"settings", "unused_options"},
    ],
}
ALWAYS_INSTALLED = {"torch", "torchvision", "transformers", "huggingface_hub", "safetensors", "numpy", "PIL"}


def python_files(folder: str) -> list[Path]:
    return sorted(path for path in (ROOT / folder).rglob("*.py"))


def module_name(path: Path) -> str:
    """The full name of a module of the package: `hf_attncap.training.data.views`."""
    package, folder = next((name, folder) for name, folder in FOLDERS.items() if path.is_relative_to(folder))
    parts = path.relative_to(folder).with_suffix("").parts
    return ".".join([package, *(part for part in parts if part != "__init__")])


MODULES = {module_name(path): path for folder in FOLDERS for path in python_files(folder.rpartition(".")[2])}


def imports(tree: ast.AST) -> list[tuple[int, str, str]]:
    """(dots, module, name) of every import of a file, also of those inside functions."""
    found = []
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            found += [(0, alias.name, "") for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            found += [(node.level, node.module or "", alias.name) for alias in node.names]
    return found


def packages_imported(path: Path) -> set[str]:
    """The first names of all absolute imports of a file."""
    return {module.split(".")[0] for dots, module, _ in imports(ast.parse(path.read_text(encoding="utf-8"))) if not dots}


def imported_modules(name: str) -> set[str]:
    """The modules of the package that a module of the package imports."""
    path, found = MODULES[name], set()
    package = name.split(".") if path.stem == "__init__" else name.split(".")[:-1]
    for dots, module, attribute in imports(ast.parse(path.read_text(encoding="utf-8"))):
        base = ".".join([*package[: len(package) - dots + 1], *([module] if module else [])]) if dots else module
        if base.split(".")[0] == "hf_attncap":
            home = hf_attncap._HOMES.get(attribute, attribute) if base == "hf_attncap" else attribute
            found.add(next((module for module in (f"{base}.{home}", base) if module in MODULES), base))
    return found - {name, "hf_attncap"}


def layer_of(name: str, package: str) -> str:
    """The name under which `LAYERS[package]` lists a module."""
    return name.removeprefix(f"{package}.").split(".")[0] if name != package else "__init__"


@pytest.mark.parametrize("package", LAYERS)
def test_modules_import_only_from_layers_below(package):
    height = {name: -depth for depth, names in enumerate(LAYERS[package]) for name in names}
    nested = tuple(other for other in FOLDERS if other.startswith(f"{package}."))
    inside = {name for name in MODULES if f"{name}.".startswith(f"{package}.") and not name.startswith(nested)}
    here = {layer_of(name, package) for name in inside}
    assert here - {"__init__"} == set(height) - {"__init__"}, f"the layers of {package} differ from its files"
    for name in inside:
        own = layer_of(name, package)
        for other in imported_modules(name) & inside if own in height else ():
            below = layer_of(other, package)
            assert own == below != "__init__" or height[below] < height[own], f"{name} imports {other}"


def test_imports_have_no_cycle():
    TopologicalSorter({name: imported_modules(name) for name in MODULES if name != "hf_attncap"}).prepare()


def test_packages_import_only_from_packages_below():
    """model_card > training > hf_attncap > metrics; only the command line reaches upward."""
    order = ["hf_attncap.metrics", "hf_attncap", "hf_attncap.training", "hf_attncap.model_card"]
    for name in MODULES:
        own = max((package for package in order if name == package or name.startswith(f"{package}.")), key=len)
        above = tuple(order[order.index(own) + 1 :])
        reached = {other for other in imported_modules(name) if own != "hf_attncap.metrics" and other.startswith(above)}
        assert not reached or name == "hf_attncap.cli", f"{name} imports {reached}"
        if own == "hf_attncap.metrics":
            others = {other for other in imported_modules(name) if not other.startswith(own)}
            assert others <= {"hf_attncap.atomic"}, f"{name} imports {others}"


@pytest.mark.parametrize("folder", ["hf_attncap", "training", "model_card", "benchmarks", "tests"])
def test_training_and_the_card_have_one_import_name(folder):
    for path in python_files(folder):
        text = path.read_text(encoding="utf-8")
        assert not packages_imported(path) & {"training", "model_card"}, path
        assert not re.search(r"-m[\"', ]+(training|model_card)\.", text), path


def test_metrics_need_no_torch():
    for path in python_files("hf_attncap/metrics"):
        assert not packages_imported(path) & {"torch", "torchvision", "transformers"}, path


def guarded(tree: ast.Module) -> set[int]:
    """Lines inside `try`."""
    tries = [node for node in ast.walk(tree) if isinstance(node, ast.Try)]
    return {inner.lineno for node in tries for inner in ast.walk(node) if isinstance(inner, ast.stmt)}


@pytest.mark.parametrize("path", REMOTE, ids=lambda path: path.stem)
def test_remote_code_imports_only_what_is_copied_with_it(path):
    tree = ast.parse(path.read_text(encoding="utf-8"))
    inside_try = guarded(tree)
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom) and node.level:
            flat = node.level == 1 and node.module and node.module.endswith("_attncap") and "." not in node.module
            assert flat and (PACKAGE / f"{node.module}.py").exists(), (
                f"line {node.lineno}: only `from .x_attncap import` works in remote code"
            )
        elif isinstance(node, (ast.Import, ast.ImportFrom)):
            modules = [node.module] if isinstance(node, ast.ImportFrom) else [alias.name for alias in node.names]
            for top in {str(module).split(".")[0] for module in modules}:
                known = top in sys.stdlib_module_names or top in ALWAYS_INSTALLED or node.lineno in inside_try
                assert known and top != "hf_attncap", f"line {node.lineno}: {top} may not be installed where the code is loaded"


def test_importing_the_package_registers_its_classes():
    config = AutoConfig.for_model("attncap", backbone="squeezenet1_1", encoder_channels=8, vocab_size=9, hidden_size=8)
    assert type(config) is hf_attncap.AttnCapConfig
    assert type(AutoModel.from_config(config)) is hf_attncap.AttnCapModel
    assert type(AutoModelForImageTextToText.from_config(config)) is hf_attncap.AttnCapForConditionalGeneration
    assert PROCESSOR_MAPPING[type(config)] is hf_attncap.AttnCapProcessor
    assert type(config) in IMAGE_PROCESSOR_MAPPING
    assert PIPELINE_REGISTRY.check_task("image-captioning")[1]["impl"] is hf_attncap.AttnCapPipeline
    hf_attncap.register()  # a second call changes nothing


def test_public_names_can_be_imported():
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
        ["-m", "hf_attncap", "caption"],
        ["-W", "ignore", "-m", "hf_attncap"],
        ["-c", "import sys; sys.argv[0] = '/usr/bin/attncap'; from hf_attncap.cli import main; main()"],
    ],
    ids=["module", "command", "module with options of Python", "console script"],
)
def test_help_imports_neither_torch_nor_numpy(start):
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
    assert not imported & {"torch", "transformers", "numpy", "PIL", "matplotlib"}


def test_no_file_names_a_registry_or_a_local_path():
    names = {"pypi.org", "pythonhosted.org", "anaconda.org", f"{Path.home()}/", f"{ROOT.parent}/"} - {"//"}
    for folder in ("hf_attncap", "training", "model_card", "benchmarks"):
        for path in python_files(folder):
            text = path.read_text(encoding="utf-8")
            assert not [name for name in names if name in text], path
