"use strict";

// Written by attention_page.py; _block_data() and attention_page() describe the fields.
const data = JSON.parse(document.getElementById("data").textContent);

const element = (id) => document.getElementById(id);
const [stage, heat, marks] = ["stage", "heat", "marks"].map(element);
const [width, height] = [data.image.width, data.image.height];
const LEVELS = 127; // quantisation steps of a weight, on either side of zero
const MIN_RELATIVE_WEIGHT = 0.01; // of the largest; weaker targets get no arrow

let block; // the selected entry of data.blocks
let weights; // its arrays, returned by unpack()
let query = { row: 0, column: 0 };
let held = false; // true while the mouse does not move the query

// ---- reading the data ----

/** Return the arrays of a block: Q queries, K strongest targets of each, M targets in total. */
async function unpack(block) {
  const bytes = Uint8Array.from(atob(block.data), (character) => character.charCodeAt(0));
  const stream = new Blob([bytes]).stream().pipeThrough(new DecompressionStream("deflate"));
  const buffer = await new Response(stream).arrayBuffer();
  const queries = block.queries.x.length * block.queries.y.length;
  const targets = block.targets.x.length * block.targets.y.length;
  let offset = 0;
  const take = (Type, count) => {
    const array = new Type(buffer, offset, count);
    offset += array.byteLength;
    return array;
  };
  return {
    index: take(Uint32Array, queries * block.strongest), // (Q, K), indices of targets
    weight: take(Float32Array, queries * block.strongest), // (Q, K), by descending magnitude
    padding: take(Float32Array, queries), // (Q), share of the weight in the padding
    level: take(Int8Array, queries * targets), // (Q, M), see colour()
  };
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
  const { queries, targets, strongest } = block;
  const columns = targets.x.length;
  const number = query.row * queries.x.length + query.column;
  const [x, y] = [queries.x[query.column], queries.y[query.row]];
  const index = weights.index.subarray(number * strongest, (number + 1) * strongest);
  const weight = weights.weight.subarray(number * strongest, (number + 1) * strongest);
  const found = Array.from(index, (target, i) => ({
    x: targets.x[target % columns],
    y: targets.y[Math.floor(target / columns)],
    weight: weight[i],
  }));
  const top = Math.abs(weight[0]);

  const rows = targets.y.length;
  const size = columns * rows;
  paint(heat, weights.level.subarray(number * size, (number + 1) * size), columns, rows);

  const scale = stage.clientWidth / width;
  marks.replaceChildren();
  if (element("detections").checked) {
    data.detections.forEach((detection) => drawDetection(detection, scale));
  }
  const start = [x * scale, y * scale];
  for (const target of found.slice(0, Number(element("arrows").value)).reverse()) {
    const share = top ? Math.abs(target.weight) / top : 0;
    if (share >= MIN_RELATIVE_WEIGHT) {
      drawArrow(start, [target.x * scale, target.y * scale], share, target.weight < 0);
    }
  }
  const mark = svg(marks, "g", { class: "query" });
  outlined(mark, "circle", { cx: x * scale, cy: y * scale, r: 6 }, 2);

  element("readout").textContent =
    `Query (${place(x)}, ${place(y)}): strongest ${figure(found[0].weight)} ` +
    `at (${place(found[0].x)}, ${place(found[0].y)}); ` +
    `${(100 * weights.padding[number]).toFixed(1)} % of the weight in padding.` +
    (held ? " Held." : "");
  element("strongest").replaceChildren(
    ...found.map((target, i) =>
      tableRow([i + 1, figure(target.weight), place(target.x), place(target.y)]),
    ),
  );
  const ticks = block.signed ? [-top, -top / 4, 0, top / 4, top] : [0, top / 4, top];
  element("ticks").replaceChildren(...ticks.map((tick) => cell("span", tick ? figure(tick) : "0")));
}

const figure = (weight) =>
  (Math.abs(weight) < 1e-4 && weight ? weight.toExponential(2) : weight.toPrecision(3))
    .replaceAll("-", "\u2212");
const place = (pixels) => String(Math.round(10 * pixels) / 10);

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
  row = clamp(row, block.queries.y.length);
  column = clamp(column, block.queries.x.length);
  if (row !== query.row || column !== query.column) {
    query = { row, column };
    show();
  }
}

/** Return row and column of the query that contains a point of the image. */
function queryAt(x, y) {
  const [cellWidth, cellHeight] = block.queries.cell;
  return [Math.floor(y / cellHeight), Math.floor(x / cellWidth)];
}

async function choose(chosen, x, y) {
  const unpacked = await unpack(chosen);
  [block, weights] = [chosen, unpacked];
  const [row, column] = queryAt(x, y);
  query = { row: clamp(row, block.queries.y.length), column: clamp(column, block.queries.x.length) };
  const { targets } = block;
  heat.style.width = `${(100 * targets.x.length * targets.cell[0]) / width}%`;
  heat.style.height = `${(100 * targets.y.length * targets.cell[1]) / height}%`;
  const levels = Array.from({ length: 2 * LEVELS + 1 }, (_, i) => i - LEVELS);
  const shown = block.signed ? levels : levels.slice(LEVELS);
  paint(element("scale"), shown, shown.length, 1);
  element("arrows").max = block.strongest;
  element("arrows").nextElementSibling.value = element("arrows").value;
  element("about").textContent = block.about;
  show();
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
  const { x, y } = block.queries;
  choose(data.blocks[event.target.selectedIndex], x[query.column], y[query.row]);
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
element("image").src = data.image.source;
element("image").alt = data.image.name;
element("block").append(...data.blocks.map((block) => cell("option", block.name)));
element("arrows").max = data.blocks[0].strongest;
element("arrows").value = data.blocks[0].strongest;
stage.style.setProperty("--opacity", element("opacity").value);
for (const node of [element("detections"), document.querySelector("[for=detections]")]) {
  node.hidden = data.detections.length === 0;
}
choose(data.blocks[0], ...data.start).then(
  () => new ResizeObserver(show).observe(stage),
  (error) => {
    element("readout").textContent = `This browser cannot unpack the maps: ${error.message}`;
  },
);
