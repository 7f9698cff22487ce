"""How long does a training step take in stage 2 and in self-critical training, and how much time do the package's defaults save?

    python -m benchmarks.speed.training --output training.json

The steps are those of the package's Trainers with the released checkpoint: 16 images with 5 captions or samples each, loss,
backward pass, gradient clipping and AdamW. Images, features and captions are random; captions have lengths like those of Flickr8k.

"blocks": the decoder and the last three blocks are trained on cached features, as for the released checkpoint. "all": the decoder
and the whole encoder are trained, as in finetune.yaml.
"""

import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext
from functools import partial
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from hf_attncap.training.arguments import CaptionTrainingArguments
from hf_attncap.training.trainers import self_critical
from hf_attncap.training.trainers.caption_trainer import CaptionTrainer
from hf_attncap.training.trainers.self_critical import SelfCriticalTrainer

from hf_attncap import AttnCapConfig, AttnCapForConditionalGeneration, AttnCapProcessor
from hf_attncap.captioner import CHECKPOINT
from hf_attncap.processing_attncap import IGNORED_LABEL

from .measure import Candidate, Row, create_parser, parse_options, report, time_candidates

IMAGES, CAPTIONS = 16, 5
MEAN_LENGTH, DEVIATION, LONGEST = 12.8, 3.4, 21  # of Flickr8k's captions, with the end token, truncated after 20 words
COLUMNS = {
    "step": "step",
    "trained": "trained",
    "name": "computation",
    "ms": "ms",
    "cpu_ms": "CPU ms",
    "times_as_fast": "times as fast as the first",
    "times_as_fast_cpu": "in CPU time",
}


def random_labels(vocabulary: int, end: int, images: int) -> torch.Tensor:
    """Random labels (images, 5, T) with the lengths of real captions, -100 after the end token."""
    generator = torch.Generator().manual_seed(1)
    lengths = (MEAN_LENGTH + DEVIATION * torch.randn(images, CAPTIONS, generator=generator)).round().clamp(3, LONGEST)
    ids = torch.randint(4, vocabulary, (images, CAPTIONS, int(lengths.max())), generator=generator)
    position = torch.arange(ids.shape[-1])
    ids = ids.masked_fill(position == lengths[..., None] - 1, end)
    return ids.masked_fill(position >= lengths[..., None], IGNORED_LABEL)


class TrainingStep:
    """One training step of a Trainer on a batch."""

    def __init__(self, args: Any, folder: Path, trained: str, bf16: bool, self_critical: bool, channels_last: bool = True):
        processor: Any = AttnCapProcessor.from_pretrained(args.checkpoint)
        config: Any = AttnCapConfig.from_pretrained(args.checkpoint)
        config.freeze_backbone = False
        config.trainable_blocks = None if trained == "all" else args.blocks
        model: Any = AttnCapForConditionalGeneration.from_pretrained(args.checkpoint, config=config)
        if channels_last:
            model.model.encoder.to(memory_format=torch.channels_last)
        options: dict[str, Any] = {"use_cpu": args.device == "cpu", "bf16": bf16, "report_to": "none", "max_grad_norm": 5.0}
        if self_critical:
            options |= {"self_critical": True, "samples_per_image": CAPTIONS, "cross_entropy_weight": 0.6}
        training = CaptionTrainingArguments(output_dir=str(folder), **options)
        labels = random_labels(config.vocab_size, model.end_token_ids[0], args.images)  # (B, 5, T)
        references = {
            str(n): processor.batch_decode(row.masked_fill(row < 0, config.pad_token_id).tolist(), skip_special_tokens=True)
            for n, row in enumerate(labels)
        }
        kinds: Any = partial(SelfCriticalTrainer, references=references) if self_critical else CaptionTrainer
        self.trainer = kinds(model=model, args=training, processing_class=processor, train_dataset=[0])
        self.trainer.create_optimizer()
        self.model = self.trainer.accelerator.prepare(model)
        self.trainer._samples = args.images * CAPTIONS
        pixels = torch.randn(args.images, 3, args.side, args.side)
        self.batch: dict[str, Any] = {"labels": labels}
        if self_critical:
            self.batch["image_ids"] = list(references)
        if trained == "all":
            self.batch["pixel_values"] = pixels
        else:
            with torch.no_grad():
                self.batch["backbone_features"] = model.model.encoder.features(pixels.to(model.device)).half().float()
        self.words = (labels != IGNORED_LABEL).sum()

    def __call__(self) -> None:
        self.trainer.training_step(self.model, dict(self.batch), self.words)
        torch.nn.utils.clip_grad_norm_(self.model.parameters(), self.trainer.args.max_grad_norm)
        self.trainer.optimizer.step()
        self.model.zero_grad()

    def compute_depthwise_in_bfloat16(self) -> "TrainingStep":
        """Undo `keep_depthwise_in_float32`."""
        for layer in self.model.base_model.encoder.modules():
            vars(layer).pop("forward", None)
        return self


