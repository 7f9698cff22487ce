"""How many captions are grammatical: the share that link-grammar's English grammar parses in full, no word left over.

    apt-get install link-grammar
    python benchmarks/grammar.py results/*.json --validation_file validation.parquet --output grammar.json

The results are those of `ablation.py`, whose table takes the output as a column. Rows that its plan compares are compared by the
paired bootstrap. The validation file gives two anchors: what people wrote, and the same captions with their words shuffled.

The grammar knows more sentences than people write: of 1,000 images' captions 91 % parse as people wrote them and 10 % shuffled.
It finds cut captions and missing agreement, but it forgives most doubled words, which `repeated_words` counts, and any single
noun that could be a verb. People's share is no ceiling: simple sentences parse more often than theirs.
"""

import argparse
import json
import random
import re
import shutil
import subprocess
import sys
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import yaml
from coco_caption import captions_of

from hf_attncap.metrics.significance import means, paired_bootstrap

PLAN = Path(__file__).with_name("ablation.yaml")
SEED = 0

# A caption is grammatical as a sentence, or where a noun phrase can stand ("a dog in the snow" is no sentence). "There may be"
# takes one and many; "this is a picture of" and "we see" let twice as many errors of agreement pass. The blank before the
# sentence keeps a leading "!" or "%" from being read as a command or a comment.
FORMS = (" {}", "there may be {}")
# Read from standard input, an answer to each line. Not -batch, which only reports failures: silence, as after a sentence of
# too many words, would count as a parse. Spelling is not corrected, so that the answer does not hang on installed
# dictionaries. The timeout is in seconds of processor time.
OPTIONS = ("en", "--quiet", "-verbosity=1", "-echo=1", "-graphics=0", "-null=0", "-panic=0", "-spell=0", "-timeout=5")
MAX_BYTES = 2000  # link-parser ends at a line of more than 2,046
_FOUND = re.compile(r"Found \d+ linkages? \((\d+) .*had no P\.P\. violations\)")


def parse_in_full(captions: Sequence[str]) -> list[bool]:
    """Whether link-grammar parses each caption in full, by one run of `link-parser`.

    Captions are read in lower case and without the mark at their end, so that people's and a model's are treated alike. False
    as well for an empty caption, one over `MAX_BYTES` bytes and one whose parse runs out of time.

    Raises:
        SystemExit: `link-parser` is not installed.
        RuntimeError: it failed, or did not answer for every caption.
    """
    texts = [_plain(caption) for caption in captions]
    asked = [text for text in dict.fromkeys(texts) if text and len(text.encode()) <= MAX_BYTES]
    sentences = [form.format(text) for text in asked for form in FORMS]
    answers = _answers(_link_parser(*OPTIONS, given="".join(f"{sentence}\n" for sentence in sentences)), sentences)
    parsed = {text for place, text in enumerate(asked) if any(answers[place * len(FORMS) : (place + 1) * len(FORMS)])}
    return [text in parsed for text in texts]


def shuffled(captions: Sequence[str]) -> list[str]:
    """Each caption's words in another order, the same at every call, without the marks between them."""
    chance = random.Random(SEED)
    words = [re.findall(r"[\w'-]+", caption) for caption in captions]
    return [" ".join(chance.sample(own, len(own))) for own in words]


def compared(files: Mapping[str, Mapping[str, Any]], parsed: Mapping[str, Mapping[str, bool]]) -> list[dict[str, Any]]:
    """The rows of the plan against their neighbours, each image's answers averaged over the row's seeds."""
    plan = yaml.safe_load(PLAN.read_text(encoding="utf-8"))["rows"]
    rows: dict[str, list[Mapping[str, bool]]] = {}
    for name, content in files.items():
        rows.setdefault(content["row"], []).append(parsed[name])
    found = []
    for row, runs in rows.items():
        neighbour = plan.get(row, {}).get("against")
        if neighbour not in rows:
            continue
        images = sorted(runs[0])
        if any(sorted(run) != images for run in (*runs, *rows[neighbour])):
            sys.exit(f"the results of {row} and {neighbour} are of different images; caption the same images in all of them")
        averaged = [np.mean([[run[id] for id in images] for run in side], axis=0) for side in (rows[neighbour], runs)]
        comparison = paired_bootstrap(*([means({"full_parse": values})] for values in averaged))["full_parse"]
        found.append({"row": row, "against": neighbour, **asdict(comparison)})
    return found


