"""Writes the speed tables in README.md, docs/speed.md and docs/many_images.md from the JSON files of the speed scripts.

python -m benchmarks.speed.pages              # exit code 1 if a page differs from the files
python -m benchmarks.speed.pages --write
"""

import argparse
import json
import re
import sys
from collections.abc import Sequence
from typing import Any

from .measure import NOT_MEASURED, ROOT, describe_run, format_value, markdown_table

RESULTS = ROOT / "model_card" / "results" / "speed"
README, PAGES = "README.md", ("docs/speed.md", "docs/many_images.md")
OWN, PEERS = "this package", ("vit-gpt2", "GIT-base", "BLIP-base")
README_TABLE = re.compile(r"^\| ms per photograph.*\n(?:\|.*\n)+", flags=re.M)
TABLE = re.compile(r"(<!-- (\w+) -->\n).*?(<!-- end -->)", flags=re.S)
Results = dict[str, dict[str, Any]]


def load_results() -> Results:
    """The results by the name of the script."""
    return {path.stem: json.loads(path.read_text(encoding="utf-8")) for path in sorted(RESULTS.glob("*.json"))}


def readme_table(found: dict[str, Any]) -> str:
    """Milliseconds per photograph by engine and captioner, from the results of `end_to_end`; of exports the first one."""
    times = {(row["name"], row["engine"]): row["ms_per_image"] for row in found["rows"] if row["batch"] == 1}
    own = {engine: ms for (name, engine), ms in times.items() if name == OWN and "optimize=False" not in engine}
    exported = [engine for engine in own if "exported" in engine]
    engines = [*(engine for engine in own if engine not in exported), *exported[:1]]
    title = f"ms per photograph, {found['machine']['cores']} cores of {found['machine']['cpu']}"
    rows = []
    for engine in engines:
        cells = {name: times.get((name, engine)) for name in (OWN, *PEERS)}
        rows.append({title: engine} | {name: NOT_MEASURED if ms is None else format_value(ms) for name, ms in cells.items()})
    return markdown_table({name: name for name in (title, OWN, *PEERS)}, rows) + "\n"


def page_section(results: Results, script: str) -> str:
    """The table of a script, its command and the machine."""
    if script not in results:
        return f"{NOT_MEASURED.capitalize()}.\n"
    found = results[script]
    return f"{markdown_table(found['columns'], found['rows'])}\n\n`{found['command']}`, {found['date']}: {describe_run(found)}.\n"


def update_tables(page: str, results: Results) -> str:
    """The text of a page, with its tables replaced by those of the results."""
    text = (ROOT / page).read_text(encoding="utf-8")
    if page == README:
        return README_TABLE.sub(lambda _: readme_table(results["end_to_end"]), text) if "end_to_end" in results else text
    return TABLE.sub(lambda match: f"{match[1]}{page_section(results, match[2])}{match[3]}", text)


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--write", action="store_true", help="write the tables instead of comparing them")
    args = parser.parse_args(argv)
    results = load_results()
    stale = {
        page: text
        for page in (README, *PAGES)
        if (text := update_tables(page, results)) != (ROOT / page).read_text(encoding="utf-8")
    }
    if args.write:
        for page, text in stale.items():
            (ROOT / page).write_text(text, encoding="utf-8")
        return 0
    for page in stale:
        print(f"{page} differs from the results: run `python -m benchmarks.speed.pages --write`.", file=sys.stderr)
    return int(bool(stale))


if __name__ == "__main__":
    sys.exit(main())
