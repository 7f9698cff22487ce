"""Penn Treebank tokenisation of captions, as the metrics need it."""

import re
from functools import cache, lru_cache

from .ptb_rules import ABBREVIATIONS, ASSIMILATED, RULES, Rule, replace_character

PUNCTUATION = frozenset(["''", "'", "``", "`", ".", "?", "!", ",", ":", "-", "--", "...", ";"])

_PLAIN = re.compile(r"([A-Za-z]+(?:['-][A-Za-z]+)*)([.,:;?!]?)")


def tokenize(caption: str) -> list[str]:
    """The words of a caption, lower-case and without punctuation.

    They equal those of pycocoevalcap's `PTBTokenizer` (Stanford CoreNLP 3.4.1, Java), except where that tokeniser has defects: the
    end of a caption depends on the beginning of the next one ("vitamin A." before "The"), a line break other than "\\n" shifts all
    later captions, and letters and marks of some scripts are dropped, among them those added to Unicode after 2013.

    Returns:
        The words in order; an empty list for a caption without words. A word can contain a no-break space ("1 1/2").
    """
    words: list[str] = []
    for chunk in caption.split(" "):
        plain = _plain_words(chunk)
        if plain is None:
            break
        words += plain
    else:
        return words
    line = " ".join(_tokens(caption)).lower()
    return [word for word in line.rstrip().split(" ") if word and word not in PUNCTUATION]


@lru_cache(maxsize=1 << 16)
def _plain_words(chunk: str) -> tuple[str, ...] | None:
    """The words of the text between two spaces; None if they may depend on the text around it."""
    if not chunk or chunk in PUNCTUATION:
        return ()
    match = _PLAIN.fullmatch(chunk)
    if not match:
        return None
    word, mark = match.groups()
    if mark == "." and (len(word) == 1 or not word.isalpha() or ABBREVIATIONS.fullmatch(word)):
        return None
    if word.isalpha() and word.lower() not in ASSIMILATED:
        return (word.lower(),)
    return tuple(token.lower() for token in _tokens(word, by_rules=True) if token not in PUNCTUATION)


def _tokens(caption: str, by_rules: bool = False) -> list[str]:
    """The tokens of a caption. Plain text between spaces takes a faster path, unless `by_rules`."""
    if caption and max(caption) > "\uffff":  # Java counts such a character as two
        return [_joined(token) for token in _tokens(_halved(caption))]
    text = caption + "\n"
    seen = text if text.isascii() else "".join(map(replace_character, text))
    start, tokens = 0, []
    while start < len(text):
        if text[start] == " ":
            start += 1
            continue
        if not by_rules and (not start or text[start - 1] == " "):
            end = text.find(" ", start)
            plain = _plain_words(text[start:end]) if end > 0 else None
            if plain is not None:
                tokens += plain
                start = end
                continue
        found = _longest(seen, start)
        if found is None:
            start += 1  # a character that no rule matches
            continue
        rule, end = found
        if rule.write:
            tokens.append(rule.write(text[start:end]))
        start = end - rule.read_again
    return tokens


def _longest(seen: str, start: int) -> tuple[Rule, int] | None:
    """The rule with the longest match at `start`, the first of a tie, and the end of its token."""
    spans = _scanner().match(seen, start).regs  # type: ignore[union-attr]  # all groups may be empty
    ends = [end for _, end in spans[1::2]]
    furthest = max(ends)
    if furthest < 0:
        return None
    number = ends.index(furthest)
    return RULES[number], spans[2 * number + 2][1]


@cache
def _scanner() -> re.Pattern[str]:
    """All rules as one pattern with two groups per rule: its whole match, and the token at the start of it."""
    return re.compile("".join(f"(?:(?=({rule.pattern}))|)" for rule in RULES))


def _halved(text: str) -> str:
    codes = text.encode("utf-16-le", "surrogatepass")
    return "".join(chr(int.from_bytes(codes[i : i + 2], "little")) for i in range(0, len(codes), 2))


def _joined(token: str) -> str:
    return token.encode("utf-16-le", "surrogatepass").decode("utf-16-le", "replace")
