"""How long does `generate` take with this package's loops, with transformers' loops, and how much of that is overhead?

    python -m benchmarks.speed.decoding --output decoding.json

The regions of one image are given and 16 tokens are generated. "bare steps" is greedy search without `generate`. The overhead of a
call of `generate` is its time minus that of the bare steps.
"""

from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any
from unittest import mock

import torch

from hf_attncap import AttnCapForConditionalGeneration, Captioner, generation_attncap
from hf_attncap.cache_attncap import AttnCapCache
from hf_attncap.captioner import CHECKPOINT

from .measure import Candidate, Row, create_parser, parse_options, report, time_candidates
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


@torch.inference_mode()
def bare_steps(model: AttnCapForConditionalGeneration, regions: torch.Tensor, tokens: int) -> torch.Tensor:
    """Greedy search without logits processors and without `generate`."""
    decoder, cache = model.model.decoder, AttnCapCache()
    words = torch.full((regions.shape[0], 1), model.config.decoder_start_token_id, device=regions.device)  # (B, 1)
    for _ in range(tokens):
        out: Any = decoder(words, regions, past=cache)
        words = model.lm_head(out.last_hidden_state[:, -1]).argmax(dim=-1, keepdim=True)  # (B, 1)
    return words


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
    candidates: dict[str, Candidate] = {"bare": partial(bare_steps, model, regions, args.tokens)}
    cases = {}
    for settings, changes in (("plain", PLAIN), ("the checkpoint's", {})):
        for count in beams:
            for fast in (False, True):
                name = f"{settings} {count} {fast}"
                cases[name] = settings, count, fast
                loop = generate if fast else generate_by_transformers
                candidates[name] = partial(loop, model, regions, num_beams=count, **length, **changes)
    found = time_candidates(candidates, args)
    rows: list[Row] = [{"settings": "none", "beams": 1, "name": "bare steps", "dtype": dtype, **found["bare"]}]
    for name, (settings, count, fast) in cases.items():
        row = {"settings": settings, "beams": count, "name": "this package" if fast else "transformers", "dtype": dtype}
        row |= found[name]
        if fast:
            row["times_as_fast"] = round(found[f"{settings} {count} False"]["ms"] / row["ms"], 3)
        if count == 1 and settings == "plain":
            row["overhead_ms"] = round(row["ms"] - found["bare"]["ms"], 3)
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
