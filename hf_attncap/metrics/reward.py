"""CIDEr-D of sampled captions as a reward for training.

Rennie et al. (2017), "Self-critical sequence training for image captioning".
"""

from collections.abc import Mapping, Sequence

import numpy as np

from .cider import END, CiderD, DocumentFrequencies, ending
from .ngrams import Floats, Tokens, check_tokens


class CiderReward:
    """CIDEr-D of sampled captions with fixed document frequencies, for self-critical training; references are counted once.

    Args:
        references: for each image's id, one or more lists of tokens.
        frequencies: of the training references. Made with `end_token=True`, each reference ends with an end token here as well.

    Raises:
        TypeError: a caption is a string.
        ValueError: no image, or an image without a reference.
    """

    def __init__(self, references: Mapping[str, Sequence[Tokens]], frequencies: DocumentFrequencies):
        self._end_token = frequencies.end_token
        self._place = {name: i for i, name in enumerate(references)}
        captions = list(references.values())
        self._cider = CiderD(ending(captions) if self._end_token else captions, frequencies)

    def reward(self, ids: Sequence[str], samples: Sequence[Tokens], ended: Sequence[bool] | None = None) -> Floats:
        """CIDEr-D of P samples, any number for an image.

        Args:
            ids: the image of each sample.
            samples: P lists of tokens, without an end token.
            ended: whether each sample came to its end by itself; one cut off at the longest length earns less. Given with
                frequencies that count the end of captions, and only then.

        Returns:
            (P,), 0 to 10.

        Raises:
            TypeError: a sample is a string.
            ValueError: an id is unknown, the numbers differ, or `ended` does not go with the frequencies.
        """
        unknown = [name for name in ids if name not in self._place]
        if unknown:
            raise ValueError(f"There are no references for the image '{unknown[0]}': give the reward those of every image.")
        if self._end_token != (ended is not None):
            need = "count the end of captions: say which samples `ended`" if self._end_token else "know no end: leave `ended` out"
            raise ValueError(f"The document frequencies {need}, or make them with end_token={not self._end_token}.")
        if len(ids) != len(samples):
            raise ValueError(f"{len(ids)} ids for {len(samples)} samples: give the id of each sample's image.")
        check_tokens(samples, "a sample")
        if ended is not None:
            if len(ended) != len(samples):
                raise ValueError(f"{len(ended)} values of `ended` for {len(samples)} samples: give one for each.")
            samples = [[*tokens, END] if end else tokens for tokens, end in zip(samples, ended)]
        images = np.array([self._place[name] for name in ids], dtype=np.int64)
        matches = self._cider.references.match(samples, images)
        return self._cider.score_matches(matches)
