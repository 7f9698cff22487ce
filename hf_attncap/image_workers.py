"""Reads images one after the other, on request in worker processes: `read_images`.

A worker is a new Python interpreter with pipes, not a process of `multiprocessing`. Such a process either imports the user's main
module again, which runs a script without `if __name__ == "__main__"` twice, or it is forked, which is unsafe beside the threads of
torch. A worker imports numpy and Pillow but not torch. It ends when its input ends, so also when this process is killed.
"""

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

from .images import MAX_BATCH_PIXELS, ImageError, describe_error, read_image

FILES = (str, os.PathLike, bytes, bytearray, memoryview)  # sources that take time to read; others are in memory
START = "import pickle, sys; sys.path[:] = pickle.load(sys.stdin.buffer); from hf_attncap.image_workers import serve; serve()"
Outcome = tuple[str, "Image.Image | ImageError"]  # the name of an image, and the image or why it cannot be read


def read_images(
    sources: Iterable[Any], allow_private_urls: bool, workers: int = 0, window: int = 1
) -> Generator[Outcome, None, None]:
    """Yields the name of each image, and the image or an `ImageError`, in order.

    Args:
        sources: of the kinds that `load_image` reads.
        allow_private_urls: as for `load_image`.
        workers: processes that read files, URLs and bytes. They end with the generator. 0 reads in this process.
        window: with `workers`, how many images beyond the one in use are read from `sources`; at least two per worker. Fewer are
            decoded if they have more than `MAX_BATCH_PIXELS` pixels together.

    If `sources` raises an error, that is raised after the images before. A worker that dies is the `ImageError` of its image.
    """
    if not workers:
        for number, source in enumerate(sources):
            yield read_image(number, source, allow_private_urls)
        return
    window = max(window, 2 * workers)
    ahead: deque[tuple[int, Any, Future[Outcome] | None]] = deque()
    failure, numbered = None, enumerate(sources)
    readers = _Readers(workers, allow_private_urls)
    try:
        while True:
            while failure is None and len(ahead) < window:
                try:
                    number, source = next(numbered)
                except Exception as error:
                    failure = error
                else:
                    ahead.append((number, source, readers.submit(number, source) if isinstance(source, FILES) else None))
            if not ahead:
                break
            number, source, future = ahead.popleft()
            yield read_image(number, source, allow_private_urls) if future is None else readers.take(number, future)
    finally:
        readers.close()
    if not isinstance(failure, StopIteration):
        raise cast(Exception, failure)


class _Readers:
    """Threads with a worker process each. Daemon threads: those that wait for room must not keep the interpreter from ending."""

    def __init__(self, count: int, allow_private_urls: bool):
        self._allow_private_urls = allow_private_urls
        self._tasks: queue.SimpleQueue[tuple[int, Any, Future[Outcome]] | None] = queue.SimpleQueue()
        self._changed = threading.Condition()  # guards the following
        self._wanted = -1  # the number of the image that the consumer waits for
        self._pixels = 0  # in images that the consumer has not taken yet
        self._workers: set[_Worker] = set()
        self._closed = False
        self._threads = [threading.Thread(target=self._run, daemon=True, name=f"attncap-reader-{n}") for n in range(count)]
        for thread in self._threads:
            thread.start()

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
        """End all processes and threads."""
        with self._changed:
            self._closed = True
            self._changed.notify_all()
            for worker in self._workers:
                worker.end()
        for _ in self._threads:
            self._tasks.put(None)
        for thread in self._threads:
            thread.join()

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
            worker = _Worker(self._allow_private_urls)
            self._workers.add(worker)
        return worker


class _Worker:
    """A process that runs `serve`."""

    def __init__(self, allow_private_urls: bool):
        command = [sys.executable, "-W", "ignore", "-P", "-c", START]
        self._process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE)
        self._ready = False
        self._greeting = pickle.dumps(sys.path) + pickle.dumps(
            (Image.MAX_IMAGE_PIXELS, ImageFile.LOAD_TRUNCATED_IMAGES, allow_private_urls)
        )

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
            reason = self._end_of_process()
            if not self._ready:
                raise RuntimeError(f"A process to read images cannot start ({reason}): use `workers=0`.") from error
            problem = f"the process that read it ended ({reason}); the file may crash a decoder, or memory ran out"
        except Exception as error:  # of memory
            self.end()
            problem = describe_error(error)
        return (name, ImageError(f"{name} cannot be read: {problem}")), False

    def end(self) -> None:
        self._process.kill()

    def _end_of_process(self) -> str:
        self._process.kill()  # it may have closed its output only
        code = self._process.wait()
        return signal.Signals(-code).name if code < 0 else f"exit code {code}"


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
    return Image.frombuffer("RGB", size, data, "raw", "RGB", 0, 1)


def serve() -> None:
    """The worker: reads images from paths, URLs and bytes on stdin and writes them to stdout, until stdin ends."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C goes to all processes of a terminal; the first one decides
    requests, replies = sys.stdin.buffer, os.fdopen(os.dup(1), "wb")
    os.dup2(2, 1)  # what libraries print must not get between the replies
    Image.MAX_IMAGE_PIXELS, ImageFile.LOAD_TRUNCATED_IMAGES, allow_private_urls = pickle.load(requests)
    try:
        pickle.dump("ready", replies)
        replies.flush()
        while True:
            number, source = pickle.load(requests)
            name, image = read_image(number, source, allow_private_urls)
            content = str(image) if isinstance(image, ImageError) else image.size
            pickle.dump((name, content), replies)
            if isinstance(image, Image.Image):
                replies.write(image.tobytes())
            replies.flush()
    except (EOFError, BrokenPipeError):
        os._exit(0)  # at a normal exit, Python would flush a closed pipe