def _plain(caption: str) -> str:
    printable = "".join(letter if letter.isprintable() else " " for letter in caption)
    return " ".join(printable.split()).rstrip(" .!?").lower()


def _link_parser(*options: str, given: str = "") -> str:
    """What link-parser says to `given`."""
    if not (program := shutil.which("link-parser")):
        sys.exit("There is no program link-parser; install link-grammar, on Debian and Ubuntu by: apt-get install link-grammar")
    ended = subprocess.run([program, *options], input=given, capture_output=True, encoding="utf-8", errors="replace")
    if ended.returncode:
        raise RuntimeError(f"link-parser ended with {ended.returncode}: {ended.stderr.strip()[-500:]}")
    return ended.stdout


def _answers(output: str, sentences: Sequence[str]) -> list[bool]:
    """The answer to each sentence, which follows the sentence itself; none is a no."""
    answers: list[bool] = []
    for line in output.split("\n"):
        if len(answers) < len(sentences) and line == sentences[len(answers)]:
            answers.append(False)
        elif answers and (found := _FOUND.fullmatch(line)):
            answers[-1] = int(found[1]) > 0
    if len(answers) < len(sentences):
        raise RuntimeError(f"link-parser gave no answer to {sentences[len(answers)]!r}: {output.strip()[-500:]}")
    return answers


def _read(file: Path) -> dict[str, Any]:
    content = json.loads(file.read_text(encoding="utf-8"))
    if missing := {"row", "captions"} - content.keys():
        sys.exit(f"{file} has no {' and no '.join(sorted(missing))}; give results files of ablation.py")
    return content


def _share(answers: Sequence[bool]) -> dict[str, Any]:
    return {"captions": len(answers), "full_parse": sum(answers) / max(len(answers), 1)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("results", nargs="+", type=Path, help="results files of ablation.py")
    parser.add_argument("--validation_file", help="a Parquet file with a column `captions`, several texts a row, for the anchors")
    parser.add_argument("--output", type=Path, help="a file to write the shares to, as JSON")
    args = parser.parse_args()
    files = {file.stem: _read(file) for file in args.results}
    if len(files) < len(args.results):
        sys.exit("Two of the results files have the same name; results are told apart by the names of their files.")

    parsed = {name: dict(zip(found["captions"], parse_in_full([*found["captions"].values()]))) for name, found in files.items()}
    failed = {name: {id: files[name]["captions"][id] for id, good in own.items() if not good} for name, own in parsed.items()}
    results = {name: {**_share([*own.values()]), "unparsed": failed[name]} for name, own in parsed.items()}
    anchors = {}
    if args.validation_file:
        people = [caption for captions in captions_of(args.validation_file).values() for caption in captions]
        anchors = {"people": _share(parse_in_full(people)), "people, shuffled": _share(parse_in_full(shuffled(people)))}
    comparisons = compared(files, parsed)

    print("| captions | number | full parse |\n|---|---:|---:|")
    for name, share in {**results, **anchors}.items():
        print(f"| {name} | {share['captions']} | {100 * share['full_parse']:.1f} % |")
    for found in comparisons:
        interval = f"{100 * found['low']:+.1f} to {100 * found['high']:+.1f}"
        print(f"{found['row']} against {found['against']}: {100 * found['difference']:+.1f} ({interval}), p {found['p']:.4f}")
    if args.output:
        version = _link_parser("--version").splitlines()[0].removeprefix("Version: ")
        content = {"link_grammar": version, "forms": FORMS, "results": results, "anchors": anchors, "compared": comparisons}
        args.output.write_text(json.dumps(content, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")


if __name__ == "__main__":
    try:
        main()
    except OSError as error:
        sys.exit(f"error: {error}")
