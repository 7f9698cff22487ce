"""`Captioner.stream`: order, errors, laziness and memory, and worker processes that read the images."""

import http.server
import os
import signal
import subprocess
import sys
import threading
import time
import weakref
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from PIL import Image

from hf_attncap import Captioner, CaptionResult, image_workers
from hf_attncap.images import ImageError, Reading, load_image

TINY = 1e-4  # what batching changes in scores


@pytest.fixture(scope="module")
def captioner(tiny_checkpoint) -> Captioner:
    return Captioner.from_pretrained(tiny_checkpoint, device="cpu")


@pytest.fixture
def processes(monkeypatch) -> list[subprocess.Popen]:
    """The worker processes that are started."""
    started = []

    class Recorded(subprocess.Popen):
        def __init__(self, *arguments, **options):
            super().__init__(*arguments, **options)
            started.append(self)

    monkeypatch.setattr(image_workers.subprocess, "Popen", Recorded)
    return started


@pytest.fixture(scope="module")
def mixture(captioner, pictures, tmp_path_factory) -> list[tuple]:
    """Sources of all kinds, good, odd and broken, each with its result or error when captioned alone."""
    folder = tmp_path_factory.mktemp("mixture")
    (folder / "empty.jpg").touch()
    (folder / "cut.jpg").write_bytes(pictures[0].read_bytes()[:400])
    Image.new("RGB", (300, 2), "red").save(folder / "flat.png")
    Image.new("RGBA", (1, 1), (0, 0, 0, 0)).save(folder / "dot.png")
    sources = [pictures[0], str(pictures[1]), pictures[1].read_bytes(), Image.open(pictures[2]), np.zeros((5, 7, 3), np.uint8)]
    sources += [torch.ones(3, 9, 9), memoryview(pictures[2].read_bytes()), folder / "flat.png", str(folder / "dot.png")]
    sources += [folder / "empty.jpg", folder / "cut.jpg", folder, folder / "nowhere.jpg", b"no image", "no image", None, 7]
    sources += [np.zeros((2, 2, 2, 2)), Image.new("RGB", (0, 3))]
    alone = []
    for source in sources:
        try:
            alone.append(captioner.caption(source))
        except ImageError as error:
            alone.append(error)
    assert sum(isinstance(one, ImageError) for one in alone) == 10
    return list(zip(sources, alone))


@pytest.mark.parametrize("batch_size", [1, 2, 8])
def test_stream_yields_one_result_or_error_per_image_in_order(captioner, pictures, batch_size, tmp_path):
    (tmp_path / "empty.jpg").touch()
    sources = [pictures[0], tmp_path / "empty.jpg", pictures[1].read_bytes(), None, Image.open(pictures[2])]
    found = list(captioner.stream(iter(sources), on_error="yield", batch_size=batch_size))
    alone = captioner.caption([pictures[0], pictures[1], pictures[2]], batch_size=1)
    assert [one.text for one in (found[0], found[2], found[4])] == [one.text for one in alone]
    assert isinstance(found[1], ImageError) and "empty.jpg is empty" in str(found[1])
    assert isinstance(found[3], ImageError) and "NoneType" in str(found[3])


def test_stream_raises_after_the_results_of_the_images_before(captioner, pictures):
    stream = captioner.stream([pictures[0], b"no picture", pictures[1]])
    assert next(stream).text == captioner.caption(pictures[0]).text
    with pytest.raises(ImageError, match="not an image"):
        next(stream)


def test_failure_of_one_image_keeps_the_results_of_its_batch(captioner, pictures, monkeypatch):
    caption, bad = captioner._caption_batch, Image.open(pictures[1]).size

    def fail(batch, settings):
        if bad in [picture.size for picture in batch]:
            raise RuntimeError("out of memory")
        return caption(batch, settings)

    monkeypatch.setattr(captioner, "_caption_batch", fail)
    found = list(captioner.stream([Image.open(file) for file in pictures], on_error="yield"))
    assert isinstance(found[0], CaptionResult) and isinstance(found[2], CaptionResult)
    assert str(found[1]) == "images[1] cannot be captioned: RuntimeError: out of memory"
    assert isinstance(found[1].__cause__, RuntimeError)


@pytest.mark.parametrize(
    ("images", "settings", "message"),
    [
        ("photo.jpg", {}, "single image"),
        (Image.new("RGB", (9, 9)), {}, "single image"),
        ([], {"on_error": "skip"}, "'raise' or 'yield'"),
        ([], {"batch_size": 0}, "at least 1"),
        ([], {"prompt": "xylophone"}, "does not know"),
        ([], {"workers": -1}, "`workers` is -1, but it must be an integer from 0 to 256"),
        ([], {"workers": 257}, "`workers` is 257, but it must be an integer from 0 to 256"),
        ([], {"max_new_tokens": 0}, "`max_new_tokens` must be greater than 0"),
        ([], {"do_sample": True, "temperature": -1.0}, "strictly positive"),
        ([], {"num_beam_groups": 2}, "group_beam_search is not part of transformers"),
    ],
)
def test_stream_rejects_wrong_arguments_before_reading(captioner, images, settings, message):
    with pytest.raises(ValueError, match=message):
        captioner.stream(images, **settings)


