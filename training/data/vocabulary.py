"""Builds the tokenizer from captions: a vocabulary of words or word pieces, and all text normalisation."""

from collections import Counter
from collections.abc import Iterable, Sequence
from typing import Any, Literal

from tokenizers import Regex, Tokenizer, decoders, normalizers, pre_tokenizers
from tokenizers.models import BPE, WordLevel
from tokenizers.trainers import BpeTrainer, WordLevelTrainer
from transformers import PreTrainedTokenizerFast

SPECIAL_TOKENS = ("<pad>", "<s>", "</s>", "<unk>")  # in the order of their ids, 0 to 3
BPE_VOCAB_SIZE = 4000
MODEL_MAX_LENGTH = 64  # tokens; a caption has at most 20 words, the model itself sets no limit
LOW_COVERAGE = 0.95  # share of known words below which a warning is logged
SHOWN = 10  # missing words in that warning
REPEATABLE_SHARE = 0.1  # of the captions with a word, from which it may be repeated
PRIOR_CAPTIONS = 50  # captions with one occurrence that are added to the count

_CHAR = r"\p{L}\p{M}\p{N}"
_PART = rf"[\p{{L}}\p{{N}}][{_CHAR}]*"
_WORD = rf"{_PART}(?:['\-]{_PART})*"


def build_tokenizer(
    captions: Iterable[str],
    kind: Literal["word", "bpe"] = "word",
    *,
    min_count: int = 5,
    vocab_size: int | None = None,
) -> PreTrainedTokenizerFast:
    """Trains a tokenizer on captions.

    The tokenizer takes raw captions. It converts them to lower case in Unicode NFC, drops punctuation, and keeps digits and the
    apostrophes and hyphens inside words ("t-shirt", "dog's", also written "dog 's"). It adds no special tokens, reads "</s>" in a
    caption as ordinary text, and pads on the left. Ids 0 to 3 are `<pad>`, `<s>`, `</s>` and `<unk>`. The order of the captions
    does not matter.

    Args:
        captions: the training captions, raw.
        kind: "word" for one token per word, ids by falling count and then alphabetically; "bpe" for word pieces (byte-pair
            encoding), where the first piece of each word begins with "▁".
        min_count: how often a word ("word") or a pair of neighbouring pieces ("bpe") must occur to enter the vocabulary.
        vocab_size: for "bpe": maximum number of tokens, including special tokens. Default: 4000.

    Raises:
        ValueError: `kind` is unknown, `vocab_size` is given with "word", or the vocabulary would be empty.
        TypeError: `captions` is one string, or holds something other than strings.
    """
    if isinstance(captions, str):
        raise TypeError("`captions` must be an iterable of strings, got one string: wrap it in a list.")
    captions = list(captions)
    if wrong := [caption for caption in captions if not isinstance(caption, str)]:
        raise TypeError(f"`captions` must be one flat list of strings; found {wrong[0]!r:.100}.")
    if kind == "word":
        if vocab_size is not None:
            raise ValueError("`vocab_size` is for kind='bpe': limit a word vocabulary with `min_count`.")
        tokenizer = _train_words(captions, min_count)
        learned = [token for token in tokenizer.get_vocab() if token not in SPECIAL_TOKENS]
    elif kind == "bpe":
        tokenizer = _train_bpe(captions, min_count, BPE_VOCAB_SIZE if vocab_size is None else vocab_size)
        learned = [token for token in tokenizer.get_vocab() if token not in SPECIAL_TOKENS and len(token) > 1]
    else:
        raise ValueError(f"Unknown kind {kind!r}: use 'word' or 'bpe'.")
    if not learned:
        raise ValueError(
            f"The {len(captions)} captions give an empty {kind!r} vocabulary with min_count={min_count}"
            + (f" and vocab_size={vocab_size}" if vocab_size is not None else "")
            + ": give more captions or lower `min_count`"
            + (", or raise `vocab_size`." if kind == "bpe" else ".")
        )
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token="<pad>",
        bos_token="<s>",
        eos_token="</s>",
        unk_token="<unk>",
        padding_side="left",
        model_max_length=MODEL_MAX_LENGTH,
        model_input_names=["input_ids", "attention_mask"],
        clean_up_tokenization_spaces=False,
        # "</s>" in a caption or prompt must not end it.
        split_special_tokens=True,
    )


