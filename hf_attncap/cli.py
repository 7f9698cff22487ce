"""The console script `attncap`: reads the command line, calls, prints."""

import argparse
import io
import json
import os
import re
import sys
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict
from itertools import chain, count
from pathlib import Path
from typing import TYPE_CHECKING, Any
from urllib.parse import urlsplit

if TYPE_CHECKING:
    from .captioner import Captioner, CaptionResult
    from .metrics import CaptionScores
    from .metrics.files import References
    from .metrics.matching import Matched
    from .metrics.significance import Comparison

FEW = 100  # images, below which a bootstrap takes luck for gain too often
SETTLED = 200  # images, below which a calibration depends much on which images they are
INTERRUPTED, CLOSED_PIPE = 130, 141  # 128 + the number of the signal, as shells report it


def main(argv: Sequence[str] | None = None) -> int:
    """Runs one command.

    Args:
        argv: the arguments behind the program's name. Default: those of this process.

    Returns:
        The exit code: 0; 1 if anything failed, which is then named on stderr; 130 after Ctrl-C; 141 if the
        reader of stdout has gone.

    Raises:
        SystemExit: with code 2 for a wrong usage, 0 for `--help`.
    """
    arguments = list(sys.argv[1:] if argv is None else argv)
    if arguments[:1] == ["train"]:
        return _train(arguments[1:])
    args = _parser().parse_args(arguments)
    try:
        with warnings.catch_warnings(action="ignore"):
            return args.command(args)
    except KeyboardInterrupt:
        return INTERRUPTED
    except BrokenPipeError:
        # Python writes what is left in the buffer when it ends, and would complain.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return CLOSED_PIPE
    except (OSError, ValueError) as error:
        _complain(error)
        return 1


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser("attncap", description="Captions pictures and shows where the model looked.")
    commands = parser.add_subparsers(required=True, metavar="COMMAND")

    caption = commands.add_parser(
        "caption",
        help="print a caption for each picture",
        description="Prints one line per picture: its path, a tab and the caption. Pictures that cannot be read are skipped and "
        "named on stderr; the exit code is then 1. Line breaks and tabs in a path are printed as "
        "\\n, \\r and \\t; --json has the path as it is.",
    )
    caption.add_argument("files", nargs="+", metavar="FILE", help="a picture: a path or an http(s) URL; write ./-x.jpg for -x.jpg")
    caption.add_argument("--model", metavar="DIR_OR_NAME", help="a folder or a Hub repository (default: the model of this package)")
    caption.add_argument(
        "--attention",
        metavar="OUT_DIR",
        type=Path,
        help="also write a film strip of where the model looked for each word, as NAME.attention.png; "
        "replaces only the film strips of earlier runs",
    )
    caption.add_argument(
        "--importance",
        metavar="OUT_DIR",
        type=Path,
        help="also write NAME.importance.png: below the attention, which regions each word depends on; takes longer",
    )
    caption.add_argument("--beams", metavar="N", type=_count, help="captions followed at a time (default: the model's own)")
    caption.add_argument(
        "--n-best", metavar="N", type=_count, default=1, help="captions a picture; the further ones stand behind a tab"
    )
    caption.add_argument("--json", action="store_true", help="print a JSON object a line instead, with scores and words")
    caption.add_argument("--prompt", metavar="TEXT", help="the beginning of all captions")
    caption.add_argument(
        "--min-confidence",
        metavar="P",
        type=_probability,
        help="leave out captions whose calibrated confidence is below P, from 0 to 1, and name their pictures on stderr",
    )
    caption.add_argument("--batch-size", metavar="N", type=_count, default=8, help="pictures at a time (default: 8)")
    caption.add_argument("--device", metavar="D", help="such as cpu or cuda:1 (default: a GPU where there is one)")
    caption.add_argument("--allow-private-urls", action="store_true", help="also fetch URLs from the local network")
    caption.set_defaults(command=_caption, usage_error=caption.error)

    evaluate = commands.add_parser(
        "evaluate",
        help="score captions against references",
        description="Prints BLEU, ROUGE-L, CIDEr and measures of variety, as pycocoevalcap gives them, without Java. Files are "
        "COCO results or annotations, Karpathy's splits, JSON lines or a JSON object of captions by id. What is odd in them, or is "
        "left out, is named on stderr.",
    )
    evaluate.add_argument("--predictions", metavar="FILE", type=_file, required=True, help="a caption an image; - reads stdin")
    evaluate.add_argument("--references", metavar="FILE", type=_file, required=True, help="one or more captions an image")
    evaluate.add_argument("--split", metavar="NAME", help="of Karpathy's references: test, val, train or several, joined by +")
    evaluate.add_argument(
        "--training", metavar="FILE", type=_file, help="captions that the model learned from, to count the novel ones"
    )
    evaluate.add_argument("--compare", metavar="FILE", type=_file, help="captions of another system: is the gain over it luck?")
    evaluate.add_argument("--meteor", action="store_true", help="also METEOR, through pycocoevalcap and Java")
    evaluate.add_argument("--spice", action="store_true", help="also SPICE, through pycocoevalcap and Java")
    evaluate.add_argument(
        "--output", metavar="FILE", type=_file, help="also write the scores as JSON; - prints them instead of the table"
    )
    evaluate.add_argument(
        "--per-image", metavar="FILE", type=_file, help="also write a line of JSON an image; - prints these instead of the table"
    )
    evaluate.set_defaults(command=_evaluate)

    commands.add_parser("train", help="train or fine-tune a captioner; --help lists its settings")

    card = commands.add_parser(
        "card",
        help="write a checkpoint's model card",
        description="Writes README.md of a checkpoint from the files in its folder: results.json, which --images and --pictures "
        "write, training.json of its training, and about.yaml with your own text (title, summary, license, license_name, "
        "license_link, repository, base_model, datasets, independent, origins).",
    )
    card.add_argument("checkpoint", metavar="CHECKPOINT", help="the folder of a saved model")
    card.add_argument(
        "--images",
        metavar="FILE",
        type=_file,
        nargs="+",
        default=[],
        help="captioned pictures to measure it on, in a format of `train`; each file is measured by itself",
    )
    card.add_argument("--split", metavar="NAME", help="of the images, where a file has several")
    card.add_argument("--image-dir", metavar="DIR", help="where paths of pictures begin (default: the folder of the file)")
    card.add_argument(
        "--pictures",
        metavar="FILE",
        nargs="+",
        default=[],
        help="photographs to show with the attention and importance of each word",
    )
    card.set_defaults(command=_card)

    calibrate = commands.add_parser(
        "calibrate",
        help="make a checkpoint say how sure it is of its captions",
        description="Fits the confidence of captions on half of the captioned images and measures it on the other half. Writes the "
        "calibration into the checkpoint's config.json, and the report beside it as calibration.json and calibration.jpg. "
        "A caption is good if its CIDEr is at least 0.5 against the references of its image. Use images that the captioner "
        "was not trained on.",
    )
    calibrate.add_argument("checkpoint", metavar="CHECKPOINT", help="the folder of a saved model")
    calibrate.add_argument(
        "--images",
        metavar="FILE",
        type=_file,
        nargs="+",
        required=True,
        help="captioned pictures in a format of `train`; several files are reported one by one and together",
    )
    calibrate.add_argument("--split", metavar="NAME", help="of the images, where a file has several")
    calibrate.add_argument("--image-dir", metavar="DIR", help="where paths of pictures begin (default: the folder of the file)")
    calibrate.set_defaults(command=_calibrate)

    average = commands.add_parser(
        "average",
        help="average the weights of checkpoints",
        description="Writes the mean of the weights of checkpoints that were trained on from the same one, with the processor and "
        "the settings of the last. Compare it with each of them on validation images.",
    )
    average.add_argument("checkpoints", metavar="CHECKPOINT", nargs="+", help="folders of saved models")
    average.add_argument("--output", metavar="DIR", required=True, help="the folder to write")
    average.add_argument("--shares", metavar="N", type=float, nargs="+", help="of each in the mean, in any unit (default: equal)")
    average.set_defaults(command=_average)

    pack = commands.add_parser("pack", help="store a checkpoint's weights in half precision, half the size")
    pack.add_argument("checkpoint", metavar="CHECKPOINT", help="the folder of a saved model")
    pack.add_argument("out", metavar="OUT", help="the folder to write")
    pack.add_argument(
        "--generation",
        metavar="JSON",
        type=_mapping,
        help="""settings that replace those of generation_config.json, such as '{"num_beams": 5}'; they remove the confidence""",
    )
    pack.set_defaults(command=_pack)

    export = commands.add_parser("export-hub", help="write a folder for the Hugging Face Hub")
    export.add_argument("checkpoint", metavar="CHECKPOINT", help="the folder of a saved model")
    export.add_argument("out", metavar="OUT", help="the folder to write")
    export.set_defaults(command=_export_hub)
    return parser


