"""Self-critical sequence training (SCST): policy gradients with the CIDEr-D of sampled captions as the reward.

Rennie et al. (2017), "Self-critical sequence training for image captioning", with the baseline of Luo (2020), "A better variant of
self-critical sequence training": the mean reward of the other samples of the same image.
"""

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch.nn import functional as F

from hf_attncap.cache_attncap import CACHE_NAME
from hf_attncap.metrics import CiderReward, DocumentFrequencies, tokenize
from hf_attncap.processing_attncap import IGNORED_LABEL

from ..arguments import SettingError
from ..processes import run_on_main_rank
from .caption_trainer import CaptionTrainer

FREQUENCIES_FILE = "document_frequencies.npz"


class SelfCriticalTrainer(CaptionTrainer):
    """`CaptionTrainer` whose training loss is w * cross-entropy + (1 - w) * self-critical, w = `cross_entropy_weight`.

    The self-critical loss is -sum_s advantage_s log p(s) / S over the S = images * `samples_per_image` samples of all accumulated
    batches and processes; log p(s) is the sum over a sample's words and its end token. Dividing by the number of samples, not of
    words, gives the gradient of the expected reward for any lengths, and S is known before sampling.

    Sampling and the self-critical loss use no dropout and fixed batch norm statistics, because both must use the same
    probabilities, those of the final captioner. The cross-entropy uses dropout.

    Args:
        references: the captions of every training image by `image_id`. Training batches must have `image_ids`.

    Raises:
        SettingError: as `CaptionTrainer`; also if the checkpoint has no `max_new_tokens`, or if the `document_frequencies.npz` of a
            resumed run was computed on other images.
    """

    def __init__(self, *, references: Mapping[str, Sequence[str]], **kwargs: Any):
        super().__init__(**kwargs)
        settings: Any = self.model.generation_config  # type: ignore[union-attr]
        if settings.max_new_tokens is None:
            raise SettingError("The checkpoint's generation_config.json has no `max_new_tokens`: set it to the longest caption.")
        tokens = {name: [tokenize(caption) for caption in captions] for name, captions in references.items()}
        self._reward = CiderReward(tokens, self._frequencies(list(tokens.values())))
        self._samples = 0  # of all accumulated batches and processes
        self._sums = torch.zeros(6, dtype=torch.float64)

    def _frequencies(self, references: list[list[list[str]]]) -> DocumentFrequencies:
        """The document frequencies of the training references, which one process computes and saves in the output folder."""
        args: Any = self.args
        path = Path(args.output_dir) / FREQUENCIES_FILE

        def save() -> None:
            if not (args.resume_from_checkpoint and path.exists()):
                path.parent.mkdir(parents=True, exist_ok=True)
                DocumentFrequencies.from_references(references, end_token=True).save(path)

        run_on_main_rank(save)
        frequencies = DocumentFrequencies.load(path)
        if frequencies.images != len(references):
            raise SettingError(
                f"{path} was computed on {frequencies.images} images, but there are {len(references)} training images: "
                "resume with the same `train_file`, or start a new run in another `output_dir`."
            )
        return frequencies

    def get_batch_samples(self, epoch_iterator: Iterator, num_batches: int, device: torch.device) -> Any:
        batches, words = super().get_batch_samples(epoch_iterator, num_batches, device)
        images = torch.tensor(sum(len(batch["image_ids"]) for batch in batches), device=device)
        self._samples = int(self.accelerator.gather(images).sum()) * self.args.samples_per_image  # type: ignore[union-attr]
        return batches, words

    def compute_loss(
        self,
        model: torch.nn.Module,
        inputs: dict[str, Any],
        return_outputs: bool = False,
        num_items_in_batch: torch.Tensor | int | None = None,
    ) -> Any:
        """The loss of a training batch, scaled for accumulation and processes. In evaluation, the cross-entropy."""
        if not model.training:
            return super().compute_loss(model, inputs, return_outputs, num_items_in_batch)
        captioner: Any = self.model
        weight = self.args.cross_entropy_weight  # type: ignore[attr-defined]
        disable_dropout(captioner)
        regions = self._encode(inputs).last_hidden_state  # (B, N, C)
        with self.accelerator.autocast():  # around all steps, so that each weight is converted to half precision once
            samples = sample(captioner, regions, self.args.samples_per_image)  # type: ignore[attr-defined]  # (R, T)
        advantage = torch.zeros(len(samples), device=samples.device)  # (R); 0 for duplicates, which have no id
        if inputs["image_ids"]:
            counted = len(inputs["image_ids"]) * self.args.samples_per_image  # type: ignore[attr-defined]
            advantage[:counted] = self._advantage(samples[:counted], inputs["image_ids"])
        logits = model(encoder_outputs=(regions,), labels=samples).logits  # (R, T, V)
        loss = self_critical_loss(policy_logits(captioner, logits), samples, advantage) / self._samples
        loss = loss * self.accelerator.num_processes  # the gradients of the processes are averaged
        if weight:
            captioner.dropout.train()
            words = {"encoder_outputs": (regions,), "labels": inputs["labels"]}
            cross_entropy = super().compute_loss(model, words, num_items_in_batch=num_items_in_batch)
            captioner.dropout.eval()
            loss = weight * cross_entropy + (1 - weight) * loss
        return loss

    def _advantage(self, samples: torch.Tensor, image_ids: list[str]) -> torch.Tensor:
        """The advantage (R) of samples (R, T). Also updates the sums for the log."""
        k = len(samples) // len(image_ids)
        ends = self.model.end_token_ids  # type: ignore[union-attr]
        rows = [[token for token in row if token != IGNORED_LABEL] for row in samples.tolist()]
        ended = [row[-1] in ends for row in rows]
        captions = self.processing_class.batch_decode(rows, skip_special_tokens=True)  # type: ignore[union-attr]
        ids = [name for name in image_ids for _ in range(k)]
        reward = torch.from_numpy(self._reward.reward(ids, [tokenize(caption) for caption in captions], ended))  # (R)
        advantage = advantages(reward, k)
        lengths = sum(map(len, rows)) - sum(ended)
        distinct = sum(len({tuple(row) for row in rows[start : start + k]}) for start in range(0, len(rows), k))
        sums = (len(rows), reward.sum(), advantage.square().sum(), lengths, sum(ended), distinct)
        self._sums += torch.tensor([float(value) for value in sums], dtype=torch.float64)
        return advantage.to(samples.device, torch.float32)

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """With each training loss, also logs means over the samples since the last one, of all processes.

        These are `reward` (equal to the mean baseline), `advantage_std`, `sample_length` (tokens without the end token),
        `sample_ended` (fraction with an end token) and `sample_distinct` (fraction of distinct samples per image).
        """
        if "loss" in logs:
            own = self._sums.to(self.args.device, torch.float32)
            sums = self.accelerator.gather(own[None]).double().sum(dim=0).tolist()  # type: ignore[union-attr]
            self._sums.zero_()
            if sums[0]:
                reward, square, *others = (value / sums[0] for value in sums[1:])
                logs.update(reward=reward, advantage_std=square**0.5)
                logs.update(zip(("sample_length", "sample_ended", "sample_distinct"), others))
        super().log(logs, start_time)

    def prediction_step(self, model: torch.nn.Module, inputs: dict[str, Any], *args: Any, **kwargs: Any) -> Any:
        return super().prediction_step(model, {name: x for name, x in inputs.items() if name != "image_ids"}, *args, **kwargs)


