"""How long does captioning a photograph take, in this package and in other captioners?

    python -m benchmarks.speed.end_to_end --exported runs/int8 --output end_to_end.json

For this package, the time is from the bytes of an image file to the text and its attention, with the checkpoint's default decoding.
The other captioners have their published sizes and random weights. They generate 16 tokens greedily and return token ids. They run
as shipped, in float32, and in bfloat16. Each time is compared with vit-gpt2 as shipped, and with vit-gpt2 in the same engine and
data type if that was measured. For the exports, vit-gpt2 is exported too.
"""

import itertools
import json
import tempfile
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
from transformers import GenerationConfig

from hf_attncap import Captioner
from hf_attncap.captioner import CHECKPOINT
from hf_attncap.runtime import EXPORT_FILE

from .exported_peer import ExportedPeer
from .inputs import exported_name, find_photographs
from .measure import NOT_MEASURED, Candidate, Row, create_parser, parse_options, report, time_candidates
from .models import LARGEST, TOKENS, million_parameters, random_captioner
from .peers import PEERS, Peer

BATCH = 32
REFERENCE = "vit-gpt2"
TYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}
COLUMNS = {
    "name": "captioner",
    "engine": "engine",
    "decoding": "decoding",
    "parameters": "million parameters",
    "batch": "batch",
    "ms_per_image": "ms per image",
    "times_as_fast": "times as fast as vit-gpt2 as shipped",
    "same_engine": "times as fast as vit-gpt2, same engine and type",
}


def caption_each(caption: Callable[[Any], Any], pictures: Sequence[Any]) -> None:
    """Caption images one at a time."""
    for picture in pictures:
        caption(picture)


def own_candidates(args: Any, files: list[bytes]) -> dict[tuple, tuple[Row, Candidate]]:
    """The candidates with the released checkpoint: the row and the function of each (name, engine, batch size)."""
    loaded: dict[str, Any] = {
        "torch float32, optimize=False": Captioner.from_pretrained(args.checkpoint, device=args.device, optimize=False),
        "torch float32": Captioner.from_pretrained(args.checkpoint, device=args.device),
        "torch bfloat16": Captioner.from_pretrained(args.checkpoint, device=args.device, dtype="bfloat16"),
    }
    loaded |= {exported_name(folder): Captioner.from_pretrained(folder) for folder in args.exported}
    size = million_parameters(loaded["torch float32"].model.config)
    beams = GenerationConfig.from_pretrained(args.checkpoint).num_beams
    many = [files[n % len(files)] for n in range(args.batch)]
    found: dict[tuple, tuple[Row, Candidate]] = {}
    kinds = {exported_name(folder): exported_kind(folder) for folder in args.exported}
    for engine, captioner in loaded.items():
        kind = kinds.get(engine, engine.removesuffix(", optimize=False"))
        row = {"name": "this package", "engine": engine, "kind": kind, "decoding": f"{beams} beams", "parameters": size}
        found["this package", engine, 1] = (
            {**row, "batch": 1, "images": len(files)},
            partial(caption_each, captioner.caption, files),
        )
        batch = partial(captioner.caption, many, batch_size=args.batch)
        found["this package", engine, args.batch] = {**row, "batch": args.batch, "images": args.batch}, batch
    return found


def exported_kind(folder: Path) -> str:
    """The engine and the data type of an exported folder."""
    about = json.loads((folder / EXPORT_FILE).read_text(encoding="utf-8"))
    return f"exported, {about['format']}-{about['dtype']}"


def exported_peers(args: Any, files: list[bytes], scratch: Path) -> dict[tuple, tuple[Row, Candidate]]:
    """vit-gpt2 in each engine and data type of the exported folders, as in `own_candidates`."""
    found: dict[tuple, tuple[Row, Candidate]] = {}
    for kind in dict.fromkeys(map(exported_kind, args.exported)) if REFERENCE in args.peers else ():
        folder = scratch / kind.removeprefix("exported, ")
        folder.mkdir()
        peer = Peer.build(REFERENCE, torch.float32, "cpu", args.tokens)
        format, dtype = kind.removeprefix("exported, ").split("-")
        exported = ExportedPeer(peer.model, peer.processor, folder, format, dtype, args.tokens)
        row = {"name": REFERENCE, "engine": kind, "kind": kind, "parameters": peer.parameters, "batch": 1, "images": 1}
        row["decoding"] = f"greedy, {args.tokens} tokens"
        found[REFERENCE, kind, 1] = row, partial(exported.caption, files[0])
    return found