def word_coverage(tokenizer: PreTrainedTokenizerFast, captions: Iterable[str]) -> float:
    """The share of words in the captions that the vocabulary covers, 0 to 1; 1.0 if there are no words."""
    total, missing = _count_words(tokenizer, captions)
    return 1 - missing.total() / total if total else 1.0


def describe_coverage(tokenizer: PreTrainedTokenizerFast, captions: Sequence[str], way_out: str) -> list[str]:
    """Sentences on how much of the captions a vocabulary covers and, below 95 %, which words it lacks.

    Args:
        captions: the training captions, raw.
        way_out: what to do about missing words.
    """
    total, missing = _count_words(tokenizer, captions)
    share = 1 - missing.total() / total if total else 1.0
    sentences = [f"vocabulary: {len(tokenizer)} tokens, which cover {share:.2%} of the {total} words in the training captions"]
    if share < LOW_COVERAGE:
        shown = ", ".join(f"{word} ({count})" for word, count in missing.most_common(SHOWN))
        sentences.append(
            f"{missing.total()} words in the training captions ({len(missing)} different ones) are read as <unk>, most often "
            f"{shown}: {way_out}."
        )
    return sentences


def extend_vocabulary(model: Any, tokenizer: PreTrainedTokenizerFast, captions: Iterable[str], min_count: int = 5) -> list[str]:
    """Adds frequent words of the captions to a captioner's vocabulary. Their ids follow the existing ones.

    Changes the tokenizer and the model in place; save both. Existing rows of the word embedding and the output layer do not change.
    `resize_token_embeddings` samples new rows close to the mean of the existing ones, and their bias is the mean bias. So captions
    hardly change before training. Set a random seed first.

    Args:
        model: an `AttnCapForConditionalGeneration` whose word embedding is trained.
        tokenizer: its tokenizer, of whole words.
        captions: the new training captions, raw.
        min_count: how often a word must occur to be added.

    Returns:
        The new words in the order of their ids: by falling count, then alphabetically.

    Raises:
        ValueError: the tokenizer has word pieces, or the word embedding is frozen, so that new words could not be trained.
    """
    if model.config.freeze_word_embeddings:
        raise ValueError("Frozen word embeddings cannot learn new words: set `freeze_word_embeddings` to false.")
    size, words = model.config.vocab_size, extend_tokenizer(tokenizer, captions, min_count)
    if words:
        model.resize_token_embeddings(size + len(words))
        bias = model.lm_head.bias.data  # (V + k), 0 for new words of tied embeddings, higher than that of rare words
        bias[size:] = bias[:size].mean()
    return words


def extend_tokenizer(tokenizer: PreTrainedTokenizerFast, captions: Iterable[str], min_count: int = 5) -> list[str]:
    """The part of `extend_vocabulary` that changes the tokenizer, with the same arguments and errors."""
    backend = tokenizer.backend_tokenizer
    if not isinstance(backend.model, WordLevel):
        raise ValueError("A vocabulary of word pieces ('bpe') spells new words with its pieces and cannot be extended.")
    _, missing = _count_words(tokenizer, captions)
    words = sorted((word for word, count in missing.items() if count >= min_count), key=lambda word: (-missing[word], word))
    vocabulary = backend.get_vocab()
    ids = {word: number for number, word in enumerate(words, 1 + max(vocabulary.values()))}
    backend.model = WordLevel({**vocabulary, **ids}, unk_token="<unk>")
    return words


