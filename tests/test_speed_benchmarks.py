"""The speed benchmarks run on tiny models and write the fields that the pages need; the pages show the results."""

import json
import re
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from pages import ROOT, shell_commands
from transformers import GPT2Config, VisionEncoderDecoderConfig, VisionEncoderDecoderModel, ViTConfig, ViTImageProcessor

sys.path.insert(0, str(ROOT))
from benchmarks.speed import __main__ as run_all
from benchmarks.speed import (
    decoding,
    encoder,
    end_to_end,
    exported_peer,
    measure,
    models,
    pages,
    peers,
    scaling,
    startup_memory,
    training,
)
from hf_attncap import export

TIMES = {"ms", "lowest_ms", "highest_ms"}


@pytest.fixture(autouse=True)
def short(monkeypatch):
    """Each candidate runs once per round."""
    monkeypatch.setattr(measure, "QUICK_SECONDS", 0.0)


@pytest.fixture
def photographs(pictures) -> str:
    return str(pictures[0].parent)


def results_of(script: Any, capsys: pytest.CaptureFixture, tmp_path: Path, *options: str) -> list[dict[str, Any]]:
    """The rows that a script writes, after a check of what it prints."""
    output = tmp_path / "results.json"
    script.main(["--quick", "--rounds", "2", "--output", str(output), *options])
    shown, found = capsys.readouterr().out, json.loads(output.read_text(encoding="utf-8"))
    assert found["machine"]["cores"] >= 1 and found["versions"]["torch"] and found["rounds"] == 2 and len(found["load"]) == 2
    assert found["command"].startswith(f"python -m {script.__name__} --quick")
    assert found["machine"]["cpu"] in shown
    assert measure.markdown_table(found["columns"], found["rows"]) in shown
    for row in found["rows"]:
        assert set(row) >= TIMES and 0 < row["lowest_ms"] <= row["ms"] <= row["highest_ms"]
    return found["rows"]


def test_encoder(tiny_checkpoint, photographs, capsys, tmp_path):
    options = ["--checkpoint", str(tiny_checkpoint), "--photographs", photographs, "--batches", "1", "2"]
    rows = results_of(encoder, capsys, tmp_path, *options, "--backbones", "squeezenet1_1")
    assert {(row["backbone"], row["batch"]) for row in rows} == {
        (name, batch) for name in ("mobilenet_v3_small", "squeezenet1_1") for batch in (1, 2)
    }
    for row in rows:
        assert row["ms_per_image"] == pytest.approx(row["ms"] / row["batch"], abs=0.001)
        assert row["name"] != "eager float32" or row["times_as_fast"] == 1
        assert row["batch"] != 1 or row["to_batch_1"] == 1


def test_decoding(tiny_checkpoint, capsys, tmp_path):
    rows = results_of(decoding, capsys, tmp_path, "--checkpoint", str(tiny_checkpoint), "--tokens", "3", "--beams", "1", "2")
    assert [row["name"] for row in rows].count("this package") == 4
    for row in rows:
        assert ("times_as_fast" in row) == (row["name"] == "this package")
        is_plain = row["beams"] == 1 and row["settings"] == "plain"
        assert ("overhead_ms" in row) == (is_plain and row["name"] == "this package")
        assert 0 < row.get("overhead_ms", 1) < 1000


def test_fast_and_stock_loops_are_both_measured(tiny_checkpoint, monkeypatch):
    from hf_attncap import AttnCapForConditionalGeneration, generation_attncap

    model, called = AttnCapForConditionalGeneration.from_pretrained(tiny_checkpoint).eval(), []
    search = generation_attncap.greedy_search
    monkeypatch.setattr(generation_attncap, "greedy_search", lambda *args: called.append(1) or search(*args))
    regions = torch.randn(1, 6, 16)
    loops = (decoding.generate, decoding.generate_by_transformers)
    found = [loop(model, regions, num_beams=1, max_new_tokens=3) for loop in loops]
    assert len(called) == 1 and torch.equal(*found)
    plain = decoding.generate(model, regions, num_beams=1, max_new_tokens=3, min_new_tokens=3, **decoding.PLAIN)
    assert plain.shape == (1, 4)


