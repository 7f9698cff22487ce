"""The command `attncap caption`: prints captions, or writes them to a file."""

import argparse
import gc
import io
import json
import os
import sys
import threading
from collections.abc import Callable, Generator, Iterator
from contextlib import AbstractContextManager, closing, contextmanager, nullcontext
from functools import cache, partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, Self

from .bulk import Outcome, Target, Totals, caption_inputs, caption_to_target, is_doubtful, model_digest
from .console import escape_path, make_folder, print_error, silence_libraries
from .images import ImageError, describe_error
from .inputs import STDIN, Input, base_folder, count_inputs, find_inputs
from .writers import WRITERS, CaptionFiles, Row, find_format

if TYPE_CHECKING:
    from .captioner import Captioner, CaptionResult

INTERRUPTED = 130
PLOTS = ("attention", "importance")
JOURNAL, JOURNAL_BESIDE_IMAGES = ".attncap", ".attncap-txt"  # endings and names of folders
SETTINGS = ("model", "revision", "device", "dtype", "num_beams", "num_return_sequences", "prompt", "temperature", "top_p")
SETTINGS += ("max_words", "min_confidence", "batch_size", "allow_private_urls", "format")


def run(args: argparse.Namespace) -> int:
    """Runs the command and returns its exit code: 1 if an image failed."""
    _check_usage(args)
    if args.engine == "ray":
        return _run_ray(args)
    target = _find_target(args)
    folders = {kind: folder for kind in PLOTS if (folder := getattr(args, kind))}
    if folders:
        from .visualize import require_matplotlib

        require_matplotlib()
    for kind, folder in folders.items():
        make_folder(folder, f"--{kind}")
    return _print_captions(args, folders) if target is None else _write_captions(args, target)


def _check_usage(args: argparse.Namespace) -> None:
    """Ends the program with exit code 2 if options do not fit together."""
    sampled = args.temperature is not None or args.top_p is not None
    writes = args.output is not None or args.format == "txt"
    stdin = args.files.count(STDIN) + (args.files_from == STDIN)
    beams = args.num_return_sequences
    problems = {
        "the following arguments are required: PATH, or --files-from LIST": not (args.files or args.files_from),
        "stdin can be read only once: give - once": stdin > 1,
        f"--num-return-sequences {beams} needs --num-beams {beams} or more": beams > (args.num_beams or beams) and not sampled,
        "--min-confidence and --prompt exclude each other: the confidence is only calibrated without a prompt": (
            args.min_confidence is not None and args.prompt is not None
        ),
        "--format txt writes a file beside each image: leave out --output": args.format == "txt" and args.output is not None,
        f"--format {args.format} needs --output FILE": args.format is not None and not writes,
        "--json prints captions: for a file, give --format jsonl": writes and args.json,
        "plots are written only with printed captions: leave out --attention and --importance": (
            writes and bool(args.attention or args.importance)
        ),
    }
    for problem, found in problems.items():
        if found:
            args.usage_error(problem)


def _run_ray(args: argparse.Namespace) -> int:
    unused = {"format": (None, "parquet"), "num_return_sequences": (1,), "workers": (0,), "json": (False,)}
    unused |= dict.fromkeys(("files_from", "attention", "importance", "min_confidence"), (None,))
    if args.output is None:
        args.usage_error("--engine ray needs --output FOLDER")
    if not args.files:
        args.usage_error("--engine ray needs PATH")
    for name, allowed in unused.items():
        if getattr(args, name) not in allowed:
            args.usage_error(f"--engine ray and --{name.replace('_', '-')} exclude each other")
    from .ray_captions import caption_with_ray

    silence_libraries()
    names = ("num_beams", "prompt", "batch_size", "allow_private_urls", "device", "dtype", "revision")
    options = {name: value for name in names if (value := getattr(args, name)) is not None}
    return caption_with_ray(args.files, str(args.output), args.model, **options, **_generate_options(args))


