"""`CaptionTrainer`: a `Seq2SeqTrainer` for captioners."""

import copy
from collections.abc import Iterator
from contextlib import nullcontext
from functools import partial
from itertools import islice
from typing import Any

import torch
from accelerate.data_loader import prepare_data_loader
from torch.nn import functional as F
from torch.utils.data import DataLoader
from transformers import TrainerCallback, set_seed
from transformers.trainer_utils import has_length

from hf_attncap.processing_attncap import IGNORED_LABEL

from ..arguments import SettingError
from ..processes import check_processes, run_on_all_ranks
from .ema import WeightAverage
from .resumable import ResumableTrainer


class CaptionTrainer(ResumableTrainer):
    """`Seq2SeqTrainer` for captioners.

    `encoder_learning_rate` is the learning rate of the backbone. With `predict_with_generate`, evaluation generates one caption
    per image from `pixel_values` or `backbone_features`. It uses the model's own generation settings, except
    `generation_num_beams` and `generation_max_length` (in tokens, including the start token) if they are given.

    The first axis of every tensor of a batch is the image, also of labels: (B, k, T). `eval_data_collator` makes the batches of
    evaluations; default: the `data_collator`.

    If the training dataset is a stream (has no length), give each process its own images, as `load_data` does. All processes end
    a pass over the stream together, and each image counts once per pass.

    With `ema_decay`, the average of the weights is evaluated, saved in checkpoints and left in the model after training.

    Raises:
        SettingError: several GPUs in one process, `dispatch_batches`, or fewer images in a stream than processes.
    """

    _average: WeightAverage | None = None
    _latest: dict[str, Any] | None = None  # the last batch of a stream on this process
    _evaluated: torch.Tensor  # the sum of the losses of all words, and the number of words

    def __init__(self, *args: Any, eval_data_collator: Any = None, **kwargs: Any):
        super().__init__(*args, **kwargs)
        check_processes(self.args)
        self._eval_data_collator = eval_data_collator or self.data_collator
        order = self.accelerator.dataloader_config
        order.data_seed = self.args.seed if order.data_seed is None else order.data_seed  # the same on all processes
        self.add_callback(SeedPerProcess())
        if rate := self.args.input_dropout:  # type: ignore[attr-defined]
            add_input_dropout(self.model, rate)
        if self.args.bf16 and self.args.device.type == "cpu":
            keep_depthwise_in_float32(self.model)

    def train(self, *args: Any, **kwargs: Any) -> Any:
        decay = self.args.ema_decay  # type: ignore[attr-defined]
        if decay is None:
            return super().train(*args, **kwargs)
        self._average = WeightAverage(self.model, decay)  # type: ignore[arg-type]
        self.add_callback(self._average)
        try:
            result = super().train(*args, **kwargs)
            if not (self.args.load_best_model_at_end and self.state.best_model_checkpoint):
                self._average.copy_to_model()
            return result
        finally:
            self.remove_callback(self._average)
            self._average = None

    def evaluate(self, *args: Any, **kwargs: Any) -> dict[str, float]:
        with self._average.in_model() if self._average else nullcontext():
            return super().evaluate(*args, **kwargs)

    def _checkpoint_size(self) -> int:
        return super()._checkpoint_size() + (self._average.nbytes if self._average else 0)

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
        if self._average is None:
            return super().save_model(output_dir, _internal_call)
        with self._average.in_model():
            super().save_model(output_dir, _internal_call)
        if self.args.should_save:
            self._average.save_live(output_dir or str(self.args.output_dir))

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: torch.nn.Module | None = None) -> None:
        super()._load_from_checkpoint(resume_from_checkpoint, model)
        if self._average is not None:
            self._average.resume(resume_from_checkpoint)

    def get_eval_dataloader(self, eval_dataset: Any = None) -> Any:
        own, self.data_collator = self.data_collator, self._eval_data_collator
        try:
            return super().get_eval_dataloader(eval_dataset)
        finally:
            self.data_collator = own

    def evaluation_loop(self, *args: Any, metric_key_prefix: str = "eval", **kwargs: Any) -> Any:
        """Like the base class, except that the loss is the mean over all words, not over batches or processes."""
        self._evaluated = torch.zeros(2, dtype=torch.float64)
        output: Any = super().evaluation_loop(*args, metric_key_prefix=metric_key_prefix, **kwargs)
        sums = self._evaluated.to(self.args.device, torch.float32)
        loss, words = self.accelerator.reduce(sums, "sum").tolist()  # type: ignore[union-attr]
        output.metrics[f"{metric_key_prefix}_loss"] = loss / words
        return output

    def get_train_dataloader(self) -> Any:
        args: Any = self.args
        if has_length(self.train_dataset):
            return super().get_train_dataloader()
        # Like `Trainer`'s loader, except that Accelerate does not divide the images among the processes a second time.
        loader = DataLoader(
            self.train_dataset,  # type: ignore[arg-type]
            batch_size=self._train_batch_size // (self.accelerator.num_processes if self.accelerator.split_batches else 1),
            collate_fn=self.data_collator,
            num_workers=args.dataloader_num_workers,
            pin_memory=args.dataloader_pin_memory,
            persistent_workers=args.dataloader_persistent_workers,
            multiprocessing_context=args.dataloader_multiprocessing_context,
            prefetch_factor=args.dataloader_prefetch_factor,
            in_order=args.dataloader_in_order,
            generator=torch.Generator().manual_seed(args.seed),
        )
        return prepare_data_loader(
            loader, args.device, num_processes=1, process_index=0, put_on_device=True, dispatch_batches=False
        )

    def get_batch_samples(self, epoch_iterator: Iterator, num_batches: int, device: torch.device) -> Any:
        batches = list(islice(map(self._mask_duplicates, epoch_iterator), num_batches))
        if not has_length(self.train_dataset):
            batches = self._pad_stream(batches, num_batches, device)
        return super().get_batch_samples(iter(batches), num_batches, device)

    def _pad_stream(self, batches: list[dict[str, Any]], number: int, device: torch.device) -> list[dict[str, Any]]:
        """Add batches without labels until every process has `number` batches, if any process has one left in this pass.

        Processes have shards of different sizes. If one started the next pass or an evaluation while others still train, they
        would wait for each other forever. And `Trainer` makes no step for fewer batches than it accumulates.
        """
        if batches:
            self._latest = batches[-1]
        counts = self.accelerator.gather(torch.tensor([len(batches)], device=device)).tolist()  # type: ignore[union-attr]
        if max(counts) == 0:
            self.control.should_epoch_stop = True
        elif min(counts) < number:
            run_on_all_ranks(self._find_batch)
            batches = batches + [self._keep_first(self._latest, 0)] * (number - len(batches))  # type: ignore[arg-type]
        return batches

    def _find_batch(self) -> None:
        """Set the batch to pad with, also if a resumed run skipped all images of this process in the pass."""
        if self._latest is None:
            self._latest = next(iter(self.get_train_dataloader()), None)
        if self._latest is None:
            raise SettingError(
                f"The stream has no image for one of {self.accelerator.num_processes} processes: start fewer processes, or add "
                "images."
            )

    def _mask_duplicates(self, batch: dict[str, Any]) -> dict[str, Any]:
        """The batch without labels and ids of the images that Accelerate repeats to give every process a full last batch."""
        accelerator = self.accelerator
        loader = accelerator.gradient_state.active_dataloader if accelerator.gradient_state.end_of_dataloader else None
        filled = accelerator.num_processes > 1 and accelerator.even_batches and not self.args.dataloader_drop_last
        if not filled or loader is None or not has_length(loader.dataset):
            return batch
        images = len(loader.dataset)
        new = new_images(images, len(batch["labels"]), accelerator.num_processes, accelerator.process_index)
        return self._keep_first(batch, new)

    def _keep_first(self, batch: dict[str, Any], images: int) -> dict[str, Any]:
        """The batch with the labels and ids of its first `images` only, so that the others have no loss."""
        labels = batch["labels"].clone()  # (B, k, T)
        labels[images:] = IGNORED_LABEL
        ids = {name: batch[name][:images] for name in ("image_ids",) if name in batch}
        return {**batch, **ids, "labels": labels}

    def _encode(self, inputs: dict[str, Any]) -> Any:
        """The encoder's output for the `pixel_values` or `backbone_features` of a batch."""
        pictures = {name: inputs.get(name) for name in ("pixel_values", "backbone_features")}
        with self.accelerator.autocast():
            return self.model.base_model.encoder(**pictures)  # type: ignore[union-attr]

    def create_optimizer(self, model: torch.nn.Module | None = None) -> torch.optim.Optimizer:
        if self.optimizer is None:
            captioner: Any = self.model if model is None else model
            args: Any = self.args
            backbone = {id(p) for p in captioner.base_model.encoder.backbone.parameters()}
            rate = args.learning_rate if args.encoder_learning_rate is None else args.encoder_learning_rate
            groups: dict[tuple[float, float], list[torch.nn.Parameter]] = {}
            for parameter in captioner.parameters():
                if parameter.requires_grad:
                    lr = rate if id(parameter) in backbone else args.learning_rate
                    decay = args.weight_decay if parameter.ndim > 1 else 0.0  # not of biases and batch norm
                    groups.setdefault((lr, decay), []).append(parameter)
            optimizer_class, options = self.get_optimizer_cls_and_kwargs(args, captioner)
            self.optimizer = optimizer_class(
                [{"params": group, "lr": lr, "weight_decay": decay} for (lr, decay), group in groups.items()], **options
            )
        return self.optimizer

    def prediction_step(
        self,
        model: torch.nn.Module,
        inputs: dict[str, Any],
        prediction_loss_only: bool,
        ignore_keys: list[str] | None = None,
        **gen_kwargs: Any,
    ) -> tuple[Any, torch.Tensor | None, torch.Tensor | None]:
        args: Any = self.args
        captioner: Any = self.model
        prepared = self._prepare_inputs(self._mask_duplicates(inputs))
        labels = prepared["labels"]  # (B, k, T)
        with torch.no_grad(), self.compute_loss_context_manager():
            encoded = self._encode(prepared)  # `generate` does not accept features
            loss = model(encoder_outputs=encoded, labels=labels, num_items_in_batch=1).loss  # the sum over all words
        self._evaluated += torch.tensor([float(loss), float((labels != IGNORED_LABEL).sum())])
        if not args.predict_with_generate or prediction_loss_only:
            return loss, None, None
        settings = gen_kwargs or dict(getattr(self, "_gen_kwargs", {}))
        longest = settings.pop("max_length", None)
        if longest is not None:  # the model's own `max_new_tokens` would override `max_length`
            settings["max_new_tokens"] = longest - 1
        own = copy.deepcopy(captioner.generation_config)
        pictures = {"encoder_outputs": encoded}
        try:
            _, ids, _ = super().prediction_step(model, pictures, False, ignore_keys=ignore_keys, **settings)
        finally:
            captioner.generation_config = own  # the base class adds its defaults, which must not enter checkpoints
        return loss, ids, labels.flatten(1)  # (B, k * T): `Trainer` pads the second axis, and gathers by the first


