"""transformers' Trainer with a learning rate of its own for the backbone, and captions from features."""

import copy
from typing import Any

import torch
from transformers import Seq2SeqTrainer


class CaptionTrainer(Seq2SeqTrainer):
    """`Seq2SeqTrainer` for captioners.

    The backbone's parameters may learn at `encoder_learning_rate`. With `predict_with_generate`, evaluation generates one caption
    an image, from `pixel_values` or `backbone_features`, with the model's own generation settings but for
    `generation_num_beams` and `generation_max_length` (in tokens, the start token included) where they are given.
    """

    def create_optimizer(self, model: torch.nn.Module | None = None) -> torch.optim.Optimizer:
        if self.optimizer is None:
            captioner: Any = self.model if model is None else model
            args: Any = self.args
            backbone = {id(p) for p in captioner.base_model.encoder.backbone.parameters()}
            trained = [p for p in captioner.parameters() if p.requires_grad]
            rate = args.learning_rate if args.encoder_learning_rate is None else args.encoder_learning_rate
            groups = [
                {"params": [p for p in trained if id(p) not in backbone]},
                {"params": [p for p in trained if id(p) in backbone], "lr": rate},
            ]
            optimizer_class, options = self.get_optimizer_cls_and_kwargs(args, captioner)
            self.optimizer = optimizer_class([group for group in groups if group["params"]], **options)
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
        if not args.predict_with_generate or prediction_loss_only:
            return super().prediction_step(model, inputs, prediction_loss_only, ignore_keys=ignore_keys)
        prepared = self._prepare_inputs(inputs)
        pictures = {name: prepared.pop(name, None) for name in ("pixel_values", "backbone_features")}
        with torch.no_grad():
            prepared["encoder_outputs"] = captioner.base_model.encoder(**pictures)  # `generate` takes no features
        settings = gen_kwargs or dict(getattr(self, "_gen_kwargs", {}))
        longest = settings.pop("max_length", None)
        if longest is not None:  # a length would lose against the model's own `max_new_tokens`
            settings["max_new_tokens"] = longest - 1
        own = copy.deepcopy(captioner.generation_config)
        try:
            return super().prediction_step(model, prepared, False, ignore_keys=ignore_keys, **settings)
        finally:
            captioner.generation_config = own  # the base class fills in its defaults, which the checkpoint must not hold
