r"""The rules of the Penn Treebank tokeniser in the order in which `ptb.py` applies them.

They reproduce `PTBTokenizer` of Stanford CoreNLP 3.4.1 (2014) as pycocoevalcap calls it. The rule with the longest match wins,
including the context that must follow the token; of a tie, the first rule.

A rule has a pattern, whose first group is the token and the rest its context; a function that writes the token (None: the token is
dropped); and the number of its last characters that are read again. Words match in any case, character classes as written. Before
matching, `replace_character` replaces each character by the one that represents its class.
"""

import re
import unicodedata
from collections.abc import Callable
from functools import cache
from typing import NamedTuple


def _as_is(token: str) -> str:
    return token


class Rule(NamedTuple):
    """A kind of token."""

    pattern: str
    write: Callable[[str], str] | None = _as_is
    read_again: int = 0


# --- How tokens are written

_QUOTE_MARKS = {
    "'": "'",
    "&apos;": "'",
    '"': "''",
    "&quot;": "''",
    **dict.fromkeys("\u0091\u2018\u201b\u2039", "`"),
    **dict.fromkeys("\u0092\u2019\u203a", "'"),
    **dict.fromkeys("\u0093\u201c\u00ab", "``"),
    **dict.fromkeys("\u0094\u201d\u00bb", "''"),
}
_QUOTE_MARK = re.compile("|".join(_QUOTE_MARKS))
_FRACTIONS = {"¼": "1/4", "½": "1/2", "¾": "3/4", "⅓": "1/3", "⅔": "2/3"}
_CURRENCIES = {"¢": "cents", "£": "#", **dict.fromkeys("\u0080¤₠€", "$")}


def _always(text: str) -> Callable[[str], str]:
    return lambda token: text


def _closing_quotes(token: str) -> str:
    return _QUOTE_MARK.sub(lambda mark: _QUOTE_MARKS[mark[0]], token)


def _opening_quotes(token: str) -> str:
    return _closing_quotes(token).replace("'", "`")


def _without_soft_hyphens(token: str) -> str:
    return token.replace("\u00ad", "") or "-"


def _first_part(token: str) -> str:
    return token[:-3] if token.lower() in ("cannot", "'twas") else token[:-2]


def _initial(token: str) -> str:
    return token[:1] if len(token) == 2 else token  # "I." loses its full stop, "U.S." keeps it


def _with_no_break_spaces(token: str) -> str:
    return token.replace(" ", "\u00a0")


def _brackets(token: str) -> str:
    return _with_no_break_spaces(token).replace("(", "-LRB-").replace(")", "-RRB-")


def _ampersands(token: str) -> str:
    return re.sub("(?i:&amp;)", "&", token)


def _dashes(token: str) -> str:
    return "--" if 3 <= len(token) <= 4 else token


# --- Kinds of characters

_SYMBOLS = re.compile(
    "[%¡¦-©¬®-±´¶-¸¿×÷\u037e\u0387\u0589\u05be\u05c0\u05c3\u05c6\u05f3\u05f4\u0600-\u0603\u0606-\u060a\u060c\u0614\u061b\u061e\u061f\u066a"
    "\u066d\u06d4\u0700-\u070d\u07f6-\u07f8\u0964\u0965\u0e4f\u1fbd\u2016\u2017\u2020-\u2023\u2030-\u2038\u203b\u203e-\u2042\u207c-\u207e"
    "\u208c-\u208e\u2100-\u214f\u2190-\u2bff\u3012\u30fb\uff01-\uff0f\uff1a-\uff20\uff3b-\uff40\uff5b-\uff65]"
)
_NAMED = set(
    "\u0080\u0085\u0091\u0092\u0093\u0094\u0096\u0097\u00a0¢£¤¥«\u00ad²³¹»¼½¾İıſ\u212a\u058a\u060b\u066b\u066c\u0e3f\u2028\u2029\u200b\u200e\u200f"
    "\u2010\u2011\u2013\u2014\u2015\u2018\u2019\u201a\u201b\u201c\u201d\u201e\u201f\u2026\u2039\u203a\u2044\u2070\u20a0\u20a4\u20ac\u3000"
    "\u3001\u3002\ufeff\uffe0\uffe1\uffe5\uffe6"
) | {chr(code) for first, last in ((0x2000, 0x200A), (0x2074, 0x208B), (0x2153, 0x215E)) for code in range(first, last + 1)}
_MARKS, _FURTHER_MARKS = ("Mn", "Mc", "Sk"), "\u03f6\u055a\u055b\u055c\u055d\u055e\u055f"
_FOREIGN_LOWER, _FOREIGN_UPPER, _MARK, _SYMBOL, _UPPER_SYMBOL, _UPPER_NUMBER = "ªÀ\u02d8§ⒶⅠ"


