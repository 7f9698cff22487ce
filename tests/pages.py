"""Reads the documentation: its pages and their code blocks."""

import contextlib
import io
import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

from hf_attncap.cli import main

ROOT = Path(__file__).parent.parent
BIN = Path(sys.executable).parent
PAGES = ["README.md", "RESULTS.md", "CONTRIBUTING.md", "CHANGELOG.md"]
PAGES += sorted(f"docs/{page.name}" for page in (ROOT / "docs").glob("*.md"))
SCRIPT = "benchmarks/reproduce_checkpoint.sh"
IN_PROCESS = re.compile("attncap (caption|explain|evaluate|card|export-hub) ")


def read(page: str) -> str:
    return (ROOT / page).read_text(encoding="utf-8")


def blocks(language: str, page: str) -> list[str]:
    """The code blocks of a language in a page."""
    return re.findall(rf"^```{language}\n(.*?)^```", read(page), flags=re.S | re.M)


def shell_commands(page: str) -> list[str]:
    """The lines of a page's `bash` blocks, without comments."""
    lines = "\n".join(blocks("bash", page)).splitlines()
    return [line.strip() for line in lines if line.strip() and not line.startswith("#")]


def run(command: str, folder: Path) -> subprocess.CompletedProcess[str]:
    """Runs a shell command in a folder with the programs of this environment."""
    path = os.pathsep.join([str(BIN), os.environ["PATH"]])
    environment = {**os.environ, "PATH": path, "HF_HUB_OFFLINE": "1", "PYTHONPATH": str(ROOT)}
    return subprocess.run(["sh", "-ec", command], cwd=folder, env=environment, capture_output=True, text=True, timeout=300)


def run_here(command: str, folder: Path) -> str:
    """Runs `attncap WORDS` or `attncap WORDS > FILE` in a folder, in this process, which is seconds faster than in a new one."""
    words, _, file = command.removeprefix("attncap ").partition(" > ")
    printed = io.StringIO()
    with contextlib.chdir(folder), contextlib.redirect_stdout(printed):
        assert main(shlex.split(words, comments=True)) == 0, command
        if file:
            Path(file).write_text(printed.getvalue(), encoding="utf-8")
    return "" if file else printed.getvalue()


def check_commands(folder: Path, commands: list[str], training_options: str = "") -> str:
    """Runs commands one after the other; returns what the last one printed. Training gets further options.

    Commands that match `IN_PROCESS`, and `--inspect`, run in this process, other commands in a new one.
    """
    output = ""
    for command in commands:
        if (IN_PROCESS.match(command) and " < " not in command) or "--inspect" in command:
            output = run_here(command, folder)
            continue
        result = run(f"{command} {training_options}" if "attncap train" in command else command, folder)
        assert result.returncode == 0, f"{command}\n{result.stderr[-3000:]}"
        output = result.stdout
    return output


def help_text(*words: str) -> str:
    """What `attncap ... --help` prints."""
    printed = io.StringIO()
    with contextlib.redirect_stdout(printed), contextlib.suppress(SystemExit):
        main([*words, "--help"])
    return printed.getvalue()


def command_options(command: str) -> set[str]:
    """The options of a command of `attncap`, except `--help`."""
    return set(re.findall(r"(?<!\w)--[a-z][\w-]*", help_text(command))) - {"--help"}
