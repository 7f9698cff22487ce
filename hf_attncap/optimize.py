"""Makes a faster copy of a captioner for inference: `optimize_for_inference`."""

import copy
import logging
from typing import Any, NoReturn

import torch
from torch import nn
from torch.nn import functional as F

from .convolutions import fuse_convolutions
from .decoder_attncap import AttnCapDecoder
from .modeling_attncap import AttnCapForConditionalGeneration
from .onednn import PackedLinear

logger = logging.getLogger(__name__)

MAX_TABLE_ELEMENTS = 2**25  # of the table of word products; with a larger vocabulary the decoder stays as it is


def optimize_for_inference(model: AttnCapForConditionalGeneration, compile: bool = False) -> AttnCapForConditionalGeneration:
    """Makes a faster copy of a captioner. In float32 its captions are the same; scores and attention differ by rounding only.

    - Batch norm is folded into the convolution before it.
    - The encoder's weights are in channels-last layout, which makes convolutions faster.
    - On x86 CPUs, residuals and activations are fused into the convolutions, in float32 and bfloat16. For single images, the
      encoder then keeps a second copy of its weights.
    - With `word_attention` "none" or "score", the decoder becomes an `InferenceDecoder`, which looks up the products of the word
      embeddings in a table. If the table would exceed 128 MiB in float32, the decoder stays as it is.
    - In bfloat16 on x86 CPUs, the `InferenceDecoder` and the output layer keep a second copy of their weights in oneDNN's layout.

    The copy is in evaluation mode. It can be neither trained nor saved, and its weights must not be changed. An INFO message in the
    log says what was done.

    Args:
        model: is not changed.
        compile: also compile the encoder with `torch.compile`, which needs a C++ compiler on CPUs. The first batch of each size is
            slow.
    """
    fast: Any = copy.deepcopy(model).eval().requires_grad_(False)
    encoder = fast.model.encoder
    folded = fuse_convolutions(encoder)
    encoder.to(memory_format=torch.channels_last)
    decoder = fast.model.decoder
    if decoder.attention.word_attention in ("none", "score") and InferenceDecoder.table_size(decoder) <= MAX_TABLE_ELEMENTS:
        fast.model.decoder = InferenceDecoder(decoder)
    if type(fast.lm_head) is nn.Linear:
        fast.lm_head = PackedLinear(fast.lm_head.weight, fast.lm_head.bias)
    if compile:
        encoder.compile()
    tabulated = isinstance(fast.model.decoder, InferenceDecoder)
    logger.info(
        "Optimized for inference: %d batch norms folded, channels last, %s, %s.",
        folded,
        "word products in a table" if tabulated else "decoder unchanged",
        "encoder compiled" if compile else "encoder not compiled",
    )
    fast.save_pretrained = _refuse_saving
    return fast


class InferenceDecoder(AttnCapDecoder):
    """A decoder for inference that needs fewer operations per step.

    The layers that read the LSTM state are merged into one. The layers of the deep output that read state and context are merged
    too. The products of the word embeddings with weight matrices are computed once for the whole vocabulary, and each step looks
    them up in a table. D is E with deep output, else 0.

    Args:
        decoder: with `word_attention` "none" or "score". Layers that the steps do not need are left out.
    """

    word_products: torch.Tensor

    def __init__(self, decoder: AttnCapDecoder):
        nn.Module.__init__(self)
        self.embed_tokens, self.attention, self.deep_output = decoder.embed_tokens, decoder.attention, decoder.deep_output
        self.init_h, self.init_c = decoder.init_h, decoder.init_c
        cell, query, words = decoder.cell, decoder.attention.query_proj, decoder.embed_tokens.weight  # (V, E)
        word_weight, context_weight = _reorder_gates(cell.weight_ih).split(
            [words.shape[1], cell.input_size - words.shape[1]], dim=1
        )  # (4S, E), (4S, C)
        weights, biases = [query.weight, _reorder_gates(cell.weight_hh)], [query.bias, _reorder_gates(cell.bias_ih + cell.bias_hh)]
        if decoder.gate is not None:
            weights.append(decoder.gate.weight)
            biases.append(decoder.gate.bias)
        self.widths = [query.out_features, 4 * cell.hidden_size]
        self.state_proj = PackedLinear(_arrange(torch.cat(weights)), torch.cat(biases))  # S to A + 4S [+ C]
        self.context_proj = PackedLinear(_arrange(context_weight))  # C to 4S
        is_scored = decoder.attention.word_attention == "score"
        queries = decoder.attention.word_proj(words) if is_scored else words.new_zeros(len(words), query.out_features)  # (V, A)
        table = [queries, words @ word_weight.T]  # (V, A), (V, 4S)
        if decoder.deep_output:
            self.output_proj = PackedLinear(torch.cat([decoder.state_out.weight, decoder.region_out.weight], dim=1))  # S + C to E
            table.append(decoder.word_out(words) + decoder.state_out.bias)  # (V, E)
        self.register_buffer("word_products", torch.cat(table, dim=1), persistent=False)  # (V, A + 4S + D)

    @staticmethod
    def table_size(decoder: AttnCapDecoder) -> int:
        """The number of elements in the table that a decoder would have."""
        words, embed = decoder.embed_tokens.weight.shape
        return words * (4 * decoder.cell.hidden_size + embed + decoder.attention.query_proj.out_features)

    def _embed(self, input_ids: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor | None]:
        """Look up the word products (R, T, A + 4S + D), which take the place of e and u."""
        return F.embedding(input_ids, self.word_products), None

    def step(self, h, c, keys, regions, e, u, mask=None, gradients=None):
        state = self.state_proj(h)  # (R, A + 4S [+ C])
        width = sum(self.widths)
        query, gates = (state[:, :width] + e[:, -1, :width]).split(self.widths, dim=-1)  # (R, A), (R, 4S)
        z, alpha = self.attention.attend_regions(query, keys, regions)  # (R, C), (R, N)
        if state.shape[1] > width:
            z = torch.sigmoid(state[:, width:]) * z  # (R, C)
        gates = self.context_proj(z, gates)  # (R, 4S)
        i, f, o = torch.sigmoid(gates[:, : 3 * h.shape[1]]).chunk(3, dim=-1)  # (R, S) each
        c = f * c + i * torch.tanh(gates[:, 3 * h.shape[1] :])  # (R, S)
        return o * torch.tanh(c), c, z, alpha, None

    def project_output(self, e: torch.Tensor, h: torch.Tensor, z: torch.Tensor) -> torch.Tensor:
        if not self.deep_output:
            return h
        return e[..., -self.embed_tokens.embedding_dim :] + self.output_proj(torch.cat([h, z], dim=-1))  # (..., E)


def _reorder_gates(weight: torch.Tensor) -> torch.Tensor:
    """Moves the rows (4S, .) of the LSTM's output gate before those of the cell input. One sigmoid then computes all gates."""
    i, f, g, o = weight.chunk(4)  # (S, .) each
    return torch.cat([i, f, o, g])


def _arrange(weight: torch.Tensor) -> torch.Tensor:
    """Copies a weight (out, in) to the memory layout that is fastest for few rows on CPUs. In float32 that is (in, out)."""
    return weight.T.contiguous().T if weight.dtype == torch.float32 else weight.contiguous()


def _refuse_saving(*args: Any, **kwargs: Any) -> NoReturn:
    raise RuntimeError(
        "A model optimized for inference cannot be saved: save the original, or load the checkpoint with `optimize=False`."
    )


__all__ = ["optimize_for_inference"]
