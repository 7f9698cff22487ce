"""The command-line options of `attncap`."""

import argparse
import json
import sys
from pathlib import Path
from typing import Any

from . import __version__


def build_parser() -> argparse.ArgumentParser:
    """The parser of `attncap`. The parsed arguments hold the name of the command in `command`."""
    parser = argparse.ArgumentParser("attncap", description="Captions images and shows which regions the model attended to.")
    parser.add_argument("--version", action="version", version=f"attncap {__version__}")
    commands = parser.add_subparsers(required=True, dest="command", metavar="COMMAND")
    _add_caption(commands)
    _add_explain(commands)
    _add_demo(commands)
    _add_evaluate(commands)
    commands.add_parser("train", help="train or fine-tune a captioner; `attncap train --help` lists its options")
    _add_card(commands)
    _add_calibrate(commands)
    _add_checkpoint_commands(commands)
    return parser


def _add_caption(commands: Any) -> None:
    caption = commands.add_parser(
        "caption",
        help="caption images",
        description="Prints one line per image: its path, a tab and the caption. With --output, it writes a file instead; run the "
        "same command again if it was interrupted. Images that cannot be read are skipped with a message on stderr, and the exit "
        "code is then 1. Line breaks and tabs in paths are printed as \\n, \\r and \\t; --json prints paths unchanged.",
    )
    add = caption.add_argument
    add(
        "files",
        nargs="*",
        metavar="PATH",
        help="an image, an http(s) URL, a folder (with its subfolders), a quoted pattern such as '**/*.jpg', or - for an image on "
        "stdin; write ./-x.jpg for -x.jpg",
    )
    add("--files-from", metavar="LIST", type=_file, help="a file of paths, one per line or separated by NUL bytes; - is stdin")
    add("--output", metavar="FILE", type=_file, help="write the captions to FILE instead of printing them")
    add(
        "--format",
        choices=("jsonl", "csv", "parquet", "coco", "txt"),
        help="format of --output (default: from its ending); txt writes photo.txt beside photo.jpg and needs no --output",
    )
    add("--attention", metavar="DIR", type=Path, help="also write attention plots to DIR/NAME.attention.png")
    add(
        "--importance",
        metavar="DIR",
        type=Path,
        help="also write plots of attention and importance to DIR/NAME.importance.png; slower",
    )
    add(
        "--num-return-sequences",
        metavar="N",
        type=_count,
        default=1,
        help="captions per image (default: 1); extra ones are printed on tab-indented lines",
    )
    add("--beams", dest="num_beams", type=_count, **_old_name)
    add("--n-best", dest="num_return_sequences", type=_count, **_old_name)
    add("--json", action="store_true", help="print one JSON object per line, with scores and words")
    add(
        "--min-confidence",
        metavar="P",
        type=_probability,
        help="skip captions with a confidence below P (0 to 1); their images are listed on stderr",
    )
    add("--max-words", metavar="N", type=_count, help="longest caption, without the prompt")
    add("--temperature", metavar="T", type=_positive, help="sample captions: below 1 more probable words, above 1 more varied ones")
    add("--top-p", metavar="P", type=_probability, help="sample captions from the most probable words that add up to P (0 to 1)")
    add("--batch-size", metavar="N", type=_count, default=8, help="images per forward pass (default: 8)")
    add(
        "--engine",
        choices=("ray",),
        help="caption folders, Parquet files and WebDataset shards on a Ray cluster; --output is then a folder of Parquet files",
    )
    add("--workers", metavar="N", type=_whole, default=0, help="processes that read images (default: 0, this process)")
    add("--dtype", metavar="NAME", help="data type of the model, such as bfloat16 (default: the checkpoint's)")
    add("--revision", metavar="NAME", help="branch, tag or commit of a Hub repository")
    _add_model_options(add)
    caption.set_defaults(usage_error=caption.error)


def _add_explain(commands: Any) -> None:
    explain = commands.add_parser(
        "explain",
        help="show which regions each word of a caption attended to and depends on",
        description="Writes three files per image to DIR: NAME.html, an interactive page that works offline; NAME.summary.png, the "
        "image with the regions that the words depend on; and NAME.importance.png, one attention map and one importance map per "
        "word. Prints the caption and the names and sizes of the files. Images that cannot be read are skipped with a message on "
        "stderr, and the exit code is then 1.",
    )
    add = explain.add_argument
    add("files", nargs="+", metavar="FILE", help="an image: a path or an http(s) URL; write ./-x.jpg for -x.jpg")
    add("-o", "--output", metavar="DIR", type=Path, required=True, help="the folder to write; replaces only files of earlier runs")
    add("--num-return-sequences", metavar="N", type=_count, default=1, help="captions per image (default: 1)")
    _add_model_options(add)
    explain.set_defaults(usage_error=explain.error)