@contextmanager
def slow_sampling(trainer: Any) -> Iterator[None]:
    """Makes a Trainer sample with `torch.multinomial`, and convert the weights to half precision for every word."""
    own = self_critical.sample

    def sample(*arguments: Any) -> torch.Tensor:
        with torch.autocast("cpu", enabled=False):
            return own(*arguments)

    with (
        mock.patch.object(self_critical, "sample_tokens", lambda probabilities: torch.multinomial(probabilities, 1)),
        mock.patch.object(self_critical, "sample", sample) if trainer.args.bf16 else nullcontext(),
    ):
        yield


def with_slow_sampling(step: TrainingStep) -> Candidate:
    def run() -> None:
        with slow_sampling(step.trainer):
            step()

    return run


def step_candidates(args: Any, folder: Path, kind: str, trained: str) -> dict[str, Candidate]:
    """The steps of a kind, with and without the package's optimisations.

    Steps in float32 are made first, because Accelerate has one precision for the whole process.
    """
    critical = kind == "self-critical"
    make = partial(TrainingStep, args, folder, trained, self_critical=critical)
    if critical:
        full = {"float32, torch.multinomial": with_slow_sampling(make(bf16=False)), "float32, as trained": make(bf16=False)}
        slow = with_slow_sampling(make(bf16=True).compute_depthwise_in_bfloat16())
    else:
        full = {"float32, contiguous": make(bf16=False, channels_last=False), "float32, as trained": make(bf16=False)}
        slow = make(bf16=True).compute_depthwise_in_bfloat16()
    return {**full, "bfloat16": slow, "bfloat16, as trained": make(bf16=True)}


def main(argv: Sequence[str] | None = None) -> None:
    options = create_parser(__doc__, __file__)
    options.add_argument("--checkpoint", type=Path, default=CHECKPOINT, help="default: the released checkpoint")
    options.add_argument("--images", type=int, default=IMAGES, help="images of a step (default: %(default)s)")
    options.add_argument("--side", type=int, default=224, help="height and width of the images (default: %(default)s)")
    options.add_argument("--blocks", type=int, default=3, help="blocks that are trained on cached features (default: %(default)s)")
    args = parse_options(options, argv)
    rows: list[Row] = []
    for kind, trained in (("stage 2", "blocks"), ("self-critical", "blocks"), ("stage 2", "all")):
        if args.quick and trained == "all":
            continue
        with tempfile.TemporaryDirectory() as folder:
            times = time_candidates(step_candidates(args, Path(folder), kind, trained), args)
        first = next(iter(times.values()))
        for name, found in times.items():
            ratios = {"times_as_fast": first["ms"] / found["ms"], "times_as_fast_cpu": first["cpu_ms"] / found["cpu_ms"]}
            rows.append({"step": kind, "trained": trained, "name": name, **found, **{k: round(v, 3) for k, v in ratios.items()}})
    report(args, COLUMNS, rows, images=args.images, captions=CAPTIONS)


if __name__ == "__main__":
    main()
