"""Loads a captioner from a Hub that this process serves, and prints what was asked as JSON.

Arguments: the folder of a checkpoint, the folder for the cache, an image.
"""

import hashlib
import json
import os
import sys
import threading
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

FOLDER, CACHE, IMAGE = map(Path, sys.argv[1:])
NAME, REVISION, TOKEN, COMMIT = "me/captioner", "v1", "secret", "c" * 40
asked: list[dict] = []


class Hub(BaseHTTPRequestHandler):
    """The repository NAME with the revision REVISION, for those who have the token."""

    def do_HEAD(self) -> None:
        self.answer(False)

    def do_GET(self) -> None:
        self.answer(True)

    def answer(self, with_body: bool) -> None:
        path = self.path.partition("?")[0]
        if not path.startswith((f"/{NAME}/", f"/api/models/{NAME}")):
            return self.reply(404, b"", {}, with_body)
        is_file = path.startswith(f"/{NAME}/resolve/")
        rest = path.removeprefix(f"/{NAME}/resolve/" if is_file else f"/api/models/{NAME}").strip("/").split("/")
        revision, name = (rest[0], rest[1]) if is_file else ((rest[1:] or ["main"])[0], "")
        revision = REVISION if revision == COMMIT else revision
        asked.append({"revision": revision, "token": self.headers.get("Authorization"), "file": name})
        if self.headers.get("Authorization") != f"Bearer {TOKEN}":
            return self.reply(401, b"", {"X-Error-Code": "GatedRepo"}, with_body)
        if revision != REVISION:
            return self.reply(404, b"", {"X-Error-Code": "RevisionNotFound"}, with_body)
        if not is_file:
            files = [{"rfilename": file.name} for file in FOLDER.iterdir()]
            about = {"id": NAME, "sha": COMMIT, "siblings": files, "tags": [], "private": True}
            return self.reply(200, json.dumps([] if rest[0] == "tree" else about).encode(), {}, with_body)
        if not (FOLDER / name).is_file():
            return self.reply(404, b"", {"X-Error-Code": "EntryNotFound", "X-Repo-Commit": COMMIT}, with_body)
        body = (FOLDER / name).read_bytes()
        self.reply(200, body, {"ETag": hashlib.sha1(body).hexdigest(), "X-Repo-Commit": COMMIT}, with_body)

    def reply(self, status: int, body: bytes, headers: dict[str, str], with_body: bool) -> None:
        self.send_response(status)
        for name, value in {**headers, "Content-Length": str(len(body))}.items():
            self.send_header(name, value)
        self.end_headers()
        if with_body:
            self.wfile.write(body)

    def log_message(self, format: str, *args: object) -> None:
        pass


def main() -> None:
    with ThreadingHTTPServer(("127.0.0.1", 0), Hub) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        os.environ |= {
            "HF_ENDPOINT": f"http://127.0.0.1:{server.server_port}",
            "HF_HUB_OFFLINE": "0",
            "HF_HOME": str(CACHE / "home"),
        }
        from hf_attncap import Captioner

        def text(**options: bool) -> str:
            return Captioner.from_pretrained(NAME, revision=REVISION, token=TOKEN, cache_dir=CACHE, **options).caption(IMAGE).text

        found: dict = {"texts": [text()], "files": [one["file"] for one in asked if one["file"]]}
        found["revisions"] = sorted({one["revision"] for one in asked})
        # The library also lists all files, without a token, to look for a SentencePiece model.
        found["tokens"] = sorted({str(one["token"]) for one in asked if one["file"]})
        before = len(asked)
        found["texts"].append(text(local_files_only=True))
        found["requests_afterwards"] = len(asked) - before
        try:
            Captioner.from_pretrained(NAME, revision="v2", token=TOKEN, cache_dir=CACHE)
        except OSError as error:
            found["other_revision"] = str(error)
        server.shutdown()
    started = time.monotonic()
    found["texts"].append(text())
    found["seconds_without_server"] = time.monotonic() - started
    print(json.dumps(found))


if __name__ == "__main__":
    main()