def repeatable_tokens(tokenizer: PreTrainedTokenizerFast, captions: Iterable[str]) -> list[int] | None:
    """The words that people write more than once in a caption, such as "a" or "the", for `generation_config.repeatable_token_ids`.

    A word is repeatable if it occurs more than once in at least 10 % of the captions that contain it. 50 captions with one
    occurrence are added to the count, so that a rare word needs more than a few cases.

    Args:
        tokenizer: of whole words. For word pieces the result is None, since pieces recur in different words.
        captions: the training captions, raw.

    Returns:
        Their ids in rising order, or None for word pieces.
    """
    backend = tokenizer.backend_tokenizer
    if not isinstance(backend.model, WordLevel):
        return None
    held: Counter[int] = Counter()
    repeated: Counter[int] = Counter()
    for encoding in backend.encode_batch(list(captions), add_special_tokens=False):
        for token, count in Counter(encoding.ids).items():
            held[token] += 1
            repeated[token] += count > 1
    del held[tokenizer.unk_token_id]
    return sorted(token for token in held if repeated[token] >= REPEATABLE_SHARE * (held[token] + PRIOR_CAPTIONS))


def _count_words(tokenizer: PreTrainedTokenizerFast, captions: Iterable[str]) -> tuple[int, Counter[str]]:
    """The number of words, and the count of each word that the vocabulary lacks."""
    captions, total, missing = list(captions), 0, Counter()
    backend: Any = tokenizer.backend_tokenizer
    for caption, encoding in zip(captions, backend.encode_batch(captions, add_special_tokens=False), strict=True):
        total += len(set(encoding.word_ids))
        pieces = zip(encoding.word_ids, encoding.ids, strict=True)
        if unknown := {word for word, token in pieces if token == tokenizer.unk_token_id}:
            words = backend.pre_tokenizer.pre_tokenize_str(backend.normalizer.normalize_str(caption))
            missing.update(words[word][0].removeprefix("▁") for word in unknown)
    return total, missing


def _train_words(captions: list[str], min_count: int) -> Tokenizer:
    """A word-level `Tokenizer`. Without a decoder it joins words with single spaces."""
    tokenizer = Tokenizer(WordLevel(unk_token="<unk>"))
    tokenizer.normalizer = _normalizer()
    tokenizer.pre_tokenizer = _words()
    trainer = WordLevelTrainer(
        vocab_size=2**31,  # limited by min_count alone
        min_frequency=min_count,
        special_tokens=list(SPECIAL_TOKENS),
        show_progress=False,
    )
    tokenizer.train_from_iterator(captions, trainer)
    return tokenizer


def _train_bpe(captions: list[str], min_count: int, vocab_size: int) -> Tokenizer:
    """A byte-pair `Tokenizer` over characters. Adjacent unknown characters are one `<unk>`."""
    tokenizer = Tokenizer(BPE(unk_token="<unk>", fuse_unk=True))
    tokenizer.normalizer = _normalizer()
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([_words(), pre_tokenizers.Metaspace(split=False)])
    # The last two steps remove the space that a skipped <unk> leaves in decoded text.
    tokenizer.decoder = decoders.Sequence(
        [
            decoders.Metaspace(split=False),
            decoders.Fuse(),
            decoders.Replace(Regex(" +"), " "),
            decoders.Replace(Regex("^ | $"), ""),
        ]
    )
    trainer = BpeTrainer(
        vocab_size=vocab_size,
        min_frequency=min_count,
        special_tokens=list(SPECIAL_TOKENS),
        show_progress=False,
    )
    tokenizer.train_from_iterator(captions, trainer)
    return tokenizer


def _normalizer() -> normalizers.Normalizer:
    """Lower case, NFC, plain apostrophes and hyphens, and "dog 's" as "dog's"."""
    return normalizers.Sequence(
        [
            normalizers.Lowercase(),
            normalizers.NFC(),
            normalizers.Replace(Regex("[\u2019\u02bc\uff07]"), "'"),
            normalizers.Replace(Regex("[\u2010\u2011]"), "-"),
            normalizers.Replace(Regex(rf"[^{_CHAR}'\-]+"), " "),
            # Only spaces, apostrophes and hyphens are left between words. Removing all of them here makes decoded text,
            # with one space between words, give the same words again.
            normalizers.Replace(Regex(rf"(?<=[{_CHAR}])[ '\-]* '(?=(?:s|d|m|re|ve|ll)(?![{_CHAR}]))"), "'"),
        ]
    )


def _words() -> pre_tokenizers.PreTokenizer:
    """Splits into words and removes everything between them."""
    return pre_tokenizers.Split(Regex(_WORD), behavior="removed", invert=True)
