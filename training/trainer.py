"""transformers' Trainer with a learning rate of its own for the backbone."""

import torch
from transformers import Seq2SeqTrainer


class CaptionTrainer(Seq2SeqTrainer):
    """`Seq2SeqTrainer` for captioners: the backbone's parameters may learn at `encoder_learning_rate`."""

    def create_optimizer(self, model: torch.nn.Module | None = None) -> torch.optim.Optimizer:
        if self.optimizer is None:
            model = self.model if model is None else model
            backbone = {id(p) for p in model.base_model.encoder.backbone.parameters()}
            trained = [p for p in model.parameters() if p.requires_grad]
            rate = self.args.learning_rate if self.args.encoder_learning_rate is None else self.args.encoder_learning_rate
            groups = [
                {"params": [p for p in trained if id(p) not in backbone]},
                {"params": [p for p in trained if id(p) in backbone], "lr": rate},
            ]
            optimizer_class, options = self.get_optimizer_cls_and_kwargs(self.args, model)
            self.optimizer = optimizer_class([group for group in groups if group["params"]], **options)
        return self.optimizer