def disable_dropout(captioner: torch.nn.Module) -> None:
    """Put every layer in evaluation mode: no dropout, fixed batch norm statistics.

    Containers stay in training mode, which they need for gradient checkpointing.
    """
    captioner.train()
    for module in captioner.modules():
        if next(module.children(), None) is None:
            module.eval()


def policy_logits(captioner: Any, logits: torch.Tensor) -> torch.Tensor:
    """The logits (..., V) from which captions are sampled: -inf for words that the captioner suppresses."""
    suppressed = torch.tensor(captioner.generation_config.suppress_tokens or [], dtype=torch.long, device=logits.device)
    return logits.to(torch.promote_types(logits.dtype, torch.float32)).index_fill(-1, suppressed, float("-inf"))


@torch.no_grad()
def sample(captioner: Any, regions: torch.Tensor, k: int) -> torch.Tensor:
    """Sample k captions per image: token ids (B * k, T), -100 after the end token, T at most the model's `max_new_tokens`.

    `generate` would also apply the checkpoint's settings for repetitions and lengths, and so sample from other probabilities than
    those of the loss. Here, only `policy_logits` changes the model's logits.

    Args:
        regions: (B, N, C).
        k: samples per image, in adjacent rows.
    """
    rows = regions.shape[0] * k
    words = torch.full((rows, 1), captioner.config.decoder_start_token_id, device=regions.device)  # (R, 1)
    unfinished = torch.ones_like(words, dtype=torch.bool)  # (R, 1)
    ends = torch.tensor(captioner.end_token_ids, dtype=torch.long, device=regions.device)
    state, samples = None, []
    for _ in range(captioner.generation_config.max_new_tokens):
        out = captioner(encoder_outputs=(regions,), decoder_input_ids=words, use_cache=True, **{CACHE_NAME: state})
        state = out[CACHE_NAME]
        words = sample_tokens(policy_logits(captioner, out.logits[:, -1]).softmax(dim=-1))  # (R, 1)
        samples.append(words.masked_fill(~unfinished, IGNORED_LABEL))
        unfinished = unfinished & ~torch.isin(words, ends)
        if not unfinished.any():
            break
    return torch.cat(samples, dim=1)


def sample_tokens(probabilities: torch.Tensor) -> torch.Tensor:
    """Sample one token per row of probabilities (R, V): (R, 1).

    Equivalent to `torch.multinomial`, which generates its random numbers four times slower on CPUs.
    """
    exponential = torch.rand_like(probabilities).log_().neg_()  # (R, V)
    return (probabilities / exponential).argmax(dim=-1, keepdim=True)  # (R, 1)


def advantages(rewards: torch.Tensor, k: int) -> torch.Tensor:
    """Rewards (R), k adjacent ones per image, minus the mean reward of the other k - 1 samples of the image."""
    each = rewards.unflatten(0, (-1, k))  # (B, k)
    return (each - (each.sum(dim=1, keepdim=True) - each) / (k - 1)).flatten()


def self_critical_loss(logits: torch.Tensor, samples: torch.Tensor, advantage: torch.Tensor) -> torch.Tensor:
    """-sum over the samples of advantage * log p, where log p is the sum over the words and the end token.

    Args:
        logits: the logits from which the samples were drawn, (R, T, V).
        samples: (R, T), -100 after the end token.
        advantage: (R).
    """
    losses = F.cross_entropy(logits.flatten(0, 1), samples.flatten(), ignore_index=IGNORED_LABEL, reduction="none")  # (R * T)
    return (advantage * losses.unflatten(0, samples.shape).sum(dim=1)).sum()
