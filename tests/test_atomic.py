"""Files and folders appear complete or not at all, and no other file is replaced."""

import errno
import os
import stat
import subprocess
import sys
from pathlib import Path

import pytest
from hf_attncap.training.checkpoints.average import average_checkpoints
from hf_attncap.training.checkpoints.pack import pack

from hf_attncap.atomic import atomic_files, atomic_folder, atomic_write, replace_folder

ROOT = Path(__file__).parent.parent


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


@pytest.mark.parametrize(("mode", "content"), [("w", "a dög"), ("wb", b"\0\xff")])
def test_a_file_appears_when_it_is_complete(tmp_path, mode, content):
    path = tmp_path / ("n" * 250 + ".json")
    with atomic_write(path, mode) as file:
        file.write(content)
        assert not path.exists()
    assert path.read_bytes() == (content.encode() if isinstance(content, str) else content)
    assert names(tmp_path) == [path.name]
    (tmp_path / "plain").touch()
    assert stat.S_IMODE(path.stat().st_mode) == stat.S_IMODE((tmp_path / "plain").stat().st_mode)


@pytest.mark.parametrize("failure", [OSError(errno.ENOSPC, "No space left on device"), ValueError("wrong"), KeyboardInterrupt()])
def test_an_error_leaves_the_file_unchanged_and_no_other_file(tmp_path, failure):
    path = tmp_path / "scores.json"
    path.write_text("before")
    with pytest.raises(type(failure)) as caught, atomic_write(path) as file:
        file.write("half")
        raise failure
    assert path.read_text() == "before" and names(tmp_path) == ["scores.json"]
    if isinstance(failure, OSError):
        assert str(caught.value) == f"{path} cannot be written (No space left on device)"


def test_folders_that_cannot_hold_the_file_are_named(tmp_path):
    missing = r"nowhere/a\.json cannot be written \(there is no folder .*nowhere\)"
    with pytest.raises(FileNotFoundError, match=missing), atomic_write(tmp_path / "nowhere" / "a.json") as file:
        file.write("a")
    (tmp_path / "taken").mkdir()
    with pytest.raises(IsADirectoryError, match="taken cannot be written"), atomic_write(tmp_path / "taken") as file:
        file.write("a")
    assert names(tmp_path) == ["taken"]


def test_a_link_stays_a_link_and_a_pipe_a_pipe(tmp_path):
    link = tmp_path / "link"
    link.symlink_to(tmp_path / "real")
    with atomic_write(link) as file:
        file.write("a")
    assert link.is_symlink() and (tmp_path / "real").read_text() == "a"
    with atomic_write(os.devnull) as file:
        file.write("a")
    assert not Path(os.devnull).is_file()
    write = "from hf_attncap.atomic import atomic_write\nwith atomic_write('/dev/stdout') as file: file.write('a')"
    if Path("/dev/stdout").exists():
        assert subprocess.run([sys.executable, "-c", write], cwd=ROOT, capture_output=True, check=True).stdout == b"a"


def test_open_files_are_not_renamed_and_read_only_files_not_flushed(tmp_path, monkeypatch):
    """Windows flushes only files that are open for writing, and renames only closed ones."""
    fcntl = pytest.importorskip("fcntl")
    flushed, replace = [], os.replace

    def fsync(descriptor: int) -> None:
        assert fcntl.fcntl(descriptor, fcntl.F_GETFL) & os.O_ACCMODE != os.O_RDONLY
        flushed.append(descriptor)

    def closed_replace(source, target, **kwargs):
        assert not [
            fd for fd in flushed if Path(f"/proc/self/fd/{fd}").exists() and os.path.sameopenfile(fd, fd) and is_at(fd, source)
        ]
        assert not os.path.isdir(target)
        replace(source, target, **kwargs)

    def is_at(descriptor: int, path: Path) -> bool:
        return os.path.realpath(f"/proc/self/fd/{descriptor}") == os.path.realpath(path)

    monkeypatch.setattr(os, "fsync", fsync)
    monkeypatch.setattr(os, "replace", closed_replace)
    with atomic_write(tmp_path / "a") as file:
        file.write("a")
    (tmp_path / "empty").mkdir()
    with atomic_folder(tmp_path / "empty") as folder:
        (folder / "b").write_text("b")
    with atomic_files(tmp_path) as folder:
        (folder / "c").write_text("c")
    assert len(flushed) == 3 and (tmp_path / "empty" / "b").read_text() == "b" and (tmp_path / "c").read_text() == "c"


@pytest.mark.parametrize("there", [False, True])
def test_a_folder_appears_when_it_is_complete(tmp_path, there):
    target = tmp_path / "runs" / "mine"
    if there:
        target.mkdir(parents=True)
    with pytest.raises(ValueError, match="wrong"), atomic_folder(target) as folder:
        (folder / "half").touch()
        raise ValueError("wrong")
    assert not there or names(target) == []
    with atomic_folder(target) as folder:
        (folder / "whole").touch()
    assert names(target) == ["whole"] and names(target.parent) == ["mine"]
    (tmp_path / "plain").mkdir()
    assert target.stat().st_mode == (tmp_path / "plain").stat().st_mode
    with pytest.raises(FileExistsError, match="mine' exists and is not an empty folder"), atomic_folder(target):
        pytest.fail("occupied")


def test_files_take_their_places_together_or_not_at_all(tmp_path):
    (tmp_path / "a").write_text("before")
    with pytest.raises(ValueError, match="wrong"), atomic_files(tmp_path) as folder:
        (folder / "a").write_text("half")
        raise ValueError("wrong")
    assert (tmp_path / "a").read_text() == "before" and names(tmp_path) == ["a"]
    with atomic_files(tmp_path) as folder:
        (folder / "a").write_text("after")
        (folder / "sub").mkdir()
        (folder / "sub" / "b").write_text("b")
        assert (tmp_path / "a").read_text() == "before"
    assert (tmp_path / "a").read_text() == "after" and names(tmp_path) == ["a", "sub"]
    assert names(tmp_path / "sub") == ["b"]


def test_a_complete_folder_replaces_another_one(tmp_path):
    for name in ("new", "old"):
        (tmp_path / name).mkdir()
        (tmp_path / name / name).touch()
    replace_folder(tmp_path / "new", tmp_path / "old")
    assert names(tmp_path / "old") == ["new"]


def test_packing_and_averaging_replace_nothing(tiny_checkpoint, tmp_path):
    taken = tmp_path / "taken"
    taken.mkdir()
    (taken / "model.safetensors").write_text("years of work")
    before = {path.name: path.read_bytes() for path in tiny_checkpoint.iterdir()}
    for out in (tiny_checkpoint, taken, taken / "model.safetensors"):
        for write in (lambda out: pack(tiny_checkpoint, out), lambda out: average_checkpoints([tiny_checkpoint] * 2, out)):
            with pytest.raises(FileExistsError, match="exists and is not an empty folder"):
                write(out)
    assert {path.name: path.read_bytes() for path in tiny_checkpoint.iterdir()} == before
    assert (taken / "model.safetensors").read_text() == "years of work"
    average_checkpoints([tiny_checkpoint] * 2, tmp_path / "mean")
    assert "config.json" in names(tmp_path / "mean") and names(tmp_path) == ["mean", "taken"]
