"""The command `attncap`: reads the command line, calls the package and prints."""

import argparse
import os
import signal
import sys
import warnings
from collections.abc import Sequence
from pathlib import Path

from .console import print_error, silence_libraries
from .parser import build_parser

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
        print_error(MISSING_PACKAGE.format(error))
        return 1
    except (ImportError, OSError, ValueError) as error:
        print_error(error)
        return 1


def _train(arguments: list[str]) -> int:
    try:
        from hf_attncap.training.train import main as train
    except ImportError as error:
        print_error(MISSING_PACKAGE.format(error))
        return 1
    return train(arguments)


def _caption(args: argparse.Namespace) -> int:
    from .caption_command import run

    return run(args)


def _average(args: argparse.Namespace) -> int:
    silence_libraries()
    from hf_attncap.training.checkpoints.average import average_checkpoints

    print(average_checkpoints(args.checkpoints, args.output, args.weights))
    return 0


def _pack(args: argparse.Namespace) -> int:
    silence_libraries()
    from hf_attncap.training.checkpoints.pack import pack

    print(pack(args.checkpoint, args.out, args.generation))
    return 0


def _export(args: argparse.Namespace) -> int:
    silence_libraries()
    from .export import export_checkpoint

    print(export_checkpoint(args.checkpoint, args.out, args.format, args.dtype, args.calibration, args.onnxruntime_web))
    return 0


def _export_hub(args: argparse.Namespace) -> int:
    silence_libraries()
    if args.space:
        from .space import export_space

        print(export_space(args.checkpoint, args.out))
        return 0
    from hf_attncap.model_card.build_card import is_ours, write_card

    from .hub import export_to_hub

    folder = export_to_hub(args.checkpoint, args.out)
    if is_ours(folder):
        write_card(folder)
    print(folder)
    return 0


def _card(args: argparse.Namespace) -> int:
    silence_libraries()
    from hf_attncap.model_card.build_card import check_card, write_card

    check_card(args.checkpoint, len(args.eval_data))
    if args.eval_data or args.example_images:
        from hf_attncap.model_card.measure import update_results

        update_results(args.checkpoint, args.eval_data, args.split, args.image_dir, args.example_images)
    print(write_card(args.checkpoint))
    return 0


def _calibrate(args: argparse.Namespace) -> int:
    silence_libraries()
    from hf_attncap.model_card.calibration import calibrate

    from .hub import CALIBRATION
    from .metrics.report import calibration_summary

    report = calibrate(args.checkpoint, args.eval_data, args.split, args.image_dir)
    print(calibration_summary(report))
    if (images := report["calibration"]["images"]) < MIN_CALIBRATION_IMAGES:
        print_error(
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


def _explain(args: argparse.Namespace) -> int:
    from .explain_command import run

    return run(args)


def _demo(args: argparse.Namespace) -> int:
    from . import Captioner
    from .demo import build_demo, launch_demo
    from .runtime import is_export

    if args.checkpoint is None or not is_export(args.checkpoint):
        silence_libraries()
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # ends as after Ctrl-C, and so deletes the uploads
    demo = build_demo(Captioner.from_pretrained(args.checkpoint, device=args.device))
    try:
        print(launch_demo(demo, args.host, args.port), flush=True)
    except OSError as error:
        raise OSError(
            f"The demo cannot listen on {args.host}, port {args.port or 'from 7860'}: give another --host or --port."
        ) from error
    demo.block_thread()
    return 0


COMMANDS = {
    "average": _average,
    "calibrate": _calibrate,
    "caption": _caption,
    "card": _card,
    "demo": _demo,
    "evaluate": _evaluate,
    "explain": _explain,
    "export": _export,
    "export-hub": _export_hub,
    "pack": _pack,
}
