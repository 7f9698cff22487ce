"""Do the scores equal pycocoevalcap's? Compares corpora and single images, with generated, human and deliberately bad predictions.

pip install "hf_attncap[java]" pyarrow        # and a Java runtime
python benchmarks/metrics_agreement.py --references train.parquet --predictions predictions.json
"""

import argparse
import json
import random
import sys
from pathlib import Path
from typing import Any

import numpy as np
from coco_caption import NAMES, SEED, CocoCaption, captions_of, environment

from hf_attncap.atomic import write_json
from hf_attncap.metrics import CaptionMetrics, tokenize

UNICODE = [
    "Ein Mädchen läuft über die Straße",
    "два человека и собака",
    "東京の犬 😀",
    "“a dog’s” life – half ½ … £5",
    "ça va? ¿qué? ﬁne",
]
MARKS = ["...", "!!", "( )", "- -- ---", "' \" ``", ", . ; : ?", "&amp; @ # $ %", "<b> </b>"]


class Corpus:
    """Images with references and a prediction."""

    def __init__(self) -> None:
        self.references: dict[str, list[str]] = {}
        self.predictions: dict[str, str] = {}

    def add(self, id: str, references: list[str], prediction: str) -> None:
        self.references[id], self.predictions[id] = references, prediction


def from_file(path: str) -> Corpus:
    """A JSON list of objects with `image_id`, `caption` and `references`."""
    corpus = Corpus()
    for number, row in enumerate(json.loads(Path(path).read_text(encoding="utf-8")), 1):
        if missing := {"image_id", "caption", "references"} - row.keys():
            sys.exit(f"{path}, row {number} has no {' and no '.join(sorted(missing))}.")
        corpus.add(str(row["image_id"]), row["references"], row["caption"])
    return corpus


def leave_one_out(captions: dict[str, list[str]]) -> Corpus:
    """One of each image's captions as its prediction."""
    corpus = Corpus()
    for number, (id, texts) in enumerate(captions.items()):
        place = number % len(texts)
        corpus.add(id, texts[:place] + texts[place + 1 :], texts[place])
    return corpus


def bad_predictions(captions: dict[str, list[str]]) -> Corpus:
    """Bad predictions of many kinds, a different kind for each image in turn."""
    chance = random.Random(SEED)

    def shuffled(text: str) -> str:
        words = text.split()
        return " ".join(chance.sample(words, len(words)))

    def marked(text: str) -> str:
        return "".join(word + chance.choice([" ", ", ", "-", ". ", '" ', "'s ", "; ", "/"]) for word in text.split())

    ways = [
        lambda text: "",
        lambda text: "   ",
        lambda text: text.split()[0],
        lambda text: "zebra",
        lambda text: "a man in a red shirt",
        shuffled,
        lambda text: f"{text} {text} {text}",
        lambda text: "a " * chance.randrange(1, 40),
        lambda text: text.upper(),
        marked,
        lambda text: chance.choice(MARKS),
        lambda text: chance.choice(UNICODE),
        lambda text: f"{chance.choice(UNICODE)} {text}",
        lambda text: " ".join(map(str, [chance.randrange(2000), chance.random(), "1/2", "U.S.", "can't", "2:30 p.m."])) + text,
    ]
    corpus = Corpus()
    for number, (id, texts) in enumerate(captions.items()):
        corpus.add(id, texts, ways[number % len(ways)](chance.choice(texts)))
    return corpus


def agreement(coco: CocoCaption, name: str, corpus: Corpus) -> dict[str, Any]:
    """Both scores of one corpus, from strings, and their differences."""
    texts = {id: [*references, corpus.predictions[id]] for id, references in corpus.references.items()}
    ours = CaptionMetrics(corpus.references).score(corpus.predictions)
    references, predictions = (
        coco.tokenized(corpus.references),
        coco.tokenized({id: [text] for id, text in corpus.predictions.items()}),
    )
    theirs = coco.scored(references, predictions)
    otherwise = [
        (text, words)
        for id in texts
        for text, words in zip(texts[id], [*references[id], *predictions[id]])
        if " ".join(tokenize(text)) != words
    ]
    scores = {
        score: {
            "ours": ours[score],
            "pycocoevalcap": theirs.corpus[score],
            "difference": abs(ours[score] - theirs.corpus[score]),
            "largest_of_an_image": float(np.abs(ours.per_image[score] - theirs.per_image[score]).max()),
        }
        for score in NAMES
    }
    return {
        "name": name,
        "images": len(texts),
        "captions": sum(map(len, texts.values())),
        "tokenised_otherwise": [{"caption": text, "ours": " ".join(tokenize(text)), "java": words} for text, words in otherwise],
        "scores": scores,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--references", required=True, help="Parquet file with a column `captions`, a list of texts")
    parser.add_argument(
        "--predictions", nargs="*", default=[], help="JSON files: lists of objects with image_id, caption and references"
    )
    parser.add_argument("--output", help="file for the results, as JSON")
    args = parser.parse_args()
    coco, around, captions = CocoCaption(), environment(), captions_of(args.references)
    corpora = {Path(path).name: from_file(path) for path in args.predictions}
    corpora |= {"references, one left out": leave_one_out(captions), "bad predictions": bad_predictions(captions)}
    results = [agreement(coco, name, corpus) for name, corpus in corpora.items()]

    print("| predictions | images | tokenised differently | score | ours | pycocoevalcap | difference | largest of an image |")
    print("|---|---:|---:|---|---:|---:|---:|---:|")
    for result in results:
        for score, values in result["scores"].items():
            print(
                f"| {result['name']} | {result['images']} | {len(result['tokenised_otherwise'])} of {result['captions']} | {score} "
                f"| {values['ours']:.6f} | {values['pycocoevalcap']:.6f} "
                f"| {values['difference']:.1e} | {values['largest_of_an_image']:.1e} |"
            )
    if args.output:
        write_json(args.output, {**around, "corpora": results})


if __name__ == "__main__":
    main()
