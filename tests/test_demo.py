"""`attncap demo`: the page in Chromium, its API, what it keeps of uploads, which hosts it asks, and the Space folder."""

import json
import os
import re
import socket
import subprocess
import sys
import time
import urllib.request
from pathlib import Path

import pytest
import yaml
from PIL import Image

gradio = pytest.importorskip("gradio", reason='pip install "hf_attncap[demo]"')
from gradio_client import Client, handle_file  # noqa: E402
from gradio_client.exceptions import AppError  # noqa: E402

from hf_attncap import Captioner  # noqa: E402
from hf_attncap import demo as demo_module  # noqa: E402
from hf_attncap.captioner import CHECKPOINT  # noqa: E402
from hf_attncap.cli import main  # noqa: E402
from hf_attncap.demo import build_demo, launch_demo  # noqa: E402
from hf_attncap.space import export_space  # noqa: E402

# gradio's own client prints this when a stream ends.
KNOWN_WARNING = "Method not implemented."


@pytest.fixture(scope="module")
def uploads(tmp_path_factory):
    """The folder of gradio's uploads."""
    folder = tmp_path_factory.mktemp("uploads")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("GRADIO_TEMP_DIR", str(folder))
        yield folder


@pytest.fixture(scope="module")
def captioner(tiny_checkpoint):
    return Captioner.from_pretrained(tiny_checkpoint)


