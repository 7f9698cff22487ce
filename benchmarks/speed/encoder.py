"""How fast is the encoder: without optimisation ("eager"), optimised for inference, in bfloat16, and exported?

    python -m benchmarks.speed.encoder --output encoder.json

Times are per image, from pixels to regions, at batch sizes 1 and 32. The weights of backbones other than the checkpoint's are
random.
"""

import copy
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch

from hf_attncap import Captioner
from hf_attncap.captioner import CHECKPOINT
from hf_attncap.optimize import optimize_for_inference

from .inputs import decode_image, exported_name, find_photographs
from .measure import Candidate, Row, create_parser, parse_options, report, time_candidates
from .models import BACKBONES, LARGEST, encode, random_model

BATCHES = (1, 32)
COLUMNS = {
    "backbone": "backbone",
    "name": "encoder",
    "batch": "batch",
    "ms_per_image": "ms per image",
    "times_as_fast": "times as fast as eager float32",
    "to_batch_1": "per image, relative to batch 1",
}


def torch_models(model: Any, device: str) -> dict[str, Any]:
    """A model without optimisation, optimised, and optimised in bfloat16, by name."""
    fast: Any = optimize_for_inference(model)
    fast, half = fast.to(device), copy.deepcopy(fast).to(device, torch.bfloat16)
    return {"eager float32": model.to(device), "optimised float32": fast, "optimised bfloat16": half}


def measure_backbone(name: str, models: dict[str, Any], exported: dict[str, Any], side: int, args: Any) -> list[Row]:
    """The rows of one backbone. `side` is the height and width of its images."""
    picture = decode_image(find_photographs(args.photographs)[0].read_bytes())
    rows: list[Row] = []
    for batch in args.batches:
        images = torch.randn(batch, 3, side, side, device=args.device)
        candidates: dict[str, Candidate] = {kind: partial(encode, model, images) for kind, model in models.items()}
        for kind, captioner in exported.items():
            engine = captioner.engine
            pixels = engine._pixels([picture] * batch)  # (B, height, width, 3)
            candidates[kind] = partial(engine._encode, pixels)
        for kind, times in time_candidates(candidates, args).items():
            rows.append({"backbone": name, "name": kind, "batch": batch, **times, "ms_per_image": round(times["ms"] / batch, 3)})
    for row in rows:
        eager = next(other for other in rows if other["name"] == "eager float32" and other["batch"] == row["batch"])
        first = next(other for other in rows if other["name"] == row["name"])
        row["times_as_fast"] = round(eager["ms_per_image"] / row["ms_per_image"], 3)
        row["to_batch_1"] = round(row["ms_per_image"] / first["ms_per_image"], 3)
    return rows


def main(argv: Sequence[str] | None = None) -> None:
    options = create_parser(__doc__, __file__)
    options.add_argument(
        "--backbones", nargs="*", help=f"other backbones (default: {' '.join(BACKBONES)}; with --quick, not the last one)"
    )
    options.add_argument("--batches", type=int, nargs="+", default=BATCHES, help="batch sizes (default: 1 32)")
    options.add_argument("--exported", type=Path, nargs="*", default=[], help="exported folders of the checkpoint")
    options.add_argument("--checkpoint", type=Path, default=CHECKPOINT, help="default: the released checkpoint")
    options.add_argument("--photographs", type=Path, help="a folder (default: photographs of scikit-image)")
    args = parse_options(options, argv)
    backbones = args.backbones
    if backbones is None:
        backbones = [name for name in BACKBONES if not (args.quick and name == LARGEST)]
    released = Captioner.from_pretrained(args.checkpoint, device="cpu", optimize=False)
    model: Any = released.model
    side = released.processor.image_processor.size["height"]
    exported = {exported_name(folder): Captioner.from_pretrained(folder) for folder in args.exported}
    rows = measure_backbone(model.config.backbone, torch_models(model, args.device), exported, side, args)
    for name in backbones:
        rows += measure_backbone(name, torch_models(random_model(name, args.checkpoint), args.device), {}, side, args)
    report(args, COLUMNS, rows)


if __name__ == "__main__":
    main()
