// The page: takes a picture, sends it to the worker, and shows its caption or an error.

import { MAX_PIXELS } from "./image.js";
import "./viewer.js"; // defines mountAttncapViewer

const DELAY = 150; // milliseconds until the page says that it works on a picture

const element = (id) => document.getElementById(id);
const worker = startWorker();
let newest = 0; // the number of the picture that was chosen last; answers for earlier ones are dropped
let shown = null; // the picture, and the address of its copy in the viewer
let timer;

element("needs-server").hidden = true;
element("loading").hidden = false;
worker.onmessage = ({ data }) => receive(data);
worker.onerror = (event) => {
  event.preventDefault();
  fail(`The captioner stopped: ${event.message ?? "its code cannot be loaded"}. Reload the page.`);
};

/** A worker whose code runs under this page's Content-Security-Policy, which only workers from blob: addresses inherit. */
function startWorker() {
  const code = `import ${JSON.stringify(new URL("worker.js", import.meta.url).href)};`;
  return new Worker(URL.createObjectURL(new Blob([code], { type: "text/javascript" })), { type: "module" });
}

function receive({ loaded, total, beams, failed, id, error, result, image }) {
  if (loaded !== undefined) showProgress(loaded, total);
  else if (beams !== undefined) showControls(beams);
  else if (failed !== undefined) fail(`The captioner cannot be loaded. ${failed}`);
  else if (id === newest) error === undefined ? showResult(result, image) : showError(error);
}

function showProgress(loaded, total) {
  const megabytes = (bytes) => (bytes / 1e6).toFixed(0);
  element("progress").value = loaded / total;
  element("loading-text").textContent =
    loaded < total ? `Loading the captioner: ${megabytes(loaded)} of ${megabytes(total)} MB` : "Starting the captioner";
}

function showControls(beams) {
  element("loading").hidden = true;
  element("controls").hidden = false;
  element("beams").value = beams;
}

function fail(message) {
  element("loading").hidden = true;
  element("controls").hidden = true;
  showError(message);
}

function showError(message) {
  finish();
  element("viewer").replaceChildren();
  element("error").textContent = message;
  element("error").hidden = false;
}

function finish() {
  clearTimeout(timer);
  element("status").textContent = "";
  element("drop").classList.remove("over");
}

function showResult(result, image) {
  finish();
  element("error").hidden = true;
  if (shown?.address) URL.revokeObjectURL(shown.address);
  shown.address = URL.createObjectURL(image);
  const data = { ...result, image: shown.address, alt: `${shown.file.name}: ${result.text}` };
  mountAttncapViewer(element("viewer"), data);
}

/** Captions a file; of several pictures in quick succession, only the last one is shown. */
async function take(file) {
  const id = ++newest;
  finish();
  element("error").hidden = true;
  timer = setTimeout(() => (element("status").textContent = `Captioning ${file.name} …`), DELAY);
  const { width, height } = await sizeOf(file);
  if (id !== newest) return;
  if (width * height > MAX_PIXELS) {
    showError(`${file.name} has ${(width * height / 1e6).toFixed(0)} megapixels. Make it smaller than ${(MAX_PIXELS / 1e6).toFixed(0)} megapixels.`);
    return;
  }
  shown = { file, address: shown?.address };
  worker.postMessage({ id, file, beams: Number(element("beams").value) });
}

/** Width and height of a picture, which browsers find without decoding it; 0 if it is no image, which the worker reports. */
async function sizeOf(file) {
  const image = new Image();
  const address = URL.createObjectURL(file);
  try {
    await new Promise((resolve) => {
      image.onload = image.onerror = resolve;
      image.src = address;
    });
    return { width: image.naturalWidth, height: image.naturalHeight };
  } finally {
    URL.revokeObjectURL(address);
  }
}

const ready = () => !element("controls").hidden && element("controls").checkValidity();

element("file").addEventListener("change", ({ target }) => {
  const [file] = target.files;
  target.value = ""; // so that the same file can be chosen again
  if (file && ready()) take(file);
});
element("beams").addEventListener("change", () => {
  if (shown && ready()) take(shown.file);
});
element("controls").addEventListener("submit", (event) => event.preventDefault());
addEventListener("paste", ({ clipboardData }) => {
  const [file] = clipboardData.files;
  if (file && ready()) take(file);
});
addEventListener("dragover", (event) => {
  event.preventDefault(); // allows dropping
  element("drop").classList.add("over");
});
addEventListener("dragleave", (event) => {
  if (event.relatedTarget === null) element("drop").classList.remove("over");
});
addEventListener("drop", (event) => {
  event.preventDefault(); // the browser would open the file
  element("drop").classList.remove("over");
  const [file] = event.dataTransfer.files;
  if (file && ready()) take(file);
});
