"use strict";

// Written by attention_page.py; _block_data() and attention_page() describe the fields.
const data = JSON.parse(document.getElementById("data").textContent);

const element = (id) => document.getElementById(id);
const [stage, heat, marks] = ["stage", "heat", "marks"].map(element);
const [width, height] = [data.image.width, data.image.height];
const LEVELS = 127; // quantisation steps of a weight, on either side of zero
const STRONGEST = 20; // targets with an arrow, as many as in Fig. 3 of the paper
const MIN_RELATIVE_WEIGHT = 0.01; // of the largest; weaker targets get no arrow

let block; // the selected entry of data.blocks
let maps; // its arrays, returned by unpack()
let query = {}; // row and column, indices into block.queries
let held = false; // true while the mouse does not move the query

// ---- reading the data ----

/** Return the arrays of a block, described in _block_data(). */
async function unpack(block) {
  const bytes = Uint8Array.from(atob(block.maps), (character) => character.charCodeAt(0));
  const stream = new Blob([bytes]).stream().pipeThrough(new DecompressionStream("deflate"));
  const buffer = await new Response(stream).arrayBuffer();
  const queries = block.queries[0].length * block.queries[1].length;
  return {
    largest: new Float32Array(buffer, 0, queries),
    padding: new Float32Array(buffer, 4 * queries, queries),
    levels: new Int8Array(buffer, 8 * queries),
  };
}

/** Return x and y of the centre of a position, or of its part inside the image. */
function centre([cellWidth, cellHeight], row, column) {
  const middle = (i, side, end) => (i * side + Math.min((i + 1) * side, end)) / 2;
  return [middle(column, cellWidth, width), middle(row, cellHeight, height)];
}

// ---- drawing ----

/** Return red, green, blue, alpha of a level: sign(w) * LEVELS * sqrt(|w| / max |w|). */
function colour(level) {
  const t = Math.abs(level) / LEVELS;
  const stops = level < 0 ? [[40, 60, 190], [70, 160, 255], [205, 240, 255]]
    : [[190, 25, 45], [255, 130, 20], [255, 240, 120]];
  const [from, to] = t < 0.5 ? [stops[0], stops[1]] : [stops[1], stops[2]];
  const share = t < 0.5 ? 2 * t : 2 * t - 1;
  const rgb = from.map((value, i) => Math.round(value + share * (to[i] - value)));
  return [...rgb, Math.round(255 * t)];
}

const COLOURS = new Uint8ClampedArray(4 * 256);
for (let level = -LEVELS; level <= LEVELS; level++) {
  COLOURS.set(colour(level), 4 * (level & 255));
}

/** Draw one pixel per level. */
function paint(canvas, levels, columns, rows) {
  const pixels = new ImageData(columns, rows);
  const [to, from] = [new Uint32Array(pixels.data.buffer), new Uint32Array(COLOURS.buffer)];
  for (let i = 0; i < to.length; i++) {
    to[i] = from[levels[i] & 255];
  }
  canvas.width = columns;
  canvas.height = rows;
  canvas.getContext("2d").putImageData(pixels, 0, 0);
}

function svg(parent, name, attributes) {
  const node = document.createElementNS("http://www.w3.org/2000/svg", name);
  for (const [key, value] of Object.entries(attributes)) {
    node.setAttribute(key, value);
  }
  return parent.appendChild(node);
}

/** Draw an element twice, the lower copy as a dark outline, so that it is visible on any image. */
function outlined(parent, name, attributes, stroke) {
  svg(parent, name, { ...attributes, class: "halo", "stroke-width": stroke + 2 });
  svg(parent, name, { ...attributes, class: "shaft", "stroke-width": stroke });
}

