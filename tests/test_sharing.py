"""`--push_to_hub`, with a local server in place of the Hub."""

import base64
import json
import logging
import re
import threading
from collections.abc import Iterator
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest
from datasets import Dataset
from datasets import Image as ImageColumn
from hf_attncap.training.train import main
from huggingface_hub import constants
from PIL import Image
from transformers import AutoModelForImageTextToText, pipeline

from hf_attncap import Captioner

make_pipeline: Any = pipeline  # its overloads know only the library's own tasks


@dataclass
class Hub:
    """Requests to the Hub, and the message and files of each commit, by repository."""

    folder: Path
    refuse: set[str] = field(default_factory=set)  # kinds of requests that it refuses
    tokens: set[str] = field(default_factory=set)
    repositories: list[str] = field(default_factory=list)
    commits: list[tuple[str, list[str]]] = field(default_factory=list)

    def answer(self, path: str, body: bytes, token: str) -> tuple[int, dict[str, Any]]:
        kind = next((kind for kind in ("create", "preupload", "commit", "validate-yaml") if f"/{kind}" in path), "other")
        if kind == "validate-yaml":  # of a card, without a token
            return 200, {"errors": [], "warnings": []}
        if kind == "other":
            return 404, {"error": f"There is no {path}."}
        self.tokens.add(token.removeprefix("Bearer "))
        if kind in self.refuse or not token:
            return 401, {"error": "Invalid username or password."}
        if kind == "create":
            asked = json.loads(body)
            name = f"{asked.get('organization') or 'me'}/{asked['name']}"
            self.repositories.append(name)
            return 200, {"url": f"{constants.ENDPOINT}/{name}"}
        if kind == "preupload":
            files = [{**file, "uploadMode": "regular", "shouldIgnore": False} for file in json.loads(body)["files"]]
            return 200, {"files": files}
        self._commit(re.sub(r"/api/models/(.+)/commit/.*", r"\1", path), [json.loads(line) for line in body.splitlines()])
        return 200, {"commitUrl": f"{constants.ENDPOINT}/me/run/commit/0", "commitOid": "0", "hookOutput": ""}

    def _commit(self, repository: str, lines: list[dict[str, Any]]) -> None:
        files = [line["value"] for line in lines if line["key"] == "file"]
        for file in files:
            path = self.folder / repository / file["path"]
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(base64.b64decode(file["content"]))
        self.commits.append((lines[0]["value"]["summary"], sorted(file["path"] for file in files)))


