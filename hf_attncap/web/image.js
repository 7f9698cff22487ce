// Pictures as the Python runtime prepares them: upright RGB on white, resized with the same arithmetic as Pillow's `resize`.

export const MAX_PIXELS = 2 ** 27; // decoded, a picture of this size takes 512 MB
const STRIP = 64; // rows that are read at a time, which bounds the memory for huge pictures
const TILE = 4096; // columns that are read at a time: browsers limit the size of a canvas
const FRACTION_BITS = 22; // Pillow's: coefficients are integers, in units of 2 ** -22

// Pillow's filters by their number: [half the width of the filter, its value at a distance].
const FILTERS = {
  1: [3, (x) => (Math.abs(x) < 3 ? sinc(x) * sinc(x / 3) : 0)], // Lanczos
  2: [1, (x) => Math.max(1 - Math.abs(x), 0)], // bilinear
  3: [2, bicubic],
  4: [0.5, (x) => (x > -0.5 && x <= 0.5 ? 1 : 0)], // box
  5: [1, (x) => (Math.abs(x) < 1 ? sinc(x) * (0.54 + 0.46 * Math.cos(Math.PI * x)) : 0)], // Hamming
};

function sinc(x) {
  return x === 0 ? 1 : Math.sin(Math.PI * x) / (Math.PI * x);
}

function bicubic(distance) {
  const x = Math.abs(distance), a = -0.5;
  if (x < 1) return ((a + 2) * x - (a + 3)) * x * x + 1;
  return x < 2 ? (((x - 5) * x + 8) * x - 4) * a : 0;
}

/**
 * The pixels of a picture for the encoder.
 *
 * @param {ImageBitmap} bitmap the decoded picture.
 * @param {number} width
 * @param {number} height the size to resize it to.
 * @param {number} resample Pillow's number of the filter.
 * @returns {Uint8Array} (height, width, 3)
 */
export function pixelsOf(bitmap, width, height, resample) {
  return resize(stripsOf(bitmap), width, height, resample);
}

/** Decodes an image file; rejects where the browser cannot. Like Python, it applies the EXIF orientation and ignores colour profiles. */
export function decode(file) {
  return createImageBitmap(file, { imageOrientation: "from-image", colorSpaceConversion: "none" });
}

/** A copy of a picture for display, as the model sees it, with at most `longest` pixels per side: a Blob. */
export function preview(bitmap, longest) {
  const scale = Math.min(1, longest / Math.max(bitmap.width, bitmap.height));
  const width = Math.max(1, Math.round(bitmap.width * scale)), height = Math.max(1, Math.round(bitmap.height * scale));
  const { canvas, context } = whiteCanvas(width, height);
  context.imageSmoothingQuality = "high";
  context.drawImage(bitmap, 0, 0, width, height);
  return canvas.convertToBlob({ type: "image/jpeg", quality: 0.92 });
}

/** A canvas without transparency: transparent regions of what is drawn on it become white. */
function whiteCanvas(width, height) {
  const canvas = new OffscreenCanvas(width, height);
  const context = canvas.getContext("2d", { alpha: false, willReadFrequently: true });
  context.fillStyle = "white";
  context.fillRect(0, 0, width, height);
  return { canvas, context };
}

/** The rows of a bitmap as `resize` reads them. */
function stripsOf(bitmap) {
  const { width, height } = bitmap;
  const tile = Math.min(width, TILE);
  const { context } = whiteCanvas(tile, Math.min(height, STRIP));

  function rows(top, count) {
    const found = new Uint8Array(count * width * 4);
    for (let left = 0; left < width; left += tile) {
      const columns = Math.min(tile, width - left);
      context.fillRect(0, 0, columns, count);
      context.drawImage(bitmap, left, top, columns, count, 0, 0, columns, count);
      const { data } = context.getImageData(0, 0, columns, count);
      for (let y = 0; y < count; y++) {
        found.set(data.subarray(y * columns * 4, (y + 1) * columns * 4), (y * width + left) * 4);
      }
    }
    return found;
  }
  return { width, height, rows };
}

/**
 * Resizes a picture: each output pixel is a weighted mean of input pixels, along rows and along columns. Each pass rounds to integers,
 * and its weights are rounded to multiples of 2 ** -22, as in Pillow, so that the pixels are equal.
 *
 * @param source {width, height, rows(top, count)}; `rows` returns (count, width, 4) RGBA, of which alpha is ignored.
 * @returns {Uint8Array} (height, width, 3)
 */