@pytest.fixture(scope="module")
def address(captioner, uploads):
    """The running demo, with uploads that are deleted after ten seconds."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(demo_module, "KEPT_SECONDS", 10)
        patch.setattr(demo_module, "CHECK_SECONDS", 1)
        demo = build_demo(captioner)
    yield launch_demo(demo)
    demo.close()


@pytest.fixture(scope="module")
def client(address, tmp_path_factory):
    return Client(address, verbose=False, analytics_enabled=False, download_files=str(tmp_path_factory.mktemp("client")))


def caption(client, picture, *, beams=2, temperature=0, length=6, prompt="", count=2, importance=False):
    return client.predict(handle_file(picture), beams, temperature, length, prompt, count, importance, api_name="/caption")


def test_api_captions_as_python_does(client, captioner, pictures):
    text, view, details = caption(client, pictures[0], prompt="a dog")
    expected = captioner.caption(pictures[0], num_beams=2, num_return_sequences=2, max_new_tokens=6, prompt="a dog")
    assert text == expected.text and view.startswith("<iframe sandbox") and "Content-Security-Policy" in view
    assert details["score"] == pytest.approx(expected.score, abs=1e-4) and details["words"] == expected.words
    assert [other["caption"] for other in details["alternatives"]] == [other.text for other in expected.alternatives]
    assert "&quot;importance&quot;: null" in view
    _, explained, _ = caption(client, pictures[0], importance=True)
    assert "&quot;importance&quot;: [[" in explained


def test_settings_of_the_api_reach_the_model(client, pictures):
    _, _, details = caption(client, pictures[1], length=2)
    assert len(details["words"]) <= 2
    _, _, details = caption(client, pictures[1], beams=1, count=3)
    assert details["alternatives"] == [], "beam search gives as many captions as it has beams"
    samples = {caption(client, pictures[1], temperature=2.0, count=3)[0] for _ in range(4)}
    assert len(samples) > 1


def test_api_captions_several_files_and_reports_the_broken_ones(client, captioner, pictures, tmp_path):
    broken = tmp_path / "broken.png"
    broken.write_bytes(b"no image")
    files = [handle_file(path) for path in (*pictures, broken)]
    table = client.predict(files, 2, 0, 6, "", api_name="/caption_files")
    expected = [captioner.caption(path, num_beams=2, max_new_tokens=6).text for path in pictures]
    assert [row[0] for row in table["data"]] == [*(path.name for path in pictures), "broken.png"]
    assert [row[1] for row in table["data"]] == [*expected, ""]
    assert table["data"][3][3] == "broken.png is not an image in a known format; save it as JPEG or PNG"


def test_wrong_input_is_one_sentence(client, pictures, tmp_path, capfd):
    bad = tmp_path / "<b>bad.png"
    bad.write_bytes(b"no image")
    with pytest.raises(AppError, match="bad.png is not an image in a known format; save it as JPEG or PNG"):
        caption(client, bad)
    with pytest.raises(AppError, match="The model does not know zebra in the prompt"):
        caption(client, pictures[0], prompt="zebra")
    with pytest.raises(AppError, match="Choose a picture first"):
        client.predict(None, 2, 0, 6, "", 1, False, api_name="/caption")
    with pytest.raises(AppError, match="Choose pictures first"):
        client.predict(None, 2, 0, 6, "", api_name="/caption_files")
    with pytest.raises(AppError, match="65 pictures are too many: choose at most 64"):
        client.predict([handle_file(pictures[2])] * 65, 2, 0, 6, "", api_name="/caption_files")
    assert "Traceback" not in capfd.readouterr().err


def test_endpoints_and_their_host(client, address):
    assert set(client.view_api(return_format="dict")["named_endpoints"]) == {"/caption", "/caption_files"}
    assert address.startswith("http://127.0.0.1:")


def test_messages_hold_no_markup():
    error = demo_module._error(gradio, "<img src=x onerror=alert(1)>.png is no image")
    assert error.message == "&lt;img src=x onerror=alert(1)&gt;.png is no image"


def test_uploads_are_deleted(client, uploads, pictures, tmp_path):
    Image.open(pictures[0]).resize((77, 33)).save(tmp_path / "private.png")
    caption(client, tmp_path / "private.png", importance=True)
    client.predict([handle_file(tmp_path / "private.png")], 2, 0, 6, "", api_name="/caption_files")
    kept = {str(path) for path in uploads.rglob("*") if path.is_file()}
    assert any("private" in path for path in kept), "the test must see the upload"
    deadline = time.monotonic() + 40
    while any("private" in path for path in kept) and time.monotonic() < deadline:
        time.sleep(0.2)
        kept = {str(path) for path in uploads.rglob("*") if path.is_file()}
    assert {Path(path).name for path in kept} <= set(demo_module.EXAMPLES)


def test_large_uploads_are_refused(address, uploads, tmp_path):
    assert demo_module.MAX_FILE_BYTES <= 64 * 2**20
    body = b'--x\r\nContent-Disposition: form-data; name="files"; filename="huge.png"\r\n\r\n'
    body += bytes(demo_module.MAX_FILE_BYTES + 1) + b"\r\n--x--\r\n"
    headers = {"Content-Type": "multipart/form-data; boundary=x"}
    with pytest.raises(urllib.error.HTTPError, match="413"):
        urllib.request.urlopen(urllib.request.Request(f"{address}gradio_api/upload", body, headers))
    assert not list(uploads.rglob("huge.png"))


def test_local_files_of_the_server_are_not_read(address, pictures):
    """A request that names a file of the server instead of an upload gets no caption."""
    picture = {"path": str(pictures[0]), "meta": {"_type": "gradio.FileData"}}
    for name, data in (("caption", [picture, 2, 0, 6, "", 1, False]), ("caption_files", [[picture], 2, 0, 6, ""])):
        call = f"{address}gradio_api/call/{name}"
        request = urllib.request.Request(call, json.dumps({"data": data}).encode(), {"Content-Type": "application/json"})
        with urllib.request.urlopen(request) as answer:
            event = json.load(answer)["event_id"]
        with urllib.request.urlopen(f"{call}/{event}") as answer:
            assert answer.read().startswith(b"event: error\n")


# In Chromium


@pytest.fixture
def page(open_page, address):
    """The page of the demo, after which the test fails for errors in the console and for other hosts."""
    found = open_page(address, viewport={"width": 1280, "height": 1000})
    found.page.get_by_role("button", name="Caption", exact=True).wait_for()
    yield found.page
    found.console_errors[:] = [text for text in found.console_errors if text != KNOWN_WARNING]
    found.assert_no_errors()
    assert found.hosts() == {address.removeprefix("http://").rstrip("/")}


def test_page_captions_an_upload_and_hovering_works(page, pictures, captioner):
    page.locator("input[type=file]").first.set_input_files(pictures[0])
    frame = page.frame_locator("iframe")
    frame.locator(".attncap-word").first.wait_for()
    expected = captioner.caption(pictures[0], max_new_tokens=21)
    assert frame.locator(".attncap-letters").all_inner_texts() == expected.words
    assert page.get_by_label("Caption", exact=True).first.input_value() == expected.text
    page.locator("iframe").scroll_into_view_if_needed()
    canvas = "document.querySelector('canvas').toDataURL()"
    inner = next(frame for frame in page.frames if frame.parent_frame)
    inner.wait_for_function("document.querySelector('canvas').width > 1")
    plain = inner.evaluate(canvas)
    frame.locator(".attncap-word").first.hover()
    inner.wait_for_function(f"plain => {canvas} !== plain", arg=plain)
    frame.get_by_label("Importance").check()
    frame.locator(".attncap-stage").hover()
    assert all(frame.locator(".attncap-value").all_inner_texts())


def test_page_reports_a_file_that_is_no_image(page, tmp_path):
    (tmp_path / "notes.png").write_bytes(b"no image")
    page.locator("input[type=file]").first.set_input_files(tmp_path / "notes.png")
    toast = page.get_by_test_id("toast-body")
    toast.wait_for()
    assert "notes.png is not an image in a known format; save it as JPEG or PNG" in toast.inner_text()


def test_page_captions_several_files(page, pictures):
    page.get_by_role("tab", name="Several pictures").click()
    page.locator("input[type=file][multiple]").set_input_files(pictures)
    page.locator(".file-preview tr").nth(2).wait_for()
    page.get_by_role("button", name="Caption all").click()
    for picture in pictures:
        page.get_by_role("gridcell", name=picture.name).wait_for()


# The command

RECORD = """
import atexit, socket, sys
asked, look_up = set(), socket.getaddrinfo

def record(host, *rest, **more):
    asked.add(host.decode() if isinstance(host, bytes) else host)
    return look_up(host, *rest, **more)

