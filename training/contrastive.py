"""Contrastive training: before it is to be put into words, a picture learns to be told apart by its captions from other pictures.

The loss is that of Radford et al. (2021), "Learning transferable visual models from natural language supervision", with several
captions a picture as in Khosla et al. (2020), "Supervised contrastive learning", equation 2.
"""

import math
from typing import Any

import numpy as np
import torch
from torch import nn
from torch.nn import functional as F

from hf_attncap.processing_attncap import IGNORED_LABEL

from .trainer import CaptionTrainer

WIDTH = 256  # of the space in which pictures and captions meet
STATES = 512  # of the reader of captions
DROPOUT = 0.2
FIRST_SCALE, LARGEST_SCALE = 14.0, 100.0  # of cosines; the first is Radford et al.'s 1 / 0.07
WITHIN = (1, 5, 10)


class Matcher(nn.Module):
    """A captioner's encoder, and what it is trained with: a reader of captions, a GRU, and a space where the two meet.

    Nothing of the captioner learns but its encoder's blocks that are not frozen: a new one's decoder stays as random as it came.
    """

    def __init__(self, captioner: Any):
        super().__init__()
        captioner.requires_grad_(False)
        encoder = captioner.base_model.encoder
        for block in encoder.blocks()[encoder.frozen_blocks :]:
            block.requires_grad_(True)
        self.captioner = captioner
        self.words = nn.Embedding(captioner.config.vocab_size, WIDTH)
        self.reader = nn.GRU(WIDTH, STATES, batch_first=True)
        self.picture = nn.Linear(encoder.windows.in_channels, WIDTH)
        self.caption = nn.Linear(STATES, WIDTH)
        self.log_scale = nn.Parameter(torch.tensor(math.log(FIRST_SCALE)))

    @property
    def base_model(self) -> Any:
        return self.captioner.base_model

    def forward(
        self, labels: torch.Tensor, pixel_values: torch.Tensor | None = None, backbone_features: torch.Tensor | None = None
    ) -> dict[str, torch.Tensor]:
        """The loss of B pictures and their captions (B, k, T), and where they are, (B, W) and (B * k, W)."""
        pictures = self.place_pictures(pixel_values, backbone_features)  # (B, W)
        captions = self.place_captions(labels.flatten(0, 1))  # (R, W)
        scale = self.log_scale.exp().clamp(max=LARGEST_SCALE)
        return {"loss": contrastive_loss(scale * pictures @ captions.mT), "pictures": pictures, "captions": captions}

    def place_pictures(self, pixel_values: torch.Tensor | None, backbone_features: torch.Tensor | None) -> torch.Tensor:
        """(B, W), of length 1."""
        f = self.base_model.encoder.trunk_map(pixel_values, backbone_features).float()  # (B, D, h, w)
        seen = F.dropout(f.mean(dim=(2, 3)), DROPOUT, self.training)  # (B, D)
        return F.normalize(self.picture(seen).float(), dim=-1)

    def place_captions(self, labels: torch.Tensor) -> torch.Tensor:
        """(R, W), of length 1: the largest value of each state over the words."""
        nothing = labels == IGNORED_LABEL  # (R, T)
        e = F.dropout(self.words(labels.masked_fill(nothing, 0)), DROPOUT, self.training)  # (R, T, W)
        h = self.reader(e)[0].float().masked_fill(nothing[..., None], -1)  # (R, T, S); tanh is above -1
        read = F.dropout(h.amax(dim=1), DROPOUT, self.training)  # (R, S)
        return F.normalize(self.caption(read).float(), dim=-1)


def contrastive_loss(logits: torch.Tensor) -> torch.Tensor:
    """The mean of two cross-entropies: which picture a caption is of, and which captions, k equal ones, a picture has.

    Args:
        logits: (B, R), R = B * k, the captions of a picture adjacent.
    """
    pictures, captions = logits.shape
    own = torch.arange(pictures, device=logits.device).repeat_interleave(captions // pictures)  # (R)
    of_captions = F.cross_entropy(logits.mT, own)
    of_pictures = -logits.log_softmax(dim=1)[own, torch.arange(captions, device=logits.device)].mean()
    return (of_captions + of_pictures) / 2


def retrieval(pictures: np.ndarray, captions: np.ndarray) -> dict[str, float]:
    """Shares of captions whose picture, and of pictures of which a caption, is among the nearest 1, 5 and 10 of all.

    Args:
        pictures: (I, W).
        captions: (I * k, W), the captions of a picture adjacent.
    """
    near = captions @ pictures.T  # (R, I)
    own = np.repeat(np.arange(len(pictures)), len(captions) // len(pictures))  # (R)
    pair = np.arange(len(captions)), own
    to_own = near[pair]  # (R)
    best = to_own.reshape(len(pictures), -1).max(axis=1)  # (I)
    near[pair] = -np.inf  # others that are as near count as nearer
    ranks = {"picture": (near >= to_own[:, None]).sum(axis=1), "caption": (near >= best).sum(axis=0)}  # (R), (I)
    return {f"{kind}_within_{count}": float((rank < count).mean()) for kind, rank in ranks.items() for count in WITHIN}


class ContrastiveTrainer(CaptionTrainer):
    """`CaptionTrainer` of a `Matcher`; evaluations say how well pictures and captions find each other among all, `retrieval`.

    The captions that a picture is told apart by are those of its own batch, in its own process: the loss, at evaluations too, is
    the mean over pictures and depends on the size of batches. Checkpoints hold the matcher; at the end the captioner is saved.
    """

    def __init__(self, *, model: Any, **kwargs: Any):
        super().__init__(model=Matcher(model), **{**kwargs, "compute_metrics": _scores})

    def _count_first(self, batch: dict[str, Any], images: int) -> dict[str, Any]:
        return batch  # a picture that comes again has captions like any other

    def prediction_step(self, model: torch.nn.Module, inputs: dict[str, Any], *args: Any, **kwargs: Any) -> Any:
        """The loss, and where each picture and its captions are, (B, 1 + k, W)."""
        prepared = self._prepare_inputs(inputs)
        with torch.no_grad(), self.compute_loss_context_manager():
            found = model(**prepared)
        pictures, captions = found["pictures"], found["captions"]
        images = len(pictures)
        self._evaluated += torch.tensor([images * float(found["loss"]), float(images)])
        places = torch.cat([pictures[:, None], captions.unflatten(0, (images, -1))], dim=1)  # (B, 1 + k, W)
        return found["loss"], places, places[:, 0, 0]

    def _save(self, output_dir: str | None = None, state_dict: dict | None = None) -> None:
        matcher: Any = self.model
        if self._unfinished is not None:
            weights = matcher.state_dict() if state_dict is None else state_dict
            # safetensors refuses weights that are channels last.
            return super()._save(output_dir, {name: weight.contiguous() for name, weight in weights.items()})
        self.model = matcher.captioner
        try:
            super()._save(output_dir, None)
        finally:
            self.model = matcher


def _scores(evaluated: Any) -> dict[str, float]:
    places = np.asarray(evaluated.predictions)  # (I, 1 + k, W)
    return retrieval(places[:, 0], places[:, 1:].reshape(-1, places.shape[-1]))