export function resize(source, width, height, resample) {
  const across = weightsOf(source.width, width, resample);
  const down = weightsOf(source.height, height, resample);
  // Pillow 13 begins with the columns of pictures that shrink mainly in height. Older versions always begin with the rows.
  const columnsFirst = source.height > height && source.height - height > 2 * (source.width - width);
  const columns = new ColumnPass(down, columnsFirst ? source.width * 4 : width * 3);
  const row = new Uint8Array(width * 3);
  for (let top = 0; top < source.height; top += STRIP) {
    const count = Math.min(STRIP, source.height - top);
    const rows = source.rows(top, count);
    for (let y = 0; y < count; y++) {
      const from = y * source.width * 4;
      if (columnsFirst) {
        columns.add(top + y, rows, from);
      } else {
        weighRow(rows, from, across, row, 0);
        columns.add(top + y, row, 0);
      }
    }
  }
  const found = columns.finish();
  if (!columnsFirst) return found;
  const pixels = new Uint8Array(height * width * 3);
  for (let y = 0; y < height; y++) weighRow(found, y * source.width * 4, across, pixels, y * width * 3);
  return pixels;
}

/** For each of `outputs` pixels: the first input pixel, the number of them, and their integer weights (outputs, size). */
function weightsOf(inputs, outputs, resample) {
  const [reach, filter] = FILTERS[resample];
  const step = inputs / outputs;
  const scale = Math.max(step, 1);
  const size = Math.ceil(reach * scale) * 2 + 1;
  const first = new Int32Array(outputs), count = new Int32Array(outputs), weights = new Int32Array(outputs * size);
  for (let i = 0; i < outputs; i++) {
    const center = (i + 0.5) * step;
    first[i] = Math.max(Math.trunc(center - reach * scale + 0.5), 0);
    count[i] = Math.min(Math.trunc(center + reach * scale + 0.5), inputs) - first[i];
    const values = Array.from({ length: count[i] }, (_, j) => filter((j + first[i] - center + 0.5) * (1 / scale)));
    const sum = values.reduce((total, value) => total + value, 0);
    values.forEach((value, j) => {
      const share = sum === 0 ? value : value / sum;
      weights[i * size + j] = Math.trunc(share * 2 ** FRACTION_BITS + (share < 0 ? -0.5 : 0.5));
    });
  }
  return { first, count, weights, size, outputs };
}

/** One row of RGBA pixels at `from` to a row of `outputs` RGB pixels at `to`. */
function weighRow(input, from, { first, count, weights, size, outputs }, output, to) {
  const half = 2 ** (FRACTION_BITS - 1);
  for (let i = 0; i < outputs; i++) {
    let red = half, green = half, blue = half;
    let at = from + first[i] * 4;
    const end = i * size + count[i];
    for (let j = i * size; j < end; j++, at += 4) {
      red += input[at] * weights[j];
      green += input[at + 1] * weights[j];
      blue += input[at + 2] * weights[j];
    }
    output[to + i * 3] = toByte(red);
    output[to + i * 3 + 1] = toByte(green);
    output[to + i * 3 + 2] = toByte(blue);
  }
}

/** The means along columns, from rows that come one after the other. */
class ColumnPass {
  /** `length` is the number of values in a row. */
  constructor(weights, length) {
    Object.assign(this, weights, { length, lowest: 0 });
    this.sums = new Int32Array(this.outputs * length).fill(2 ** (FRACTION_BITS - 1));
  }

  add(row, values, from) {
    const { first, count, weights, size, outputs, length, sums } = this;
    while (first[this.lowest] + count[this.lowest] <= row) this.lowest++; // output rows that are complete
    for (let y = this.lowest; y < outputs && first[y] <= row; y++) {
      const weight = weights[y * size + row - first[y]];
      for (let x = 0; x < length; x++) sums[y * length + x] += weight * values[from + x];
    }
  }

  /** The output rows (outputs, length). */
  finish() {
    return Uint8Array.from(this.sums, toByte);
  }
}

function toByte(sum) {
  return Math.min(Math.max(sum >> FRACTION_BITS, 0), 255);
}
