"""On several processes every image stays with its own captions, and counts once in each pass over the data.

The colour of a picture is its number, and every caption of it holds that number as a word.
"""

import io
import json
import tarfile
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import torch
from datasets import Dataset, IterableDataset
from hf_attncap.training.data.streaming import SHUFFLE_BUFFER, select_share
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from tests.test_processes import history, launch, load, options

SHADE = 6  # between the colours of two numbers
PER_IMAGE = 3
MODEL = {
    "backbone": "mobilenet_v3_small",
    "encoder_channels": 8,
    "hidden_size": 16,
    "attention_dim": 8,
    "word_embed_dim": 8,
    "dropout": 0.0,
    "alpha_c": 0.0,
}

# Main of several command lines on the same processes. Each process writes what it trains on: for every batch and image, the
# number that the image shows, its captions, and whether they count.
RUN = """
import json
import sys
from pathlib import Path
import torch
from accelerate import PartialState
from hf_attncap.training.train import main
from hf_attncap.training.trainers.caption_trainer import CaptionTrainer

seen = []
plain = CaptionTrainer.compute_loss

def compute_loss(self, model, inputs, *args, **kwargs):
    if model.training:
        processor = self.processing_class
        pixels = inputs["pixel_values"].mean(dim=(2, 3)) * torch.tensor(processor.image_processor.image_std)
        shades = (pixels + torch.tensor(processor.image_processor.image_mean)).mean(dim=1) * 255
        labels = inputs["labels"].reshape(len(shades), -1, inputs["labels"].shape[-1])
        captions = [processor.batch_decode(rows.clamp(min=0), skip_special_tokens=True) for rows in labels]
        numbers = (shades / SHADE).round().int().tolist()
        seen.append([[n, c, bool((r != -100).any())] for n, c, r in zip(numbers, captions, labels)])
    return plain(self, model, inputs, *args, **kwargs)

CaptionTrainer.compute_loss = compute_loss
for argv in json.loads(Path(sys.argv[1]).read_text()):
    seen.clear()
    assert main(argv) == 0, argv
    output = Path(argv[argv.index("--output_dir") + 1])
    (output / f"seen-{PartialState().process_index}.json").write_text(json.dumps(seen))
""".replace("SHADE", str(SHADE))


