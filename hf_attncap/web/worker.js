// The web worker that runs the captioner, so that the page stays responsive.
//
// It receives {id, file, beams} and answers {id, result, image} or {id, error}. While it loads, it sends {loaded, total}; then
// {beams}, the beam width of the checkpoint, or {failed} with the reason.

import { decode, pixelsOf, preview } from "./image.js";
import { Captioner } from "./model.js";

const PREVIEW = 1280; // pixels of the longer side
const ALTERNATIVES = 4;

let captioner;
let queue = Captioner.load(new URL("./", import.meta.url), (loaded, total) => postMessage({ loaded, total })).then(
  (loaded) => {
    captioner = loaded;
    postMessage({ beams: loaded.settings.generation.num_beams });
  },
  (error) => postMessage({ failed: String(error.message) }),
);

self.onmessage = ({ data }) => {
  queue = queue.then(() => answer(data)); // one after the other
};

async function answer({ id, file, beams }) {
  try {
    const bitmap = await decode(file).catch(() => {
      throw new Error(`${file.name} is not an image that this browser can read. Choose a JPEG, PNG, WebP or GIF file.`);
    });
    try {
      const { height, width, resample } = captioner.settings;
      const result = await captioner.caption(pixelsOf(bitmap, width, height, resample), beams, Math.min(beams, 1 + ALTERNATIVES));
      postMessage({ id, result, image: await preview(bitmap, PREVIEW) });
    } finally {
      bitmap.close();
    }
  } catch (error) {
    postMessage({ id, error: String(error.message) });
  }
}
