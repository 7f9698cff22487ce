"""The share of captions with a full parse: by link-grammar where it is installed, and by a stand-in that speaks as it does."""

import importlib
import json
import shutil
import sys
from pathlib import Path
from typing import Any

import pytest
from datasets import Dataset
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from PIL import Image

ROOT = Path(__file__).parent.parent
LINK_GRAMMAR = pytest.mark.skipif(not shutil.which("link-parser"), reason="needs link-parser: apt-get install link-grammar")
GOOD = [
    "a dog runs through the snow",
    "A dog in the snow .",
    "two dogs playing in the water",
    "a man in a red shirt is riding a bike",
    "A woman, wearing a hat, is looking at the sea!",
    "three children on a hill",
]
BROKEN = [
    "a man in a red shirt and a",
    "two dogs are playing in the",
    "a man with a .",
    "snow the runs dog a through",
    "a brown and white dog are playing in the water",
    "a boy is the running beach on",
]
ODD = [
    "",
    " \n\t ",
    "...",
    "!exit",
    "% a dog",
    "* a dog",
    'a "dog; a\x00cat\u2028\ud800',
    "a dog " * 200,
    "x" * 5000,
    "Ça 東京 😀",
    "' -- ; :",
]

# Answers in the words of link-grammar 5.12, and obeys, leaves out and ends where it does. A sentence parses if it ends in
# "parses", has linkages that are all wrong if it ends in "violates" and gets no answer if it ends in "slow".
STAND_IN = """#!{python} -u
import sys
if sys.argv[1:] == ["--version"]:
    print("Version: link-grammar-5.12.0")
    sys.exit()
lines = open(0, encoding="utf-8", newline="\\n")
assert "-echo=1" in sys.argv and "-null=0" in sys.argv
print("verbosity set to 1")
for line in lines:
    line = line.rstrip()
    if len(line.encode()) > 2046:
        sys.exit("link-grammar: Fatal error: Input line too long (>2046).")
    if line == "!exit":
        break
    if not line or line[0] in "!%":
        continue
    sys.stdout.buffer.write(line.encode() + b"\\n")
    sys.stdout.flush()
    if line.endswith("slow"):
        sys.stderr.write("Timer is expired!\\n")
    elif line.endswith("violates"):
        print("Found 4 linkages (0 had no P.P. violations)")
    elif line.endswith("many parses"):
        print("Found 22518 linkages (798 of 1000 random linkages had no P.P. violations)")
        print("\\tLinkage 1, cost vector = (UNUSED=0 DIS= 0.00 LEN=10)")
    elif line.endswith("parses"):
        print("Found 1 linkage (1 had no P.P. violations)")
        print("\\tUnique linkage, cost vector = (UNUSED=0 DIS= 1.00 LEN=1)")
    else:
        print("No complete linkages found.")
print("Bye.")
"""


@pytest.fixture
def script(monkeypatch):
    """A script of `benchmarks/` as a module."""
    monkeypatch.syspath_prepend(ROOT / "benchmarks")
    return importlib.import_module


@pytest.fixture
def grammar(script) -> Any:
    return script("grammar")


@pytest.fixture
def stand_in(tmp_path, monkeypatch) -> Path:
    """The only program on the path: a link-parser of a few lines."""
    program = tmp_path / "programs" / "link-parser"
    program.parent.mkdir()
    program.write_text(STAND_IN.format(python=sys.executable))
    program.chmod(0o755)
    monkeypatch.setenv("PATH", str(program.parent))
    return program


def command(script: Any, monkeypatch, *arguments: object) -> None:
    monkeypatch.setattr(sys, "argv", [script.__name__, *map(str, arguments)])
    script.main()


def write(folder: Path, name: str, row: str, captions: dict[str, str]) -> Path:
    file = folder / f"{name}.json"
    file.write_text(json.dumps({"row": row, "captions": captions}))
    return file


@LINK_GRAMMAR
def test_link_grammar_tells_good_captions_from_broken_ones(grammar):
    captions = [caption for pair in zip(GOOD, BROKEN) for caption in pair]
    assert grammar.parse_in_full(captions) == [True, False] * len(GOOD)


@LINK_GRAMMAR
def test_link_grammar_answers_for_odd_captions_in_order(grammar):
    mixed = [caption for odd in ODD for caption in (GOOD[0], odd, BROKEN[0])]
    answers = grammar.parse_in_full(mixed)
    assert answers[::3] == [True] * len(ODD) and answers[2::3] == [False] * len(ODD)
    assert not any(answers[1::3][place] for place, odd in enumerate(ODD) if not odd.strip(" \n\t.") or len(odd) > 1000)


@LINK_GRAMMAR
def test_shuffled_captions_parse_less_often(grammar):
    assert sum(grammar.parse_in_full(grammar.shuffled(GOOD * 3))) < len(GOOD * 3) / 2


def test_an_answer_is_read_from_what_follows_the_sentence(grammar, stand_in):
    captions = ["it parses", "it violates", "it has many parses", "it is slow", "it is wrong", "It parses .", "it parses"]
    assert grammar.parse_in_full(captions) == [True, False, True, False, False, True, True]
    assert grammar.parse_in_full([]) == []


def test_captions_that_look_like_commands_or_are_too_long_take_no_other_caption_along(grammar, stand_in):
    captions = ["!exit", "%it parses", "", "x" * 5000, "it\nparses", "\x00 slow\nit parses", '"it" ; parses', "it parses !", *ODD]
    answers = grammar.parse_in_full([*captions, "it parses"])
    assert answers == [False, True, False, False, True, True, True, True, *[False] * len(ODD), True]


