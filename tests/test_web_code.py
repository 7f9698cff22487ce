"""The JavaScript of the web page gives what the Python runtime gives: search, resizing, words. Needs Node.js."""

import json
import shutil
import subprocess
from dataclasses import asdict

import numpy as np
import PIL
import pytest
from hf_attncap.training.data.vocabulary import build_tokenizer
from PIL import Image

from hf_attncap.export_web import PAGE
from hf_attncap.numpy_search import NOT_GENERATED, SearchSettings, search
from hf_attncap.words_attncap import CaptionPieces

STATES = 50  # of the decoder of these tests


@pytest.fixture(scope="module")
def run_node(tmp_path_factory):
    """`run_node(code, data)` runs JavaScript that has `data`, and returns the `result` that it sets."""
    node = shutil.which("node")
    if node is None:
        pytest.skip("Node.js is not installed")
    folder = shutil.copytree(PAGE, tmp_path_factory.mktemp("node") / "web")
    (folder / "package.json").write_text('{"type": "module"}')

    def run_node(code: str, data):
        (folder / "data.json").write_text(json.dumps(data))
        (folder / "test.js").write_text(
            'import { readFileSync } from "node:fs";\nconst data = JSON.parse(readFileSync("data.json"));\nlet result;\n'
            f"{code}\nconsole.log(JSON.stringify(result));"
        )
        done = subprocess.run([node, "test.js"], cwd=folder, capture_output=True, text=True, timeout=120)
        assert done.returncode == 0, done.stderr
        return json.loads(done.stdout)

    return run_node


class TableDecoder:
    """A decoder whose logits are the sum of a row for the newest token and a row for the state, which depends on all tokens."""

    def __init__(self, of_token: np.ndarray, of_state: np.ndarray):
        self.of_token, self.of_state = of_token, of_state
        self.state = np.zeros((1, 1), int)

    def read_prompt(self, ids, beams):
        return [np.repeat(output, beams, axis=1) for output in self.read(ids[None, None])]

    def read(self, ids):
        newest = ids[:, :, -1]  # (1, K)
        self.state = (self.state * 31 + newest) % STATES
        logits = self.of_token[newest] + self.of_state[self.state]  # (1, K, V)
        normalizer = np.log(np.exp(logits).sum(-1))  # (1, K)
        log_p = logits - normalizer[..., None]
        return [logits, normalizer, -(np.exp(log_p) * log_p).sum(-1)]

    def select(self, beams):
        self.state = np.take_along_axis(np.broadcast_to(self.state, (1, beams.shape[1])), beams, 1)


TABLE_DECODER = """
class TableDecoder {
  constructor({ ofToken, ofState }) { Object.assign(this, { ofToken, ofState, states: [0] }); }
  read(captions) {
    const rows = captions.map((ids, k) => {
      const newest = ids.at(-1);
      this.states[k] = (this.states[k] * 31 + newest) % data.states;
      const added = this.ofState[this.states[k]];
      return Float32Array.from(this.ofToken[newest], (value, v) => Math.fround(value) + Math.fround(added[v]));
    });
    const normalizers = rows.map((row) => Math.fround(Math.log(row.reduce((sum, value) => sum + Math.exp(value), 0))));
    const entropies = rows.map((row, k) => -row.reduce((sum, x) => sum + Math.exp(x - normalizers[k]) * (x - normalizers[k]), 0));
    return { logits: Float32Array.from(rows.flatMap((row) => [...row])), normalizers, entropies };
  }
  select(parents) { this.states = parents.map((parent) => this.states[Math.min(parent, this.states.length - 1)]); }
}
"""


def random_settings(random: np.random.Generator, vocabulary: int) -> SearchSettings:
    some = [int(token) for token in random.choice(vocabulary, 4, replace=False)]
    longest = int(random.integers(2, 12))
    has_length = random.random() < 0.2
    return SearchSettings(
        decoder_start_token_id=1,
        pad_token_id=0,
        eos_token_id=[[2], [2, 5], []][int(random.choice(3, p=[0.7, 0.2, 0.1]))],
        num_beams=1,
        max_new_tokens=None if has_length else longest,
        max_length=longest + 1 if has_length else None,
        length_penalty=float(random.choice([-0.5, 0.0, 0.7, 1.0, 1.5])),
        early_stopping=[True, False, "never"][random.integers(3)],
        min_length=int(random.choice([0, 0, 5])),
        min_new_tokens=int(random.choice([0, 0, 4])),
        repetition_penalty=float(random.choice([1.0, 1.0, 1.3, 0.8])),
        no_repeat_ngram_size=int(random.integers(0, 4)),
        suppress_tokens=some[:2] if random.random() < 0.5 else [],
        repeatable_token_ids=some if random.random() < 0.5 else None,
    )