function drawArrow([x0, y0], [x1, y1], share, negative) {
  const group = svg(marks, "g", {
    class: negative ? "arrow negative" : "arrow",
    opacity: 0.1 + 0.9 * Math.sqrt(share),
    "stroke-linecap": "round",
  });
  const length = Math.hypot(x1 - x0, y1 - y0);
  if (length < 12) {
    outlined(group, "path", { d: `M${x1 - 4},${y1} a4,4 0 1,0 8,0 a4,4 0 1,0 -8,0` }, 1.5);
    return;
  }
  const [ux, uy] = [(x1 - x0) / length, (y1 - y0) / length];
  const head = [4, -4].map((side) => `${x1 - 8 * ux + side * uy},${y1 - 8 * uy - side * ux}`);
  const start = `${x0 + 7 * ux},${y0 + 7 * uy}`; // on the circle around the query
  const d = `M${start} L${x1},${y1} M${head[0]} L${x1},${y1} L${head[1]}`;
  outlined(group, "path", { d }, 0.75 + 1.75 * share);
}

function drawDetection({ box, label }, scale) {
  const [x0, y0, x1, y1] = box.map((value) => value * scale);
  const group = svg(marks, "g", { class: "box" });
  outlined(group, "rect", { x: x0, y: y0, width: x1 - x0, height: y1 - y0 }, 1.5);
  const [x, anchor] = x0 < stage.clientWidth / 2 ? [x0 + 4, "start"] : [x1 - 4, "end"];
  svg(group, "text", { x, y: Math.max(y0 + 14, 14), "text-anchor": anchor }).textContent = label;
}

/** Redraw everything that depends on the query or the controls. */
function show() {
  const [rows, columns] = block.targets;
  const number = query.row * block.queries[1].length + query.column;
  const levels = maps.levels.subarray(number * rows * columns, (number + 1) * rows * columns);
  const largest = maps.largest[number];
  paint(heat, levels, columns, rows);

  const [x, y] = centre(block.cells[0], block.queries[0][query.row], block.queries[1][query.column]);
  const strongest = Array.from(levels.keys())
    .sort((a, b) => Math.abs(levels[b]) - Math.abs(levels[a]))
    .slice(0, STRONGEST)
    .filter((target, i) => i === 0 || levels[target])
    .map((target) => ({
      place: centre(block.cells[1], Math.floor(target / columns), target % columns),
      share: (levels[target] / LEVELS) ** 2,
      negative: levels[target] < 0,
    }));
  const weight = ({ share, negative }) => figure(negative ? -share * largest : share * largest);

  const scale = stage.clientWidth / width;
  marks.replaceChildren();
  if (element("detections").checked) {
    data.detections.forEach((detection) => drawDetection(detection, scale));
  }
  for (const target of strongest.slice(0, Number(element("arrows").value)).reverse()) {
    if (target.share >= MIN_RELATIVE_WEIGHT) {
      const end = target.place.map((side) => side * scale);
      drawArrow([x * scale, y * scale], end, target.share, target.negative);
    }
  }
  const mark = svg(marks, "g", { class: "query" });
  outlined(mark, "circle", { cx: x * scale, cy: y * scale, r: 6 }, 2);

  element("readout").textContent =
    `Query ${place([x, y])}: strongest ${weight(strongest[0])} at ${place(strongest[0].place)}; ` +
    `${(100 * maps.padding[number]).toFixed(1)} % of the weight in padding.` +
    (held ? " Held." : "");
  element("strongest").replaceChildren(
    ...strongest.map((target, i) => tableRow([i + 1, weight(target), ...target.place.map(round)])),
  );
  const ticks = signed() ? [-1, -1 / 4, 0, 1 / 4, 1] : [0, 1 / 4, 1];
  element("ticks").replaceChildren(...ticks.map((tick) => cell("span", figure(tick * largest))));
}

const signed = () => block.instantiation === "dot_product"; // the other weights are not negative

/** Format a weight. The maps store about two significant digits. */
const figure = (weight) =>
  (Math.abs(weight) < 1e-4 && weight ? weight.toExponential(1) : String(+weight.toPrecision(2)))
    .replaceAll("-", "\u2212");
const round = (pixels) => String(Math.round(10 * pixels) / 10);
const place = ([x, y]) => `(${round(x)}, ${round(y)})`;

function cell(tag, text) {
  const node = document.createElement(tag);
  node.textContent = text;
  return node;
}

function tableRow(texts) {
  const row = document.createElement("tr");
  row.append(...texts.map((text) => cell("td", text)));
  return row;
}

// ---- selecting the query and the block ----

const clamp = (value, count) => Math.min(Math.max(value, 0), count - 1);