socket.getaddrinfo = record
from hf_attncap.cli import main
code = main(sys.argv[1:])
print(*sorted(map(str, asked)))
sys.exit(code)
"""


def test_command_serves_the_page_contacts_nobody_and_leaves_nothing(tiny_checkpoint, pictures, tmp_path):
    environment = {**os.environ, "TMPDIR": str(tmp_path), "PYTHONUNBUFFERED": "1"}
    environment.pop("GRADIO_TEMP_DIR", None)
    command = [sys.executable, "-c", RECORD, "demo", str(tiny_checkpoint), "--port", "7999"]
    with subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process:
        assert process.stdout.readline() == "http://127.0.0.1:7999/\n"
        (uploads,) = tmp_path.glob("attncap-demo-*")
        assert uploads.stat().st_mode & 0o077 == 0
        with urllib.request.urlopen("http://127.0.0.1:7999/") as answer:
            content, policy = answer.read().decode(), answer.headers["Content-Security-Policy"]
        client = Client("http://127.0.0.1:7999/", verbose=False, analytics_enabled=False)
        assert caption(client, pictures[0])[0]
        client.close()
        process.terminate()
        output, errors = process.communicate(timeout=180)
    assert policy.startswith("default-src 'self'") and "http" not in policy
    assert not re.findall(r"""<(?:script|link|img|iframe)[^>]*(?:src|href)=["'](?:https?:)?//[^"']+""", content)
    assert set(output.splitlines()[-1].split()) <= {"127.0.0.1", "localhost"}
    assert "Traceback" not in errors and not list(tmp_path.glob("attncap-demo-*"))


def test_busy_port_is_reported(tiny_checkpoint, capfd):
    with socket.socket() as busy:
        busy.bind(("127.0.0.1", 0))
        busy.listen()
        port = busy.getsockname()[1]
        assert main(["demo", str(tiny_checkpoint), "--port", str(port)]) == 1
    assert f"{port}" in capfd.readouterr().err.splitlines()[-1]


# The Space


def run_app(folder: Path) -> tuple[str, str]:
    """Imports `app.py` of a Space in a process of its own; returns the package's path and the caption of a picture."""
    code = (
        "import sys; sys.path.insert(0, '.'); import app, hf_attncap; from PIL import Image; import gradio;"
        "assert isinstance(app.demo, gradio.Blocks); print(hf_attncap.__file__);"
        "print(app.captioner.caption(Image.new('RGB', (64, 48), 'red')).text)"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=folder, capture_output=True, text=True, timeout=180)
    assert done.returncode == 0, done.stderr
    path, text = done.stdout.splitlines()[-2:]
    return path, text


def front_matter(folder: Path) -> dict:
    return yaml.safe_load((folder / "README.md").read_text(encoding="utf-8").split("---")[1])


def test_space_with_a_checkpoint_builds_the_demo(tiny_checkpoint, captioner, tmp_path, capfd):
    out = tmp_path / "space"
    (tmp_path / "model").symlink_to(tiny_checkpoint)
    assert main(["export-hub", str(tmp_path / "model"), str(out), "--space"]) == 0
    assert capfd.readouterr().out == f"{out}\n"
    card = front_matter(out)
    assert card["sdk"] == "gradio" and card["sdk_version"] == gradio.__version__ and card["app_file"] == "app.py"
    path, text = run_app(out)
    assert Path(path) == out / "hf_attncap" / "__init__.py", "the Space runs its own copy of the code"
    assert text == captioner.caption(Image.new("RGB", (64, 48), "red")).text
    requirements = (out / "requirements.txt").read_text().splitlines()
    assert any(line.startswith("torch>=") for line in requirements) and not any("extra" in line for line in requirements)
    assert main(["export-hub", str(tiny_checkpoint), str(out), "--space"]) == 1
    assert "is not an empty folder" in capfd.readouterr().err


@pytest.mark.slow
def test_space_with_an_exported_folder_needs_no_torch(make_export, pictures, tmp_path):
    exported = make_export("onnx")
    out = export_space(exported, tmp_path / "space")
    captioners = [Captioner.from_pretrained(folder) for folder in (exported, out / "checkpoint")]
    assert len({captioner.caption(pictures[0]).text for captioner in captioners}) == 1
    requirements = (out / "requirements.txt").read_text().splitlines()
    assert "onnxruntime" in requirements and not [line for line in requirements if line.startswith(("torch", "transformers"))]


def test_space_with_the_name_of_a_repository(tmp_path, capfd):
    out = export_space("user/model", tmp_path / "space")
    assert "from_pretrained('user/model')" in (out / "app.py").read_text() and not (out / "checkpoint").exists()
    compile((out / "app.py").read_text(), "app.py", "exec")
    with pytest.raises(FileNotFoundError, match="'no model' is neither a folder nor the name of a Hub repository"):
        export_space("no model", tmp_path / "other")
    assert not (tmp_path / "other").exists()


def test_space_keeps_the_licence_of_the_checkpoint(tmp_path):
    card = front_matter(export_space(CHECKPOINT, tmp_path / "space"))
    assert card["license"] == "other" and card["license_link"].startswith("https://")
