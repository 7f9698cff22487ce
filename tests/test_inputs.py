"""Images are found in folders, patterns and lists: by content, in order, without loops, with a reason for what cannot be read."""

import io
import os
import subprocess
import sys
from pathlib import Path

import pytest
from PIL import Image

from hf_attncap import inputs
from hf_attncap.inputs import Input, base_folder, count_inputs, find_inputs, is_image

FORMATS = ["JPEG", "PNG", "GIF", "BMP", "TIFF", "WEBP", "PPM", "JPEG2000", "DDS", "QOI"]
linux = pytest.mark.skipif(sys.platform != "linux", reason="file names of any bytes, links and pipes")


def save(path: Path, format: str = "PNG") -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", (8, 6), "teal").save(path, format)
    return path


def names(*paths, files_from=None) -> list[str]:
    """What is found, relative to the current folder; errors with a mark."""
    found = find_inputs([os.fspath(path) for path in paths], files_from)
    return [f"! {item.error}" if item.error else item.name for item in found]


@pytest.fixture
def here(tmp_path, monkeypatch) -> Path:
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.mark.parametrize("format", FORMATS)
def test_images_are_recognised_without_an_ending(format, tmp_path):
    if format not in Image.registered_extensions().values():
        pytest.skip(f"Pillow without {format}")
    assert is_image(str(save(tmp_path / "photo", format)))


@pytest.mark.parametrize(
    "content", [b"", b"BMW cars", b"P1 is the first", b"%PDF-1.7", b"<svg/>", b"RIFF\0\0\0\0WAVEfmt ", b"\0\0\0 ftypisom\0\0\2\0"]
)
def test_other_files_are_no_images(content, tmp_path):
    (tmp_path / "notes.txt").write_bytes(content)
    assert not is_image(str(tmp_path / "notes.txt"))
    (tmp_path / "photo.JPG").write_bytes(content)
    assert is_image(str(tmp_path / "photo.JPG")), "a broken image is reported and not skipped"


def test_folders_are_read_in_order_without_hidden_and_system_files(here):
    for name in ("b.png", "a/z.png", "a/deep/er/x", "c/y.jpg", "a.png"):
        save(here / "in" / name)
    for name in (
        ".hidden.png",
        ".git/a.png",
        "Thumbs.db",
        "__MACOSX/a.png",
        "c/@eaDir/a.png",
        ".DS_Store",
        "._a.png",
        "desktop.ini",
    ):
        save(here / "in" / name)
    (here / "in" / "notes.txt").write_text("no image")
    found = ["in/a/deep/er/x", "in/a/z.png", "in/a.png", "in/b.png", "in/c/y.jpg"]
    assert names("in") == found
    assert names("in/") == [name.replace("in/", "in/") for name in found]
    save(here / ".secret" / "a.png")
    assert names(".secret") == [".secret/a.png"], "a hidden folder that is named is read"
    assert count_inputs(["in"]) == 5 and count_inputs(["in", "-"]) is None and count_inputs([], "-") is None


def test_what_has_no_image_is_an_error(here):
    (here / "empty").mkdir()
    assert names("empty", "*.tga") == [
        "! empty is a folder without images; check the path",
        "! *.tga matches no image; check the pattern",
    ]
    assert names("missing.jpg", "https://x.org/a?b=[1]") == ["missing.jpg", "https://x.org/a?b=[1]"], "reported when they are read"


@linux
def test_loops_of_links_end_and_pipes_are_not_opened(here):
    save(here / "in" / "a" / "x.png")
    (here / "in" / "a" / "up").symlink_to(here / "in")
    (here / "in" / "b").symlink_to(here / "in" / "a")
    (here / "in" / "self.png").symlink_to("self.png")
    (here / "in" / "gone.png").symlink_to("nowhere.png")
    (here / "in" / "gone").symlink_to("nowhere")
    os.mkfifo(here / "in" / "pipe.png")
    os.mkfifo(here / "in" / "pipe")
    assert names("in") == ["in/a/x.png", "in/gone.png", "in/self.png"]
    assert names("in/**/*.png") == ["in/gone.png", "in/self.png", "in/a/x.png"]


@linux
def test_links_that_multiply_folders_do_not_multiply_images(here):
    for number in range(30):
        (here / f"d{number}").mkdir()
        for name in ("x", "y"):
            (here / f"d{number}" / name).symlink_to(here / f"d{number + 1}")
    save(here / "d30" / "a.png")
    assert names("d0") == ["/".join(["d0", *["x"] * 30, "a.png"])]
    assert names("d0/**/*.png") == ["/".join(["d0", *["x"] * 30, "a.png"])]


def test_unreadable_folders_are_errors_and_the_rest_is_read(here, monkeypatch):
    for name in ("in/a/x.png", "in/b/x.png", "in/c/x.png"):
        save(here / name)
    scan = os.scandir

    def refuse(path):
        if Path(path).name == "b":
            raise PermissionError(13, "Permission denied")
        return scan(path)

    monkeypatch.setattr(os, "scandir", refuse)
    error = "! in/b cannot be listed (Permission denied); check its permissions"
    assert names("in") == ["in/a/x.png", error, "in/c/x.png"]
    assert names("in/*/x.png") == ["in/a/x.png", "in/b/x.png", "in/c/x.png"], "a file there can still be read"
    assert names("in/*/*.png") == ["in/a/x.png", error, "in/c/x.png"]


