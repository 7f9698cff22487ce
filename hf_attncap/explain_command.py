"""The command `attncap explain`: writes the maps, a summary picture and an offline page for each photograph."""

import argparse
import io
import sys
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING
from urllib.parse import urlsplit

from .console import escape_path, make_folder, print_error, silence_libraries

if TYPE_CHECKING:
    from .captioner import CaptionResult

ENDINGS = (".html", ".summary.png", ".importance.png")
MAX_TITLE = 200  # characters


def run(args: argparse.Namespace) -> int:
    """Runs the command and returns its exit code: 1 if an image failed or a file could not be written."""
    if args.num_beams is not None and args.num_return_sequences > args.num_beams:
        args.usage_error(
            f"--num-return-sequences {args.num_return_sequences} needs --num-beams {args.num_return_sequences} or more"
        )
    from .visualize import path_key, require_matplotlib

    require_matplotlib()
    make_folder(args.output, "--output")
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="backslashreplace")  # paths may hold bytes that are not text
    from . import Captioner
    from .runtime import is_export

    if args.model is None or not is_export(args.model):
        silence_libraries()
    results = Captioner.from_pretrained(args.model, device=args.device).stream(
        args.files,
        on_error="yield",
        num_beams=args.num_beams,
        num_return_sequences=args.num_return_sequences,
        prompt=args.prompt,
        allow_private_urls=args.allow_private_urls,
        explain=True,
    )
    taken = set(map(path_key, args.files))
    failed = False
    for file, result in zip(args.files, results):
        if isinstance(result, Exception):
            print_error(result, file)
            failed = True
        else:
            failed |= not _write_files(file, result, args.output, taken)
    return int(failed)


def _write_files(file: str, result: "CaptionResult", folder: Path, taken: set[str]) -> bool:
    """Writes the files of one photograph and prints their names; False if one of them fails, with a message on stderr."""
    from .atomic import atomic_write
    from .images import describe_error
    from .visualize import output_paths, path_key, save_plot

    page, summary, strip = output_paths(file, ENDINGS, folder, taken)
    taken |= {path_key(path) for path in (page, summary, strip)}

    def write_page() -> None:
        with atomic_write(page) as stream:
            stream.write(result.to_html(_title(file)))

    steps: dict[Path, Callable[[], None]] = {
        page: write_page,
        summary: lambda: save_plot(result.plot_summary(), summary),
        strip: lambda: save_plot(result.plot_importance(), strip),
    }
    written = []
    for path, write in steps.items():
        try:
            write()
            written.append(f"{escape_path(str(path))} ({path.stat().st_size / 1000:.0f} kB)")
        except Exception as error:  # one file must not keep the others from being written
            print_error(f"{file}: {path} cannot be written: {describe_error(error)}", file)
    print(f"{escape_path(file)}\t{result.text}", *written, sep="\n\t", flush=True)
    return len(written) == len(steps)


def _title(file: str) -> str:
    """The name of the file, or the start of the URL."""
    return (file if urlsplit(file).scheme in ("http", "https", "data") else Path(file).name)[:MAX_TITLE]
