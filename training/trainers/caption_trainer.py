"""transformers' Trainer for captioners: a rate of its own for the backbone, averaged weights, captions."""

import copy
from collections.abc import Iterator
from contextlib import nullcontext
from itertools import islice
from typing import Any

import torch
from accelerate.data_loader import prepare_data_loader
from torch.utils.data import DataLoader
from transformers import TrainerCallback, set_seed
from transformers.trainer_utils import has_length

from hf_attncap.processing_attncap import IGNORED_LABEL

from ..arguments import SettingError
from ..processes import check_processes, together
from .dropout import drop_inputs
from .ema import WeightAverage
from .resumable import ResumableTrainer


class CaptionTrainer(ResumableTrainer):
    """`Seq2SeqTrainer` for captioners.

    The backbone's parameters may learn at `encoder_learning_rate`. With `predict_with_generate`, evaluation generates one caption
    an image, from `pixel_values` or `backbone_features`, with the model's own generation settings but for
    `generation_num_beams` and `generation_max_length` (in tokens, the start token included) where they are given.

    Batches of evaluations are made by `eval_data_collator`, if there is one. In every batch the image is the first axis of each
    tensor, labels included: (B, k, T).

    If the training dataset is a stream (has no length), give each process its own images, as `load_stream` does. All processes end
    a pass over the stream together, and each image counts once per pass.

    With `ema_decay`, evaluations, checkpoints and the captioner at the end have the average of the weights.

    Raises:
        SettingError: several GPUs in one process, or `dispatch_batches`; fewer images in a stream than processes.
    """

    _average: WeightAverage | None = None
    _latest: dict[str, Any] | None = None  # the last batch of this process's own images of a stream
    _evaluated: torch.Tensor  # the losses of all words added up, and their number

    def __init__(self, *args: Any, eval_data_collator: Any = None, **kwargs: Any):
        super().__init__(*args, **kwargs)
        check_processes(self.args)
        self._eval_data_collator = eval_data_collator or self.data_collator
        order = self.accelerator.dataloader_config
        order.data_seed = self.args.seed if order.data_seed is None else order.data_seed  # one for all, unlike the noise
        self.add_callback(OwnNoise())
        if share := self.args.input_dropout:  # type: ignore[attr-defined]
            drop_inputs(self.model, share)

    def train(self, *args: Any, **kwargs: Any) -> Any:
        decay = self.args.ema_decay  # type: ignore[attr-defined]
        if decay is None:
            return super().train(*args, **kwargs)
        self._average = WeightAverage(self.model, decay)  # type: ignore[arg-type]
        self.add_callback(self._average)
        try:
            result = super().train(*args, **kwargs)
            if not (self.args.load_best_model_at_end and self.state.best_model_checkpoint):
                self._average.hand_over()
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
        """As the base class does, but that the loss is the mean over all words, however many each batch and process has."""
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
        # What `Trainer` makes, but that Accelerate would divide the images among the processes once more.
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
        batches = list(islice(map(self._each_once, epoch_iterator), num_batches))
        if not has_length(self.train_dataset):
            batches = self._filled_up(batches, num_batches, device)
        return super().get_batch_samples(iter(batches), num_batches, device)

    def _filled_up(self, batches: list[dict[str, Any]], number: int, device: torch.device) -> list[dict[str, Any]]:
        """`number` batches of a stream on every process, as long as one has any left in this pass; those added do not count.

        Processes have shards of different sizes. One that went on to the next pass, or to an evaluation, while others still
        train would wait for them, and they for its gradients. And `Trainer` makes no step after fewer batches than it accumulates.
        """
        if batches:
            self._latest = batches[-1]
        counts = self.accelerator.gather(torch.tensor([len(batches)], device=device)).tolist()  # type: ignore[union-attr]
        if max(counts) == 0:
            self.control.should_epoch_stop = True
        elif min(counts) < number:
            together(self._find_batch)
            batches = batches + [self._count_first(self._latest, 0)] * (number - len(batches))  # type: ignore[arg-type]
        return batches

    def _find_batch(self) -> None:
        """A batch to be added, also where a resumed run skipped all images that this process has in the pass."""
        if self._latest is None:
            self._latest = next(iter(self.get_train_dataloader()), None)
        if self._latest is None:
            raise SettingError(
                f"The stream has no image for one of {self.accelerator.num_processes} processes: start fewer of them, or give more "
                "images."
            )

    def _each_once(self, batch: dict[str, Any]) -> dict[str, Any]:
        """The batch without the labels and ids of images that an earlier batch had: several processes fill the last one up."""
        accelerator = self.accelerator
        loader = accelerator.gradient_state.active_dataloader if accelerator.gradient_state.end_of_dataloader else None
        filled = accelerator.num_processes > 1 and accelerator.even_batches and not self.args.dataloader_drop_last
        if not filled or loader is None or not has_length(loader.dataset):
            return batch
        images = len(loader.dataset)
        new = new_images(images, len(batch["labels"]), accelerator.num_processes, accelerator.process_index)
        return self._count_first(batch, new)

    def _count_first(self, batch: dict[str, Any], images: int) -> dict[str, Any]:
        """The batch with the labels and ids of its first images alone; the others count for nothing."""
        labels = batch["labels"].clone()  # (B, k, T)
        labels[images:] = IGNORED_LABEL
        ids = {name: batch[name][:images] for name in ("image_ids",) if name in batch}
        return {**batch, **ids, "labels": labels}

    def _encode(self, inputs: dict[str, Any]) -> Any:
        """The encoder's output for the pictures of a batch: `pixel_values` or `backbone_features`."""
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
                    decay = args.weight_decay if parameter.ndim > 1 else 0.0  # no biases, no batch norm, which transformers decays
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
        prepared = self._prepare_inputs(self._each_once(inputs))
        labels = prepared["labels"]  # (B, k, T)
        with torch.no_grad(), self.compute_loss_context_manager():
            encoded = self._encode(prepared)  # `generate` takes no features
            loss = model(encoder_outputs=encoded, labels=labels, num_items_in_batch=1).loss  # the sum over all words
        self._evaluated += torch.tensor([float(loss), float((labels != IGNORED_LABEL).sum())])
        if not args.predict_with_generate or prediction_loss_only:
            return loss, None, None
        settings = gen_kwargs or dict(getattr(self, "_gen_kwargs", {}))
        longest = settings.pop("max_length", None)
        if longest is not None:  # a length would lose against the model's own `max_new_tokens`
            settings["max_new_tokens"] = longest - 1
        own = copy.deepcopy(captioner.generation_config)
        pictures = {"encoder_outputs": encoded}
        try:
            _, ids, _ = super().prediction_step(model, pictures, False, ignore_keys=ignore_keys, **settings)
        finally:
            captioner.generation_config = own  # the base class fills in its defaults, which the checkpoint must not hold
        return loss, ids, labels.flatten(1)  # (B, k * T): `Trainer` pads the second axis, and gathers by the first


class OwnNoise(TrainerCallback):
    """Each process draws dropout masks and captions of its own; from the one seed that all begin with, all would draw the same.

    A run that goes on from a checkpoint takes its random numbers from there afterwards.
    """

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if args.process_index:
            set_seed(args.seed + args.process_index)


def new_images(images: int, size: int, processes: int, rank: int) -> int:
    """How many of the `size` images of a process's last batch, the first ones, no batch had before.

    Args:
        images: of the dataset.
        rank: of the process; the batches of all processes in their order make the last one.
    """
    last = images % (size * processes) or size * processes
    return min(max(last - rank * size, 0), size)


def policy(captioner: Any, logits: torch.Tensor) -> torch.Tensor:
    """Logits (..., V) of what captions are drawn from: those of words that the captioner never says are -inf."""
    never = torch.tensor(captioner.generation_config.suppress_tokens or [], dtype=torch.long, device=logits.device)
    return logits.to(torch.promote_types(logits.dtype, torch.float32)).index_fill(-1, never, float("-inf"))
