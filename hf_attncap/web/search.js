// Greedy and beam search for one image. The steps and the arithmetic are those of `numpy_search.py`, so that the captions are equal.
//
// Shapes: K beams, V vocabulary, t tokens so far, N regions. Numbers are rounded to float32 where numpy computes in float32.

const IMPOSSIBLE = -1e9; // the score of a beam that must not be chosen
const f32 = Math.fround;

/**
 * @typedef {object} Caption a beam, with one entry per token, the start token first
 * @property {number[]} ids
 * @property {number[]} parents the beam that each token continued, -1 for the start token
 * @property {number[]} logProbs
 * @property {number[]} entropies of the distributions that the tokens were chosen from
 */

/**
 * Decodes one image.
 *
 * @param decoder `read(captions)` reads the newest token of K captions (K arrays of ids) and resolves to {logits: Float32Array (K * V),
 *     normalizers: (K), entropies: (K)}; `select(parents)` keeps the states of these beams, in this order.
 * @param settings the generation settings of `export.json`.
 * @param {number} beams the beam width, 1 for greedy search.
 * @param {number} wanted how many captions to return, at most `beams`.
 * @returns {Promise<{caption: Caption, score: number}[]>} best first.
 */
export async function search(decoder, settings, beams, wanted) {
  const longest = settings.max_new_tokens === null ? settings.max_length : 1 + settings.max_new_tokens;
  const start = { ids: [settings.decoder_start_token_id], parents: [-1], logProbs: [0], entropies: [0] };
  const outputs = await decoder.read([start.ids]);
  if (beams === 1) return [await greedySearch(decoder, settings, longest, start, outputs)];
  return (await beamSearch(decoder, settings, longest, start, beams, outputs)).slice(0, wanted);
}

async function greedySearch(decoder, settings, longest, start, outputs) {
  let caption = start;
  for (;;) {
    const { logits, normalizers, entropies } = outputs;
    const scores = logits.slice();
    process(settings, caption.ids, scores);
    const id = scores.reduce((best, value, index) => (value > scores[best] ? index : best), 0);
    caption = extend(caption, id, 0, f32(logits[id] - normalizers[0]), entropies[0]);
    if (settings.eos_token_id.includes(id) || caption.ids.length >= longest) break;
    outputs = await decoder.read([caption.ids]);
  }
  const sum = caption.logProbs.reduce((total, value) => f32(total + value), 0);
  return { caption, score: sum / (caption.ids.length - 1) ** settings.length_penalty };
}

async function beamSearch(decoder, settings, longest, start, K, outputs) {
  const ends = new Set(settings.eos_token_id);
  const candidates = Math.max(2, 1 + ends.size) * K;
  const penalty = (tokens) => f32(tokens ** settings.length_penalty);
  // At first all beams are equal, so only one counts. It stands for all of them, as there is only one row of outputs.
  let beams = Array.from({ length: K }, (_, k) => ({ caption: start, score: k === 0 ? 0 : IMPOSSIBLE }));
  let finished = Array.from({ length: K }, () => ({ caption: start, score: IMPOSSIBLE, ended: false }));

  for (let length = 1; length < longest; length++) {
    const extended = extendBeams(settings, beams, outputs, candidates).map((found) => ({
      ...found,
      ended: ends.has(found.caption.ids[length]) || length + 1 >= longest,
    }));
    beams = best(extended.map((found) => ({ ...found, score: found.ended ? f32(found.score + IMPOSSIBLE) : found.score })), K);

    const complete = finished.every((found) => found.ended);
    const ranked = extended.map((found, rank) => {
      const ended = found.ended && rank < K;
      const score = f32(found.score / penalty(length));
      const lost = !ended || (settings.early_stopping === true && complete);
      return { ...found, ended, score: lost ? f32(score + IMPOSSIBLE) : score };
    });
    finished = best([...finished, ...ranked], K);

    const until = settings.early_stopping === "never" && settings.length_penalty > 0 ? longest : length + 1;
    const possible = f32(beams[0].score / penalty(until - 1));
    const lowest = Math.min(...finished.map((found) => found.score));
    const improvable = finished.some((found) => possible > (found.ended ? lowest : IMPOSSIBLE));
    const all = finished.every((found) => found.ended) && settings.early_stopping === true;
    if (!improvable || all || extended.every((found) => found.ended)) break;
    decoder.select(beams.map((found) => found.caption.parents[length]));
    outputs = await decoder.read(beams.map((found) => found.caption.ids));
  }
  return finished;
}

/** The `count` best continuations of the beams by one token, best first. */
function extendBeams(settings, beams, { logits, normalizers, entropies }, count) {
  const V = logits.length / normalizers.length;
  const totals = [], logProbs = [];
  beams.forEach(({ caption, score }, k) => {
    const row = Math.min(k, normalizers.length - 1); // the start token has one row for all beams
    logProbs.push(logits.slice(row * V, (row + 1) * V).map((logit) => logit - normalizers[row]));
    const scores = logProbs[k].slice();
    process(settings, caption.ids, scores);
    totals.push(scores.map((value) => value + score));
  });
  return largest(totals, count).map(([k, id]) => {
    const entropy = entropies[Math.min(k, normalizers.length - 1)];
    return { caption: extend(beams[k].caption, id, k, logProbs[k][id], entropy), score: totals[k][id] };
  });
}

function extend(caption, id, parent, logProb, entropy) {
  return {
    ids: [...caption.ids, id],
    parents: [...caption.parents, parent],
    logProbs: [...caption.logProbs, logProb],
    entropies: [...caption.entropies, entropy],
  };
}

/** The `count` captions with the highest scores, best first; of equal ones the earlier. */
function best(captions, count) {
  return [...captions].sort((one, other) => other.score - one.score).slice(0, count);
}

/** Row and column of the `count` largest values in rows, in descending order; of equal ones the earlier. */
function largest(rows, count) {
  const found = []; // [value, row, column], in descending order
  rows.forEach((row, k) => {
    for (let v = 0; v < row.length; v++) {
      if (found.length === count && !(row[v] > found[count - 1][0])) continue;
      let place = found.length;
      while (place > 0 && row[v] > found[place - 1][0]) place--;
      found.splice(place, 0, [row[v], k, v]);
      if (found.length > count) found.pop();
    }
  });
  return found.map(([, k, v]) => [k, v]);
}

/** Changes the scores (V) of the token after `ids` as the logits processors of transformers do, in place. */
function process(settings, ids, scores) {
  if (settings.repetition_penalty !== 1) {
    const penalty = f32(settings.repetition_penalty);
    for (const id of new Set(ids)) scores[id] = scores[id] < 0 ? scores[id] * penalty : scores[id] / penalty;
  }
  const size = settings.no_repeat_ngram_size;
  if (size > 0) {
    const last = ids.length - size + 1; // where the n-gram begins that the new token ends
    for (let from = 0; from + size <= ids.length; from++) {
      const repeats = Array.from({ length: size - 1 }, (_, n) => ids[from + n] === ids[last + n]).every(Boolean);
      if (repeats) scores[ids[from + size - 1]] = -Infinity;
    }
  }
  if (ids.length < settings.min_length || ids.length - 1 < settings.min_new_tokens) {
    for (const id of settings.eos_token_id) scores[id] = -Infinity;
  }
  for (const id of settings.suppress_tokens) scores[id] = -Infinity;
  if (settings.repeatable_token_ids !== null) {
    const repeatable = [...settings.repeatable_token_ids, ...settings.eos_token_id];
    for (const id of ids) if (!repeatable.includes(id)) scores[id] = -Infinity;
  }
}