def test_the_search_gives_the_captions_and_scores_of_the_python_search(run_node):
    random = np.random.default_rng(0)
    cases, expected = [], []
    for _ in range(300):
        V = int(random.integers(16, 60))
        settings = random_settings(random, V)
        tables = [random.normal(0, 2, (rows, V)).astype(np.float32) for rows in (V, STATES)]
        tables[0][:, 2] += random.choice([0, 3])  # some captions end early
        beams = int(random.integers(1, 6))
        wanted = int(random.integers(1, beams + 1))
        tokens, scores = search(TableDecoder(*tables), settings, 1, [], beams, wanted)
        generated = [row[: 1 + (row["beam"] != NOT_GENERATED).sum()] for row in tokens[0]]
        expected.append([[row["id"].tolist(), row["beam"].tolist(), score] for row, score in zip(generated, scores[0].tolist())])
        names = dict(zip(("ofToken", "ofState"), (table.tolist() for table in tables)))
        cases.append({**names, "settings": asdict(settings), "beams": beams, "wanted": wanted})
    code = f"""import {{ search }} from "./search.js";\n{TABLE_DECODER}
    result = [];
    for (const one of data.cases) {{
      const found = await search(new TableDecoder(one), one.settings, one.beams, one.wanted);
      result.push(found.map(({{ caption, score }}) => [caption.ids, caption.parents, score]));
    }}"""
    found = run_node(code, {"states": STATES, "cases": cases})
    assert len(found) == len(cases) and {len(captions) for captions in expected} == {1, 2, 3, 4, 5}
    for case, captions, theirs in zip(cases, found, expected):
        captions, theirs = ([[ids, beams[1:], score] for ids, beams, score in one if score > -1e8] for one in (captions, theirs))
        assert [[*caption[:2]] for caption in captions] == [[*caption[:2]] for caption in theirs], case["settings"]
        np.testing.assert_allclose([caption[2] for caption in captions], [caption[2] for caption in theirs], rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("resample", [1, 2, 3, 4, 5])
def test_resized_pixels_equal_those_of_pillow(run_node, resample):
    if int(PIL.__version__.partition(".")[0]) < 13:
        pytest.skip("the page resizes as Pillow 13 and later")
    random = np.random.default_rng(resample)
    cases, expected = [], []
    for size in ((31, 200), (333, 77), (500, 10), (1, 1), (2, 90), (96, 64), (95, 65), (700, 130), (120, 400), (60, 63)):
        pixels = random.integers(0, 256, (size[1], size[0], 4), dtype=np.uint8)
        pixels[: size[1] // 2] = 255 * (pixels[: size[1] // 2] > 127)  # sharp edges, where bicubic filters overshoot
        cases.append({"width": size[0], "height": size[1], "pixels": pixels.ravel().tolist()})
        image = Image.fromarray(np.ascontiguousarray(pixels[..., :3])).resize((96, 64), Image.Resampling(resample))
        expected.append(np.asarray(image).ravel().tolist())
    code = f"""import {{ resize }} from "./image.js";
    result = data.map(({{ width, height, pixels }}) => {{
      const rows = (top, count) => Uint8Array.from(pixels.slice(top * width * 4, (top + count) * width * 4));
      return [...resize({{ width, height, rows }}, 96, 64, {resample})];
    }});"""
    for case, found, theirs in zip(cases, run_node(code, cases), expected):
        assert found == theirs, (case["width"], case["height"])


@pytest.mark.parametrize("kind", ["word", "bpe"])
def test_words_and_their_maps_equal_those_of_python(run_node, kind):
    captions = ["A black dog's ball rolls over the well-known beach .", "Children are playing near a big house while it rains ."]
    tokenizer = build_tokenizer(captions * 2, kind, min_count=1)
    random = np.random.default_rng(0)
    cases, expected = [], []
    for length in (1, 2, 5, 9, 9, 15):
        ids = [1, *random.integers(3, len(tokenizer), length).tolist(), 2]
        rows = random.random((length + 1, 6)).astype(np.float32)
        pieces = CaptionPieces(tokenizer, ids)
        cases.append({"ids": ids, "rows": rows.tolist()})
        expected.append([pieces.text, pieces.words, pieces.merge(rows).tolist(), pieces.add_up(rows).tolist()])
    file = json.loads(tokenizer.backend_tokenizer.to_str())
    data = {"file": file, "settings": {"all_special_ids": tokenizer.all_special_ids}, "cases": cases}
    code = """import { CaptionPieces, Tokenizer } from "./words.js";
    const tokenizer = new Tokenizer(data.file, data.settings);
    result = data.cases.map(({ ids, rows }) => {
      const pieces = new CaptionPieces(tokenizer, ids);
      return [pieces.text, pieces.words, pieces.merge(rows), pieces.addUp(rows)];
    });"""
    for found, theirs in zip(run_node(code, data), expected):
        assert found[:2] == theirs[:2] and found[0]
        for ours, rows in zip(found[2:], theirs[2:]):
            np.testing.assert_allclose(ours, rows, atol=1e-5)
