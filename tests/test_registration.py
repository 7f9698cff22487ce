"""Importing the package registers it with transformers, in any order of imports, and does not import transformers itself."""

import os
import subprocess
import sys
import time
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
ASK = """
config = AutoConfig.for_model("attncap", backbone="squeezenet1_1", encoder_channels=8, vocab_size=9, hidden_size=8)
assert type(config) is hf_attncap.AttnCapConfig, type(config)
assert type(AutoModelForImageTextToText.from_config(config)) is hf_attncap.AttnCapForConditionalGeneration
assert PIPELINE_REGISTRY.check_task("image-captioning")[1]["impl"] is hf_attncap.AttnCapPipeline
print("registered")
"""
AUTO = "from transformers import AutoConfig, AutoModelForImageTextToText\nfrom transformers.pipelines import PIPELINE_REGISTRY\n"
ORDERS = {
    "transformers before": AUTO + "import hf_attncap\n" + ASK,
    "transformers after": "import hf_attncap\n" + AUTO + ASK,
    "transformers alone, then by part": "import transformers\nimport hf_attncap\n" + AUTO + ASK,
    "metrics before": "import hf_attncap.metrics\n" + AUTO + ASK,
    "a module of the package first": "from hf_attncap.configuration_attncap import AttnCapConfig\nimport hf_attncap\n" + AUTO + ASK,
    "the model first": "from hf_attncap.modeling_attncap import AttnCapModel\nimport hf_attncap\n" + AUTO + ASK,
    "the captioner first": "from hf_attncap import Captioner\nimport hf_attncap\n" + AUTO + ASK,
    "training first": "import hf_attncap.training.arguments\nimport hf_attncap\n" + AUTO + ASK,
    "a part of transformers": "import hf_attncap\nfrom transformers.models.auto.configuration_auto import AutoConfig\n"
    + AUTO
    + ASK,
}
QUICK = ("transformers before", "the model first")


def python(*arguments: str, cwd: Path | None = None) -> str:
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    done = subprocess.run([sys.executable, *arguments], cwd=cwd, env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout


@pytest.mark.parametrize("order", [order if order in QUICK else pytest.param(order, marks=pytest.mark.slow) for order in ORDERS])
def test_any_import_order_registers_the_classes(order, tmp_path):
    assert python("-c", ORDERS[order], cwd=tmp_path) == "registered\n"


def test_a_script_called_attncap(tiny_checkpoint, pictures, tmp_path):
    (tmp_path / "attncap.py").write_text(
        f"{ORDERS['transformers after']}\nfrom transformers import pipeline\n"
        f"captions = pipeline('image-captioning', model={str(tiny_checkpoint)!r}, device='cpu')({str(pictures[0])!r})\n"
        "print(type(captions[0]['generated_text']).__name__)"
    )
    assert python("attncap.py", cwd=tmp_path) == "registered\nstr\n"


@pytest.mark.slow
def test_a_module_called_attncap(tmp_path):
    (tmp_path / "attncap.py").write_text(ORDERS["transformers after"])
    assert python("-m", "attncap", cwd=tmp_path) == "registered\n"


@pytest.mark.parametrize(
    "use",
    [
        "import hf_attncap",
        "import hf_attncap.metrics; hf_attncap.metrics.CaptionMetrics({'1': ['a dog', 'the dog']}).score({'1': 'a dog'})",
        "import hf_attncap.cli",
        "from hf_attncap import Captioner, CaptionResult, ImageError; from hf_attncap.captioner import CHECKPOINT",
        "from hf_attncap.words_attncap import CaptionPieces; from hf_attncap.confidence_attncap import SIGNALS",
        "import hf_attncap.engine, hf_attncap.image_files_attncap, hf_attncap.images, hf_attncap.result, hf_attncap.visualize",
    ],
)
def test_modules_without_a_model_do_not_import_transformers(use):
    assert python("-c", f"import sys; {use}; print({{'torch', 'transformers', 'torchvision'}} & set(sys.modules))") == "set()\n"


def test_a_spec_is_found_without_importing():
    script = "import sys, importlib.util, hf_attncap; assert importlib.util.find_spec('transformers').origin.endswith('.py')"
    assert python("-c", f"{script}; print('transformers' in sys.modules)") == "False\n"


def test_help_is_fast():
    seconds = []
    for _ in range(5):
        start = time.perf_counter()
        python("-m", "hf_attncap", "--help")
        seconds.append(time.perf_counter() - start)
    bare = []
    for _ in range(5):
        start = time.perf_counter()
        python("-c", "pass")
        bare.append(time.perf_counter() - start)
    assert min(seconds) - min(bare) < 0.2


def test_the_caption_command_imports_only_what_it_needs_and_collects_no_garbage_before(tiny_checkpoint, pictures):
    """Packages of other commands, and garbage collection during imports, would take a third of the start-up time."""
    script = (
        "import gc, sys; from hf_attncap.cli import main\n"
        "collections = []; gc.callbacks.append(lambda phase, info: collections.append(info['generation']))\n"
        f"sys.argv[1:] = ['caption', '--model', {str(tiny_checkpoint)!r}, {str(pictures[0])!r}]; assert main() == 0\n"
        "others = {'datasets', 'gensim', 'matplotlib', 'pandas', 'peft', 'sklearn', 'tensorboard', 'hf_attncap.training'}\n"
        "print(gc.isenabled(), collections.count(2), others & set(sys.modules))"
    )
    assert python("-c", script).splitlines()[-1] == "True 0 set()"
