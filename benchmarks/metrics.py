"""How fast are the scores, compared with pycocoevalcap?

    pip install "hf_attncap[java]" pyarrow        # and a Java runtime
    python benchmarks/metrics.py --references train.parquet

The candidates are timed in turn, in random order, and their medians are compared. Predictions are captions of other images, chosen
again for each turn.
"""

import argparse
import random
import re
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from coco_caption import SEED, CocoCaption, captions_of, environment

from hf_attncap.atomic import write_json
from hf_attncap.metrics import CaptionMetrics, CiderReward, DocumentFrequencies, ptb, ptb_rules, tokenize

IMAGES, SAMPLES, CALLS = 64, 5, 50  # of the reward

# Both read a file with one caption per line and write one with tokens. Ours runs under the name `attncap`, because the package
# does not import torch then.
OURS = """
import sys
captions, tokens = sys.argv[1:]
sys.argv[0] = "attncap"
from hf_attncap.metrics import tokenize
with open(captions, encoding="utf-8") as captions, open(tokens, "w", encoding="utf-8") as tokens:
    tokens.writelines(" ".join(tokenize(line)) + "\\n" for line in captions.read().split("\\n"))
"""
THEIRS = """
import sys
from pycocoevalcap.tokenizer.ptbtokenizer import PTBTokenizer
with open(sys.argv[1], encoding="utf-8") as captions, open(sys.argv[2], "w", encoding="utf-8") as tokens:
    found = PTBTokenizer().tokenize({0: [{"caption": line} for line in captions.read().split("\\n")]})
    tokens.writelines(line + "\\n" for line in found[0])
"""

Captions = dict[str, list[str]]
Turn = Callable[[dict[str, str]], object]  # the timed work on predictions

# Ours, theirs, and how many times faster ours should be.
COMPARISONS = [
    ("score strings, empty caches", "pycocoevalcap, from strings", 3),
    ("score strings, references prepared, empty word cache", "pycocoevalcap, from strings", 10),
    ("score strings, references prepared", "pycocoevalcap, from strings", 10),
    ("score strings, references prepared", "pycocoevalcap, from tokens of both", None),
    ("tokenise, empty word cache", "pycocoevalcap, tokenise", 1),
    ("tokenise in a new process", "pycocoevalcap, tokenise in a new process", 1),
]


def forget() -> None:
    """Empty the caches of the tokeniser: words, character classes and compiled patterns."""
    for module in (ptb, ptb_rules):
        for thing in vars(module).values():
            if hasattr(thing, "cache_clear"):
                thing.cache_clear()
    re.purge()


def others(references: Captions, seed: int) -> dict[str, str]:
    """A caption of another image for each image."""
    chance = random.Random(seed)
    ids = list(references)
    chance.shuffle(ids)
    captions = {id: chance.choice(references[other]) for id, other in zip(ids, ids[1:] + ids[:1])}
    return {id: captions[id] for id in references}


def turns(coco: CocoCaption, references: Captions, scratch: Path) -> dict[str, Turn]:
    """The candidates by name."""
    metrics, tokens = CaptionMetrics(references), coco.tokenized(references)
    known = {text: words for id, texts in references.items() for text, words in zip(texts, tokens[id])}

    def all_of(predictions: dict[str, str]) -> Captions:
        return {id: [*texts, predictions[id]] for id, texts in references.items()}

    def cold(predictions: dict[str, str]) -> object:
        forget()
        return CaptionMetrics(references).score(predictions)

    def empty_word_cache(predictions: dict[str, str]) -> object:
        forget()
        return metrics.score(predictions)

    def tokenize_all(predictions: dict[str, str]) -> object:
        forget()
        return [tokenize(caption) for captions in all_of(predictions).values() for caption in captions]

    def in_a_new_process(code: str, predictions: dict[str, str]) -> object:
        captions = [" ".join(caption.split("\n")) for captions in all_of(predictions).values() for caption in captions]
        (scratch / "captions").write_text("\n".join(captions), encoding="utf-8")
        command = [sys.executable, "-c", code, str(scratch / "captions"), str(scratch / "tokens")]
        done = subprocess.run(command, capture_output=True, text=True, timeout=600)
        return sys.exit(done.stderr) if done.returncode else done

    def from_tokens(predictions: dict[str, str]) -> object:
        return coco.scored(tokens, {id: [known[caption]] for id, caption in predictions.items()})

    return {
        "pycocoevalcap, from strings": lambda predictions: coco.end_to_end(references, predictions),
        "score strings, empty caches": cold,
        "pycocoevalcap, from tokens of both": from_tokens,
        "score strings, references prepared, empty word cache": empty_word_cache,
        "score strings, references prepared": metrics.score,
        "pycocoevalcap, tokenise": lambda predictions: coco.tokenized(all_of(predictions)),
        "tokenise, empty word cache": tokenize_all,
        "tokenise in a new process": lambda predictions: in_a_new_process(OURS, predictions),
        "pycocoevalcap, tokenise in a new process": lambda predictions: in_a_new_process(THEIRS, predictions),
    }


