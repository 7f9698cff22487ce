"""The command `attncap`: reads the command line, calls the package and prints."""

import argparse
import gc
import io
import json
import os
import re
import sys
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import TYPE_CHECKING, Any

from .parser import build_parser

if TYPE_CHECKING:
    from .captioner import CaptionResult

MIN_CALIBRATION_IMAGES = 200  # below, the calibration depends much on which images were used
MISSING_PACKAGE = 'this command needs more packages: pip install "hf_attncap[train]" ({})'
INTERRUPTED, CLOSED_PIPE = 130, 141  # 128 + the number of the signal, as shells report it


def main(argv: Sequence[str] | None = None) -> int:
    """Runs one command.

    Args:
        argv: the arguments after the program's name. Default: those of this process.

    Returns:
        The exit code: 0; 1 if anything failed, with a message on stderr; 130 after Ctrl-C; 141 if the reader of stdout has closed
        the pipe.

    Raises:
        SystemExit: with code 2 for wrong usage, 0 for `--help`.
    """
    arguments = list(sys.argv[1:] if argv is None else argv)
    if arguments[:1] == ["train"]:
        return _train(arguments[1:])
    args = build_parser().parse_args(arguments)
    args.owns_process = argv is None
    try:
        with warnings.catch_warnings(action="ignore"):
            return COMMANDS[args.command](args)
    except KeyboardInterrupt:
        return INTERRUPTED
    except BrokenPipeError:
        # At exit, Python flushes stdout and would report the closed pipe.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return CLOSED_PIPE
    except ModuleNotFoundError as error:
        _print_error(MISSING_PACKAGE.format(error))
        return 1
    except (ImportError, OSError, ValueError) as error:
        _print_error(error)
        return 1


def _train(arguments: list[str]) -> int:
    try:
        from hf_attncap.training.train import main as train
    except ImportError as error:
        _print_error(MISSING_PACKAGE.format(error))
        return 1
    return train(arguments)


def _average(args: argparse.Namespace) -> int:
    _silence_libraries()
    from hf_attncap.training.checkpoints.average import average_checkpoints

    print(average_checkpoints(args.checkpoints, args.output, args.weights))
    return 0


def _pack(args: argparse.Namespace) -> int:
    _silence_libraries()
    from hf_attncap.training.checkpoints.pack import pack

    print(pack(args.checkpoint, args.out, args.generation))
    return 0


def _export(args: argparse.Namespace) -> int:
    _silence_libraries()
    from .export import export_checkpoint

    print(export_checkpoint(args.checkpoint, args.out, args.format, args.dtype, args.calibration, args.onnxruntime_web))
    return 0


def _export_hub(args: argparse.Namespace) -> int:
    _silence_libraries()
    from hf_attncap.model_card.build_card import is_ours, write_card

    from .hub import export_to_hub

    folder = export_to_hub(args.checkpoint, args.out)
    if is_ours(folder):
        write_card(folder)
    print(folder)
    return 0


def _card(args: argparse.Namespace) -> int:
    _silence_libraries()
    from hf_attncap.model_card.build_card import check_card, write_card

    check_card(args.checkpoint, len(args.eval_data))
    if args.eval_data or args.example_images:
        from hf_attncap.model_card.measure import update_results

        update_results(args.checkpoint, args.eval_data, args.split, args.image_dir, args.example_images)
    print(write_card(args.checkpoint))
    return 0


def _calibrate(args: argparse.Namespace) -> int:
    _silence_libraries()
    from hf_attncap.model_card.calibration import calibrate

    from .hub import CALIBRATION
    from .metrics.report import calibration_summary

    report = calibrate(args.checkpoint, args.eval_data, args.split, args.image_dir)
    print(calibration_summary(report))
    if (images := report["calibration"]["images"]) < MIN_CALIBRATION_IMAGES:
        _print_error(
            f"{args.checkpoint}: fitted on {images} images; below {MIN_CALIBRATION_IMAGES} the confidence is unreliable, use more"
        )
    print(f"{args.checkpoint}: calibrated; the report is in {Path(args.checkpoint) / CALIBRATION}")
    return 0


def _evaluate(args: argparse.Namespace) -> int:
    from .atomic import atomic_write
    from .metrics.report import evaluate_files

    _check_files(args)
    found = evaluate_files(
        args.predictions,
        args.references,
        split=args.split,
        training=args.training,
        baseline=args.compare,
        meteor=args.meteor,
        spice=args.spice,
    )
    for note in found.notes:
        print("attncap:", note, file=sys.stderr)
    print(found.tables(), file=sys.stderr if "-" in (args.output, args.per_image) else sys.stdout)
    for path, to_json in ((args.per_image, found.rows_to_json), (args.output, found.to_json)):
        if path == "-":
            print(to_json(), end="")
        elif path:
            with atomic_write(path) as file:
                file.write(to_json())
    return 0


def _check_files(args: argparse.Namespace) -> None:
    """Raises a ValueError if an output cannot be written or would replace an input or a file of another program."""
    from .metrics.report import is_own_report

    inputs = [file for file in (args.predictions, args.references, args.compare, args.training) if file]
    outputs = [file for file in (args.output, args.per_image) if file]
    if os.path.realpath(args.predictions) == os.path.realpath(args.references):
        raise ValueError(f"{args.predictions} is given as predictions and as references")
    for number, file in enumerate(outputs):
        if os.path.realpath(file) in map(os.path.realpath, [*inputs, *outputs[:number]]):
            raise ValueError(f"{file} is given twice, and would be overwritten: give another --output or --per-image")
        if file == "-":
            continue
        if not Path(file).absolute().parent.is_dir():
            raise ValueError(f"{file} cannot be written: there is no folder {Path(file).parent}")
        if Path(file).is_dir():
            raise ValueError(f"{file} is a folder: name a file in it")
        if Path(file).is_file() and not is_own_report(Path(file)):
            raise ValueError(f"{file} exists and was not written by `attncap evaluate`: name another file, or remove it")