@settings(max_examples=12, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data(), batch_size=st.integers(1, 5), workers=st.integers(0, 2))
def test_any_mixture_gives_the_results_and_errors_of_single_images_in_order(captioner, mixture, data, batch_size, workers):
    chosen = data.draw(st.lists(st.sampled_from(mixture), max_size=9))
    sources = (source for source, _ in chosen)
    found = list(captioner.stream(sources, on_error="yield", batch_size=batch_size, workers=workers))
    assert len(found) == len(chosen)
    for one, (_, alone) in zip(found, chosen):
        assert type(one) is type(alone)
        if isinstance(alone, CaptionResult):
            assert one.text == alone.text and one.score == pytest.approx(alone.score, abs=TINY)
            assert one.attention == pytest.approx(alone.attention, abs=TINY)
            assert one.image.mode == "RGB" and one.image.tobytes() == alone.image.tobytes()
        else:
            assert str(one) == str(alone)


@pytest.mark.parametrize("batch_size, workers", [(1, 0), (3, 0), (1, 2), (3, 1), (4, 2)])
def test_stream_reads_no_further_than_its_window(captioner, pictures, batch_size, workers):
    read = []
    stream = captioner.stream((read.append(n) or pictures[n % 3] for n in range(10**9)), batch_size=batch_size, workers=workers)
    assert read == []
    for count in range(1, 8):
        next(stream)
        batches = -(-count // batch_size) * batch_size
        assert len(read) <= batches + (max(batch_size, 2 * workers) if workers else 0)
    stream.close()


@pytest.mark.parametrize("workers", [0, 2])
def test_error_of_the_iterable_comes_after_the_results_before_it(captioner, pictures, workers):
    def sources():
        yield from pictures
        raise ConnectionError("the bucket is gone")

    stream = captioner.stream(sources(), batch_size=8, workers=workers)
    assert [next(stream).text for _ in pictures] == [one.text for one in captioner.caption(pictures)]
    with pytest.raises(ConnectionError, match="bucket"):
        next(stream)


@pytest.mark.parametrize("workers, most", [(0, 6), (1, 11)])  # a batch and two, with a worker one more batch and one
def test_images_are_dropped_after_their_batch(captioner, pictures, monkeypatch, workers, most):
    alive: list[weakref.ref] = []

    def remember(image: Image.Image) -> Image.Image:
        alive[:] = [ref for ref in alive if ref() is not None] + [weakref.ref(image)]
        assert len(alive) <= most
        return image

    receive = image_workers._receive
    monkeypatch.setattr("hf_attncap.images.load_image", lambda source, **options: remember(load_image(source)))
    monkeypatch.setattr(image_workers, "_receive", lambda *arguments: remember(receive(*arguments)))
    stream = captioner.stream([pictures[n % 3] for n in range(24)], batch_size=4, workers=workers)
    assert sum(1 for _ in stream) == 24


def test_a_list_is_read_one_batch_at_a_time(captioner, pictures, monkeypatch):
    read, generate = [], type(captioner.engine).generate
    monkeypatch.setattr("hf_attncap.images.load_image", lambda source, **options: read.append(source) or load_image(source))
    captioned = []

    def count(self, images, **options):
        captioned.append((len(read), len(images)))
        return generate(self, images, **options)

    monkeypatch.setattr(type(captioner.engine), "generate", count)
    results = captioner.caption(pictures * 2, batch_size=2, attention=False)
    assert captioned == [(2, 2), (4, 2), (6, 2)]
    assert all(result.image is None and result.attention is None for result in results)
    with pytest.raises(ImageError, match=r"^images\[3\]: .*nowhere"):
        captioner.caption([*pictures, Path("nowhere"), pictures[0]], batch_size=2)
    assert captioned[3:] == [(8, 2)]


def test_few_images_wait_if_they_are_large(pictures, monkeypatch):
    received, receive = [], image_workers._receive
    monkeypatch.setattr(image_workers, "MAX_BATCH_PIXELS", 1)
    monkeypatch.setattr(image_workers, "_receive", lambda *arguments: received.append(0) or receive(*arguments))
    images = image_workers.read_images([pictures[0]] * 30, Reading(), workers=2, window=30)
    for taken in range(1, 6):
        next(images)
        time.sleep(0.2)
        assert len(received) <= taken + 3  # one that waits, and one more per worker
    assert sum(1 for _ in images) == 25


def test_workers_import_no_torch_and_end_with_the_stream(captioner, pictures, processes):
    stream = captioner.stream(pictures * 10, workers=2)
    assert not processes
    next(stream)
    assert len(processes) == 2
    for process in processes:
        libraries = Path(f"/proc/{process.pid}/maps").read_text()
        assert "numpy" in libraries and "PIL" in libraries and "torch" not in libraries
    stream.close()
    assert all(process.returncode == -signal.SIGKILL and process.stdin.closed and process.stdout.closed for process in processes)
    assert not [thread for thread in threading.enumerate() if thread.name.startswith("attncap-reader")]


def test_workers_end_after_an_error_and_after_the_last_image(captioner, pictures, processes):
    with pytest.raises(ImageError, match="empty"):
        list(captioner.stream([pictures[0], b""], workers=1))
    assert len(list(captioner.stream(pictures, workers=1))) == 3
    assert len(processes) == 2 and all(process.returncode for process in processes)


def test_a_worker_that_dies_is_the_error_of_its_image(captioner, pictures, processes):
    class Killer(http.server.BaseHTTPRequestHandler):
        def do_GET(self):
            os.kill(processes[-1].pid, signal.SIGSEGV)

    with http.server.HTTPServer(("127.0.0.1", 0), Killer) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        url = f"http://127.0.0.1:{server.server_port}/dog.jpg"
        sources = [pictures[0], url, pictures[1], url, pictures[2]]
        found = list(captioner.stream(sources, on_error="yield", workers=1, batch_size=2, allow_private_urls=True))
        server.shutdown()
    assert [found[place].text for place in (0, 2, 4)] == [one.text for one in captioner.caption(pictures)]
    for error in (found[1], found[3]):
        assert isinstance(error, ImageError)
        assert str(error).startswith(f"{url} cannot be read: the process that read it ended (SIGSEGV)")
    assert len(processes) == 3


def test_a_worker_that_cannot_start_is_an_error_of_its_own(captioner, pictures, monkeypatch):
    monkeypatch.setattr(sys, "executable", "/bin/false")
    with pytest.raises(RuntimeError, match="cannot start .*use `workers=0`"):
        next(captioner.stream(pictures, on_error="yield", workers=1))


def test_workers_keep_the_limits_of_pillow(captioner, pictures, monkeypatch):
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 100)
    here, elsewhere = (list(captioner.stream(pictures, on_error="yield", workers=workers)) for workers in (0, 1))
    assert "far too many pixels" in str(here[0]) and [str(one) for one in here] == [str(one) for one in elsewhere]