@settings(max_examples=20, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(texts=st.lists(st.text(max_size=40)))
def test_every_caption_gets_its_own_answer(grammar, stand_in, texts):
    captions = [caption for text in texts for caption in (f"{text} it parses", f"{text} it does not")]
    assert grammar.parse_in_full(captions) == [True, False] * len(texts)


def test_without_link_grammar_it_says_how_to_install_it(grammar, monkeypatch, tmp_path):
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(SystemExit, match="no program link-parser; install link-grammar.*apt-get install link-grammar"):
        grammar.parse_in_full(["a dog"])


@pytest.mark.parametrize(
    ("body", "message"),
    [("echo no dictionary >&2; exit 3", "ended with 3: no dictionary"), ("echo Bye.", "no answer to ' a dog': Bye.")],
)
def test_a_link_parser_that_fails_is_no_verdict(grammar, stand_in, body, message):
    stand_in.write_text(f"#!/bin/sh\n{body}\n")
    with pytest.raises(RuntimeError, match=message):
        grammar.parse_in_full(["a dog"])


def test_shuffling_keeps_the_words_and_is_the_same_every_time(grammar):
    captions = ["a man's t-shirt , and the sea .", "", "a dog"]
    mixed = grammar.shuffled(captions)
    assert sorted(mixed[0].split()) == ["a", "and", "man's", "sea", "t-shirt", "the"] and mixed[1] == ""
    assert mixed == grammar.shuffled(captions)


def test_shares_comparison_and_anchors_are_printed_and_kept(grammar, stand_in, monkeypatch, tmp_path, capsys):
    plan = tmp_path / "plan.yaml"
    plan.write_text(json.dumps({"rows": {"good": {}, "bad": {"against": "good"}, "other": {"against": "missing"}}}))
    monkeypatch.setattr(grammar, "PLAN", plan)
    good, bad = {str(n): "it parses" for n in range(8)}, {str(n): "it parses" if n == 7 else "wrong" for n in reversed(range(8))}
    files = [write(tmp_path, "good-seed1", "good", good), write(tmp_path, "good-seed2", "good", {**good, "3": "wrong"})]
    files += [write(tmp_path, "bad-seed1", "bad", bad), write(tmp_path, "other-seed1", "other", good)]
    people = tmp_path / "people.parquet"
    Dataset.from_dict({"captions": [["it parses", "a dog it parses"], ["wrong", "slow"]]}).to_parquet(str(people))
    output = tmp_path / "grammar.json"
    command(grammar, monkeypatch, *files, "--validation_file", people, "--output", output)
    shown, kept = capsys.readouterr().out, json.loads(output.read_text())
    assert "| good-seed2 | 8 | 87.5 % |" in shown and "| people | 4 | 50.0 % |" in shown and "bad against good: -81.2" in shown
    assert kept["results"]["good-seed2"] == {"captions": 8, "full_parse": 0.875, "unparsed": {"3": "wrong"}}
    assert kept["link_grammar"] == "link-grammar-5.12.0" and kept["anchors"]["people, shuffled"]["captions"] == 4
    (comparison,) = kept["compared"]
    assert (comparison["first"], comparison["second"]) == (0.9375, 0.125)
    assert comparison["low"] <= comparison["difference"] <= comparison["high"] < 0


def test_results_that_do_not_fit_are_named(grammar, stand_in, monkeypatch, tmp_path):
    (tmp_path / "else.json").write_text("{}")
    with pytest.raises(SystemExit, match="else.json has no captions and no row"):
        command(grammar, monkeypatch, tmp_path / "else.json")
    (tmp_path / "more").mkdir()
    same = [write(folder, "none-seed1", "none", {"1": "it parses"}) for folder in (tmp_path, tmp_path / "more")]
    with pytest.raises(SystemExit, match="same name"):
        command(grammar, monkeypatch, *same)
    other = write(tmp_path, "history-seed1", "history", {"2": "it parses"})
    with pytest.raises(SystemExit, match="none and history have results of different images"):
        command(grammar, monkeypatch, same[0], other)


def test_the_table_of_the_ablation_takes_the_share_as_a_column(script, monkeypatch, tmp_path, capsys):
    ablation = script("ablation")
    rows = {"good": {"what": "all right", "seeds": [1, 2]}}
    base = "flickr8k_mobilenet_v2_decoder.yaml"
    (tmp_path / "plan.yaml").write_text(json.dumps({"base": base, "seeds": [1], "settings": {}, "rows": rows}))
    monkeypatch.setattr(ablation, "PLAN", tmp_path / "plan.yaml")
    people = tmp_path / "people.json"
    texts = {"1.png": ["a dog runs", "a dog"], "2.png": ["a cat"]}
    for grey, name in enumerate(texts):
        Image.new("L", (40, 40), grey).save(tmp_path / name)
    people.write_text(json.dumps([{"image": name, "captions": captions} for name, captions in texts.items()]))
    ids = ablation.load_data(ablation.DataArguments(train_file=str(people))).train["image_id"]
    for seed in (1, 2):
        write(tmp_path, f"good-seed{seed}", "good", dict.fromkeys(ids, "a dog"))
    kept = {"results": {"good-seed1": {"full_parse": 0.5}, "good-seed2": {"full_parse": 0.7}}}
    (tmp_path / "grammar.json").write_text(json.dumps(kept))
    options = ["--validation_file", people, "--results", tmp_path, "--table", "--grammar", tmp_path / "grammar.json"]
    command(ablation, monkeypatch, *options)
    heading, _, row = capsys.readouterr().out.strip().splitlines()
    assert "| vocabulary | full parse | CIDEr against |" in heading and "| 60.0 (50.0 to 70.0) |" in row
    del kept["results"]["good-seed2"]
    (tmp_path / "grammar.json").write_text(json.dumps(kept))
    with pytest.raises(SystemExit, match="has no results of good-seed2"):
        command(ablation, monkeypatch, *options)
