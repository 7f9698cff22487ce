/* The interactive view of a caption: `mountAttncapViewer(element, data)` shows the picture and the words of the caption. A word
   highlights its regions on the picture, a region highlights the words that attended to it. Plain JavaScript without dependencies.

   data = {image: <data: or blob: URL>, alt, text, words: [T], grid: [H, W], attention: [T][H*W] | null,
           importance: [T][H*W] | null, score, confidence: number | null, alternatives: [{text, score}]}

   Captions and file names are untrusted: they reach the page only as text nodes and as attributes that are no code. */
"use strict";

(() => {
  const INFERNO = "0000040b0724210c4a3d096557106e71196e8a226aa32c61bc3754d24644e45a31f1731df98e09fcac11f9cb35f2ea69fcffa4";
  const VIRIDIS = "44015448186a472d7b4240863b528b33638d2c728e26828e21918c1fa08828ae803fbc735ec96284d44baddc30d8e219fde725";
  const MAX_PIXELS = 1.2e6; // of the canvas
  const MIN_ATTENTION_SCALE = 3; // times uniform; this and the next are those of the plots in visualize.py
  const MIN_IMPORTANCE_SCALE = 0.5; // nats
  const MIN_SIDE = 48; // CSS pixels of the short side: a longer picture scrolls in its frame
  const SMALL_PICTURE = 560; // CSS pixels of the long side to which a smaller picture is enlarged

  const mounted = new WeakMap(); // element -> function that ends its observers
  let mounts = 0;

  /** Creates an element; `text` becomes a text node, whatever it holds. */
  function make(tag, name, attributes = {}, text = null) {
    const node = document.createElement(tag);
    if (name) node.className = name;
    for (const [key, value] of Object.entries(attributes)) node.setAttribute(key, value);
    if (text !== null) node.append(text);
    return node;
  }

  /** 256 colours [r, g, b] from evenly spaced hexadecimal ones. */
  function palette(hex) {
    const stops = hex.match(/../g).map((pair) => parseInt(pair, 16));
    const last = stops.length / 3 - 1;
    return Array.from({ length: 256 }, (_, level) => {
      const place = (level / 255) * last;
      const at = Math.min(Math.floor(place), last - 1);
      return [0, 1, 2].map((c) => stops[3 * at + c] + (place - at) * (stops[3 * at + 3 + c] - stops[3 * at + c]));
    });
  }

  const css = (rgb) => `rgb(${rgb.map(Math.round).join(" ")})`;

  /** Relative luminance as WCAG 2 defines it. */
  function luminance(rgb) {
    const linear = rgb.map((v) => (v / 255 <= 0.04045 ? v / 255 / 12.92 : ((v / 255 + 0.055) / 1.055) ** 2.4));
    return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2];
  }

  const largest = (rows, start) => rows.reduce((most, row) => row.reduce((a, b) => Math.max(a, b), most), start);

  /** The kinds of maps that can be shown: values, the range of the colours, and how a value is written. */
  function layersOf(data) {
    const layers = [];
    if (data.attention) {
      const regions = data.grid[0] * data.grid[1];
      const maps = data.attention.map((row) => row.map((value) => value * regions));
      layers.push({
        name: "Attention",
        maps,
        low: 1,
        high: largest(maps, MIN_ATTENTION_SCALE),
        colours: palette(INFERNO),
        write: (value) => `${value.toFixed(1)}×`,
        meaning: "Where the model looked, relative to uniform attention (1×). Grey: at most uniform.",
        region: "looked here",
      });
    }
    if (data.importance) {
      layers.push({
        name: "Importance",
        maps: data.importance,
        low: 0,
        high: largest(data.importance, MIN_IMPORTANCE_SCALE),
        colours: palette(VIRIDIS),
        write: (value) => value.toFixed(2).replace(/^-0\.00$/, "0.00").replace("-", "−"),
        meaning: "How much the log-probability of the word falls, in nats, if the region is hidden. Grey: it does not fall.",
        region: "depends on this",
      });
    }
    return layers;
  }

  const level = (layer, value) => Math.min(Math.max((value - layer.low) / (layer.high - layer.low), 0), 1);

  /** Weights of the cubic interpolation (a = -0.5) of `size` values at `length` places: [first index, weights] each. */
  function cubicWeights(size, length) {
    const kernel = (x) => {
      x = Math.abs(x);
      if (x < 1) return (1.5 * x - 2.5) * x * x + 1;
      return x < 2 ? ((-0.5 * x + 2.5) * x - 4) * x + 2 : 0;
    };
    return Array.from({ length }, (_, place) => {
      const centre = ((place + 0.5) * size) / length - 0.5;
      const first = Math.max(Math.floor(centre) - 1, 0);
      const end = Math.min(Math.floor(centre) + 3, size);
      const weights = Array.from({ length: end - first }, (_, n) => kernel(first + n - centre));
      const total = weights.reduce((a, b) => a + b, 0);
      return [first, weights.map((weight) => weight / total)];
    });
  }

  /** A map of height x width regions, smoothly enlarged to the pixels of a canvas. */
  function enlarge(map, [height, width], columns, rows) {
    const wide = new Float32Array(height * columns);
    cubicWeights(width, columns).forEach(([first, weights], x) => {
      for (let y = 0; y < height; y++) {
        let sum = 0;
        for (let n = 0; n < weights.length; n++) sum += weights[n] * map[y * width + first + n];
        wide[y * columns + x] = sum;
      }
    });
    const full = new Float32Array(rows * columns);
    cubicWeights(height, rows).forEach(([first, weights], y) => {
      for (let n = 0; n < weights.length; n++) {
        const start = (first + n) * columns;
        for (let x = 0; x < columns; x++) full[y * columns + x] += weights[n] * wide[start + x];
      }
    });
    return full;
  }

  /** Colours the grey picture in place: pixels (RGBA) and the values of the map at each of them. */
  function colour(pixels, values, layer) {
    const table = new Float32Array(256 * 4); // the share of the colour, and the colour times that share
    layer.colours.forEach((rgb, n) => {
      const alpha = 0.8 * (n / 255) ** 0.7;
      table.set([alpha, ...rgb.map((v) => alpha * v)], 4 * n);
    });
    const scale = 255 / (layer.high - layer.low);
    for (let p = 0; p < values.length; p++) {
      const grey = (0.299 * pixels[4 * p] + 0.587 * pixels[4 * p + 1] + 0.114 * pixels[4 * p + 2]) / 255;
      const n = 4 * Math.round(Math.min(Math.max((values[p] - layer.low) * scale, 0), 255));
      const under = (1 - table[n]) * 255 * (0.1 + 0.65 * grey);
      const over = 0.7 + 0.3 * grey; // keeps the picture visible under the brightest colour
      for (let c = 0; c < 3; c++) pixels[4 * p + c] = under + table[n + 1 + c] * over;
    }
  }

  /** The picture on a canvas, in colour or in grey under a map. */
  function makePicture(data, stage, onError) {
    const canvas = make("canvas", "attncap-canvas", { role: "img", "aria-label": data.alt });
    const image = new Image();
    let shown = null; // [map, layer]
    let pending = 0;

    function draw() {
      pending = 0;
      const box = stage.getBoundingClientRect();
      if (!image.naturalWidth || !box.width) return;
      const ratio = Math.min(window.devicePixelRatio || 1, 2);
      const scale = Math.min(ratio, Math.sqrt(MAX_PIXELS / (box.width * box.height)));
      canvas.width = Math.max(Math.round(box.width * scale), 1);
      canvas.height = Math.max(Math.round(box.height * scale), 1);
      const context = canvas.getContext("2d", { willReadFrequently: true });
      context.imageSmoothingQuality = "high";
      context.drawImage(image, 0, 0, canvas.width, canvas.height);
      if (!shown) return;
      const picture = context.getImageData(0, 0, canvas.width, canvas.height);
      colour(picture.data, enlarge(shown[0], data.grid, canvas.width, canvas.height), shown[1]);
      context.putImageData(picture, 0, 0);
    }

    function redraw() {
      pending = pending || requestAnimationFrame(draw);
    }

    image.onload = () => {
      const aspect = image.naturalWidth / image.naturalHeight;
      const natural = Math.max(image.naturalWidth, SMALL_PICTURE * Math.min(aspect, 1));
      stage.style.setProperty("--attncap-aspect", aspect);
      stage.style.setProperty("--attncap-natural", `${natural}px`);
      stage.style.setProperty("--attncap-least", `${MIN_SIDE * Math.max(aspect, 1)}px`);
      const root = stage.closest(".attncap");
      root?.classList.toggle("attncap-tall", aspect < 0.9);
      root?.classList.toggle("attncap-wide", aspect > 2);
      redraw();
    };
    image.onerror = onError;
    image.src = data.image;
    const observer = new ResizeObserver(redraw);
    observer.observe(stage);
    const show = (map, layer) => {
      shown = map ? [map, layer] : null;
      redraw();
    };
    return { canvas, show, stop: () => observer.disconnect() };
  }

  /** Score, confidence and further captions. */
  function makeFacts(data) {
    const facts = make("div", "attncap-facts");
    const list = make("dl", "attncap-scores");
    const entry = (name, value, explanation) => {
      const group = make("div", "", { title: explanation });
      group.append(make("dt", "", {}, name), make("dd", "", {}, value));
      list.append(group);
    };
    const round = (value) => (Number.isFinite(value) ? value.toFixed(2).replace("-", "−") : "unknown");
    if (data.confidence !== null && data.confidence !== undefined) {
      entry("Confidence", `${Math.round(100 * data.confidence)} %`, "The calibrated probability that the caption is good.");
    }
    entry("Score", round(data.score), "The log-probability of the caption, normalised by its length. Closer to 0 is more likely.");
    facts.append(list);
    if (data.alternatives.length) {
      facts.append(make("h3", "attncap-heading", {}, "Captions by score"));
      const others = make("ol", "attncap-alternatives");
      for (const { text, score } of [{ text: data.text, score: data.score }, ...data.alternatives]) {
        const item = make("li");
        item.append(make("bdi", "attncap-text", {}, text), " ", make("span", "attncap-number", {}, round(score)));
        others.append(item);
      }
      facts.append(others);
    }
    return facts;
  }

  /** One button per word; without maps there is nothing to press. */
  function makeWords(data, interactive) {
    const box = make("div", "attncap-words", { dir: "auto", role: "group", "aria-label": "Words of the caption" });
    const buttons = data.words.map((word, index) => {
      const button = make(interactive ? "button" : "span", "attncap-word");
      if (interactive) {
        button.type = "button";
        button.tabIndex = index ? -1 : 0;
        button.setAttribute("aria-pressed", "false");
      }
      button.append(make("span", "attncap-letters", {}, word), make("span", "attncap-value", { "aria-hidden": "true" }));
      return button;
    });
    box.append(...(buttons.length ? buttons : [make("span", "attncap-empty", {}, "The caption has no words.")]));
    return { box, buttons };
  }

  /** The switch between the kinds of maps, if there are two. */
  function makeSwitch(layers, onChange) {
    const box = make("fieldset", "attncap-switch");
    box.append(make("legend", "attncap-hidden", {}, "Maps"));
    const name = `attncap-maps-${++mounts}`;
    layers.forEach((layer, index) => {
      const label = make("label");
      const input = make("input", "", { type: "radio", name });
      input.checked = index === 0;
      input.addEventListener("change", () => onChange(index));
      label.append(input, make("span", "", {}, layer.name));
      box.append(label);
    });
    box.hidden = layers.length < 2;
    return box;
  }

  function fillLegend(legend, layer) {
    const bar = make("span", "attncap-bar", { "aria-hidden": "true" });
    bar.style.background = `linear-gradient(to right, ${layer.colours.filter((_, n) => n % 15 === 0).map(css).join(", ")})`;
    const scale = make("div", "attncap-scale");
    scale.append(make("span", "", {}, layer.write(layer.low)), bar, make("span", "", {}, layer.write(layer.high)));
    legend.replaceChildren(scale, make("p", "", {}, layer.meaning));
  }

  /** Colours a word by its value at a region, or removes the colour. */
  function light(button, layer, value) {
    const share = value === null ? 0 : level(layer, value);
    const chip = getComputedStyle(button).getPropertyValue("--attncap-chip").match(/[0-9a-f]{2}/gi).map((pair) => parseInt(pair, 16));
    const alpha = share ** 0.5; // low values are close to the colour of other words, as low values on the picture are to grey
    const rgb = layer.colours[Math.round(255 * share)].map((v, c) => alpha * v + (1 - alpha) * chip[c]);
    button.style.backgroundColor = share > 0 ? css(rgb) : "";
    button.style.color = share > 0 ? (luminance(rgb) > 0.179 ? "#000" : "#fff") : "";
    button.lastChild.textContent = value === null ? "" : layer.write(value);
  }

  const place = (region, [, columns]) => `row ${Math.floor(region / columns) + 1}, column ${(region % columns) + 1}`;

  /** What the status line says about a word or a region. */
  function describe(shown, data, layer) {
    if (!shown) return "";
    if (shown.kind === "word") {
      const map = layer.maps[shown.index];
      const peak = map.indexOf(Math.max(...map));
      return `“\u2068${data.words[shown.index]}\u2069”: most at ${place(peak, data.grid)} (${layer.write(map[peak])})`;
    }
    const values = layer.maps.map((map, index) => [map[shown.index], data.words[index]]);
    const best = values.filter(([value]) => value > layer.low).sort((a, b) => b[0] - a[0]);
    const names = best.slice(0, 3).map(([value, word]) => `\u2068${word}\u2069 ${layer.write(value)}`);
    return `Region in ${place(shown.index, data.grid)}: ${names.length ? names.join(", ") : `no word ${layer.region}`}`;
  }

  /** The index to which a key moves in a grid of `columns`, of `count` items; null for other keys. */
  function moved(key, index, count, columns, rightToLeft) {
    const [row, column] = [Math.floor(index / columns), index % columns];
    const last = count / columns - 1;
    const step = { ArrowLeft: rightToLeft ? 1 : -1, ArrowRight: rightToLeft ? -1 : 1 }[key];
    if (step) return row * columns + Math.min(Math.max(column + step, 0), columns - 1);
    if (key === "ArrowUp") return Math.max(row - 1, 0) * columns + column;
    if (key === "ArrowDown") return Math.min(row + 1, last) * columns + column;
    if (key === "Home") return 0;
    return key === "End" ? count - 1 : null;
  }

  /** Reads pointer and keyboard: calls `hover` and `select` with {kind: "word" | "region", index} or null. */
  function listen(root, stage, marker, buttons, grid, { hover, select, selected }) {
    const regions = grid[0] * grid[1];
    const same = (a, b) => a && b && a.kind === b.kind && a.index === b.index;
    let before = null; // what was selected before a press began: a press on it clears it
    let pressed = false; // a press gives focus before its click
    root.addEventListener("pointerdown", () => ([before, pressed] = [selected(), true]));
    root.addEventListener("pointerup", () => (pressed = false));
    root.addEventListener("pointercancel", () => (pressed = false));

    const toggle = (target, event) => select(same(event.detail ? before : selected(), target) ? null : target);
    buttons.forEach((button, index) => {
      const word = { kind: "word", index };
      button.addEventListener("pointerenter", (event) => event.pointerType !== "touch" && hover(word));
      button.addEventListener("pointerleave", () => hover(null));
      button.addEventListener("focus", () => pressed || select(word));
      button.addEventListener("click", (event) => {
        button.focus();
        toggle(word, event);
      });
      button.addEventListener("keydown", (event) => {
        const direction = getComputedStyle(button.parentNode).direction;
        const flat = { ArrowUp: "Home", ArrowDown: "End" }[event.key] ? null : event.key;
        const next = flat && moved(flat, index, buttons.length, buttons.length, direction === "rtl");
        if (next === null) return;
        event.preventDefault();
        buttons[next].focus();
        select({ kind: "word", index: next });
      });
    });

    const regionAt = (event) => {
      const box = stage.getBoundingClientRect();
      const column = Math.floor(((event.clientX - box.left) / box.width) * grid[1]);
      const row = Math.floor(((event.clientY - box.top) / box.height) * grid[0]);
      const within = (value, size) => Math.min(Math.max(value, 0), size - 1);
      return { kind: "region", index: within(row, grid[0]) * grid[1] + within(column, grid[1]) };
    };
    stage.addEventListener("pointermove", (event) => event.pointerType !== "touch" && hover(regionAt(event)));
    stage.addEventListener("pointerleave", () => hover(null));
    stage.addEventListener("click", (event) => toggle(regionAt(event), event));
    let region = Math.floor(grid[0] / 2) * grid[1] + Math.floor(grid[1] / 2);
    stage.addEventListener("focus", () => {
      if (!pressed) select({ kind: "region", index: region });
    });
    stage.addEventListener("keydown", (event) => {
      if (selected()?.kind === "region") region = selected().index;
      const next = moved(event.key, region, regions, grid[1], false);
      if (next === null) return;
      event.preventDefault();
      region = next;
      select({ kind: "region", index: region });
      marker.scrollIntoView({ block: "nearest", inline: "nearest" });
    });
    root.addEventListener("keydown", (event) => {
      if (event.key === "Escape") [hover, select].forEach((clear) => clear(null));
    });
  }

  /** Shows a caption in `element`, in place of what it held. */
  globalThis.mountAttncapViewer = (element, data) => {
    mounted.get(element)?.();
    const layers = layersOf(data);
    const root = make("section", "attncap", { "aria-label": "Caption and maps" });
    const keys = "Arrow keys move over its regions, Escape clears.";
    const access = layers.length ? { tabindex: "0", role: "application", "aria-label": `Picture. ${keys}` } : {};
    const stage = make("div", "attncap-stage", access);
    const marker = make("div", "attncap-marker", { hidden: "", "aria-hidden": "true" });
    const status = make("p", "attncap-status", { role: "status" });
    const failed = () => frame.replaceChildren(make("p", "attncap-error", { role: "alert" }, "The picture cannot be shown."));
    const picture = makePicture(data, stage, failed);
    stage.append(picture.canvas, marker);
    const frame = make("div", "attncap-frame");
    frame.append(stage);
    const words = makeWords(data, layers.length > 0);
    const legend = make("div", "attncap-legend");
    let layer = layers[0];
    let [hovered, chosen] = [null, null];

    function update() {
      const shown = hovered || chosen;
      const region = shown?.kind === "region" ? shown.index : null;
      const word = shown?.kind === "word" ? shown.index : null;
      picture.show(word === null ? null : layer.maps[word], layer);
      words.buttons.forEach((button, index) => {
        light(button, layer, region === null ? null : layer.maps[index][region]);
        button.classList.toggle("attncap-shown", index === word);
        button.setAttribute("aria-pressed", String(chosen?.kind === "word" && chosen.index === index));
      });
      marker.hidden = region === null;
      if (region !== null) {
        const [rows, columns] = data.grid;
        const size = { left: (region % columns) / columns, top: Math.floor(region / columns) / rows };
        Object.assign(size, { width: 1 / columns, height: 1 / rows });
        for (const [side, share] of Object.entries(size)) marker.style[side] = `${100 * share}%`;
      }
      status.textContent = describe(shown, data, layer);
    }

    const panel = make("div", "attncap-panel");
    panel.append(words.box);
    if (layers.length) {
      const change = (index) => {
        layer = layers[index];
        fillLegend(legend, layer);
        update();
      };
      const hint = `Point at a word to see its regions, or at the picture to see its words. Keyboard: Tab and arrow keys; Escape clears.`;
      panel.append(status, makeSwitch(layers, change), legend, make("p", "attncap-hint", {}, hint));
      fillLegend(legend, layer);
      listen(root, stage, marker, words.buttons, data.grid, {
        hover: (target) => ((hovered = target), update()),
        select: (target) => {
          chosen = target;
          words.buttons.forEach((button, n) => (button.tabIndex = n === (target?.kind === "word" ? target.index : 0) ? 0 : -1));
          update();
        },
        selected: () => chosen,
      });
    }
    panel.append(makeFacts(data));
    root.append(frame, panel);
    mounted.set(element, picture.stop);
    element.replaceChildren(root);
  };
})();
