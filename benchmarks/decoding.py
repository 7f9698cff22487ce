"""How do beam width and length penalty change the scores of a checkpoint?

    python -m benchmarks.decoding runs/best --images validation.parquet --beams 1 3 5 --length_penalties 0.8 1 1.2

The images are encoded once. The checkpoint is not changed; `attncap pack --generation` stores other settings in a copy of it.
"""

import argparse
import itertools
import sys
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import torch
from hf_attncap.model_card.measure import BATCH, commit
from hf_attncap.training.arguments import DataArguments, SettingError
from hf_attncap.training.data.splits import load_data
from transformers.modeling_outputs import BaseModelOutput

from hf_attncap import Captioner
from hf_attncap.atomic import write_json
from hf_attncap.metrics import CaptionMetrics

SCORES = ("bleu_4", "cider", "mean_length", "vocabulary", "bad_endings")


@torch.no_grad()
def encode(captioner: Captioner, rows: Any) -> torch.Tensor:
    """Regions of all images, (images, N, C)."""
    encoder = captioner.model.model.encoder
    parts = []
    for start in range(0, len(rows), BATCH):
        pictures = captioner.processor(images=rows[start : start + BATCH]["image"], return_tensors="pt")["pixel_values"]
        parts.append(encoder(pictures).last_hidden_state)  # (B, N, C)
    return torch.cat(parts)


def captions(captioner: Captioner, regions: torch.Tensor, **settings: Any) -> list[str]:
    """The captions of regions (images, N, C)."""
    model: Any = captioner.model
    texts: list[str] = []
    for batch in regions.split(BATCH):
        ids = model.generate(encoder_outputs=BaseModelOutput(last_hidden_state=batch), **settings)  # (B, T)
        texts += captioner.processor.batch_decode(ids, skip_special_tokens=True)
    return texts


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("checkpoint", type=Path)
    parser.add_argument("--images", required=True, help="captioned images, in any format that training reads")
    parser.add_argument("--beams", type=int, nargs="+", default=[1, 3, 5])
    parser.add_argument("--length_penalties", type=float, nargs="+", default=[1.0])
    parser.add_argument("--output", type=Path, help="file for the results, as JSON")
    args = parser.parse_args()
    rows: Any = load_data(DataArguments(train_file=args.images)).train
    captioner = Captioner.from_pretrained(args.checkpoint)
    metrics = CaptionMetrics(dict(zip(rows["image_id"], rows["captions"])))
    regions = encode(captioner, rows)
    found = []
    print("| beams | length penalty | " + " | ".join(name.replace("_", " ") for name in SCORES) + " |\n" + "|---" * 7 + "|")
    for beams, penalty in itertools.product(args.beams, args.length_penalties):
        if beams == 1 and penalty != args.length_penalties[0]:
            continue  # greedy search has no length penalty
        settings = {"num_beams": beams, "length_penalty": penalty}
        scores = metrics.score(dict(zip(rows["image_id"], captions(captioner, regions, **settings))))
        found.append({**settings, **{name: round(float(scores[name]), 5) for name in SCORES}})
        shown = [f"{100 * scores[name]:.1f}" for name in ("bleu_4", "cider")]
        shown += [f"{scores['mean_length']:.2f}", f"{scores['vocabulary']:.0f}", f"{100 * scores['bad_endings']:.1f}"]
        print(f"| {beams} | {penalty:g} | " + " | ".join(shown) + " |", flush=True)
    if args.output:
        results = {"commit": commit(), "date": datetime.now(UTC).date().isoformat(), "images": len(rows), "settings": found}
        write_json(args.output, results)


if __name__ == "__main__":
    try:
        main()
    except (OSError, SettingError) as error:
        sys.exit(f"error: {error}")