def _find_target(args: argparse.Namespace) -> Target | None:
    """The output, after the checks that need no model; None if the captions are printed."""
    if args.format == "txt":
        return Target(None, Path(base_folder(args.files, args.files_from)) / JOURNAL_BESIDE_IMAGES, CaptionFiles())
    if args.output is None:
        return None
    output = Path(os.path.realpath(args.output) if os.path.islink(args.output) else args.output)
    if not output.absolute().parent.is_dir():
        raise ValueError(f"{output} cannot be written: there is no folder {output.parent}")
    if output.exists() and not output.is_file():
        raise ValueError(f"{output} is not a file: name a file for --output, or leave it out to print the captions")
    args.format = args.format or find_format(args.output)
    writer = WRITERS[args.format]()
    writer.check()
    return Target(output, output.with_name(output.name + JOURNAL), writer)


def _load_captioner(args: argparse.Namespace) -> "Captioner":
    with _without_garbage_collection() if args.owns_process else nullcontext():
        from . import Captioner
        from .runtime import is_export

        if args.model is None or not is_export(args.model):
            silence_libraries()
        captioner = Captioner.from_pretrained(args.model, device=args.device, dtype=args.dtype, revision=args.revision)
    if args.min_confidence is not None and captioner.engine.calibration is None:
        name = args.model or "The checkpoint in this package"
        raise ValueError(
            f"{name} has no calibrated confidence for --min-confidence: run `attncap calibrate` on the checkpoint first, then "
            "`attncap export` again if this folder was exported."
        )
    return captioner


def _caption(
    args: argparse.Namespace, captioner: "Captioner", inputs: Iterator[Input], start: int | None = None, **more: Any
) -> Generator[Outcome, None, None]:
    """The captions of all inputs, with the options of the command line; `start` is the position of the first one."""
    names = ("num_beams", "num_return_sequences", "prompt", "batch_size", "allow_private_urls", "workers")
    options = {name: getattr(args, name) for name in names} | _generate_options(args) | more
    return caption_inputs(captioner, inputs, start if options.get("do_sample") else None, **options)


def _generate_options(args: argparse.Namespace) -> dict[str, Any]:
    """The arguments of `generate` for options that have other names or imply others."""
    options = {"temperature": args.temperature, "top_p": args.top_p}
    options["do_sample"] = True if any(value is not None for value in options.values()) else None
    options["max_new_tokens"] = args.max_words
    return {name: value for name, value in options.items() if value is not None}


def _print_captions(args: argparse.Namespace, folders: dict[str, Path]) -> int:
    from .visualize import path_key

    if isinstance(sys.stdout, io.TextIOWrapper):
        utf8 = sys.stdout.encoding.lower().replace("-", "") == "utf8"
        sys.stdout.reconfigure(errors="surrogateescape" if utf8 else "backslashreplace")  # prints the bytes of a path unchanged
    plotted, failed = bool(folders), False
    taken = set(map(path_key, args.files)) if plotted else set()
    inputs, captioner = find_inputs(args.files, args.files_from), _load_captioner(args)
    outcomes = _caption(args, captioner, inputs, attention=plotted, explain="importance" in folders)
    with closing(outcomes), _Progress(args, enabled=not sys.stdout.isatty()) as progress:
        for item, result in outcomes:
            file = item.name
            with progress.paused():
                if isinstance(result, ImageError):
                    print_error(result, file)
                    failed = True
                elif is_doubtful(result, args.min_confidence):
                    print_error(f"{file}: skipped, its caption has a confidence of {result.confidence:.2f}", file)
                else:
                    taken |= {path_key(file)} if plotted else set()
                    plots = {kind: _write_plot(file, result, kind, folder, taken) for kind, folder in folders.items()}
                    print(_as_json(file, result, plots) if args.json else _as_text(file, result), flush=True)
                    failed |= not all(plots.values())
            progress.update()
    return int(failed)


def _write_captions(args: argparse.Namespace, target: Target) -> int:
    """Writes the captions to a file and reports on stderr."""
    load = cache(partial(_load_captioner, args))
    inputs, name = find_inputs(args.files, args.files_from), escape_path(target.name)
    done = Totals()
    with _Progress(args) as progress:

        def report(row: Row | None, totals: Totals) -> None:
            nonlocal done
            done = totals
            if row is None:
                progress.start(totals.images)
                return
            if row["error"]:
                with progress.paused():
                    named = row["failed"] or row["path"] in row["error"]
                    print_error(row["error"] if named else f"{row['path']}: {row['error']}", row["path"])
            progress.update()

        try:
            done = caption_to_target(
                target,
                inputs,
                _settings(args, load),
                args.batch_size,
                lambda rest, start: _caption(args, load(), rest, start, attention=False),
                report,
                args.min_confidence,
            )
        except KeyboardInterrupt:
            progress.close()
            print_error(f"{name}: interrupted after {done.images} images; repeat the command to go on")
            return INTERRUPTED
    state = "is complete already, nothing was done" if done.complete else "is complete"
    failed = f", {done.failed} of them failed" if done.failed else ""
    images = "1 image" if done.images == 1 else f"{done.images} images"
    print(f"{name} {state}: {images}{failed}", file=sys.stderr)
    return int(done.failed > 0)


