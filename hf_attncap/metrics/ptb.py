"""Penn Treebank tokens of captions: the words that the field's metrics count."""

import re
from functools import cache, lru_cache

from .ptb_rules import ABBREVIATIONS, ASSIMILATED, RULES, Rule, stand_in

PUNCTUATION = frozenset(["''", "'", "``", "`", ".", "?", "!", ",", ":", "-", "--", "...", ";"])

_PLAIN = re.compile(r"([A-Za-z]+(?:['-][A-Za-z]+)*)([.,:;?!]?)")


def tokenize(caption: str) -> list[str]:
    """Words of a caption: lower-cased, punctuation dropped.

    They are those of pycocoevalcap's `PTBTokenizer` (Stanford's, CoreNLP 3.4.1, Java), with these exceptions: that
    one lets the end of a caption depend on the beginning of the next one ("vitamin A." before "The"), lets a line
    break other than "\\n" shift all captions behind it, and drops letters and marks of some scripts, those that
    Unicode took in after 2013 among them.

    Returns:
        The words in their order, none for a caption without any. A word can hold a no-break space ("1 1/2").
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
    """Words of what stands between two spaces; None where they may depend on what stands beyond these."""
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
    """Tokens as the tokeniser writes them; what is plain between spaces is looked up unless all is to go `by_rules`."""
    if caption and max(caption) > "\uffff":  # Java counts such a character as two
        return [_joined(token) for token in _tokens(_halved(caption))]
    text = caption + "\n"
    seen = text if text.isascii() else "".join(map(stand_in, text))
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
            start += 1  # a character that no rule knows
            continue
        rule, end = found
        if rule.write:
            tokens.append(rule.write(text[start:end]))
        start = end - rule.read_again
    return tokens


def _longest(seen: str, start: int) -> tuple[Rule, int] | None:
    """The rule that reads furthest from `start`, the upper one of several, and where its token ends."""
    spans = _scanner().match(seen, start).regs  # type: ignore[union-attr]  # all groups may be empty
    ends = [end for _, end in spans[1::2]]
    furthest = max(ends)
    if furthest < 0:
        return None
    number = ends.index(furthest)
    return RULES[number], spans[2 * number + 2][1]


@cache
def _scanner() -> re.Pattern[str]:
    """All rules at one place of a text: two groups a rule, all that it reads and the token at its beginning."""
    return re.compile("".join(f"(?:(?=({rule.pattern}))|)" for rule in RULES))


def _halved(text: str) -> str:
    codes = text.encode("utf-16-le", "surrogatepass")
    return "".join(chr(int.from_bytes(codes[i : i + 2], "little")) for i in range(0, len(codes), 2))


def _joined(token: str) -> str:
    return token.encode("utf-16-le", "surrogatepass").decode("utf-16-le", "replace")