@linux
def test_folders_deeper_than_pythons_recursion(here):
    for name in ["in", *["d"] * 1500]:
        os.mkdir(name)
        os.chdir(name)
    save(Path("a.png"))
    os.chdir(here)
    assert names("in") == ["/".join(["in", *["d"] * 1500, "a.png"])]
    assert len(names("in/**/*.png")) == 1
    subprocess.run(["rm", "-r", "in"], check=True)  # pytest's own cleanup is recursive


def test_patterns(here):
    for name in ("p/1.png", "p/2.jpg", "p/q/3.png", "p/q/r/4.png", "p/.h/5.png", "o/6.png"):
        save(here / name)
    (here / "p" / "notes.txt").write_text("no image")
    assert names("p/*.png") == ["p/1.png"]
    assert names("p/**/*.png") == ["p/1.png", "p/q/3.png", "p/q/r/4.png"]
    assert names("p/**/**/*.png") == names("p/**/*.png")
    assert names("p/**/*") == ["p/1.png", "p/2.jpg", "p/q/3.png", "p/q/r/4.png"], "each image once"
    assert names("**/[36].png") == ["o/6.png", "p/q/3.png"]
    assert names("?/*.png") == ["o/6.png", "p/1.png"]
    assert names("[op]") == ["o/6.png", "p/1.png", "p/2.jpg", "p/q/3.png", "p/q/r/4.png"], "folders that match are read"
    assert names("p/**") == ["p/1.png", "p/2.jpg", "p/q/3.png", "p/q/r/4.png"]
    assert names(here / "p" / "*.png") == [str(here / "p" / "1.png")]
    assert names("./p/../p/*.png") == ["./p/../p/1.png"]


def test_names_with_brackets_win_over_patterns(here):
    for name in ("[set] 1/a.png", "s 1/b.png", "x[1].png", "x1.png"):
        save(here / name)
    assert names("x[1].png") == ["x[1].png"]
    assert names("[set] 1") == ["[set] 1/a.png"]
    assert names("[set] 1/*.png") == ["[set] 1/a.png"]
    assert names("x[12].png") == ["x1.png"]


@linux
def test_lists_of_names(here, monkeypatch):
    for name in ("a.png", "b b.png", "c\nd.png", "-e.png", "[f].png", "g/h.png"):
        save(here / name)
    odd = os.fsdecode(b"caf\xe9.png")
    save(here / odd)
    Path("lines").write_bytes(b"\xef\xbb\xbfa.png\r\n\nb b.png\n-e.png\n[f].png\ng\ncaf\xe9.png")
    assert names(files_from="lines") == ["a.png", "b b.png", "-e.png", "[f].png", "g/h.png", odd]
    Path("zero").write_bytes(b"a.png\0c\nd.png\0\0g\0")
    assert names("-e.png", files_from="zero") == ["-e.png", "a.png", "c\nd.png", "g/h.png"]
    Path("nothing").touch()
    assert names(files_from="nothing") == []
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(b"a.png\n")))
    assert names(files_from="-") == ["a.png"]
    os.mkfifo("fifo")
    assert count_inputs([], "zero") == 3 and count_inputs([], "fifo") is None, "a pipe is not read to count its names"
    with pytest.raises(OSError, match="missing cannot be read .*check --files-from"):
        names(files_from="missing")


@pytest.mark.parametrize("separator", [b"\n", b"\0"])
def test_long_lists_are_read_in_pieces(separator, tmp_path, monkeypatch):
    monkeypatch.setattr(inputs, "LIST_HEADER", 16)
    lines = [f"{number:0{1 + number % 9}}.png" for number in range(1000)]
    for end in (b"", separator):
        (tmp_path / "list").write_bytes(separator.join(line.encode() for line in lines) + end)
        assert names(files_from=str(tmp_path / "list")) == lines


def test_image_on_stdin(monkeypatch):
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(b"an image")))
    assert list(find_inputs(["-"])) == [Input("-", b"an image")]
    monkeypatch.setattr(inputs, "MAX_BYTES", 4)
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(b"an image")))
    assert names("-") == ["! the image on stdin is larger than 4 bytes; save it and give its path"]


def test_folders_are_read_only_as_far_as_needed(here, monkeypatch):
    for name in ("a/1.png", "b/2.png"):
        save(here / "in" / name)
    read, scan = [], os.scandir
    monkeypatch.setattr(os, "scandir", lambda path: read.append(os.path.basename(path)) or scan(path))
    found = find_inputs(["in"])
    assert next(found).name == "in/a/1.png" and read == ["in", "a"]


def test_stamps_change_with_the_content(here):
    path = save(here / "a.png")
    stamps = [Input("a.png", "a.png").stamp]
    os.utime(path, ns=(1, 1))
    stamps += [Input("a.png", "a.png").stamp, Input("-", b"x").stamp, Input("-", b"y").stamp]
    assert len({str(stamp) for stamp in stamps}) == 4
    assert Input("https://x.org/a.png", "https://x.org/a.png").stamp is None


@pytest.mark.parametrize(
    ("paths", "folder"),
    [(["in"], "in"), (["in/a.png", "x"], "in"), (["in/*/b.png"], "in"), (["*.png"], "."), (["-"], "."), (["a.png"], ".")],
)
def test_base_folder(paths, folder, here):
    (here / "in").mkdir()
    assert base_folder(paths) == folder
    assert base_folder([], "in/list") == "in" and base_folder([], "-") == "."