def other_candidates(args: Any, files: list[bytes]) -> dict[tuple, tuple[Row, Candidate]]:
    """The candidates with other backbones and random weights, and the other captioners, as in `own_candidates`."""
    found: dict[tuple, tuple[Row, Candidate]] = {}
    for backbone, (name, dtype) in itertools.product(args.backbones, TYPES.items()):
        captioner = random_captioner(backbone, args.checkpoint, dtype, args.device)
        settings = captioner.model.generation_config
        size = million_parameters(captioner.model.config)
        row = {"name": f"this package, {backbone}", "engine": f"torch {name}", "parameters": size, "batch": 1, "images": len(files)}
        row["decoding"] = f"{settings.num_beams} beams, {settings.max_new_tokens} tokens"
        found[row["name"], row["engine"], 1] = row, partial(caption_each, captioner.caption, files)
    for peer_name, (name, dtype) in itertools.product(args.peers, TYPES.items()):
        peer = Peer.build(peer_name, dtype, args.device, args.tokens)
        row = {"name": peer_name, "engine": f"torch {name}", "parameters": peer.parameters, "batch": 1, "images": 1}
        row["decoding"] = f"greedy, {args.tokens} tokens"
        found[peer_name, row["engine"], 1] = (
            row,
            partial(peer.caption, files[0]),
        )  # one file is enough: all captions have this length
    return found


def main(argv: Sequence[str] | None = None) -> None:
    options = create_parser(__doc__, __file__)
    options.add_argument("--checkpoint", type=Path, default=CHECKPOINT, help="default: the released checkpoint")
    options.add_argument("--exported", type=Path, nargs="*", default=[], help="exported folders of the checkpoint")
    options.add_argument("--backbones", nargs="*", default=[], help=f"also captioners with these backbones, such as {LARGEST}")
    options.add_argument("--peers", nargs="*", choices=[*PEERS], default=[*PEERS], help="other captioners (default: all)")
    options.add_argument("--tokens", type=int, default=TOKENS, help="tokens that other captioners generate (default: %(default)s)")
    options.add_argument("--batch", type=int, default=BATCH, help="images of a batch (default: %(default)s)")
    options.add_argument("--photographs", type=Path, help="a folder (default: photographs of scikit-image)")
    args = parse_options(options, argv)
    names = [folder.name for folder in args.exported]
    if twice := [name for name in names if names.count(name) > 1]:
        options.error(f"--exported has two folders with the name {twice[0]}, which the table cannot tell apart: rename one")
    files = [path.read_bytes() for path in find_photographs(args.photographs)]
    with tempfile.TemporaryDirectory() as scratch:
        candidates = own_candidates(args, files) | other_candidates(args, files) | exported_peers(args, files, Path(scratch))
        times = time_candidates({str(key): candidate for key, (_, candidate) in candidates.items()}, args)
    rows = [{**row, **times[str(key)]} for key, (row, _) in candidates.items()]
    medians = {}
    for key, row in zip(candidates, rows):
        row["ms_per_image"] = medians[key] = round(row["ms"] / row["images"], 3)
    for row in rows:
        for field, kind in (("times_as_fast", "torch float32"), ("same_engine", row.get("kind", row["engine"]))):
            reference = medians.get((REFERENCE, kind, 1))
            row[field] = NOT_MEASURED if reference is None else round(reference / row["ms_per_image"], 3)
    lengths = [len(result.words) for result in Captioner.from_pretrained(args.checkpoint).caption([*files])]
    report(args, COLUMNS, rows, photographs=len(files), words_per_caption=sum(lengths) / len(lengths))
    print(f"Captions of this package have {sum(lengths) / len(lengths):.1f} words on average.")


if __name__ == "__main__":
    main()
