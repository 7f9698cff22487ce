"""Trains word vectors on the training captions: skip-gram over the tokenizer's tokens."""

import logging
from pathlib import Path

import numpy as np
from transformers import PreTrainedTokenizerFast

from hf_attncap.atomic import atomic_write

from ..arguments import SettingError
from .vocabulary import SPECIAL_TOKENS

logger = logging.getLogger(__name__)

# Captions are few and short, so they need more epochs than large corpora, and frequent words ("a", "in") are mostly skipped.
EPOCHS = 20
SUBSAMPLE = 0.25  # threshold of gensim's `sample`, in units of the mean word frequency


def train_word_vectors(
    captions: list[str], tokenizer: PreTrainedTokenizerFast, dim: int, seed: int = 0
) -> tuple[np.ndarray, np.ndarray, float]:
    """Word2vec (skip-gram, negative sampling; arXiv 1310.4546) on captions.

    The vectors are centred, as those of a small corpus share a large common part. Then they are scaled to a root mean square norm
    of 1, which rows of a new embedding have, so that tokens without a vector start with the same norm. Training uses one thread,
    so that the same captions in the same order give the same vectors.

    Args:
        captions: raw.
        tokenizer: its tokens (words or word pieces) get vectors.
        dim: dimensions of a vector.

    Returns:
        Ids (n), vectors (n, dim) float32, and n as a share of all tokens except special ones. Special tokens and tokens that do
        not occur in the captions get no vector.

    Raises:
        SettingError: gensim is not installed, or the captions have fewer than two different tokens.
    """
    try:
        from gensim.models import Word2Vec
    except ImportError as error:
        raise SettingError("`word_vectors: captions` needs gensim: `pip install gensim`, or give a file of vectors.") from error
    sentences = [encoding.tokens for encoding in tokenizer.backend_tokenizer.encode_batch(captions, add_special_tokens=False)]
    different = {token for sentence in sentences for token in sentence} - set(SPECIAL_TOKENS)
    if len(different) < 2:
        raise SettingError("`word_vectors: captions` needs at least two different words in the captions: give a file of vectors.")
    trained = Word2Vec(
        sentences,
        vector_size=dim,
        sg=1,
        negative=5,
        window=5,
        sample=SUBSAMPLE / len(different),
        min_count=1,
        epochs=EPOCHS,
        seed=seed,
        workers=1,
    ).wv
    tokens = [str(token) for token in trained.index_to_key if token not in SPECIAL_TOKENS]
    vectors = trained[tokens]  # (n, dim)
    vectors -= vectors.mean(0)
    vectors /= np.sqrt(np.square(vectors).sum(1).mean())
    ids = np.array(tokenizer.convert_tokens_to_ids(tokens))  # (n)
    order = ids.argsort()
    return ids[order], vectors[order], len(ids) / (len(tokenizer) - len(SPECIAL_TOKENS))


def write_word_vectors(path: Path, captions: list[str], tokenizer: PreTrainedTokenizerFast, dim: int) -> None:
    """Trains word vectors and writes them as a word2vec text file."""
    ids, vectors, share = train_word_vectors(captions, tokenizer, dim)
    logger.warning("word vectors: trained on %d captions, for %.2f %% of the tokens, saved as %s", len(captions), 100 * share, path)
    path.parent.mkdir(parents=True, exist_ok=True)
    with atomic_write(path) as file:
        file.write(f"{len(ids)} {dim}\n")
        for token, vector in zip(tokenizer.convert_ids_to_tokens(ids.tolist()), vectors):
            file.write(f"{token} {' '.join(map(str, vector))}\n")
