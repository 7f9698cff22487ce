"""Makes a faster copy of a captioner for inference: `optimize_for_inference`."""

import copy
import logging
from typing import Any, NoReturn

import torch
from torch import fx, nn
from torch.nn import functional as F
from torch.nn.utils.fusion import fuse_conv_bn_eval

from .decoder_attncap import AttnCapDecoder
from .modeling_attncap import AttnCapForConditionalGeneration

logger = logging.getLogger(__name__)

MAX_TABLE_ELEMENTS = 2**25  # of the table of word products; with a larger vocabulary the decoder stays as it is


def optimize_for_inference(model: AttnCapForConditionalGeneration, compile: bool = False) -> AttnCapForConditionalGeneration:
    """Makes a faster copy of a captioner. Its captions are the same; scores and attention differ by rounding errors only.

    - Batch norm is folded into the convolution before it.
    - The encoder's weights are in channels-last layout, with which convolutions are faster.
    - With `word_attention` "none" or "score", the decoder becomes an `InferenceDecoder`, which looks up the products of the word
      embeddings in a table. If the table would exceed 128 MiB in float32, the decoder stays as it is.

    The copy is in evaluation mode. It can be neither trained nor saved. An INFO message in the log says what was done.

    Args:
        model: is not changed.
        compile: also compile the encoder with `torch.compile`, which needs a C++ compiler on CPUs. The first batch of each size is
            slow.
    """
    fast = copy.deepcopy(model).eval().requires_grad_(False)
    encoder: Any = fast.model.encoder
    folded = _fold_batch_norm(encoder.backbone)
    encoder.to(memory_format=torch.channels_last)
    decoder: Any = fast.model.decoder
    if decoder.attention.word_attention in ("none", "score") and InferenceDecoder.table_size(decoder) <= MAX_TABLE_ELEMENTS:
        fast.model.decoder = InferenceDecoder(decoder)
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
    """A decoder for inference that needs fewer matrix products per step.

    The layers that read the LSTM state are merged into one. The layers of the deep output that read state and context are merged
    too. The products of the word embeddings with weight matrices are computed once for the whole vocabulary, and each step looks
    them up in a table. D is E with deep output, else 0.

    Args:
        decoder: with `word_attention` "none" or "score". Layers that the steps do not need are left out.
    """

    word_products: torch.Tensor
    word_queries: torch.Tensor

    def __init__(self, decoder: AttnCapDecoder):
        nn.Module.__init__(self)
        self.embed_tokens, self.attention, self.deep_output = decoder.embed_tokens, decoder.attention, decoder.deep_output
        self.init_h, self.init_c = decoder.init_h, decoder.init_c
        cell, query = decoder.cell, decoder.attention.query_proj
        words = decoder.embed_tokens.weight  # (V, E)
        word_weight, context_weight = cell.weight_ih.split(
            [words.shape[1], cell.input_size - words.shape[1]], dim=1
        )  # (4S, E), (4S, C)
        gate = [] if decoder.gate is None else [decoder.gate]
        self.widths = [query.out_features, *(layer.out_features for layer in gate), 4 * cell.hidden_size]
        bias = [query.bias, *(layer.bias for layer in gate), cell.bias_ih + cell.bias_hh]
        self.state_proj = _linear(torch.cat([query.weight, *(layer.weight for layer in gate), cell.weight_hh]), torch.cat(bias))
        self.context_proj = _linear(context_weight.contiguous())
        table = [words @ word_weight.T]  # (V, 4S)
        if decoder.deep_output:
            self.output_proj = _linear(torch.cat([decoder.state_out.weight, decoder.region_out.weight], dim=1))
            table.append(decoder.word_out(words) + decoder.state_out.bias)  # (V, E)
        self.register_buffer("word_products", torch.cat(table, dim=1), persistent=False)  # (V, 4S + D)
        if decoder.attention.word_attention == "score":
            self.register_buffer("word_queries", decoder.attention.word_proj(words), persistent=False)  # (V, A)

    @staticmethod
    def table_size(decoder: AttnCapDecoder) -> int:
        """The number of elements in the table that a decoder would have."""
        words, embed = decoder.embed_tokens.weight.shape
        return words * (4 * decoder.cell.hidden_size + embed + decoder.attention.query_proj.out_features)

    def _embed(self, input_ids: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor | None]:
        """Look up the word products (R, T, 4S + D), which take the place of e, and u (R, T, A)."""
        u = None if self.attention.word_attention == "none" else F.embedding(input_ids, self.word_queries)  # (R, T, A)
        return F.embedding(input_ids, self.word_products), u

    def step(self, h, c, keys, regions, e, u, mask=None, gradients=None):
        q, *gate, gates = self.state_proj(h).split(self.widths, dim=-1)  # (R, A), (R, C), (R, 4S)
        query = q if u is None else q + u[:, -1]  # (R, A)
        z, alpha = self.attention.attend_regions(query, keys, regions)  # (R, C), (R, N)
        if gate:
            z = torch.sigmoid(gate[0]) * z  # (R, C)
        gates = gates + e[:, -1, : gates.shape[-1]] + self.context_proj(z)  # (R, 4S)
        i, f, g, o = gates.chunk(4, dim=-1)  # (R, S) each
        c = torch.sigmoid(f) * c + torch.sigmoid(i) * torch.tanh(g)  # (R, S)
        return torch.sigmoid(o) * torch.tanh(c), c, z, alpha, None

    def project_output(self, e: torch.Tensor, h: torch.Tensor, z: torch.Tensor) -> torch.Tensor:
        if not self.deep_output:
            return h
        return e[..., -self.output_proj.out_features :] + self.output_proj(torch.cat([h, z], dim=-1))  # (..., E)


