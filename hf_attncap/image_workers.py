"""Reads images in order, optionally in worker processes: `read_images`.

A worker is a new Python interpreter with pipes, not a process of `multiprocessing`. Such a process either imports the user's main
module again, which runs a script without `if __name__ == "__main__"` twice, or it is forked, which is unsafe beside the threads of
torch. A worker imports numpy and Pillow but not torch. It ends when its input ends, so it also ends when this process is killed.
"""

import atexit
import contextlib
import os
import pickle
import queue
import signal
import subprocess
import sys
import threading
from collections import deque
from collections.abc import Generator, Iterable
from concurrent.futures import Future
from pathlib import Path
from typing import Any, BinaryIO, cast

from PIL import Image, ImageFile

from .images import MAX_BATCH_PIXELS, ImageError, Reading, describe_error

MAX_WORKERS = 256
FILES = (str, os.PathLike, bytes, bytearray, memoryview)  # sources that take time to read; others are in memory
START = "import pickle, sys; sys.path[:] = pickle.load(sys.stdin.buffer); from hf_attncap.image_workers import serve; serve()"
Outcome = tuple[str, "Image.Image | ImageError"]  # the name of an image, and the image or why it cannot be read


def read_images(sources: Iterable[Any], reading: Reading, workers: int = 0, window: int = 1) -> Generator[Outcome, None, None]:
    """Yields the name of each image, and the image or an `ImageError`, in order.

    Args:
        sources: of the kinds that `load_image` reads.
        reading: how to read them.
        workers: processes that read files, URLs and bytes. They end with the generator. 0 reads in this process.
        window: with `workers`, how many images are read ahead from `sources`; at least two per worker. Fewer are decoded ahead if
            they have more than `MAX_BATCH_PIXELS` pixels in total.

    If `sources` raises an error, it is raised after the earlier images. If a worker dies, its image is an `ImageError`.
    """
    if not workers:
        for number, source in enumerate(sources):
            yield reading.read(number, source)
        return
    window = max(window, 2 * workers)
    ahead: deque[tuple[int, Any, Future[Outcome] | None]] = deque()
    failure, numbered = None, enumerate(sources)
    readers = _Readers(workers, reading)
    try:
        while True:
            while failure is None and len(ahead) < window:
                try:
                    number, source = next(numbered)
                except Exception as error:
                    failure = error
                    continue
                if isinstance(source, FILES):
                    ahead.append((number, None, readers.submit(number, source)))
                else:
                    ahead.append((number, source, None))
            if not ahead:
                break
            number, source, future = ahead.popleft()
            yield reading.read(number, source) if future is None else readers.take(number, future)
    finally:
        readers.close()
    if not isinstance(failure, StopIteration):
        raise cast(Exception, failure)


class _Readers:
    """Daemon threads with one worker process each. A waiting thread must not keep the interpreter from ending."""

    def __init__(self, count: int, reading: Reading):
        self._reading = reading
        self._tasks: queue.SimpleQueue[tuple[int, Any, Future[Outcome]] | None] = queue.SimpleQueue()
        self._changed = threading.Condition()  # guards the following
        self._wanted = -1  # the number of the image that the consumer waits for
        self._pixels = 0  # in images that the consumer has not taken yet
        self._workers: set[_Worker] = set()
        self._closed = False
        self._threads = [threading.Thread(target=self._run, daemon=True, name=f"attncap-reader-{n}") for n in range(count)]
        for thread in self._threads:
            thread.start()
        atexit.register(
            self.close
        )  # for iterators that are not used up; while the interpreter ends, threads can no longer be joined

    def submit(self, number: int, source: Any) -> Future[Outcome]:
        """Let a worker read image `number`; numbers rise."""
        future: Future[Outcome] = Future()
        self._tasks.put((number, _plain(source), future))
        return future

    def take(self, number: int, future: Future[Outcome]) -> Outcome:
        """Wait for image `number`, which must be the first one that was not taken."""
        with self._changed:
            self._wanted = number
            self._changed.notify_all()
        outcome = future.result()
        with self._changed:
            self._pixels -= _pixels(outcome)
            self._changed.notify_all()
        return outcome

    def close(self) -> None:
        """End all processes and threads; a second call changes nothing."""
        atexit.unregister(self.close)
        with self._changed:
            self._closed = True
            self._changed.notify_all()
            for worker in self._workers:
                worker.kill()
        for _ in self._threads:
            self._tasks.put(None)
        for thread in self._threads:
            thread.join()
        while self._workers:
            self._workers.pop().close()

    def _run(self) -> None:
        worker = None
        while (task := self._tasks.get()) is not None:
            number, source, future = task
            self._wait_for_room(number)
            try:
                worker = worker or self._start()
                outcome, alive = worker.read(number, source)
            except Exception as error:
                future.set_exception(error)
                continue
            if not alive:
                with self._changed:
                    self._workers.remove(worker)
                worker = None
            with self._changed:
                self._pixels += _pixels(outcome)
            future.set_result(outcome)

    def _wait_for_room(self, number: int) -> None:
        with self._changed:
            # Tasks start in order, so the thread that has the wanted image is never behind one that waits here.
            self._changed.wait_for(lambda: self._closed or number <= self._wanted or self._pixels <= MAX_BATCH_PIXELS)

    def _start(self) -> "_Worker":
        with self._changed:
            if self._closed:
                raise RuntimeError("The readers are closed.")
            worker = _Worker(self._reading)
            self._workers.add(worker)
        return worker