@pytest.fixture
def hub(tmp_path, monkeypatch) -> Iterator[Hub]:
    found = Hub(tmp_path / "hub")

    class Requests(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            length, chunked = self.headers.get("Content-Length"), self.headers.get("Transfer-Encoding") == "chunked"
            body = b"".join(self._chunks()) if chunked else self.rfile.read(int(length or 0))
            status, said = found.answer(self.path, body, self.headers.get("Authorization", ""))
            content = json.dumps(said).encode()
            self.send_response(status)
            self.send_header("Content-Type", "application/json")
            self.send_header("Content-Length", str(len(content)))
            self.end_headers()
            self.wfile.write(content)

        do_GET = do_POST

        def _chunks(self) -> Iterator[bytes]:
            while size := int(self.rfile.readline(), 16):
                yield self.rfile.read(size)
                self.rfile.readline()
            self.rfile.readline()

        def log_message(self, format: str, *args: Any) -> None:
            pass

    with ThreadingHTTPServer(("127.0.0.1", 0), Requests) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        monkeypatch.setattr(constants, "ENDPOINT", f"http://127.0.0.1:{server.server_port}")
        monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
        monkeypatch.setattr("hf_attncap.training.checkpoints.hub_upload.get_token", lambda: None)
        yield found
        server.shutdown()


@pytest.fixture
def train(tiny_checkpoint, tmp_path):
    """Run fine-tuning in `tmp_path/run` and return the exit code."""
    folder = tmp_path / "data"
    folder.mkdir()
    for split in ("train", "validation"):
        images = [Image.effect_noise((40, 30), 60).convert("RGB") for _ in range(2)]
        rows = {"image": images, "captions": [["A black dog is running"]] * 2, "image_id": [f"{split} 1", f"{split} 2"]}
        Dataset.from_dict(rows).cast_column("image", ImageColumn()).to_parquet(str(folder / f"{split}.parquet"))

    def run(**more) -> int:
        values = {
            "model_name_or_path": tiny_checkpoint,
            "train_file": folder / "train.parquet",
            "validation_file": folder / "validation.parquet",
            "output_dir": tmp_path / "run",
            "captions_per_image": 1,
            "max_steps": 2,
            "save_strategy": "steps",
            "save_steps": 1,
            "save_total_limit": 1,
            "report_to": "none",
            "use_cpu": True,
            "disable_tqdm": True,
            "num_logged_images": 1,
            "push_to_hub": True,
            "hub_token": "hf_secret",
            **more,
        }
        values = {key: value for key, value in values.items() if value is not None}
        return main([word for key, value in values.items() for word in (f"--{key}", str(value))])

    return run


EXPORT = {"config.json", "generation_config.json", "model.safetensors", "processor_config.json", "tokenizer.json"}


@pytest.mark.slow
def test_pushed_captioner_loads_with_remote_code(hub, train, tmp_path, pictures, remote_code):
    card = tmp_path / "run" / "README.md"
    card.parent.mkdir()
    card.write_text("# Mine\n")
    assert train(hub_model_id="me/mine", hub_strategy="end", ema_decay=0.9) == 0
    assert hub.repositories == ["me/mine"] and hub.tokens == {"hf_secret"}
    [(message, files)] = hub.commits
    assert message == "End of training" and set(files) >= EXPORT | {"README.md", "modeling_attncap.py", "pipeline_attncap.py"}
    assert not [name for name in files if not name.endswith((".json", ".safetensors", "_attncap.py", "README.md"))]
    assert not [name for name in files if "/" in name or name == "live_weights.safetensors"]
    assert (tmp_path / "run" / "samples" / "final").is_dir()  # local only

    received, picture = hub.folder / "me" / "mine", str(pictures[0])
    assert (received / "README.md").read_text() == "# Mine\n"
    said = Captioner.from_pretrained(tmp_path / "run", device="cpu").caption(picture).text
    assert Captioner.from_pretrained(received, device="cpu").caption(picture).text == said
    AutoModelForImageTextToText.from_pretrained(received, trust_remote_code=True)
    [caption] = make_pipeline("image-to-text", model=str(received), device="cpu", trust_remote_code=True)(picture)
    assert caption["generated_text"] == said
    assert "auto_map" not in (tmp_path / "run" / "config.json").read_text()
    assert b"hf_secret" not in b"".join(path.read_bytes() for path in (tmp_path / "run").rglob("*") if path.is_file())


@pytest.mark.parametrize(
    ("strategy", "folders"),
    [("every_save", set()), ("checkpoint", {"last-checkpoint"}), ("all_checkpoints", {"checkpoint-1", "checkpoint-2"})],
)
def test_hub_strategies(strategy, folders, hub, train, tmp_path):
    assert train(hub_strategy=strategy, hub_always_push=True) == 0
    assert hub.repositories == ["me/run"]  # named after the output folder
    assert [message for message, _ in hub.commits] == [*(f"Training in progress, step {n}" for n in (1, 2)), "End of training"]
    for _, files in hub.commits:
        assert set(files) >= EXPORT
    below = {name.split("/")[0]: name for _, files in hub.commits for name in files if "/" in name}
    assert set(below) == folders
    for folder in folders:  # a resumable checkpoint
        names = {path.name for path in (hub.folder / "me" / "run" / folder).iterdir()}
        assert {"optimizer.pt", "trainer_state.json", "model.safetensors"} <= names


def test_failed_upload_is_a_warning_during_training_and_an_error_at_the_end(hub, train, tmp_path, capsys, caplog):
    hub.refuse = {"preupload"}
    assert train(hub_model_id="me/mine", hub_always_push=True) == 2
    warnings = [record.getMessage() for record in caplog.records if record.levelno == logging.WARNING]
    assert len([text for text in warnings if text.startswith("push_to_hub: an upload to me/mine failed")]) == 2
    error = capsys.readouterr().err
    assert "is saved in" in error and "hf upload me/mine FOLDER" in error and "Traceback" not in error
    assert json.loads((tmp_path / "run" / "metrics.json").read_text())["train_loss"] > 0
    Captioner.from_pretrained(tmp_path / "run", device="cpu")


@pytest.mark.parametrize(
    ("more", "refuse", "message"),
    [
        ({"hub_token": None}, set(), "hf auth login"),
        ({}, {"create"}, "Invalid username or password"),
        ({"hub_model_id": "me/no good name"}, set(), "--hub_model_id"),
    ],
    ids=["no token", "wrong token", "bad name"],
)
def test_hub_errors_are_reported_before_data_are_read(more, refuse, message, hub, train, capsys):
    hub.refuse = refuse
    assert train(train_file="nowhere.parquet", **more) == 2
    error = capsys.readouterr().err
    assert message in error and "nowhere" not in error and "Traceback" not in error and len(error.splitlines()) == 1
    assert not hub.commits
