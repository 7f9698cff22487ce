// The words of captions, from the tokens of a tokenizer. The same as `words_attncap.py`.

/** Turns tokens into text as the library `tokenizers` does, for the decoders that `attncap export --format web` accepts. */
export class Tokenizer {
  /**
   * @param file the content of `tokenizer.json`.
   * @param settings the tokenizer's settings in `export.json`.
   */
  constructor(file, settings) {
    const vocabulary = Object.entries(file.model.vocab).map(([token, id]) => [id, token]);
    this.tokens = new Map([...vocabulary, ...file.added_tokens.map(({ id, content }) => [id, content])]);
    this.special = new Set(settings.all_special_ids);
    this.decoder = file.decoder;
  }

  decode(ids) {
    const tokens = ids.map((id) => this.tokens.get(id));
    return this.decoder === null ? tokens.join(" ") : decodeWith(this.decoder, tokens).join("");
  }
}

function decodeWith(decoder, tokens) {
  switch (decoder.type) {
    case "Sequence":
      return decoder.decoders.reduce((found, step) => decodeWith(step, found), tokens);
    case "Metaspace": {
      const texts = tokens.map((token) => token.replaceAll(decoder.replacement, " "));
      return decoder.prepend_scheme === "never" ? texts : texts.map((text, n) => (n === 0 ? text.replace(/^ /, "") : text));
    }
    case "Fuse":
      return [tokens.join("")];
    case "Replace": {
      const pattern = decoder.pattern.String ?? new RegExp(decoder.pattern.Regex, "gu");
      return tokens.map((token) => token.replaceAll(pattern, () => decoder.content));
    }
    default:
      throw new Error(`The tokenizer's decoder ${decoder.type} is not supported.`);
  }
}

/** The text of a caption, its words, and the tokens of each word. */
export class CaptionPieces {
  /**
   * @param {Tokenizer} tokenizer
   * @param {number[]} ids the tokens of the caption, start token first. Special tokens belong to no word.
   */
  constructor(tokenizer, ids) {
    const positions = [...ids.keys()].filter((position) => !tokenizer.special.has(ids[position]));
    const pieces = positions.map((position) => ids[position]);
    this.text = tokenizer.decode(pieces);
    this.words = split(this.text);
    const last = this.words.length - 1;
    // The number of words from a token onward gives its word, for tokenizers that mark the first token of a word and for those that
    // mark the other ones.
    this.positions = this.words.map(() => []);
    positions.forEach((position, n) => {
      const left = split(tokenizer.decode(pieces.slice(n))).length;
      if (last >= 0) this.positions[Math.min(last + 1 - left, last)].push(position);
    });
  }

  /** The means of rows of tokens over the tokens of each word; row t belongs to token t + 1. Each sums to 1. */
  merge(rows) {
    return this.positions.map((positions) => {
      const mean = Array.from(rows[0], (_, n) => positions.reduce((sum, t) => sum + rows[t - 1][n], 0) / positions.length);
      const total = mean.reduce((sum, value) => sum + value, 0);
      return mean.map((value) => value / total);
    });
  }

  /** The sums of rows of tokens over the tokens of each word. */
  addUp(rows) {
    return this.positions.map((positions) => Array.from(rows[0], (_, n) => positions.reduce((sum, t) => sum + rows[t - 1][n], 0)));
  }
}

function split(text) {
  return text.split(/\s+/u).filter((word) => word !== "");
}