def _caption(args: argparse.Namespace) -> int:
    if args.num_beams is not None and args.num_return_sequences > args.num_beams:
        args.usage_error(
            f"--num-return-sequences {args.num_return_sequences} needs --num-beams {args.num_return_sequences} or more"
        )
    if args.min_confidence is not None and args.prompt is not None:
        args.usage_error("--min-confidence and --prompt exclude each other: the confidence is only calibrated without a prompt")
    folders = {kind: folder for kind in ("attention", "importance") if (folder := getattr(args, kind))}
    if folders:
        from .visualize import require_matplotlib

        require_matplotlib()
    for kind, folder in folders.items():
        _make_folder(folder, kind)
    if isinstance(sys.stdout, io.TextIOWrapper):
        utf8 = sys.stdout.encoding.lower().replace("-", "") == "utf8"
        sys.stdout.reconfigure(errors="surrogateescape" if utf8 else "backslashreplace")  # prints the bytes of a path unchanged
    with _without_garbage_collection() if args.owns_process else nullcontext():
        from . import Captioner
        from .runtime import is_export
        from .visualize import path_key

        if args.model is None or not is_export(args.model):
            _silence_libraries()
        captioner = Captioner.from_pretrained(args.model, device=args.device)
    if args.min_confidence is not None and captioner.engine.calibration is None:
        name = args.model or "The checkpoint in this package"
        raise ValueError(
            f"{name} has no calibrated confidence for --min-confidence: run `attncap calibrate` on the checkpoint first, then "
            "`attncap export` again if this folder was exported."
        )
    outcomes = captioner.stream(
        args.files,
        on_error="yield",
        num_beams=args.num_beams,
        num_return_sequences=args.num_return_sequences,
        prompt=args.prompt,
        batch_size=args.batch_size,
        allow_private_urls=args.allow_private_urls,
        explain="importance" in folders,
    )
    taken = set(map(path_key, args.files))
    failed = False
    for file, result in zip(args.files, outcomes):
        if isinstance(result, Exception):
            _print_error(result, file)
            failed = True
        elif args.min_confidence is not None and result.confidence < args.min_confidence:
            _print_error(f"{file}: skipped, its caption has a confidence of {result.confidence:.2f}", file)
        else:
            plots = {kind: _write_plot(file, result, kind, folder, taken) for kind, folder in folders.items()}
            print(_as_json(file, result, plots) if args.json else _as_text(file, result), flush=True)
            failed |= not all(plots.values())
    return int(failed)


def _write_plot(file: str, result: "CaptionResult", kind: str, folder: Path, taken: set[str]) -> Path | None:
    """Writes the plot of "attention" or "importance" and returns its path; None if that fails, with a message on stderr."""
    from .images import describe_error
    from .visualize import path_key, plot_path, save_plot

    try:
        path = plot_path(file, kind, folder, taken)
        taken.add(path_key(path))
        save_plot(result.plot_attention() if kind == "attention" else result.plot_importance(), path)
    except Exception as error:
        _print_error(f"{file}: its {kind} cannot be plotted: {describe_error(error)}", file)
        return None
    print(f"{_escape_path(file)}: {kind} in {path}", file=sys.stderr)
    return path


def _make_folder(folder: Path, kind: str) -> None:
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise OSError(f"{folder} cannot be created as a folder ({error.strerror}); give another --{kind}") from error
    if not os.access(folder, os.W_OK):
        raise OSError(f"{folder} is a folder without write permission; give another --{kind}")


@contextmanager
def _without_garbage_collection() -> Iterator[None]:
    """Pauses garbage collection, so that imports and loading are faster.

    They create about a million objects that stay in use, and Python would search them for garbage several times. At the end, all
    objects become exempt from later collections.
    """
    gc.disable()
    try:
        yield
    finally:
        gc.freeze()
        gc.enable()


def _silence_libraries() -> None:
    """Turns off progress bars and hints of transformers and huggingface_hub: stderr is for errors."""
    from huggingface_hub.utils import logging as hub_logging
    from transformers.utils import logging

    hub_logging.set_verbosity_error()
    logging.set_verbosity_error()
    logging.disable_progress_bar()


def _as_text(file: str, result: "CaptionResult") -> str:
    return "\n\t".join([f"{_escape_path(file)}\t{result.text}", *(other.text for other in result.alternatives)])


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


def _print_error(error: Exception | str, file: str = "") -> None:
    text = str(error)
    text = text.replace(file, _escape_path(file)) if file else text
    print("attncap:", re.sub(r"\s*[\r\n]\s*", " ", text), file=sys.stderr)


def _escape_path(file: str) -> str:
    """A path without line breaks and tabs."""
    return file.translate({ord("\n"): "\\n", ord("\r"): "\\r", ord("\t"): "\\t"})


COMMANDS = {
    "average": _average,
    "calibrate": _calibrate,
    "caption": _caption,
    "card": _card,
    "evaluate": _evaluate,
    "export": _export,
    "export-hub": _export_hub,
    "pack": _pack,
}