def _mapping(text: str) -> dict[str, Any]:
    try:
        value = json.loads(text)
    except ValueError as error:
        raise argparse.ArgumentTypeError(f"'{text}' is no JSON: {error}") from error
    if not isinstance(value, dict):
        raise argparse.ArgumentTypeError(f"'{text}' is no mapping of settings, such as {{\"num_beams\": 5}}")
    return value


def _file(text: str) -> str:
    if not text:
        raise argparse.ArgumentTypeError("the name of the file is empty")
    return text


def _count(text: str) -> int:
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"'{text}' is not a whole number of at least 1")
    return int(text)


def _probability(text: str) -> float:
    try:
        value = float(text)
    except ValueError:
        value = -1.0
    if not 0 <= value <= 1:
        raise argparse.ArgumentTypeError(f"'{text}' is not a number from 0 to 1")
    return value


def _train(arguments: list[str]) -> int:
    """Hands over to the training package, which reads its settings itself."""
    try:
        from hf_attncap.training.train import main as train
    except ImportError as error:
        print(f'attncap: training needs more packages: pip install "hf_attncap[train]" ({error})', file=sys.stderr)
        return 1
    return train(arguments)


def _average(args: argparse.Namespace) -> int:
    _quieten()
    with _packages_for_training():
        from hf_attncap.training.checkpoints.average import average_checkpoints

    print(average_checkpoints(args.checkpoints, args.output, args.shares))
    return 0


