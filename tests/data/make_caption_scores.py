"""Makes caption_scores.json: captions as tokens, and what pycocoevalcap gives for them.

Run by hand, with `pip install pycocoevalcap pyarrow` and a Java runtime (for its tokenizer), on a table with a column `captions`
of five texts a row, such as Flickr8k's validation split:

    python tests/data/make_caption_scores.py validation.parquet

The tests themselves need none of these.
"""

import json
import sys
from pathlib import Path

import pyarrow.parquet as parquet  # pyright: ignore[reportMissingImports]
from pycocoevalcap.bleu.bleu import Bleu  # pyright: ignore[reportMissingImports]
from pycocoevalcap.cider.cider import Cider  # pyright: ignore[reportMissingImports]
from pycocoevalcap.rouge.rouge import Rouge  # pyright: ignore[reportMissingImports]
from pycocoevalcap.tokenizer.ptbtokenizer import PTBTokenizer  # pyright: ignore[reportMissingImports]

OUT = Path(__file__).with_name("caption_scores.json")
REAL = 46  # images of the table

# name: prediction, references
MADE_UP = {
    "empty prediction": ("", ["a dog runs on the beach", "the dog is running"]),
    "empty prediction, empty reference": ("", ["", "a dog runs"]),
    "empty reference": ("a dog runs fast", ["", "a dog runs"]),
    "only an empty reference": ("a dog runs fast", [""]),
    "one word, right": ("dog", ["a dog runs on the beach", "dog"]),
    "one word, wrong": ("zebra", ["a dog runs on the beach", "the dog is running"]),
    "three words": ("a dog runs", ["a dog runs on the beach", "a dog runs"]),
    "longer than all": (
        "a man and a man and a man ride a red bike up a steep hill in the rain",
        ["a man rides a bike", "a man on a bike"],
    ),
    "shorter than all": ("a man rides", ["a man rides a bike up a hill", "someone is riding a red bike in the rain"]),
    "single reference": ("two children play in the snow", ["two kids play in the deep snow"]),
    "tie of lengths, shorter first": ("a girl in a red dress", ["a girl in red", "a little girl wears a red summer dress"]),
    "tie of lengths, longer first": ("a girl in a red dress", ["the girl wears a red dress today", "a girl in a dress"]),
    "equal to a reference": ("two dogs run in the park", ["dogs", "two dogs run in the park", "dogs play outside"]),
    "one word again and again": ("a a a a a a", ["a dog and a cat and a bird", "a dog"]),
    "a bigram again and again": ("the dog the dog the dog", ["the dog sees the dog", "the dog and the cat"]),
    "words no reference has": ("quux foo bar quux foo baz", ["a boy jumps into the pool", "a boy in the air"]),
}
SHARED = {
    "shared 1": ("a dog runs", ["a dog is running", "a dog runs fast"]),
    "shared 2": ("a dog", ["a dog sleeps", "the sleeping animal is a dog"]),
    "shared 3": ("a cat and a dog play", ["a dog plays with a cat"]),
}


def real(table: str) -> dict[str, tuple[str, list[str]]]:
    """Tokenized captions of a table's first images: one is the prediction, the others are references."""
    rows = parquet.read_table(table, columns=["captions"]).slice(0, REAL).to_pydict()["captions"]
    tokenized = PTBTokenizer().tokenize({i: [{"caption": text} for text in texts] for i, texts in enumerate(rows)})
    found = {}
    for i, texts in tokenized.items():
        left_out = i % len(texts)
        found[f"real {i}"] = (texts[left_out], texts[:left_out] + texts[left_out + 1 :])
    return found


def scored(images: dict[str, tuple[str, list[str]]]) -> dict[str, object]:
    """The captions of one corpus and their scores."""
    references = {name: references for name, (_, references) in images.items()}
    predictions = {name: [prediction] for name, (prediction, _) in images.items()}
    bleu, bleu_per_image = Bleu(4).compute_score(references, predictions, verbose=0)
    rouge, rouge_per_image = Rouge().compute_score(references, predictions)
    cider, cider_per_image = Cider().compute_score(references, predictions)
    per_image = zip(zip(*bleu_per_image), rouge_per_image.tolist(), cider_per_image.tolist())
    return {
        "corpus": {"bleu": bleu, "rouge_l": float(rouge), "cider": float(cider)},
        "images": [
            {"name": name, "prediction": prediction, "references": references, "bleu": b, "rouge_l": r, "cider": c}
            for (name, (prediction, references)), (b, r, c) in zip(images.items(), per_image)
        ],
    }


if __name__ == "__main__":
    corpora = {
        "mixed": scored(real(sys.argv[1]) | MADE_UP),
        "one image": scored({"one image": MADE_UP["three words"]}),
        "words in every image": scored(SHARED),
    }
    OUT.write_text(json.dumps(corpora, indent=0, ensure_ascii=False) + "\n", encoding="utf-8")