def _add_model_options(add: Any) -> None:
    """Adds the options that `caption` and `explain` share."""
    add(
        "--model",
        metavar="DIR_OR_NAME",
        help="a folder, also of `attncap export`, or a Hub repository (default: the checkpoint in this package)",
    )
    add("--num-beams", metavar="N", type=_count, help="beam width (default: the model's generation_config.json)")
    add("--prompt", metavar="TEXT", help="the beginning of all captions")
    add("--device", metavar="NAME", help="such as cpu or cuda:1 (default: a GPU if available)")
    add("--allow-private-urls", action="store_true", help="also fetch URLs that lead to private addresses")


def _add_demo(commands: Any) -> None:
    demo = commands.add_parser(
        "demo",
        help="serve a page that captions pictures",
        description="Serves a page on which pictures are captioned, and prints its address. Only this machine can open it unless "
        "--host names another address. Ctrl-C ends it. Uploads are deleted after a few minutes and at the end.",
    )
    demo.add_argument(
        "checkpoint",
        metavar="CHECKPOINT",
        nargs="?",
        help="a folder, also of `attncap export`, or a Hub repository (default: the checkpoint in this package)",
    )
    demo.add_argument("--host", metavar="ADDRESS", default="127.0.0.1", help="address to listen on (default: 127.0.0.1)")
    demo.add_argument("--port", metavar="N", type=_count, help="port (default: the first free one from 7860)")
    demo.add_argument("--device", metavar="NAME", help="such as cpu or cuda:1 (default: a GPU if available)")


def _add_evaluate(commands: Any) -> None:
    evaluate = commands.add_parser(
        "evaluate",
        help="score captions against references",
        description="Prints BLEU, ROUGE-L, CIDEr and diversity. The scores equal those of pycocoevalcap and need no Java. Files "
        "are COCO results or annotations, Karpathy's splits, JSON lines, or a JSON object of captions by id. Missing, duplicate "
        "and empty captions are reported on stderr.",
    )
    add = evaluate.add_argument
    add("--predictions", metavar="FILE", type=_file, required=True, help="one caption per image; - reads stdin")
    add("--references", metavar="FILE", type=_file, required=True, help="one or more captions per image")
    add("--split", metavar="NAME", help="split of a Karpathy file: test, val, train, or several joined by +")
    add("--training", metavar="FILE", type=_file, help="the model's training captions, for the share of novel captions")
    add("--compare", metavar="FILE", type=_file, help="baseline predictions; prints a paired bootstrap test")
    add("--meteor", action="store_true", help="also compute METEOR, with pycocoevalcap and Java")
    add("--spice", action="store_true", help="also compute SPICE, with pycocoevalcap and Java")
    add("--output", metavar="FILE", type=_file, help="also write the scores as JSON; - prints them instead of the table")
    add(
        "--per-image",
        metavar="FILE",
        type=_file,
        help="also write the scores of each image as JSON lines; - prints them instead of the table",
    )


def _add_card(commands: Any) -> None:
    card = commands.add_parser(
        "card",
        help="write a checkpoint's model card",
        description="Writes README.md of a checkpoint from the files in its folder: results.json (written by --eval-data and "
        "--example-images), training.json (written by training), and about.yaml with your own text (title, summary, intended_use, "
        "selection, license, license_name, license_link, repository, base_model, datasets, independent, origins).",
    )
    card.add_argument("checkpoint", metavar="CHECKPOINT", help="the folder of a saved model")
    _add_eval_data(card, required=False)
    card.add_argument("--images", dest="eval_data", type=_file, nargs="+", **_old_name)
    card.add_argument(
        "--example-images", metavar="FILE", nargs="+", default=[], help="images to show with attention and importance plots"
    )
    card.add_argument("--pictures", dest="example_images", nargs="+", **_old_name)


def _add_calibrate(commands: Any) -> None:
    calibrate = commands.add_parser(
        "calibrate",
        help="calibrate the confidence of a checkpoint's captions",
        description="Fits the confidence on half of the captioned images and measures it on the other half. Writes the "
        "calibration to the checkpoint's config.json and a report to calibration.json and calibration.jpg. A caption is good if "
        "its CIDEr is at least 0.5 against the references of its image. Use images that the model was not trained on.",
    )
    calibrate.add_argument("checkpoint", metavar="CHECKPOINT", help="the folder of a saved model")
    _add_eval_data(calibrate, required=True)