def measured(coco: CocoCaption, references: Captions, repetitions: int) -> dict[str, list[float]]:
    """Seconds of each candidate's turns."""
    seconds: dict[str, list[float]] = {}
    chance = random.Random(SEED)
    with tempfile.TemporaryDirectory() as scratch:
        candidates = turns(coco, references, Path(scratch))
        for repetition in range(repetitions):
            predictions = others(references, SEED + repetition)
            for name in chance.sample(list(candidates), len(candidates)):
                start = time.perf_counter()
                candidates[name](predictions)
                seconds.setdefault(name, []).append(time.perf_counter() - start)
    return seconds


def rewards(references: Captions) -> dict[str, list[float]]:
    """Milliseconds per call of the reward, from lists of tokens and from strings, including the first calls."""
    tokens = {id: [tokenize(caption) for caption in captions] for id, captions in references.items()}
    frequencies = DocumentFrequencies.from_references(list(tokens.values()), end_token=True)
    reward = CiderReward(tokens, frequencies)
    every = [caption for captions in tokens.values() for caption in captions]
    chance = random.Random(SEED)
    milliseconds: dict[str, list[float]] = {"from tokens": [], "from strings": []}
    for _ in range(CALLS):
        ids = [id for id in chance.sample(list(tokens), min(IMAGES, len(tokens))) for _ in range(SAMPLES)]
        samples = chance.choices(every, k=len(ids))
        texts, ended = [" ".join(sample) for sample in samples], [chance.random() < 0.9 for _ in ids]
        start = time.perf_counter()
        reward.reward(ids, samples, ended)
        between = time.perf_counter()
        reward.reward(ids, [text.split() for text in texts], ended)
        end = time.perf_counter()
        milliseconds["from tokens"].append(1000 * (between - start))
        milliseconds["from strings"].append(1000 * (end - between))
    return milliseconds


def compared(seconds: dict[str, list[float]]) -> list[dict[str, Any]]:
    """Medians of each comparison, their ratio, and the lowest and highest ratio of two turns with the same predictions."""
    rows = []
    for ours, theirs, goal in COMPARISONS:
        medians = statistics.median(seconds[ours]), statistics.median(seconds[theirs])
        ratios = [slow / quick for quick, slow in zip(seconds[ours], seconds[theirs])]
        rows.append(
            {
                "ours": ours,
                "theirs": theirs,
                "ours_s": round(medians[0], 4),
                "theirs_s": round(medians[1], 4),
                "times_faster": round(medians[1] / medians[0], 2),
                "lowest": round(min(ratios), 2),
                "highest": round(max(ratios), 2),
                "goal": goal,
            }
        )
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--references", required=True, help="Parquet file with a column `captions`, a list of texts")
    parser.add_argument("--images", type=int, default=5000, help="number of its rows to use (default: %(default)s)")
    parser.add_argument("--repetitions", type=int, default=5, help="turns per candidate (default: %(default)s)")
    parser.add_argument("--output", help="file for the results, as JSON")
    args = parser.parse_args()
    coco, around = CocoCaption(), environment()
    references = dict(list(captions_of(args.references).items())[: args.images])
    if len(references) < args.images:
        sys.exit(f"{args.references} has only {len(references)} of {args.images} rows: lower --images.")

    milliseconds = rewards(references)
    seconds = measured(coco, references, args.repetitions)
    rows = compared(seconds)
    count = sum(map(len, references.values()))
    print(f"{len(references)} images, {count} references; medians of {args.repetitions} turns on {around['cpus']} CPUs\n")
    print("| ours | s | against | s | times faster | lowest to highest | goal |")
    print("|---|---:|---|---:|---:|---:|---:|")
    for row in rows:
        print(
            f"| {row['ours']} | {row['ours_s']:.3f} | {row['theirs']} | {row['theirs_s']:.3f} | {row['times_faster']:.1f} "
            f"| {row['lowest']:.1f} to {row['highest']:.1f} | {row['goal'] or ''} |"
        )
    print(f"\nReward of {IMAGES} images with {SAMPLES} samples each, {CALLS} calls; goal: below 20 ms")
    for name, times in milliseconds.items():
        print(f"{name}: median {statistics.median(times):.1f} ms, worst {max(times):.1f} ms")
    if args.output:
        result = {
            **around,
            "images": len(references),
            "references": count,
            "compared": rows,
            "seconds": {name: [round(value, 4) for value in values] for name, values in seconds.items()},
            "reward_ms": {
                name: {"median": round(statistics.median(times), 2), "worst": round(max(times), 2)}
                for name, times in milliseconds.items()
            },
        }
        write_json(args.output, result)


if __name__ == "__main__":
    main()