def _settings(args: argparse.Namespace, load: "Callable[[], Captioner]") -> dict[str, Any]:
    """What determines the captions, by the names of the options."""
    from . import __version__
    from .captioner import CHECKPOINT

    settings = {f"--{name.replace('_', '-')}": getattr(args, name) for name in SETTINGS}
    folder = CHECKPOINT if args.model is None else Path(args.model)
    if folder.is_dir():
        settings["the content of the model"] = model_digest(folder)
    else:
        settings["the commit of the model"] = getattr(load().model.config, "_commit_hash", None)
    return settings | {"the version of hf_attncap": __version__}


class _Progress:
    """A progress bar with rate and time left on stderr, if that is a terminal.

    Another thread counts the images. Until it has finished, the bar shows no time left.
    """

    def __init__(self, args: argparse.Namespace, enabled: bool = True):
        self._bar: Any = None
        if enabled and sys.stderr.isatty():
            import tqdm

            self._bar = tqdm.tqdm(unit=" images", file=sys.stderr, dynamic_ncols=True)
            threading.Thread(target=self._count, args=(args,), daemon=True).start()

    def _count(self, args: argparse.Namespace) -> None:
        try:
            total = count_inputs(args.files, args.files_from)
        except OSError:  # the main thread reports it
            return
        if self._bar is not None and total is not None:
            self._bar.total = total
            self._bar.refresh()

    def start(self, images: int) -> None:
        """Sets the number of images that earlier runs have done; they do not count for the rate."""
        if self._bar is not None:
            self._bar.initial = self._bar.n = images
            self._bar.refresh()

    def update(self) -> None:
        if self._bar is not None:
            self._bar.update()

    def paused(self) -> AbstractContextManager[Any]:
        """Hides the bar while messages are printed."""
        return nullcontext() if self._bar is None else self._bar.external_write_mode(file=sys.stderr)

    def close(self) -> None:
        if self._bar is not None:
            self._bar.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def _write_plot(file: str, result: "CaptionResult", kind: str, folder: Path, taken: set[str]) -> Path | None:
    """Writes the plot of "attention" or "importance" and returns its path; None if that fails, with a message on stderr."""
    from .visualize import path_key, plot_path, save_plot

    try:
        path = plot_path(file, kind, folder, taken)
        taken.add(path_key(path))
        save_plot(result.plot_attention() if kind == "attention" else result.plot_importance(), path)
    except Exception as error:
        print_error(f"{file}: its {kind} cannot be plotted: {describe_error(error)}", file)
        return None
    print(f"{escape_path(file)}: {kind} in {path}", file=sys.stderr)
    return path


@contextmanager
def _without_garbage_collection() -> Iterator[None]:
    """Pauses garbage collection, so that imports and loading are faster.

    They create about a million objects that stay in use, and Python would scan them several times. At the end, all objects are
    excluded from later collections.
    """
    gc.disable()
    try:
        yield
    finally:
        gc.freeze()
        gc.enable()


def _as_text(file: str, result: "CaptionResult") -> str:
    return "\n\t".join([f"{escape_path(file)}\t{result.text}", *(other.text for other in result.alternatives)])


def _as_json(file: str, result: "CaptionResult", plots: dict[str, Path | None]) -> str:
    record: dict[str, Any] = {
        "path": file,
        "caption": result.text,
        "score": result.score,
        "confidence": result.confidence,
        "words": result.words,
        "alternatives": [{"caption": other.text, "score": other.score} for other in result.alternatives],
    }
    return json.dumps(record | {f"{kind}_file": str(path) for kind, path in plots.items() if path})
