// The captioner: loads the files of an exported folder and captions pixels with ONNX Runtime Web. The same as `runtime.py`.
//
// Shapes: K captions, T tokens, N regions in a grid of H x W, C region channels, S LSTM state, A attention space, V vocabulary.

import * as ort from "./onnxruntime/ort.wasm.min.mjs";
import { search } from "./search.js";
import { CaptionPieces, Tokenizer } from "./words.js";

const WASM = "onnxruntime/ort-wasm-simd-threaded.wasm";
const NO_CAPTION = -1e8; // beam search gives about -1e9 to captions that it did not find
const MAX_THREADS = 4;

export class Captioner {
  /**
   * Downloads the files and prepares the graphs.
   *
   * @param {URL} folder the address of the folder.
   * @param {(loaded: number, total: number) => void} onProgress called with the bytes so far and the bytes in all.
   */
  static async load(folder, onProgress) {
    const sizes = await (await get(new URL("downloads.json", folder))).json();
    const total = Object.values(sizes).reduce((sum, size) => sum + size, 0);
    let loaded = 0;
    const onBytes = (count) => onProgress((loaded += count), total);
    const names = Object.keys(sizes);
    const contents = await Promise.all(names.map((name) => download(new URL(name, folder), sizes[name], onBytes)));
    const files = Object.fromEntries(names.map((name, n) => [name, contents[n]]));

    ort.env.wasm.wasmBinary = files[WASM].buffer;
    // Threads share memory, which browsers allow only on isolated pages.
    ort.env.wasm.numThreads = self.crossOriginIsolated ? Math.min(navigator.hardwareConcurrency, MAX_THREADS) : 1;
    const captioner = new Captioner();
    captioner.settings = parse(files["export.json"]);
    captioner.tokenizer = new Tokenizer(parse(files["tokenizer.json"]), captioner.settings.tokenizer);
    captioner.graphs = {};
    for (const name of ["encoder", "start", "step"]) {
      captioner.graphs[name] = await ort.InferenceSession.create(files[`${name}.onnx`], { logSeverityLevel: 3 });
    }
    return captioner;
  }

  /**
   * Captions one picture.
   *
   * @param {Uint8Array} pixels (height, width, 3), of the size in `settings`.
   * @param {number} beams the beam width.
   * @param {number} wanted how many captions to find.
   * @returns what the viewer shows: text, words, grid, attention, importance, score, confidence and alternatives.
   */
  async caption(pixels, beams, wanted) {
    const { height, width, grid } = this.settings;
    const [regions] = await run(this.graphs.encoder, [new ort.Tensor("uint8", pixels, [1, height, width, 3])]); // (1, N, C)
    const decoder = await Decoder.start(this, regions);
    const found = (await search(decoder, this.settings.generation, beams, wanted)).filter(({ score }) => score > NO_CAPTION);
    const pieces = found.map(({ caption }) => new CaptionPieces(this.tokenizer, caption.ids));
    const [{ caption, score }] = found;
    return {
      text: pieces[0].text,
      words: pieces[0].words,
      grid,
      attention: pieces[0].merge(decoder.attentionOf(caption)),
      importance: null,
      score,
      confidence: confidenceOf(this.settings.confidence, score, caption),
      alternatives: found.slice(1).map((other, n) => ({ text: pieces[n + 1].text, score: other.score })),
    };
  }
}

/** The decoder's state for K captions of one image, and the attention of its steps. */
class Decoder {
  static async start({ graphs, settings }, regions) {
    const decoder = new Decoder();
    const [keys, h, c] = await run(graphs.start, [regions]); // (1, N, A), (1, S), (1, S)
    Object.assign(decoder, { graph: graphs.step, regions, keys, h: h.data, c: c.data, size: h.dims[1], attention: [] });
    decoder.readsAllWords = settings.word_attention === "history";
    return decoder;
  }

  /** Reads the newest token of K captions. */
  async read(captions) {
    const K = captions.length;
    const read = this.readsAllWords ? captions : captions.map((ids) => ids.slice(-1)); // (K, t)
    const ids = new ort.Tensor("int64", BigInt64Array.from(read.flat(), BigInt), [1, K, read[0].length]);
    const [h, c] = [this.h, this.c].map((state) => new ort.Tensor("float32", state, [1, K, this.size]));
    const outputs = await run(this.graph, [ids, h, c, this.keys, this.regions]);
    const [logits, normalizers, entropies, newH, newC, alpha] = outputs.map((output) => output.data);
    Object.assign(this, { h: newH, c: newC });
    this.attention.push(rowsOf(alpha, K)); // (K, N)
    return { logits, normalizers, entropies };
  }

  /** Keeps the states of these captions, in this order. */
  select(parents) {
    [this.h, this.c] = [this.h, this.c].map((state) => {
      const rows = rowsOf(state, state.length / this.size);
      const selected = new Float32Array(parents.length * this.size);
      parents.forEach((parent, k) => selected.set(rowAt(rows, parent), k * this.size));
      return selected;
    });
  }

  /** The attention (T, N) of the steps of a caption. */
  attentionOf(caption) {
    return caption.parents.slice(1).map((parent, t) => rowAt(this.attention[t], parent));
  }
}

function rowsOf(values, count) {
  const size = values.length / count;
  return Array.from({ length: count }, (_, k) => values.subarray(k * size, (k + 1) * size));
}

/** The row of a beam; the first step has one row for all beams. */
function rowAt(rows, beam) {
  return rows[Math.min(beam, rows.length - 1)];
}

/** The calibrated probability that a caption is good, as in `confidence_attncap.py`; null without calibration. */
function confidenceOf(calibration, score, caption) {
  if (calibration === null) return null;
  const logProbs = caption.logProbs.slice(1), entropies = caption.entropies.slice(1);
  const signals = {
    score,
    lowest: Math.min(...logProbs),
    entropy: entropies.reduce((sum, value) => sum + value, 0) / entropies.length,
  };
  const names = Object.keys(signals).filter((name) => name in calibration.weights);
  const logit = names.reduce((sum, name) => sum + calibration.weights[name] * signals[name], calibration.bias);
  return 0.5 * (1 + Math.tanh(0.5 * logit));
}

/** The outputs of a graph, in its order. */
async function run(graph, inputs) {
  const found = await graph.run(Object.fromEntries(graph.inputNames.map((name, n) => [name, inputs[n]])));
  return graph.outputNames.map((name) => found[name]);
}

async function get(address) {
  const response = await fetch(address);
  if (!response.ok) throw new Error(`${address.pathname} cannot be loaded: the server answered ${response.status}.`);
  return response;
}

/** A file of `size` bytes; `onBytes` is called with the number of bytes of each part that arrives. */
async function download(address, size, onBytes) {
  const content = new Uint8Array(size);
  const reader = (await get(address)).body.getReader();
  let place = 0;
  for (;;) {
    const { done, value } = await reader.read();
    if (done) break;
    if (place + value.length > size) throw new Error(`${address.pathname} is not the file of this export: copy the folder again.`);
    content.set(value, place);
    place += value.length;
    onBytes(value.length);
  }
  if (place < size) throw new Error(`${address.pathname} is incomplete: copy the folder again.`);
  return content;
}

function parse(content) {
  return JSON.parse(new TextDecoder().decode(content));
}
