"""How many captions are grammatical? The share that link-grammar's English grammar parses completely.

    apt-get install link-grammar
    python benchmarks/grammar.py results/*.json --validation_file validation.parquet --output grammar.json

The results are those of `ablation.py`, whose table can show the output as a column. Rows that `ablation.yaml` compares are compared
by the paired bootstrap. The validation file gives two baselines: human captions, and the same captions with shuffled words.

The grammar accepts more than correct sentences: for 1,000 images, 91 % of the human captions parse and 10 % of the shuffled ones.
It rejects truncated captions and wrong agreement, but accepts most repeated words (which `repeated_words` counts) and single nouns
that can be verbs. The share of human captions is not an upper bound, because simple sentences parse more often.
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
from coco_caption import SEED, captions_of

from hf_attncap.atomic import write_json
from hf_attncap.metrics.significance import means, paired_bootstrap

PLAN = Path(__file__).with_name("ablation.yaml")

# A caption is grammatical as a sentence or as a noun phrase ("a dog in the snow" is not a sentence). "There may be" accepts
# singular and plural; "this is a picture of" and "we see" accept twice as many errors of agreement. Without the space before the
# sentence, link-parser would read a leading "!" or "%" as a command or a comment.
FORMS = (" {}", "there may be {}")
# One answer per line of standard input. With -batch, only failures are reported, so a sentence without an answer (such as one with
# too many words) would count as parsed. Spelling is not corrected, because that depends on the installed dictionaries. The timeout
# is in seconds of CPU time.
OPTIONS = ("en", "--quiet", "-verbosity=1", "-echo=1", "-graphics=0", "-null=0", "-panic=0", "-spell=0", "-timeout=5")
MAX_BYTES = 2000  # link-parser exits at a line of more than 2,046
_FOUND = re.compile(r"Found \d+ linkages? \((\d+) .*had no P\.P\. violations\)")


def parse_in_full(captions: Sequence[str]) -> list[bool]:
    """Whether link-grammar parses each caption completely, in one run of `link-parser`.

    Captions are converted to lower case, without the mark at their end, so that human and generated captions are treated alike.
    False for an empty caption, one over `MAX_BYTES` bytes, and one whose parse exceeds the time limit.

    Raises:
        SystemExit: `link-parser` is not installed.
        RuntimeError: it failed, or did not answer every caption.
    """
    texts = [_plain(caption) for caption in captions]
    asked = [text for text in dict.fromkeys(texts) if text and len(text.encode()) <= MAX_BYTES]
    sentences = [form.format(text) for text in asked for form in FORMS]
    answers = _answers(_link_parser(*OPTIONS, given="".join(f"{sentence}\n" for sentence in sentences)), sentences)
    parsed = {text for place, text in enumerate(asked) if any(answers[place * len(FORMS) : (place + 1) * len(FORMS)])}
    return [text in parsed for text in texts]


def shuffled(captions: Sequence[str]) -> list[str]:
    """Each caption with shuffled words and without punctuation, the same at every call."""
    chance = random.Random(SEED)
    words = [re.findall(r"[\w'-]+", caption) for caption in captions]
    return [" ".join(chance.sample(own, len(own))) for own in words]


def compared(files: Mapping[str, Mapping[str, Any]], parsed: Mapping[str, Mapping[str, bool]]) -> list[dict[str, Any]]:
    """Compare each row with the row `against`, with the answers of each image averaged over the seeds."""
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
            sys.exit(f"error: {row} and {neighbour} have results of different images; caption the same images in both")
        averaged = [np.mean([[run[id] for id in images] for run in side], axis=0) for side in (rows[neighbour], runs)]
        comparison = paired_bootstrap(*([means({"full_parse": values})] for values in averaged))["full_parse"]
        found.append({"row": row, "against": neighbour, **asdict(comparison)})
    return found


def _plain(caption: str) -> str:
    printable = "".join(letter if letter.isprintable() else " " for letter in caption)
    return " ".join(printable.split()).rstrip(" .!?").lower()


def _link_parser(*options: str, given: str = "") -> str:
    """The output of link-parser for the input `given`."""
    if not (program := shutil.which("link-parser")):
        sys.exit("error: no program link-parser; install link-grammar (Debian and Ubuntu: apt-get install link-grammar)")
    ended = subprocess.run([program, *options], input=given, capture_output=True, encoding="utf-8", errors="replace")
    if ended.returncode:
        raise RuntimeError(f"link-parser ended with {ended.returncode}: {ended.stderr.strip()[-500:]}")
    return ended.stdout


def _answers(output: str, sentences: Sequence[str]) -> list[bool]:
    """The answer to each sentence, which follows the sentence in the output; no answer means no parse."""
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
        sys.exit(f"error: {file} has no {' and no '.join(sorted(missing))}; give results files of ablation.py")
    return content


def _share(answers: Sequence[bool]) -> dict[str, Any]:
    return {"captions": len(answers), "full_parse": sum(answers) / max(len(answers), 1)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("results", nargs="+", type=Path, help="results files of ablation.py")
    parser.add_argument("--validation_file", help="Parquet file with a column `captions`, a list of texts, for the baselines")
    parser.add_argument("--output", type=Path, help="file for the results, as JSON")
    args = parser.parse_args()
    files = {file.stem: _read(file) for file in args.results}
    if len(files) < len(args.results):
        sys.exit("error: two of the results files have the same name; rename one.")

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
        write_json(args.output, content)


if __name__ == "__main__":
    try:
        main()
    except OSError as error:
        sys.exit(f"error: {error}")
