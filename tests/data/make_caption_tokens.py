"""Makes caption_tokens.json.xz: what pycocoevalcap's tokeniser makes of captions.

Run by hand, with `pip install pycocoevalcap pyarrow` and a Java runtime, on tables with a column `captions` of several texts a
row, such as Flickr8k's splits; of these, the captions of more than plain words and a full stop are kept:

    python tests/data/make_caption_tokens.py train.parquet validation.parquet

It compares our tokens for every caption of the tables with Java's, kept or not, and fails if any differ. The tests themselves
need none of these.
"""

import json
import lzma
import re
import sys
from pathlib import Path

import pyarrow.parquet as parquet  # pyright: ignore[reportMissingImports]
from pycocoevalcap.tokenizer.ptbtokenizer import PTBTokenizer  # pyright: ignore[reportMissingImports]

sys.path[:0] = [str(Path(__file__).parents[2]), str(Path(__file__).parents[1] / "metrics")]

from odd_captions import CHOSEN, random_captions  # noqa: E402 # pyright: ignore[reportMissingImports]

from hf_attncap.metrics import tokenize  # noqa: E402

OUT = Path(__file__).with_name("caption_tokens.json.xz")
PLAIN = re.compile("[A-Za-z ]+( ?[.])? *")


def java_tokens(captions: list[str]) -> list[str]:
    """Each caption's tokens, joined by spaces. A word stands between two captions: the tokeniser reads on across lines."""
    spaced = {i: [{"caption": caption}, {"caption": "x"}] for i, caption in enumerate(captions)}
    return [
        tokens for tokens, x in PTBTokenizer().tokenize(spaced).values() if x == "x" or sys.exit(f"lines are lost at {tokens!r}")
    ]


def main(tables: list[str]) -> None:
    captions = [
        text for path in tables for row in parquet.read_table(path, columns=["captions"]).to_pylist() for text in row["captions"]
    ]
    tokens = java_tokens(captions)
    differences = [(text, ours, java) for text, java in zip(captions, tokens) if (ours := " ".join(tokenize(text))) != java]
    print(f"{len(captions)} captions of the tables, {len(differences)} differ", *differences, sep="\n")
    odd = {text: java for text, java in zip(captions, tokens) if not PLAIN.fullmatch(text)}
    content = {"tables": odd, "chosen": java_tokens(CHOSEN), "random": java_tokens(random_captions())}
    for name, texts in (("chosen", CHOSEN), ("random", random_captions())):
        differ = [(text, ours, java) for text, java in zip(texts, content[name]) if (ours := " ".join(tokenize(text))) != java]
        print(f"{len(texts)} {name}, {len(differ)} differ", *differ[:40], sep="\n")
        differences += differ
    OUT.write_bytes(lzma.compress(json.dumps(content, ensure_ascii=False).encode(), preset=9))
    print(OUT.stat().st_size, "bytes")
    sys.exit(bool(differences))


if __name__ == "__main__":
    main(sys.argv[1:])