def _add_eval_data(command: argparse.ArgumentParser, required: bool) -> None:
    command.add_argument(
        "--eval-data",
        metavar="FILE",
        type=_file,
        nargs="+",
        default=[],
        required=required,
        help="captioned images to evaluate on, in a format that `attncap train` reads; several files are reported separately",
    )
    command.add_argument("--split", metavar="NAME", help="the split to use, if a file has several")
    command.add_argument("--image-dir", metavar="DIR", help="the folder of relative image paths (default: the file's folder)")


def _add_checkpoint_commands(commands: Any) -> None:
    average = commands.add_parser(
        "average",
        help="average the weights of checkpoints",
        description="Writes the mean of the weights of checkpoints that were fine-tuned from the same one, with the processor and "
        "the settings of the last. Compare it with each of them on validation images.",
    )
    average.add_argument("checkpoints", metavar="CHECKPOINT", nargs="+", help="folders of saved models")
    average.add_argument("--output", metavar="DIR", required=True, help="the folder to write")
    average.add_argument("--weights", metavar="N", type=float, nargs="+", help="weight of each checkpoint (default: equal)")

    pack = commands.add_parser("pack", help="store a checkpoint's weights in half precision, which halves its size")
    pack.add_argument("checkpoint", metavar="CHECKPOINT", help="the folder of a saved model")
    pack.add_argument("out", metavar="OUT", help="the folder to write")
    pack.add_argument(
        "--generation",
        metavar="JSON",
        type=_json_object,
        help="""values that replace those of generation_config.json, such as '{"num_beams": 5}'; removes the calibration""",
    )

    export = commands.add_parser(
        "export",
        help="write a folder that captions without torch",
        description="Writes a folder for `attncap caption`. ONNX Runtime or OpenVINO runs it on the CPU, without torch "
        "and transformers. bfloat16 needs OpenVINO. int8 applies to the decoder, with --calibration also to the encoder. "
        "The format web is the format onnx with a page that captions in the browser.",
    )
    export.add_argument("checkpoint", metavar="CHECKPOINT", help="the folder of a saved model, or a Hub repository")
    export.add_argument("out", metavar="OUT", help="the folder to write")
    export.add_argument(
        "--format",
        choices=("onnx", "openvino", "web"),
        default="onnx",
        help="ONNX Runtime, OpenVINO, or a web page (default: onnx)",
    )
    export.add_argument(
        "--dtype", choices=("float32", "bfloat16", "int8"), help="data type (default: int8 with web, otherwise float32)"
    )
    export.add_argument(
        "--calibration", metavar="DIR", help="with int8: a folder of 200 or more photographs, to quantise the encoder too"
    )
    export.add_argument(
        "--onnxruntime-web",
        metavar="DIR_OR_TGZ",
        help="with web: the npm package onnxruntime-web, for machines without npm or network (default: npm downloads it)",
    )

    export_hub = commands.add_parser("export-hub", help="write a folder for the Hugging Face Hub")
    export_hub.add_argument("checkpoint", metavar="CHECKPOINT", help="the folder of a saved model")
    export_hub.add_argument("out", metavar="OUT", help="the folder to write")
    export_hub.add_argument(
        "--space",
        action="store_true",
        help="write a Space instead, which runs `attncap demo`; CHECKPOINT may then also be a folder of `attncap export` or a Hub "
        "repository",
    )


class _OldName(argparse.Action):
    """An option under its old name: sets the new one and prints a warning. Removed in the next release."""

    def __call__(self, parser: Any, namespace: argparse.Namespace, values: Any, option_string: str | None = None) -> None:
        new = f"--{self.dest.replace('_', '-')}"
        print(f"attncap: {option_string} is deprecated: use {new}", file=sys.stderr)
        setattr(namespace, self.dest, values)


_old_name: Any = {"action": _OldName, "default": argparse.SUPPRESS, "help": argparse.SUPPRESS}


def _json_object(text: str) -> dict[str, Any]:
    try:
        value = json.loads(text)
    except ValueError as error:
        raise argparse.ArgumentTypeError(f"'{text}' is not JSON: {error}") from error
    if not isinstance(value, dict):
        raise argparse.ArgumentTypeError(f"'{text}' is not a JSON object, such as {{\"num_beams\": 5}}")
    return value


def _file(text: str) -> str:
    if not text:
        raise argparse.ArgumentTypeError("the file name is empty")
    return text


def _whole(text: str) -> int:
    if not text.isdecimal():
        raise argparse.ArgumentTypeError(f"'{text}' is not a whole number")
    return int(text)


def _positive(text: str) -> float:
    try:
        value = float(text)
    except ValueError:
        value = -1.0
    if not 0 < value < float("inf"):
        raise argparse.ArgumentTypeError(f"'{text}' is not a number above 0")
    return value


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
