"""Headless Chromium for tests of pages: what a page prints, which addresses it asks for, and a server for its files.

Tests use the fixtures `chromium` and `open_page` of conftest.py. They skip where Playwright or Chromium is missing.
"""

import contextlib
import functools
import http.server
import os
import shutil
import threading
import urllib.parse
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest

TIMEOUT = 60_000  # milliseconds for loading and for each wait of a test; a busy machine is slow


@dataclass
class WatchedPage:
    """A page of Chromium, and what happened on it since it was opened.

    Attributes:
        page: Playwright's page, with `goto`, `locator`, `set_input_files`, `screenshot` and the like.
        console_errors: the errors and warnings in the console, which include failed requests and refusals by the page's
            Content-Security-Policy.
        page_errors: the errors that no code of the page has caught.
        requests: the address of each request, in order, also those of workers.
        failed: the address and status of each answer that is an error.
    """

    page: Any
    console_errors: list[str] = field(default_factory=list)
    page_errors: list[str] = field(default_factory=list)
    requests: list[str] = field(default_factory=list)
    failed: list[str] = field(default_factory=list)

    def hosts(self) -> set[str]:
        """The hosts, with their ports, that the page asked; not those of data: and blob: addresses."""
        found = (urllib.parse.urlsplit(address) for address in self.requests)
        return {parts.netloc for parts in found if parts.scheme not in ("data", "blob", "about")}

    def assert_no_errors(self) -> None:
        """Fails if the page printed an error or a warning, raised an error, or if a file was missing."""
        assert not [*self.console_errors, *self.page_errors, *self.failed]


def watch(page: Any) -> WatchedPage:
    """Collects what happens on a page of Playwright from now on."""
    page.set_default_timeout(TIMEOUT)
    found = WatchedPage(page)

    def on_console(message: Any) -> None:
        if message.type in ("error", "warning"):
            found.console_errors.append(message.text)

    def on_response(response: Any) -> None:
        if response.status >= 400:
            found.failed.append(f"{response.status} {response.url}")

    page.on("console", on_console)
    page.on("pageerror", lambda error: found.page_errors.append(str(error)))
    page.context.on("request", lambda request: found.requests.append(request.url))  # of the page and its workers
    page.context.on("response", on_response)
    return found


@contextlib.contextmanager
def start_chromium() -> Iterator[Any]:
    """Yields Playwright's browser, or skips the test where Playwright or Chromium is missing."""
    sync_api = pytest.importorskip("playwright.sync_api", reason='pip install "hf_attncap[browser]"')
    executable = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
    if executable is None:
        pytest.skip("Chromium is not installed")
    sandbox = [] if os.geteuid() else ["--no-sandbox"]  # Chromium does not run as root otherwise
    with sync_api.sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=executable, args=sandbox)
        try:
            yield browser
        finally:
            browser.close()


@contextlib.contextmanager
def open_pages(browser: Any) -> Iterator[Callable[..., WatchedPage]]:
    """Yields `open_page(address, **options)`: opens an address in a new, empty profile.

    `options` are those of Playwright's `browser.new_context`, such as `viewport={"width": 360, "height": 640}` or
    `color_scheme="dark"`.
    """
    with contextlib.ExitStack() as contexts:

        def open_page(address: str, **options: Any) -> WatchedPage:
            context = browser.new_context(**options)
            contexts.callback(context.close)
            found = watch(context.new_page())
            found.page.goto(address)
            return found

        yield open_page


@contextlib.contextmanager
def serve(folder: Path, headers: dict[str, str] | None = None) -> Iterator[str]:
    """Serves a folder on this machine, with further headers in each answer; yields its address, which ends with a slash."""

    class Handler(http.server.SimpleHTTPRequestHandler):
        extensions_map = {**http.server.SimpleHTTPRequestHandler.extensions_map, ".mjs": "text/javascript"}

        def end_headers(self) -> None:
            for name, value in (headers or {}).items():
                self.send_header(name, value)
            super().end_headers()

        def log_message(self, format: str, *args: Any) -> None:
            """Prints nothing."""

    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), functools.partial(Handler, directory=str(folder)))
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    try:
        yield f"http://127.0.0.1:{server.server_port}/"
    finally:
        server.shutdown()
        server.server_close()
        thread.join()