def test_the_overhead_of_generate_is_its_time_without_the_search(tiny_checkpoint, monkeypatch):
    from hf_attncap import AttnCapForConditionalGeneration

    model = AttnCapForConditionalGeneration.from_pretrained(tiny_checkpoint).eval()
    search, seconds = decoding.greedy_search, 0.05
    monkeypatch.setattr(decoding, "greedy_search", lambda *args: time.sleep(seconds) or search(*args))
    monkeypatch.setattr(decoding, "MAX_CALLS", 5)
    assert 0 < decoding.measure_overhead(model, torch.randn(1, 6, 16), max_new_tokens=2) < 1000 * seconds


def tiny_peer() -> Any:
    vision = ViTConfig(hidden_size=8, num_hidden_layers=1, num_attention_heads=1, intermediate_size=8, image_size=32, patch_size=16)
    words = GPT2Config(vocab_size=20, n_positions=32, n_embd=8, n_layer=1, n_head=1, bos_token_id=1, eos_token_id=2)
    config = VisionEncoderDecoderConfig.from_encoder_decoder_configs(vision, words, decoder_start_token_id=1, pad_token_id=2)
    return VisionEncoderDecoderModel(config=config), ViTImageProcessor(size={"height": 32, "width": 32})


def test_end_to_end(tiny_checkpoint, photographs, capsys, tmp_path, monkeypatch):
    monkeypatch.setitem(peers.PEERS, "vit-gpt2", tiny_peer)
    options = ["--checkpoint", str(tiny_checkpoint), "--photographs", photographs, "--batch", "2", "--tokens", "4"]
    options += ["--peers", "vit-gpt2", "--backbones", "squeezenet1_1"]
    rows = results_of(end_to_end, capsys, tmp_path, *options)
    own = [row for row in rows if row["name"] == "this package"]
    assert {(row["engine"], row["batch"]) for row in own} == {
        (engine, batch) for engine in ("torch float32", "torch float32, optimize=False", "torch bfloat16") for batch in (1, 2)
    }
    times = {(row["name"], row["engine"]): row for row in rows if row["batch"] == 1}
    peer, half = times["vit-gpt2", "torch float32"], times["vit-gpt2", "torch bfloat16"]
    assert peer["times_as_fast"] == 1 and half["same_engine"] == 1
    found = times["this package", "torch bfloat16"]
    assert found["times_as_fast"] == pytest.approx(peer["ms_per_image"] / found["ms_per_image"], abs=0.001)
    assert found["same_engine"] == pytest.approx(half["ms_per_image"] / found["ms_per_image"], abs=0.001)
    assert found["ms_per_image"] == pytest.approx(found["ms"] / 3, abs=0.001), "three photographs per call"
    assert times["this package, squeezenet1_1", "torch float32"]["decoding"] == "3 beams, 16 tokens"


@pytest.mark.parametrize(
    ("format", "dtype"), [("onnx", "float32"), ("onnx", "int8"), ("openvino", "float32"), ("openvino", "int8")]
)
def test_exported_peer_generates_the_same_tokens(format, dtype, photographs, tmp_path, monkeypatch):
    for package in export.NEEDED[format]:
        pytest.importorskip(package)
    monkeypatch.setitem(peers.PEERS, "vit-gpt2", tiny_peer)
    peer = peers.Peer.build("vit-gpt2", torch.float32, "cpu", 6)
    exported = exported_peer.ExportedPeer(peer.model, peer.processor, tmp_path, format, dtype, 6)
    for file in sorted(Path(photographs).iterdir()):
        found = exported.caption(file.read_bytes())
        assert len(found) == 6 and set(found) <= set(range(20))
        assert dtype != "float32" or found == peer.caption(file.read_bytes())[0, 1:].tolist()


@pytest.mark.slow
def test_exports_are_compared_with_an_exported_peer(tiny_checkpoint, photographs, capsys, tmp_path, monkeypatch):
    for package in export.NEEDED["onnx"]:
        pytest.importorskip(package)
    monkeypatch.setitem(peers.PEERS, "vit-gpt2", tiny_peer)
    folder = export.export_checkpoint(tiny_checkpoint, tmp_path / "mine")
    options = ["--checkpoint", str(tiny_checkpoint), "--photographs", photographs, "--batch", "2", "--tokens", "4"]
    rows = results_of(end_to_end, capsys, tmp_path, *options, "--peers", "vit-gpt2", "--exported", str(folder))
    peer = next(row for row in rows if row["name"] == "vit-gpt2" and row["engine"] == "exported, onnx-float32")
    own = next(row for row in rows if row["engine"] == "exported, mine" and row["batch"] == 1)
    assert own["same_engine"] == pytest.approx(peer["ms_per_image"] / own["ms_per_image"], abs=0.001)