@cache
def replace_character(character: str) -> str:
    """The character that represents this one in the rules; the character itself if the rules name it or no class contains it."""
    category = unicodedata.category(character)
    if character.isascii() or character in _NAMED or category == "Nd":
        return character
    if category.startswith("L"):
        return _FOREIGN_UPPER if character.isupper() else _FOREIGN_LOWER
    if (category in _MARKS and "\u02c2" <= character <= "\u0ecd") or character in _FURTHER_MARKS:
        return _MARK
    if _SYMBOLS.match(character):
        return _UPPER_SYMBOL if character.isupper() else _SYMBOL
    return _UPPER_NUMBER if character.isupper() else character


# --- What tokens are made of


def _words(text: str) -> str:
    """A pattern for any of the words of `text`, ignoring case."""
    return "(?i:" + "|".join(text.split()) + ")"


def _capitalised(text: str) -> str:
    """A pattern for any of the words of `text`, ignoring case except in the first letter."""
    return "(?:" + "|".join(f"{word[0]}(?i:{word[1:]})" for word in text.split()) + ")"


_L = "A-Za-zªÀİıſ\u212a"  # letters of any script
_LETTER = f"[{_L}]"
_UPPER = "[A-ZÀİ\u212aⒶⅠ]"
_SPACE = r"[ \t\u00a0\u2000-\u200a\u3000]"
_NEWLINE = r"(?:\r\n|[\n\r\u2028\u2029\u000b\u000c\u0085])"
_GAP = f"(?:{_SPACE}|{_NEWLINE})"
_APOSTROPHE = r"(?:['\u0092\u2019]|(?i:&apos;))"
_ANY_APOSTROPHE = r"(?:['`\u0091\u0092\u2018\u2019\u201b]|(?i:&apos;))"
_HYPHEN = r"[-_\u058a\u2010\u2011]"
_CLAUSE_MARK = r"[,;:\u3001]"
_IN_NUMBER = r"[.:,\u00ad\u066b\u066c]"
_NUMBER = rf"(?:\d+(?:{_IN_NUMBER}\d+)*|(?:{_IN_NUMBER}\d+)+)"

_IN_WORD = rf"(?:[{_L}{_MARK}\u00ad]|(?i:&[aeiou](?:acute|grave|uml);))"
_WORD_PART = rf"{_IN_WORD}(?:{_IN_WORD}|\d)*"
_WORD = f"{_WORD_PART}(?:[.!?]{_WORD_PART})*"
_SHORT_VERB = rf"{_APOSTROPHE}(?:[msdMSD]|(?i:re|ve|ll))"
_NOT = f"(?i:n){_ANY_APOSTROPHE}(?i:t)"

_FRENCH = rf"(?:[dDoOlL]{_ANY_APOSTROPHE}[{_L}\d])?"
_COMPOUND = rf"{_FRENCH}[{_L}\d]+(?:{_HYPHEN}{_FRENCH}[{_L}\d]+)*"
_COUNTRIES = r"(?i:u\.s\.-u\.(?:k|s\.s\.r)|(?:canada|sino|korean|eu|japan|non)-u\.s)"
_ACRONYM = rf"(?:{_COUNTRIES}|[A-Za-z](?:\.[A-Za-z])*)"
_HYPHENATED = rf"[A-Za-z0-9][A-Za-z0-9.,\u00ad]*(?:-(?:(?:{_COUNTRIES}|[A-Za-z](?:\.[A-Za-z])+)\.|[A-Za-z0-9\u00ad]+))+"
_SLASHED = r"[A-Za-z0-9]+(?:-[A-Za-z]+){0,2}(?:\\?/[A-Za-z0-9]+(?:-[A-Za-z]+){0,2}){1,2}"
_INITIALS = r"[A-Z]+(?:(?:(?i:&amp;)|[+&])[A-Z]+)+"