def _linear(weight: torch.Tensor, bias: torch.Tensor | None = None) -> nn.Linear:
    """A linear layer with the weight (out, in)."""
    layer = nn.Linear(weight.shape[1], weight.shape[0], bias is not None, device="meta")
    layer.weight = nn.Parameter(weight, requires_grad=False)
    if bias is not None:
        layer.bias = nn.Parameter(bias, requires_grad=False)
    return layer


def _refuse_saving(*args: Any, **kwargs: Any) -> NoReturn:
    raise RuntimeError(
        "A model optimized for inference cannot be saved: save the original, or load the checkpoint with `optimize=False`."
    )


class _Tracer(fx.Tracer):
    """Traces into all modules that have children, so that each convolution and batch norm is a node of its own in the graph."""

    def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:
        return not list(m.children())


def _fold_batch_norm(backbone: nn.Module) -> int:
    """Fold batch norms into the convolutions whose outputs only they use, in place; return the number of folded batch norms.

    A backbone that fx cannot trace is not changed.
    """
    try:
        graph = _Tracer().trace(backbone)
    except Exception:  # fx raises many kinds for control flow that depends on tensors
        return 0
    modules, folded = dict(backbone.named_modules()), 0
    calls = [node for node in graph.nodes if node.op == "call_module"]
    used_once = {name for name in modules if sum(node.target == name for node in calls) == 1}
    for node in calls:
        before = node.args[0] if node.args else None
        if not (isinstance(before, fx.Node) and before.op == "call_module" and len(before.users) == 1):
            continue
        convolution: Any = modules[str(before.target)]
        norm: Any = modules[str(node.target)]
        foldable = isinstance(convolution, nn.Conv2d) and isinstance(norm, nn.BatchNorm2d) and norm.track_running_stats
        if foldable and {before.target, node.target} <= used_once:
            backbone.set_submodule(str(before.target), fuse_conv_bn_eval(convolution, norm))
            backbone.set_submodule(str(node.target), nn.Identity())
            folded += 1
    return folded


__all__ = ["optimize_for_inference"]
