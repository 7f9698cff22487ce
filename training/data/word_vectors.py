"""Word vectors learned from the training captions alone: skip-gram over the tokenizer's own tokens."""

import logging
from pathlib import Path

import numpy as np
from transformers import PreTrainedTokenizerFast

from hf_attncap.atomic import atomic_write

from ..arguments import SettingError
from .vocabulary import SPECIAL_TOKENS

logger = logging.getLogger(__name__)

# Captions are few and short: more passes than over an encyclopedia, and the commonest words ("a", "in") mostly left out,
# without which colours and verbs find each other.
EPOCHS = 20
COMMON = 0.25  # in mean frequencies: from where on a word is skipped at random; 1e-4 of all words with 2,500 different ones


def train_word_vectors(
    captions: list[str], tokenizer: PreTrainedTokenizerFast, dim: int, seed: int = 0
) -> tuple[np.ndarray, np.ndarray, float]:
    """Word2vec (skip-gram, negative sampling; arXiv 1310.4546) on captions.

    The vectors are centred, since those of a small corpus share a common part as long as what tells them apart, and then
    scaled to a root mean square length of 1, which is what a new embedding has: special tokens and rows without a vector
    start alike. One thread, so that the same captions in the same order give the same numbers.

    Args:
        captions: raw, whatever their number an image.
        tokenizer: whose tokens get vectors, words or pieces.
        dim: numbers a vector.

    Returns:
        Ids (n), vectors (n, dim) float32 and the share n / (tokens that are not special). Special tokens get no vector;
        neither do tokens that the captions, once cut into tokens, do not hold, such as the letters of a BPE vocabulary.

    Raises:
        SettingError: without gensim, or with captions of fewer than two different tokens.
    """
    try:
        from gensim.models import Word2Vec
    except ImportError as error:
        raise SettingError("`word_vectors: captions` needs gensim: `pip install gensim`, or give a file of vectors.") from error
    sentences = [encoding.tokens for encoding in tokenizer.backend_tokenizer.encode_batch(captions, add_special_tokens=False)]
    different = {token for sentence in sentences for token in sentence} - set(SPECIAL_TOKENS)
    if len(different) < 2:
        raise SettingError("`word_vectors: captions` finds fewer than two different words in the captions: give a file of vectors.")
    trained = Word2Vec(
        sentences,
        vector_size=dim,
        sg=1,
        negative=5,
        window=5,
        sample=COMMON / len(different),
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
    """Vectors of `train_word_vectors` as a word2vec text file, which `from_pretrained_parts` reads."""
    ids, vectors, share = train_word_vectors(captions, tokenizer, dim)
    logger.warning("word vectors: learned from %d captions, for %.2f %% of the tokens, in %s", len(captions), 100 * share, path)
    path.parent.mkdir(parents=True, exist_ok=True)
    with atomic_write(path) as file:
        file.write(f"{len(ids)} {dim}\n")
        for token, vector in zip(tokenizer.convert_ids_to_tokens(ids.tolist()), vectors):
            file.write(f"{token} {' '.join(map(str, vector))}\n")