function moveTo(row, column) {
  row = clamp(row, block.queries[0].length);
  column = clamp(column, block.queries[1].length);
  if (row !== query.row || column !== query.column) {
    query = { row, column };
    show();
  }
}

/** Return row and column of the query that contains a point of the image. */
function queryAt(x, y) {
  const [cellWidth, cellHeight] = block.cells[0].map((side) => side * block.step);
  return [Math.floor(y / cellHeight), Math.floor(x / cellWidth)];
}

async function choose(chosen, x, y) {
  const unpacked = await unpack(chosen);
  [block, maps] = [chosen, unpacked];
  const [rows, columns] = block.targets;
  heat.style.width = `${(100 * columns * block.cells[1][0]) / width}%`;
  heat.style.height = `${(100 * rows * block.cells[1][1]) / height}%`;
  const levels = Array.from({ length: 2 * LEVELS + 1 }, (_, i) => i - LEVELS);
  const shown = signed() ? levels : levels.slice(LEVELS);
  paint(element("scale"), shown, shown.length, 1);
  const [count, step] = [block.queries[0].length * block.queries[1].length, block.step];
  element("about").textContent =
    `${block.name}: ${block.instantiation}, ${count} query and ${rows * columns} target positions.` +
    (step > 1 ? ` To limit the file size, the page has one query of every ${step} x ${step}.` : "");
  query = {};
  moveTo(...queryAt(x, y));
}

function point(event) {
  const { left, top } = stage.getBoundingClientRect();
  const scale = width / stage.clientWidth;
  moveTo(...queryAt((event.clientX - left) * scale, (event.clientY - top) * scale));
}

stage.addEventListener("pointermove", (event) => {
  if (!held) {
    point(event);
  }
});
stage.addEventListener("pointerdown", (event) => {
  held = event.pointerType === "mouse" && !held;
  stage.classList.toggle("held", held);
  point(event);
  show();
});
stage.addEventListener("keydown", (event) => {
  const steps = { ArrowUp: [-1, 0], ArrowDown: [1, 0], ArrowLeft: [0, -1], ArrowRight: [0, 1] };
  if (event.key in steps) {
    event.preventDefault();
    const [down, right] = steps[event.key].map((step) => step * (event.shiftKey ? 5 : 1));
    moveTo(query.row + down, query.column + right);
  }
});
element("block").addEventListener("change", (event) => {
  const [rows, columns] = block.queries;
  const [x, y] = centre(block.cells[0], rows[query.row], columns[query.column]);
  choose(data.blocks[event.target.selectedIndex], x, y);
});
element("opacity").addEventListener("input", (event) => {
  stage.style.setProperty("--opacity", event.target.value);
});
element("arrows").addEventListener("input", (event) => {
  event.target.nextElementSibling.value = event.target.value;
  show();
});
element("detections").addEventListener("change", show);
element("controls").addEventListener("submit", (event) => event.preventDefault());

// ---- start ----

stage.style.setProperty("--ratio", width / height);
stage.parentElement.classList.toggle("strip", width > 2.5 * height);
stage.setAttribute("aria-label", `${data.image.name}: select the query position`);
document.title = `Attention of non-local blocks: ${data.image.name}`;
document.querySelector("h1").textContent = document.title;
element("image").src = `data:image/jpeg;base64,${data.image.jpeg}`;
element("image").alt = data.image.name;
element("block").append(...data.blocks.map((block) => cell("option", block.name)));
element("arrows").max = STRONGEST;
element("arrows").value = STRONGEST;
element("arrows").nextElementSibling.value = STRONGEST;
stage.style.setProperty("--opacity", element("opacity").value);
for (const node of [element("detections"), document.querySelector("[for=detections]")]) {
  node.hidden = data.detections.length === 0;
}
const [x0, y0, x1, y1] = data.detections.length ? data.detections[0].box : [0, 0, width, height];
choose(data.blocks[0], (x0 + x1) / 2, (y0 + y1) / 2).then(
  () => new ResizeObserver(show).observe(stage),
  (error) => {
    element("readout").textContent = `This browser cannot unpack the maps: ${error.message}`;
  },
);