SCRIPT = """
import os, signal, sys, time
signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell's background jobs ignore it, and so do their children
from hf_attncap.image_workers import read_images
from hf_attncap.images import Reading
print("started", flush=True)
images = read_images(sys.argv[1:] * 1000, Reading(), workers=2, window=4)
print(next(images)[1].size, flush=True)
while "torch" not in sys.modules:
    time.sleep(0.01)
"""


def test_a_script_may_end_before_its_stream(pictures, tmp_path):
    script = tmp_path / "script.py"
    script.write_text(SCRIPT.partition("while")[0])  # the iterator is still open
    for _ in range(3):
        command = [sys.executable, str(script), *map(str, pictures)]
        ran = subprocess.run(command, capture_output=True, text=True, timeout=60)
        assert (ran.returncode, ran.stdout, ran.stderr) == (0, "started\n(160, 60)\n", "")


@pytest.mark.parametrize("how", ["file", "stdin"])
@pytest.mark.parametrize("ending", [signal.SIGINT, signal.SIGTERM, signal.SIGKILL])
def test_scripts_need_no_main_guard_and_leave_no_processes(pictures, tmp_path, how, ending):
    (tmp_path / "numpy.py").write_text("raise ImportError('a module of the current folder')")
    script = tmp_path / "scripts" / "script.py"
    script.parent.mkdir()
    script.write_text(SCRIPT)
    command = [sys.executable, str(script) if how == "file" else "-P", *([] if how == "file" else ["-"]), str(pictures[0])]
    with (
        script.open() as code,
        subprocess.Popen(
            command, cwd=tmp_path, stdin=code, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, start_new_session=True
        ) as process,
    ):
        assert process.stdout.readline() == "started\n" and process.stdout.readline() == "(160, 60)\n"
        if ending == signal.SIGINT:
            os.killpg(process.pid, ending)  # as Ctrl-C does
        else:
            process.send_signal(ending)
        try:
            output, errors = process.communicate(timeout=30)
        finally:
            process.kill()
    assert output == "" and ("KeyboardInterrupt" in errors if ending == signal.SIGINT else errors == "")
    for _ in range(200):
        try:
            os.killpg(process.pid, 0)
        except ProcessLookupError:
            return
        time.sleep(0.05)
    raise AssertionError("a worker lives on")
