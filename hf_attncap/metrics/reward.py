"""CIDEr-D of sampled captions as a reward for training.

Rennie et al. (2017), "Self-critical sequence training for image captioning".
"""

from collections.abc import Mapping, Sequence

import numpy as np

from .cider import END, CiderD, DocumentFrequencies, ending
from .ngrams import Floats, References, Tokens, check_tokens


class CiderReward:
    """CIDEr-D with fixed document frequencies, for self-critical training. The n-grams of the references are counted once.

    Args:
        references: id of an image -> one or more lists of tokens.
        frequencies: document frequencies of the training references. If they have an end token, these references get one too.

    Raises:
        TypeError: a caption is a string.
        ValueError: there are no images, or an image has no reference.
    """

    def __init__(self, references: Mapping[str, Sequence[Tokens]], frequencies: DocumentFrequencies):
        self._end_token = frequencies.end_token
        self._place = {name: i for i, name in enumerate(references)}
        captions = list(references.values())
        prepared = References(ending(captions) if self._end_token else captions, frequencies.index)
        self._cider = CiderD(prepared, frequencies)

    def reward(self, ids: Sequence[str], samples: Sequence[Tokens], ended: Sequence[bool] | None = None) -> Floats:
        """CIDEr-D of P samples, any number per image.

        Args:
            ids: the image of each sample.
            samples: P lists of tokens, without an end token.
            ended: whether each sample has an end token; a sample that was cut off at the maximum length gets a lower reward.
                Required if the frequencies have an end token, and not allowed otherwise.

        Returns:
            (P,), 0 to 10.

        Raises:
            TypeError: a sample is a string.
            ValueError: an id is unknown, the lengths differ, or `ended` does not fit the frequencies.
        """
        unknown = [name for name in ids if name not in self._place]
        if unknown:
            raise ValueError(f"There are no references for the image '{unknown[0]}': give references for every image.")
        if self._end_token != (ended is not None):
            need = "have an end token: give `ended`" if self._end_token else "have no end token: leave `ended` out"
            raise ValueError(f"The document frequencies {need}, or count them with end_token={not self._end_token}.")
        if len(ids) != len(samples):
            raise ValueError(f"{len(ids)} ids for {len(samples)} samples: give the id of each sample's image.")
        check_tokens(samples, "a sample")
        if ended is not None:
            if len(ended) != len(samples):
                raise ValueError(f"{len(ended)} values of `ended` for {len(samples)} samples: give one for each.")
            samples = [[*tokens, END] if end else tokens for tokens, end in zip(samples, ended)]
        images = np.array([self._place[name] for name in ids], dtype=np.int64)
        return self._cider.score(self._cider.references.match(samples, images))