_NAME = "[A-Za-z][A-Za-z0-9_:.-]*"
_ATTRIBUTE = rf"""{_NAME}(?:[ ]*=[ ]*(?:'[^']*'|"[^"]*"|{_NAME}))?"""
_TAG = rf"<(?:[!?][A-Za-z-][^>\r\n]*|{_NAME}(?:[ ]+{_ATTRIBUTE})*[ ]*/?|/{_NAME})[ ]*>"

_URL_PATH = r"""(?:/[^ \t\n\f\r"<>|()]+[^ \t\n\f\r"<>|.!?(){},-])?"""
_BREAKS = r"""[^ \t\n\f\r"<>|(){}"""  # an open class of what no address holds
_URLS = [
    rf"(?i:https?)://{_BREAKS}]+{_BREAKS}.!?,-]",
    rf"(?i:www)\.(?:{_BREAKS}.!?,]+\.)+[a-zA-Z]{{2,4}}{_URL_PATH}",
    rf"(?:{_BREAKS}`'.!?,-_$]+\.)+(?i:com|net|org|edu){_URL_PATH}",
    rf"(?:<|(?i:&lt;))?[a-zA-Z0-9]{_BREAKS}\u00a0]*@(?:{_BREAKS}.\u00a0]+\.)*{_BREAKS}.\u00a0]+(?:>|(?i:&gt;))?",
]
_PHONES = [
    r"\([0-9]{2,3}\)[ \u00a0]?[0-9]{3,4}[- \u00a0]?[0-9]{3,5}",
    r"(?:\+\+?)?(?:[0-9]{2,4}[- \u00a0])?[0-9]{2,4}[- \u00a0][0-9]{3,4}[- \u00a0]?[0-9]{3,5}",
    r"(?:(?:\+\+?)?[0-9]{2,4}\.)?[0-9]{2,4}\.[0-9]{3,4}\.[0-9]{3,5}",
]
_APOSTROPHE_WORDS = [
    f"{_APOSTROPHE}(?i:n){_APOSTROPHE}?",
    f"[lLdDjJ]{_APOSTROPHE}",
    f"(?i:dunkin|somethin|ol){_APOSTROPHE}",
    f"{_APOSTROPHE}(?i:em|till?|cause)",
    f"[A-HJ-XZn]{_ANY_APOSTROPHE}{_LETTER}{{2,}}",
    f"{_APOSTROPHE}[2-9]0(?i:s)",
    f"{_LETTER}+[aeiouyAEIOUY]{_ANY_APOSTROPHE}[aeiouA-Z]{_LETTER}*",
    r"(?i:cont'd)\.?",
    "(?i:nor'easter|c'mon|e'er|s'mores|ev'ry|li'l|nat'l)",
    f"(?i:o){_ANY_APOSTROPHE}(?i:o)",
]
_SMILEYS = [
    r"(?:[\^=~<>]|(?i:x))\.\[\^(?i:x)=[^<]*<>\]",
    r"[-^=~<>'x]_[-^=~<>'x]",
    r"\([-^=~<>'x][_.]?[-^=~<>'x]\)",
    r"\([\^=~<>'x]-[\^=~<>'`x]\)",
]