@pytest.mark.parametrize("name", peers.PEERS)
@pytest.mark.slow
def test_peers_have_their_published_sizes(name, pictures):
    peer = peers.Peer.build(name, torch.float32, "cpu", 4)
    assert peer.parameters == {"vit-gpt2": 239, "BLIP-base": 224, "GIT-base": 177}[name]
    generated = peer.caption(pictures[0].read_bytes())
    assert generated.shape[0] == 1 and 4 <= generated.shape[1] <= 6  # start tokens and four generated ones


def test_training(make_checkpoint, capsys, tmp_path):
    checkpoint = make_checkpoint(backbone="mobilenet_v3_small", freeze_backbone=False)
    options = ["--checkpoint", str(checkpoint), "--images", "2", "--side", "32", "--blocks", "3"]
    rows = results_of(training, capsys, tmp_path, *options)
    assert {row["step"] for row in rows} == {"stage 2", "self-critical"}
    for kind in ("stage 2", "self-critical"):
        assert next(row["times_as_fast"] for row in rows if row["step"] == kind) == 1
    assert all(row["cpu_ms"] > 0 and row["times_as_fast_cpu"] > 0 for row in rows)


def test_scaling(tiny_checkpoint, capsys, tmp_path, monkeypatch):
    monkeypatch.setattr(scaling, "QUICK_SIZES", {name: [1, 2] for name in scaling.SIZES} | {"vocabulary": [20, 40]})
    rows = results_of(scaling, capsys, tmp_path, "--checkpoint", str(tiny_checkpoint), "--side", "32")
    assert [row["what"] for row in rows] == [name for name in scaling.SIZES for _ in range(2)]
    for first, second in zip(rows[::2], rows[1::2]):
        assert second["ms"] / first["ms"] == pytest.approx(2 ** second["growth"], rel=0.01)
        assert second["superlinear"] == ("yes" if second["growth"] > 1.1 else "no")


@pytest.mark.slow
def test_startup_and_memory(tiny_checkpoint, photographs, capsys, tmp_path):
    rows = results_of(startup_memory, capsys, tmp_path, "--checkpoint", str(tiny_checkpoint), "--photographs", photographs)
    found = {row["name"]: row for row in rows}
    assert found[startup_memory.CAPTION_COMMAND]["times_as_fast"] == 1 and len(found) == 2
    for row in rows:
        assert row["seconds"] == pytest.approx(row["ms"] / 1000, abs=0.001) and row["memory_mib"] > 100


def test_failing_command_is_reported():
    with pytest.raises(SystemExit, match="no such module|No module named"):
        startup_memory.run([sys.executable, "-m", "hf_attncap_missing"], None)


def test_random_checkpoint_can_be_loaded(tmp_path, monkeypatch):
    monkeypatch.setattr(sys, "argv", ["models", "squeezenet1_1", str(tmp_path / "random")])
    models.main()
    captioner = models.Captioner.from_pretrained(tmp_path / "random")
    assert captioner.model.config.backbone == "squeezenet1_1"
    assert captioner.model.generation_config.max_new_tokens == captioner.model.generation_config.min_new_tokens == 16


def test_all_scripts_run_with_options_that_they_have(tmp_path, monkeypatch):
    calls = []
    monkeypatch.setattr(run_all.subprocess, "run", lambda command, check: calls.append(command))
    run_all.main(["--quick", "--exported", "a", "b", "--output_dir", str(tmp_path / "out")])
    assert [call[2].removeprefix("benchmarks.speed.") for call in calls] == list(run_all.SCRIPTS)
    scripts = (decoding, encoder, end_to_end, scaling, startup_memory, training)
    assert {script.__name__.rpartition(".")[2] for script in scripts} == set(run_all.SCRIPTS)
    for call in calls:
        text = (ROOT / f"{call[2].replace('.', '/')}.py").read_text() + (ROOT / "benchmarks/speed/measure.py").read_text()
        for option in re.findall(r"--\w+", " ".join(call)):
            assert f'"{option}"' in text, call