def _pack(args: argparse.Namespace) -> int:
    _quieten()
    with _packages_for_training():
        from hf_attncap.training.checkpoints.pack import pack

    print(pack(args.checkpoint, args.out, args.generation))
    return 0


def _export_hub(args: argparse.Namespace) -> int:
    _quieten()
    from .hub import export_to_hub

    export_to_hub(args.checkpoint, args.out)
    from hf_attncap.model_card.build_card import is_ours, write_card

    if is_ours(args.out):
        write_card(args.out)
    return 0


def _card(args: argparse.Namespace) -> int:
    _quieten()
    from hf_attncap.model_card.build_card import check_card, write_card

    check_card(args.checkpoint, len(args.images))
    if args.images or args.pictures:
        with _packages_for_training():
            from hf_attncap.model_card.measure import update_results

        update_results(args.checkpoint, args.images, args.split, args.image_dir, args.pictures)
    print(write_card(args.checkpoint))
    return 0


def _calibrate(args: argparse.Namespace) -> int:
    _quieten()
    with _packages_for_training():
        from hf_attncap.model_card.calibration import calibrate

    report = calibrate(args.checkpoint, args.images, args.split, args.image_dir)
    for name, found in report["sets"].items():
        figures = [found["auroc"], found["auroc_of_score"]] if found["images"] else []
        if not figures or figures[0][0] is None:
            print(f"{name}: {found['images']} images to measure on are too few")
            continue
        area, raw = (f"{middle:.3f} ({low:.3f} to {high:.3f})" for middle, low, high in figures)
        print(f"{name}: {found['images']} images, {100 * found['good']:.0f} % with a good caption")
        print(f"  AUROC {area}, of the score alone {raw}; Brier score {found['brier']:.3f}")
        for kept in found["coverage"][4::5]:
            good = 100 - 100 * kept["risk"]
            print(f"  the surest {100 * kept['coverage']:.0f} %: {good:.0f} % good, CIDEr {100 * kept['cider']:.1f}")
    if (images := report["calibration"]["images"]) < SETTLED:
        print(
            f"{args.checkpoint}: fitted on {images} images; with fewer than {SETTLED} the confidence is rough, give more",
            file=sys.stderr,
        )
    print(f"{args.checkpoint}: calibrated; the report is in {Path(args.checkpoint) / 'calibration.json'}")
    return 0


@contextmanager
def _packages_for_training() -> Iterator[None]:
    try:
        yield
    except ImportError as error:
        raise OSError(f'this needs more packages: pip install "hf_attncap[train]" ({error})') from error