ASSIMILATED = frozenset(["cannot", "gonna", "gotta", "lemme", "gimme", "wanna"])
_ABBREVIATIONS = r"""
    al ala apr ariz assn aug bancorp bhd bldg blvd bros calif co colo conn corp cos ct dak dec ed\.d esq est etc ext feb
    fla fri ga inc ind intl jan jr jul jun kans? ky ltd mar md mich minn mo mon mont neb nev nov oct okla penn ph\.d plc
    pp?t(?-i:[ye])s? rd rt sept? seq sq sr sys tel tenn thu thurs tues? univ va vt wed wisc? wyo
"""
_CAPITALISED = "Ark Az Del Ill La Mass Miss Ore Pa Tex Wash"
_TITLES = r"""
    a\.k\.a adj adm adv alex assoc asst attys? ave brig capt cf cie co?mdr col cpl dept det drs? elec ens ft gen govs? hon
    insp invt jos lieut lt maj messrs m(?-i:[ft])g mlle mme mr mrs ms msgr mt natl pfc ph pres profs? pvt reps? rev sens?
    sfc sgt spc ste? supts? treas vs wm
"""
_BEFORE_NUMBERS = "art bldg ca figs? nos? op pp prop"
_SENTENCE_STARTS = r"""
    About According Additionally After An A As At But Earlier Her? Here However If In It Last Many More Mr\. Ms\. Now Once
    One Other Our She Since So Some Such That The Their Then There These They This We When While What Yet You
"""
_FILE_ENDINGS = """
    bat bmp bz2 c class cgi cpp dll docx? exe gif gz html? h jar java jpe?g mov mp3 pdf php pl png ppt ps py sql tar txt
    wav xml x zip
"""
_ABBREVIATION = rf"(?:{_words(_ABBREVIATIONS)}|{_capitalised(_CAPITALISED)})\."
_TITLE = f"(?:{_words(_TITLES)}|M(?i:iss)|{_ACRONYM})"
ABBREVIATIONS = re.compile(_words(f"{_ABBREVIATIONS} {_CAPITALISED} {_TITLES} {_BEFORE_NUMBERS}"))