class SeedPerProcess(TrainerCallback):
    """Seeds each process differently, so that dropout masks and samples differ between processes.

    A resumed run then restores the random states of its checkpoint.
    """

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if args.process_index:
            set_seed(args.seed + args.process_index)


def add_input_dropout(captioner: Any, rate: float) -> None:
    """Add dropout to the inputs of the decoder: regions (B, N, C) and word embeddings (R, T, E).

    Common in captioning (Luo's ImageCaptioning.pytorch uses 0.5 for both). `disable_dropout` switches it off too.
    """

    def drop(module: torch.nn.Module, _: Any, output: torch.Tensor) -> torch.Tensor:
        return F.dropout(output, rate, module.training)

    captioner.base_model.encoder.windows.register_forward_hook(drop)
    captioner.get_input_embeddings().register_forward_hook(drop)


def keep_depthwise_in_float32(captioner: Any) -> None:
    """Let the depthwise convolutions of the backbone compute in their own type under autocast.

    On CPUs, the backward pass of many of them takes five times longer in bfloat16 than in float32.
    """

    def run(layer: torch.nn.Conv2d, forward: Any, x: torch.Tensor) -> torch.Tensor:
        with torch.autocast("cpu", enabled=False):
            return forward(x.to(layer.weight.dtype)).to(x.dtype)

    for layer in captioner.base_model.encoder.backbone.modules():
        if isinstance(layer, torch.nn.Conv2d) and 1 < layer.groups == layer.in_channels:
            layer.forward = partial(run, layer, layer.forward)  # pyright: ignore[reportAttributeAccessIssue]


def new_images(images: int, size: int, processes: int, rank: int) -> int:
    """The number of images, from the start of a process's last batch, that are not repeated.

    Args:
        images: the number of images in the dataset.
        size: the number of images in the batch.
        rank: the index of the process; the last global batch is the batches of all processes in this order.
    """
    last = images % (size * processes) or size * processes
    return min(max(last - rank * size, 0), size)