class _Worker:
    """A process that runs `serve`."""

    def __init__(self, reading: Reading):
        command = [sys.executable, "-W", "ignore", "-P", "-c", START]
        self._process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE)
        self._ready = False
        settings = Image.MAX_IMAGE_PIXELS, ImageFile.LOAD_TRUNCATED_IMAGES, reading
        self._greeting = pickle.dumps(sys.path) + pickle.dumps(settings)

    def read(self, number: int, source: Any) -> tuple[Outcome, bool]:
        """Image `number`, and whether the process lives on; a RuntimeError if it cannot start."""
        name = source if isinstance(source, str) else os.fsdecode(source) if isinstance(source, Path) else f"images[{number}]"
        requests, replies = cast(BinaryIO, self._process.stdin), cast(BinaryIO, self._process.stdout)
        try:
            if not self._ready:
                requests.write(self._greeting)
                requests.flush()
                pickle.load(replies)
                self._ready = True
            pickle.dump((number, source), requests)
            requests.flush()
            name, content = pickle.load(replies)
            if isinstance(content, str):
                return (name, ImageError(content)), True
            return (name, _receive(content, replies)), True
        except (EOFError, OSError, pickle.UnpicklingError) as error:
            code = self.close()
            reason = signal.Signals(-code).name if code < 0 else f"exit code {code}"
            if not self._ready:
                raise RuntimeError(f"A process to read images cannot start ({reason}): use `workers=0`.") from error
            problem = f"the process that read it ended ({reason}); the file may crash a decoder, or memory ran out"
        except Exception as error:  # of memory
            self.close()
            problem = describe_error(error)
        return (name, ImageError(f"{name} cannot be read: {problem}")), False

    def kill(self) -> None:
        """End the process; a `read` in another thread returns."""
        self._process.kill()

    def close(self) -> int:
        """End the process, close the pipes and return the exit code."""
        self.kill()
        with contextlib.suppress(BrokenPipeError), self._process:  # what is left of a request cannot be written
            pass
        return self._process.wait()


def _plain(source: Any) -> Any:
    """A source as a type that can be pickled and read in a process without the user's modules."""
    if isinstance(source, str):
        return str.__str__(source)
    return Path(os.fsdecode(source)) if isinstance(source, os.PathLike) else bytes(source)


def _pixels(outcome: Outcome) -> int:
    image = outcome[1]
    return image.width * image.height if isinstance(image, Image.Image) else 0


def _receive(size: tuple[int, int], replies: BinaryIO) -> Image.Image:
    data = bytearray(3 * size[0] * size[1])
    if cast(Any, replies).readinto(data) < len(data):
        raise EOFError
    return Image.frombuffer("RGB", size, cast(bytes, data), "raw", "RGB", 0, 1)


def serve() -> None:
    """The worker: reads images from paths, URLs and bytes on stdin and writes them to stdout, until stdin ends."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C goes to all processes of a terminal; the first one decides
    requests, replies = sys.stdin.buffer, os.fdopen(os.dup(1), "wb")
    os.dup2(2, 1)  # what libraries print must not get between the replies
    Image.MAX_IMAGE_PIXELS, ImageFile.LOAD_TRUNCATED_IMAGES, reading = pickle.load(requests)
    try:
        pickle.dump("ready", replies)
        replies.flush()
        while True:
            number, source = pickle.load(requests)
            name, image = reading.read(number, source)
            content = str(image) if isinstance(image, ImageError) else image.size
            pickle.dump((name, content), replies)
            if isinstance(image, Image.Image):
                replies.write(image.tobytes())
            replies.flush()
    except (EOFError, BrokenPipeError):
        os._exit(0)  # at a normal exit, Python would flush a closed pipe