def word(number: int) -> str:
    return "abcdefghij"[number // 10] + "klmnopqrst"[number % 10]


def captions(number: int, varied: bool = True) -> list[str]:
    """Three captions, of different lengths if `varied`."""
    middle = ["very"] * (number % 7 if varied else 1)
    return [f"{word(number)} is here", " ".join(["this is", *middle, word(number)]), f"see {word(number)}"]


def png(number: int) -> bytes:
    buffer = io.BytesIO()
    Image.new("RGB", (32, 32), (SHADE * number,) * 3).save(buffer, "PNG")
    return buffer.getvalue()


def write_shards(folder: Path, sizes: list[int], varied: bool) -> str:
    """WebDataset shards with these numbers of images, numbered from 0 across all shards."""
    folder.mkdir()
    numbers = iter(range(sum(sizes)))
    for shard, size in enumerate(sizes):
        with tarfile.open(folder / f"{shard}.tar", "w") as tar:
            for number in (next(numbers) for _ in range(size)):
                texts = json.dumps({"captions": captions(number, varied)}).encode()
                for name, data in ((f"{number:03}.png", png(number)), (f"{number:03}.json", texts)):
                    entry = tarfile.TarInfo(name)
                    entry.size = len(data)
                    tar.addfile(entry, io.BytesIO(data))
    return str(folder / "*.tar")


def write_table(path: Path, images: int) -> str:
    pictures = [{"bytes": png(number), "path": None} for number in range(images)]
    Dataset.from_dict({"image": pictures, "captions": [captions(number) for number in range(images)]}).to_parquet(str(path))
    return str(path)


# Sizes of shards, images in a batch of a process, accumulated batches, workers, and steps of two passes. The shares of the
# processes are of whole shards where there is one for each, and of every other image where there are fewer.
STREAMS: dict[str, tuple[list[int], int, int, int, int]] = {
    "even": ([8, 8], 4, 1, 0, 4),
    "uneven": ([11, 3], 2, 1, 0, 12),
    "more shards than processes": ([4, 5, 6], 2, 1, 0, 10),
    "fewer": ([7], 2, 1, 0, 4),
    "fewer, accumulated": ([9], 1, 2, 0, 6),
    "with workers": ([4, 3, 4, 3], 2, 1, 2, 8),
}
TABLES = {"even": 8, "uneven": 7}


@pytest.fixture(scope="module")
def runs(tmp_path_factory) -> Path:
    """Folders of runs on two processes, all in one start, as it takes longer than the runs."""
    folder = tmp_path_factory.mktemp("runs")
    new = {"model_config": json.dumps(MODEL), "min_count": 1, "image_size": 32, "captions_per_image": PER_IMAGE}
    new |= {"ddp_backend": "gloo", "validation_file": write_table(folder / "validation.parquet", 3), "predict_with_generate": False}
    lines = []
    for name, (sizes, size, accumulated, workers, steps) in STREAMS.items():
        more = {**new, "streaming": True, "max_steps": steps, "dataloader_num_workers": workers, "accelerator_config": "{}"}
        more |= {"per_device_train_batch_size": size, "gradient_accumulation_steps": accumulated}
        shards = write_shards(folder / f"shards {name}", sizes, varied=name != "even")
        lines.append(options(shards, folder / f"stream {name}", **more))
        if name == "uneven":  # resumed where one process has no image left in the epoch
            lines[-1] += ["--save_strategy", "steps", "--save_steps", "4"]
            more["resume_from_checkpoint"] = folder / f"stream {name}" / "checkpoint-4"
            lines.append(options(shards, folder / "resumed", **more))
    for name, images in TABLES.items():
        more = {**new, "num_train_epochs": 2, "per_device_train_batch_size": 2}
        lines.append(options(write_table(folder / f"{name}.parquet", images), folder / f"table {name}", **more))
    (folder / "run.py").write_text(RUN)
    (folder / "lines.json").write_text(json.dumps(lines))
    launch(["torch.distributed.run", "--standalone", "--nproc_per_node", "2", folder / "run.py", folder / "lines.json"])
    return folder


def seen(folder: Path) -> list[list[list[Any]]]:
    """What each process trained on."""
    return [json.loads((folder / f"seen-{rank}.json").read_text()) for rank in (0, 1)]


@pytest.mark.slow
@pytest.mark.parametrize("name", [*(f"stream {name}" for name in STREAMS), *(f"table {name}" for name in TABLES)])
def test_images_keep_their_captions_and_count_once_per_epoch(name, runs):
    kind, _, which = name.partition(" ")
    images = sum(STREAMS[which][0]) if kind == "stream" else TABLES[which]
    processes = seen(runs / name)
    assert len(processes[0]) == len(processes[1])
    for number, texts, counts in (image for batches in processes for batch in batches for image in batch):
        assert not counts or (len(texts) == PER_IMAGE and set(texts) == set(captions(number, name != "stream even"))), (
            number,
            texts,
        )
    counted = Counter(image[0] for batches in processes for batch in batches for image in batch if image[2])
    assert counted == dict.fromkeys(range(images), 2)
    halves = [
        Counter(image[0] for batches in processes for batch in part(batches) for image in batch if image[2]) for part in PARTS
    ]
    assert halves[0] == halves[1] == dict.fromkeys(range(images), 1)
    vocabulary = json.loads((runs / name / "tokenizer.json").read_text())["model"]["vocab"]
    assert {word(number) for number in range(images)} <= vocabulary.keys(), "of all processes' images"


PARTS = (lambda batches: batches[: len(batches) // 2], lambda batches: batches[len(batches) // 2 :])  # the passes


@pytest.mark.slow
def test_stream_resumes_where_one_process_has_no_image_left(runs):
    whole, resumed = runs / "stream uneven", runs / "resumed"
    for before, after in zip(seen(whole), seen(resumed), strict=True):
        assert [image for batch in before[4:] for image in batch if image[2]] == [
            image for batch in after for image in batch if image[2]
        ]
    assert history(whole, "loss", "grad_norm") == history(resumed, "loss", "grad_norm")
    weights, expected = load(resumed).state_dict(), load(whole).state_dict()
    assert all(torch.equal(weights[name], expected[name]) for name in expected)


def numbered(shards: list[str]):
    for shard in shards:
        for number in range(10 * int(shard), 10 * int(shard) + 3 + int(shard)):
            yield {"number": number}


@given(st.integers(1, 6), st.integers(1, 4), st.integers(0, 2))
def test_each_row_of_a_stream_belongs_to_one_process(shards, processes, epoch):
    """Also after shuffling, in any pass; with a shard for each process at least, none reads a shard of another's."""
    names = [f"{shard}" for shard in range(shards)]
    rows: Any = IterableDataset.from_generator(numbered, gen_kwargs={"shards": names})
    shares = []
    for rank in range(processes):
        share = select_share(rows, rank, processes).shuffle(seed=5, buffer_size=SHUFFLE_BUFFER)
        share.set_epoch(epoch)
        shares.append([row["number"] for row in share])
    assert sorted(number for share in shares for number in share) == sorted(row["number"] for row in rows)
    if shards >= processes:
        read = [{number // 10 for number in share} for share in shares]
        assert sum(map(len, read)) == shards
    else:
        assert max(map(len, shares)) - min(map(len, shares)) <= shards
