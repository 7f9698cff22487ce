"""How long does `generate` take with this package's loops, with transformers' loops, and how much of that is overhead?

    python -m benchmarks.speed.decoding --output decoding.json

The regions of one image are given and 16 tokens are generated. The overhead is the time of a call of `generate` outside of its
search.
"""

import statistics
import time
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any
from unittest import mock

import torch

from hf_attncap import Captioner, generation_attncap
from hf_attncap.captioner import CHECKPOINT
from hf_attncap.search_attncap import greedy_search

from .measure import MAX_CALLS, Candidate, Row, create_parser, parse_options, report, time_candidates
from .models import TOKENS, encode, generate

BEAMS = (1, 3, 5)
# Without banned tokens, and with the length penalty that is the default of transformers.
PLAIN = {"no_repeat_ngram_size": 0, "repeatable_token_ids": None, "suppress_tokens": None, "length_penalty": 1.0}
COLUMNS = {
    "settings": "settings",
    "beams": "beams",
    "name": "loop",
    "dtype": "type",
    "ms": "ms",
    "times_as_fast": "times as fast as transformers' loop",
    "overhead_ms": "overhead per call, ms",
}


def measure_overhead(model: Any, regions: torch.Tensor, **settings: Any) -> float:
    """The milliseconds that `generate` spends outside greedy search: the median over `MAX_CALLS` calls."""
    searches: list[float] = []

    def timed_search(*args: Any) -> Any:
        start = time.perf_counter()
        found = greedy_search(*args)
        searches.append(time.perf_counter() - start)
        return found

    generate(model, regions, num_beams=1, **settings)  # fills the caches
    calls = []
    with mock.patch.object(generation_attncap, "greedy_search", timed_search):
        for _ in range(MAX_CALLS):
            start = time.perf_counter()
            generate(model, regions, num_beams=1, **settings)
            calls.append(time.perf_counter() - start)
    return 1000 * statistics.median(call - search for call, search in zip(calls, searches, strict=True))


def generate_by_transformers(model: Any, regions: torch.Tensor, **settings: Any) -> torch.Tensor:
    """`generate` with transformers' loops."""
    with mock.patch.object(generation_attncap, "is_supported", lambda *_: False):
        return generate(model, regions, **settings)


def measure_dtype(checkpoint: Path, dtype: str, beams: Sequence[int], args: Any) -> list[Row]:
    """The rows of one data type."""
    captioner = Captioner.from_pretrained(checkpoint, device=args.device, dtype=dtype)
    model: Any = captioner.model
    side = captioner.processor.image_processor.size["height"]
    torch.manual_seed(0)
    regions = encode(model, torch.randn(1, 3, side, side, device=args.device))  # (1, N, C)
    length = {"max_new_tokens": args.tokens, "min_new_tokens": args.tokens}
    candidates: dict[str, Candidate] = {}
    cases = {}
    for settings, changes in (("plain", PLAIN), ("the checkpoint's", {})):
        for count in beams:
            for fast in (False, True):
                name = f"{settings} {count} {fast}"
                cases[name] = settings, count, fast
                loop = generate if fast else generate_by_transformers
                candidates[name] = partial(loop, model, regions, num_beams=count, **length, **changes)
    found = time_candidates(candidates, args)
    rows: list[Row] = []
    for name, (settings, count, fast) in cases.items():
        row = {"settings": settings, "beams": count, "name": "this package" if fast else "transformers", "dtype": dtype}
        row |= found[name]
        if fast:
            row["times_as_fast"] = round(found[f"{settings} {count} False"]["ms"] / row["ms"], 3)
        if fast and count == 1 and settings == "plain":
            row["overhead_ms"] = round(measure_overhead(model, regions, **length, **PLAIN), 3)
        rows.append(row)
    return rows


def main(argv: Sequence[str] | None = None) -> None:
    options = create_parser(__doc__, __file__)
    options.add_argument("--checkpoint", type=Path, default=CHECKPOINT, help="default: the released checkpoint")
    options.add_argument("--tokens", type=int, default=TOKENS, help="generated tokens (default: %(default)s)")
    options.add_argument("--beams", type=int, nargs="+", default=BEAMS, help="beam widths (default: 1 3 5)")
    args = parse_options(options, argv)
    rows = [
        row
        for dtype in (("float32",) if args.quick else ("float32", "bfloat16"))
        for row in measure_dtype(args.checkpoint, dtype, args.beams, args)
    ]
    report(args, COLUMNS, rows, tokens=args.tokens)


if __name__ == "__main__":
    main()