def test_commands_on_the_page_have_options_that_exist():
    for command in shell_commands(pages.PAGES[0]):
        module = command.split()[2].replace(".", "/")
        file = ROOT / f"{module}.py" if (ROOT / f"{module}.py").exists() else ROOT / module / "__main__.py"
        for option in re.findall(r"--\w+", command):
            assert f'"{option}"' in file.read_text(encoding="utf-8"), command


@pytest.mark.parametrize(
    ("value", "text"),
    [(None, ""), (0.0, "0"), (1234.5, "1,234"), (28.04, "28.0"), (3.456, "3.46"), (0.0123, "0.012"), (12000, "12,000"), ("x", "x")],
)
def test_numbers_in_tables_have_three_digits(value, text):
    assert measure.format_value(value) == text


def test_tables_of_the_pages_are_those_of_the_results():
    assert pages.main([]) == 0, "run `python -m benchmarks.speed.pages --write`"


def test_the_table_about_amx_is_that_of_the_results():
    section = (ROOT / pages.PAGES[0]).read_text(encoding="utf-8").partition("## bfloat16 on CPUs with AMX")[2].partition("\n## ")[0]
    shown_as = {1: "one photograph", 32: "per photograph in batches of 32", "stage 2": "a training step of stage 2"}
    shown_as["self-critical"] = "a self-critical step"
    columns = []
    for folder in (pages.RESULTS, pages.RESULTS / "amx"):
        captioning, training = (json.loads((folder / f"{name}.json").read_text())["rows"] for name in ("end_to_end", "training"))
        own = [row for row in captioning if row["name"] == "this package"]
        times = {f"{shown_as[row['batch']]}, {row['engine']}": row["ms_per_image"] for row in own}
        as_trained = [row for row in training if row["name"].endswith(", as trained")]
        columns.append(
            times
            | {f"{shown_as[row['step']]} ({row['trained']}), {row['name'].partition(',')[0]}": row["ms"] for row in as_trained}
        )
        has_amx = "amx_bf16" in json.loads((folder / "end_to_end.json").read_text())["machine"]["instructions"]
        assert has_amx == (folder.name == "amx")
    lines = re.findall(r"^\| (.*?) \| ([\d.,]+) \| ([\d.,]+) \|$", section, flags=re.M)
    assert len(lines) == 11
    for name, *shown in lines:
        assert shown == [measure.format_value(times[name]) for times in columns], name


def test_pages_are_written_from_results(tmp_path, monkeypatch, capsys):
    """Of each script in docs/speed.md, and of captions in README.md."""
    (tmp_path / "docs").mkdir()
    for page in (pages.README, *pages.PAGES):
        (tmp_path / page).write_text((ROOT / page).read_text(encoding="utf-8"), encoding="utf-8")
    rows = [
        {"name": name, "engine": engine, "batch": 1, "ms_per_image": ms}
        for name, engine, ms in (
            ("this package", "torch float32", 28.25),
            ("this package", "exported, openvino-int8", 8.0),
            ("this package", "exported, onnx-float32", 12.0),
            ("vit-gpt2", "torch float32", 1012.0),
        )
    ]
    found = {
        "command": "python -m benchmarks.speed.end_to_end",
        "date": "2026-01-01",
        "machine": {"cpu": "Tested CPU", "cores": 2, "instructions": ["avx2"]},
        "versions": {"python": "3.11"},
        "threads": 2,
        "rounds": 7,
        "load": [0.1, 0.2],
        "columns": {"name": "captioner", "ms_per_image": "ms"},
        "rows": rows,
    }
    (tmp_path / "end_to_end.json").write_text(json.dumps(found), encoding="utf-8")
    monkeypatch.setattr(pages, "ROOT", tmp_path)
    monkeypatch.setattr(pages, "RESULTS", tmp_path)
    assert pages.main([]) == 1 and "--write" in capsys.readouterr().err
    assert pages.main(["--write"]) == 0 and pages.main([]) == 0
    readme, page = ((tmp_path / name).read_text(encoding="utf-8") for name in (pages.README, pages.PAGES[0]))
    assert "| ms per photograph, 2 cores of Tested CPU | this package | vit-gpt2 | GIT-base | BLIP-base |" in readme
    assert "| torch float32 | 28.2 | 1,012 | not measured | not measured |" in readme
    assert "| exported, openvino-int8 | 8.00 |" in readme and "onnx" not in readme, "only the first export"
    assert "Tested CPU (avx2), 2 cores, 2 threads" in page and "| vit-gpt2 | 1,012 |" in page
