"""transformers' Trainer with a learning rate of its own for the backbone."""

from typing import Any

import torch
from transformers import Seq2SeqTrainer


class CaptionTrainer(Seq2SeqTrainer):
    """`Seq2SeqTrainer` for captioners: the backbone's parameters may learn at `encoder_learning_rate`."""

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