def _evaluate(args: argparse.Namespace) -> int:
    from .atomic import atomic_write
    from .metrics import CaptionMetrics, compare
    from .metrics.files import read_predictions, read_references, read_training
    from .metrics.matching import match
    from .metrics.report import comparison_table, score_table

    _check_files(args)
    references = read_references(args.references, args.split)
    matched = [match(references, read_predictions(file)) for file in (args.predictions, args.compare) if file]
    shared = [image_id for image_id in matched[0].references if image_id in matched[-1].references]
    notes = _notes(args, references, matched, shared)
    learned = read_training(args.training) if args.training else None
    metrics = CaptionMetrics({image_id: references.captions[image_id] for image_id in shared}, training=learned)
    scores = [
        metrics.score({image_id: system.predictions[image_id] for image_id in shared}, meteor=args.meteor, spice=args.spice)
        for system in matched
    ]
    comparison = compare(scores[1], scores[0]) if args.compare else {}
    for note in notes:
        print("attncap:", note, file=sys.stderr)
    tables = [score_table(scores[0]), *([comparison_table(comparison)] if comparison else [])]
    outputs = {
        args.per_image: "".join(json.dumps(row) + "\n" for row in scores[0].rows()) if args.per_image else "",
        args.output: json.dumps(_result(args, scores, comparison, notes), indent=1) + "\n",
    }
    print("\n\n".join(tables), file=sys.stderr if "-" in outputs else sys.stdout)
    for path, text in outputs.items():
        if path == "-":
            print(text, end="")
        elif path:
            with atomic_write(path) as file:
                file.write(text)
    return 0


def _check_files(args: argparse.Namespace) -> None:
    """What is to be written can be, and is none of the files that are read."""
    read = [file for file in (args.predictions, args.references, args.compare, args.training) if file]
    written = [file for file in (args.output, args.per_image) if file]
    if os.path.realpath(args.predictions) == os.path.realpath(args.references):
        raise ValueError(f"{args.predictions} is given as predictions and as references")
    for number, file in enumerate(written):
        if os.path.realpath(file) in map(os.path.realpath, [*read, *written[:number]]):
            raise ValueError(f"{file} is given twice, and would be overwritten: give another --output or --per-image")
        if file == "-":
            continue  # stdout, whatever files are there
        if not Path(file).absolute().parent.is_dir():
            raise ValueError(f"{file} cannot be written: there is no folder {Path(file).parent}")
        if Path(file).is_dir():
            raise ValueError(f"{file} is a folder: name a file in it")
        if Path(file).is_file() and not _is_own(Path(file)):
            raise ValueError(f"{file} is there already, and `attncap evaluate` did not write it: name another, or remove it first")


def _is_own(file: Path) -> bool:
    """Whether a file is empty, or begins as what `--output` or `--per-image` writes."""
    with file.open("rb") as stream:
        head = stream.read(4096)
    try:
        row = json.loads(head.partition(b"\n")[0])
    except ValueError:
        row = None
    is_row = isinstance(row, dict) and {"image_id", "bleu_4", "cider"} <= row.keys()
    return not head or is_row or head.startswith(b'{\n "predictions": ')


def _notes(args: argparse.Namespace, references: "References", matched: "list[Matched]", shared: list[str]) -> list[str]:
    notes = list(dict.fromkeys(note for system in matched for note in system.notes))
    lost = sum(len(system.references) - len(shared) for system in matched)
    if lost:
        notes.append(f"images with a caption in only one of {args.predictions} and {args.compare}, left out: {lost}")
    if all(len(captions) == 1 for captions in references.captions.values()):
        notes.append(f"{args.references} has one reference an image; scores are higher, and surer, with several")
    if args.compare and len(shared) < FEW:
        notes.append(f"{len(shared)} images are few: the interval and p of the comparison promise too much")
    return notes


def _result(
    args: argparse.Namespace, scores: "list[CaptionScores]", comparison: "dict[str, Comparison]", notes: list[str]
) -> dict[str, Any]:
    result: dict[str, Any] = {
        "predictions": args.predictions,
        "references": args.references,
        "images": len(scores[0].ids),
        "scores": scores[0].corpus,
        "notes": notes,
    }
    if comparison:
        result |= {"compared_with": args.compare, "comparison": {name: asdict(found) for name, found in comparison.items()}}
    return result