RULES = [
    Rule(r"(c\+\+|C\+\+|[cCfF]#)"),
    Rule("((?i:cannot|'twas))", _first_part, read_again=3),
    Rule("((?i:'tis|gonna|gotta|lemme|gimme|wanna))", _first_part, read_again=2),
    Rule(f"({_TAG})", _with_no_break_spaces),
    Rule(r"((?i:&(?:md|mdash|ndash);)|[\u0096\u0097\u2013\u2014\u2015])", _always("--")),
    Rule("((?i:&amp;))", _ampersands),
    Rule("((?i:&(?:ht|tl|ur|lr|qc|ql|qr|odq|cdq|#[0-9]+);))"),
    Rule(f"({_WORD}){_SHORT_VERB}", _without_soft_hyphens),
    Rule(rf"([A-Za-z\u00ad]*[A-MO-Za-mo-z]\u00ad*){_NOT}", _without_soft_hyphens),
    Rule(f"({_WORD})", _without_soft_hyphens),
    *[Rule(f"({word})") for word in _APOSTROPHE_WORDS],
    Rule(f"((?i:y){_APOSTROPHE}){_LETTER}"),
    *[Rule(f"({url})") for url in _URLS],
    Rule("(@[a-zA-Z_][a-zA-Z_0-9]*)"),
    Rule(f"(#{_IN_WORD}+)"),
    Rule(f"({_SHORT_VERB}|{_NOT})[^A-Za-z]", _closing_quotes),
    Rule(r"(\d{1,2}[-/]\d{1,2}[-/]\d{2,4})"),
    Rule(f"([-+]?{_NUMBER})", _without_soft_hyphens),
    Rule(r"([\u207a\u207b\u208a\u208b]?(?:[\u2070\u00b9\u00b2\u00b3\u2074-\u2079]+|[\u2080-\u2089]+))"),
    Rule(r"((?:\d{1,4}[- \u00a0])?\d{1,4}(?:\\?/|\u2044)\d{1,4})", _with_no_break_spaces),
    Rule(r"([\u00bc\u00bd\u00be\u2153-\u215e])", lambda token: _FRACTIONS.get(token, token)),
    Rule(r"((?i:-[rl][rcs]b-|c\.d\.s|pro-|anti-|s&(?:amp;)?p-500|s&(?:amp;)?ls))", _ampersands),
    Rule(f"((?i:cap{_APOSTROPHE}n|c{_APOSTROPHE}est))"),
    Rule(f"({_SLASHED})"),
    Rule(r"([A-Z]*\$|#)"),
    Rule("([¢-¥\u0080\u20a0\u20ac\u060b\u0e3f\u20a4\uffe0\uffe1\uffe5\uffe6])", lambda token: _CURRENCIES.get(token, token)),
    Rule(rf"({_ACRONYM}\.){_GAP}+(?:{_capitalised(_SENTENCE_STARTS)}|{_TAG}){_GAP}", _initial, read_again=1),
    Rule(rf"({_words(_BEFORE_NUMBERS)}\.){_GAP}?\d"),
    Rule(rf"((?i:pt[eyEY]|co)\.){_SPACE}(?i:ltd|lim)"),
    Rule(f"({_ABBREVIATION}){_GAP}(?:{_GAP}|{_UPPER}|{_TAG})", read_again=1),
    Rule(rf"({_ABBREVIATION})[\s\S][\s\S]"),
    Rule(f"({_ABBREVIATION})", read_again=1),
    Rule(rf"({_TITLE}\.)"),
    Rule(f"({_TITLE}){_SPACE}"),
    Rule(f"({_ACRONYM}){_GAP}"),
    Rule(f"({_APOSTROPHE}[0-9][0-9]){_GAP}"),
    Rule(rf"((?:{_IN_WORD}|\d)+(?:\.(?:{_IN_WORD}|\d)+)*\.{_words(_FILE_ENDINGS)})(?:{_GAP}|[.?!,])"),
    Rule(rf"({_WORD}\.){_CLAUSE_MARK}", _without_soft_hyphens),
    *[Rule(f"({phone})", _brackets) for phone in _PHONES],
    Rule('((?i:"|&quot;))[A-Za-z0-9$]', _opening_quotes),
    Rule('((?i:"|&quot;))', _closing_quotes),
    Rule("((?i:<|&lt;))", _always("<")),
    Rule("((?i:>|&gt;))", _always(">")),
    Rule(r"([<>]?[:;=][-o*']?[()DPdpO\\{@|\[\]])[^A-Za-z0-9]", _brackets),
    *[Rule(f"({smiley})", _brackets) for smiley in _SMILEYS],
    *[
        Rule(f"({re.escape(mark)})", _always(f"-{name}-"))
        for mark, name in zip("(){}[]", ["LRB", "RRB", "LCB", "RCB", "LSB", "RSB"])
    ],
    Rule("(-+)", _dashes),
    Rule(r"(\.{3,5}|(?:\.[ \u00a0]){2,4}\.|[\u0085\u2026])", _always("...")),
    Rule(r"(@+|#+|_+|\*+|(?:\\\*){1,3})"),
    Rule(rf"({_CLAUSE_MARK}|[?!]+|[.\u3002]|=|/)"),
    Rule(rf"({_HYPHENATED}\.){_CLAUSE_MARK}", _without_soft_hyphens),
    Rule(f"({_HYPHENATED})", _without_soft_hyphens),
    Rule(rf"({_COMPOUND}\.){_CLAUSE_MARK}"),
    Rule(f"({_COMPOUND})"),
    Rule(rf"({_INITIALS}\.){_CLAUSE_MARK}", _ampersands),
    Rule(f"({_INITIALS})", _ampersands),
    Rule(r"(')[A-Za-z][^ \t\n\r\u00a0]", _always("`")),
    Rule(f"({_SHORT_VERB}|{_NOT})", _closing_quotes),
    Rule(r"(''|[`\u2018-\u201f\u0091-\u0094\u2039\u203a\u00ab\u00bb]{1,2}|" + _APOSTROPHE + ")", _closing_quotes),
    Rule("(<<|>>)"),
    Rule(rf"([+%&~^|\\{_SYMBOL}{_UPPER_SYMBOL}\u2044\u207a-\u207b\u208a\u208b])"),
    Rule(rf"([\x00\x7f\u200b\u200e\u200f\ufeff]|{_SPACE}+|{_NEWLINE}|(?i:&nbsp;))", None),
]
