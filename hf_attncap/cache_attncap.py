"""The decoder's state between words as a `transformers` cache.

It has three layers: the LSTM state, the words so far (for the attention over words), and the regions of the images with their
projection. The rows of one image are adjacent and share its regions, so that beams and samples never copy them.
"""

from dataclasses import fields
from typing import Any

import torch
from transformers.cache_utils import Cache, CacheLayerMixin
from transformers.modeling_outputs import Seq2SeqLMOutput

# transformers' name of the cache in arguments and outputs: "cache" since 5.24, "past_key_values" before.
CACHE_NAME = "cache" if any(field.name == "cache" for field in fields(Seq2SeqLMOutput)) else "past_key_values"


class _Layer(CacheLayerMixin):
    """Base class of the layers. They replace their tensors and never write in place, because autograd may need the old ones."""

    keys: Any  # a tensor from the first update on
    values: Any
    is_croppable = True
    supports_early_init = False

    def lazy_initialization(self, key_states: torch.Tensor, value_states: torch.Tensor) -> None:
        self.dtype, self.device = key_states.dtype, key_states.device
        self.is_initialized = True

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        return self.get_seq_length() + query_length, 0

    def get_max_length(self) -> int:
        return -1

    def get_seq_length(self) -> int:
        return 0

    def reset(self) -> None:
        self.keys = self.values = None
        self.is_initialized = False

    def crop(self, tokens_to_remove: int) -> None:
        pass

    def select(self, rows: torch.Tensor) -> None:
        """Keep these rows, in this order."""
        if self.is_initialized:
            self.keys = self.keys.index_select(0, rows.to(self.keys.device))
            self.values = self.values.index_select(0, rows.to(self.values.device))

    def reorder_cache(self, beam_idx: torch.LongTensor) -> None:
        self.select(beam_idx)

    def batch_repeat_interleave(self, repeats: int) -> None:
        if self.is_initialized:
            self.select(torch.arange(self.keys.shape[0]).repeat_interleave(repeats))


class StateLayer(_Layer):
    """`keys` = h and `values` = c, (R, S) each, after the last word.

    It keeps references to earlier states for `crop`. Selecting rows drops them, because it would copy them all, unless
    `activate_past_recording` was called.
    """

    def __init__(self):
        super().__init__()
        self.length = 0
        self.record_past = False
        self.past: list[tuple[torch.Tensor, ...]] = []  # the state before each position

    def update(self, key_states: torch.Tensor, value_states: torch.Tensor, *args, **kwargs):
        """Store h and c (R, S) after one more position."""
        self.past.append((self.keys, self.values))
        self.keys, self.values = key_states, value_states
        self.length += 1
        return self.keys, self.values

    def start(self, h: torch.Tensor, c: torch.Tensor) -> None:
        """Store h and c (R, S) before the first word."""
        self.lazy_initialization(h, c)
        self.keys, self.values = h, c

    def get_seq_length(self) -> int:
        return self.length

    def activate_past_recording(self) -> None:
        self.record_past = True

    def crop(self, tokens_to_remove: int) -> None:
        if tokens_to_remove > 0:
            raise ValueError(f"crop({tokens_to_remove}): give the number of words to remove as a negative number.")
        if tokens_to_remove == 0:
            return
        if -tokens_to_remove > len(self.past):
            raise ValueError(
                f"crop({tokens_to_remove}): {len(self.past)} earlier states are kept; call `activate_past_recording` before "
                "beams or rows are selected."
            )
        self.keys, self.values = self.past[tokens_to_remove]
        self.past = self.past[:tokens_to_remove]
        self.length += tokens_to_remove

    def select(self, rows: torch.Tensor) -> None:
        super().select(rows)
        if not self.record_past:
            self.past = []
        self.past = [tuple(state.index_select(0, rows.to(state.device)) for state in pair) for pair in self.past]

    def reset(self) -> None:
        super().reset()
        self.length, self.past = 0, []


class WordLayer(_Layer):
    """The words so far: `keys` = u (R, t, A), `values` = e (R, t, E), `mask` (R, t), False at padding.

    `all_words` is True until a mask is given; without padding, the attention needs no mask.
    """

    mask: Any = None  # a tensor from the first update on
    all_words = True

    def update(self, key_states: torch.Tensor, value_states: torch.Tensor, mask: Any = None, **kwargs):
        """Append words: u (R, n, A), e (R, n, E), mask (R, n)."""
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
            self.keys, self.values, self.mask = key_states, value_states, mask
        else:
            self.keys = torch.cat([self.keys, key_states], dim=1)  # (R, t + n, A)
            self.values = torch.cat([self.values, value_states], dim=1)  # (R, t + n, E)
            self.mask = torch.cat([self.mask, mask], dim=1)  # (R, t + n)
        return self.keys, self.values

    def get_seq_length(self) -> int:
        return self.keys.shape[1] if self.is_initialized else 0

    def crop(self, tokens_to_remove: int) -> None:
        if tokens_to_remove < 0 and self.is_initialized:
            self.keys, self.values, self.mask = (x[:, :tokens_to_remove] for x in (self.keys, self.values, self.mask))

    def select(self, rows: torch.Tensor) -> None:
        super().select(rows)
        if self.is_initialized:
            self.mask = self.mask.index_select(0, rows.to(self.mask.device))

    def reset(self) -> None:
        super().reset()
        self.mask, self.all_words = None, True


class RegionLayer(_Layer):
    """The regions of the B images: `values` = a (B, N, C), `keys` = their projection K (B, N, A)."""

    def update(self, key_states: torch.Tensor, value_states: torch.Tensor, *args, **kwargs):
        self.lazy_initialization(key_states, value_states)
        self.keys, self.values = key_states, value_states
        return self.keys, self.values

    def reorder_cache(self, beam_idx: torch.LongTensor) -> None:
        """Do nothing: beams change places only within their image."""

    def batch_repeat_interleave(self, repeats: int) -> None:
        """Do nothing: all rows of an image share its regions."""


class AttnCapCache(Cache):
    """The decoder's cache; `get_seq_length()` counts the positions of the words so far."""

    layers: list

    def __init__(self):
        super().__init__(layers=[StateLayer(), WordLayer(), RegionLayer()])

    @property
    def state(self) -> StateLayer:
        return self.layers[0]

    @property
    def words(self) -> WordLayer:
        return self.layers[1]

    @property
    def regions(self) -> RegionLayer:
        return self.layers[2]

    @property
    def is_initialized(self) -> bool:
        return self.state.is_initialized

    def batch_select_indices(self, indices: torch.Tensor) -> None:
        """Keep these rows; from now on each row has its own regions."""
        indices = torch.as_tensor(indices)
        if indices.dtype == torch.bool:
            indices = indices.nonzero().squeeze(1)
        rows_per_image = self.state.keys.shape[0] // self.regions.keys.shape[0]
        self.state.select(indices)
        self.words.select(indices)
        self.regions.select(indices // rows_per_image)


__all__ = ["AttnCapCache"]