def _caption(args: argparse.Namespace) -> int:
    if args.beams is not None and args.n_best > args.beams:
        args.usage_error(f"--n-best {args.n_best} needs as many beams: give --beams {args.n_best}, or leave --beams out")
    if args.min_confidence is not None and args.prompt is not None:
        args.usage_error(
            "--min-confidence judges whole captions, and with --prompt only the rest is the model's own: give one of them"
        )
    folders = {kind: folder for kind in ("attention", "importance") if (folder := getattr(args, kind))}
    for kind, folder in folders.items():
        _make_folder(folder, kind)
    if isinstance(sys.stdout, io.TextIOWrapper):
        utf8 = sys.stdout.encoding.lower().replace("-", "") == "utf8"
        sys.stdout.reconfigure(errors="surrogateescape" if utf8 else "backslashreplace")  # a path goes out byte for byte
    taken = set(map(_key, args.files))
    missing = len(args.files)
    captioner = _load(args)
    if args.min_confidence is not None and captioner.model.config.confidence is None:
        name = args.model or "The package's own model"
        raise ValueError(f"{name} has no calibrated confidence for --min-confidence: run `attncap calibrate` on its folder first.")
    outcomes = captioner.stream(
        args.files,
        on_error="yield",
        beams=args.beams,
        alternatives=args.n_best,
        prompt=args.prompt,
        batch_size=args.batch_size,
        allow_private_urls=args.allow_private_urls,
        explain="importance" in folders,
    )
    for file, result in zip(args.files, outcomes):
        if isinstance(result, Exception):
            _complain(result, file)
            continue
        if args.min_confidence is not None and result.confidence < args.min_confidence:
            _complain(f"{file}: left out, its caption has a confidence of {result.confidence:.2f}", file)
            missing -= 1
            continue
        strips = {kind: _draw(file, result, kind, folder, taken) for kind, folder in folders.items()}
        print(_as_json(file, result, strips) if args.json else _as_text(file, result), flush=True)
        missing -= all(strips.values())
    return int(missing > 0)


def _draw(file: str, result: "CaptionResult", kind: str, folder: Path, taken: set[str]) -> Path | None:
    """Writes a film strip of "attention" or "importance" and gives its path; None if that fails, which is named on stderr."""
    from .captioner import describe_error
    from .visualize import save_strip

    try:
        strip = _strip_path(file, kind, folder, taken)
        save_strip(result.plot_attention() if kind == "attention" else result.plot_importance(), strip)
    except Exception as error:
        _complain(f"{file}: its {kind} cannot be drawn: {describe_error(error)}", file)
        return None
    print(f"{_escape_path(file)}: {kind} in {strip}", file=sys.stderr)
    return strip


def _make_folder(folder: Path, kind: str) -> None:
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise OSError(f"{folder} cannot be made a folder ({error.strerror}); give another --{kind}") from error
    if not os.access(folder, os.W_OK):
        raise OSError(f"{folder} is a folder that must not be written to; give another --{kind}")


def _strip_path(file: str, kind: str, folder: Path, taken: set[str]) -> Path:
    """FOLDER/<stem>.<kind>.png, or <stem>-2.<kind>.png ... where that is taken or another program's file."""
    from .visualize import is_strip

    stem = Path(urlsplit(file).path if "://" in file else file).stem
    stem = os.fsencode(stem)[:200].decode(errors="ignore") or "picture"  # the longest name is mostly of 255 bytes
    names = chain([stem], (f"{stem}-{number}" for number in count(2)))
    paths = (folder / f"{name}.{kind}.png" for name in names)
    path = next(path for path in paths if _key(path) not in taken and (is_strip(path) or not os.path.lexists(path)))
    taken.add(_key(path))
    return path


def _key(path: str | Path) -> str:
    return os.path.realpath(path).casefold()  # some file systems take A.png for a.png


def _load(args: argparse.Namespace) -> "Captioner":
    _quieten()
    from . import Captioner

    return Captioner.from_pretrained(args.model, device=args.device)


def _quieten() -> None:
    """No progress bars and no hints from the libraries: stderr is for what failed."""
    from huggingface_hub.utils import logging as hub_logging
    from transformers.utils import logging

    hub_logging.set_verbosity_error()
    logging.set_verbosity_error()
    logging.disable_progress_bar()


def _as_text(file: str, result: "CaptionResult") -> str:
    return "\n\t".join([f"{_escape_path(file)}\t{result.text}", *(other.text for other in result.alternatives)])


def _as_json(file: str, result: "CaptionResult", strips: dict[str, Path | None]) -> str:
    record: dict[str, Any] = {
        "path": file,
        "caption": result.text,
        "score": result.score,
        "confidence": result.confidence,
        "words": result.words,
        "alternatives": [{"caption": other.text, "score": other.score} for other in result.alternatives],
    }
    return json.dumps(record | {f"{kind}_file": str(strip) for kind, strip in strips.items() if strip})


def _complain(error: Exception | str, file: str = "") -> None:
    text = str(error)
    text = text.replace(file, _escape_path(file)) if file else text
    print("attncap:", re.sub(r"\s*[\r\n]\s*", " ", text), file=sys.stderr)


def _escape_path(file: str) -> str:
    """A path on one line."""
    return file.translate({ord("\n"): "\\n", ord("\r"): "\\r", ord("\t"): "\\t"})
