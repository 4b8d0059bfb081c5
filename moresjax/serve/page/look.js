// What a token of an answer looks at: probability, heat maps, and lines over layers.

import { attention } from "./api.js";
import { mapsOf, request } from "./answers.js";
import { byId, el, later, percent } from "./dom.js";
import { figure, legend } from "./lines.js";
import { bitmap } from "./pictures.js";
import { state } from "./store.js";

// The token that is looked at, the heads of the model, and the maps of heads by answer and token.
let chosen = null;
let heads = 0;
let naming = (answer) => answer.model;
const kept = new WeakMap();
const SIDE = 240;

/** Says what answers are called. */
export function name(by) {
  naming = by;
}

const answerOf = ({ turn, column }) => state.turns[turn]?.answers[column];

/** Looks at a token: of which turn and column, and which one. */
export function look(turn, column, token) {
  const answer = state.turns[turn]?.answers[column];
  if (!answer?.tokens[token]) return;
  chosen = { turn, column, token };
  byId("look-hint").hidden = true;
  byId("look-body").hidden = false;
  drawToken(answer.tokens[token], naming(answer));
  drawLines();
  drawMapSoon();
}

/** Looks at nothing, when the conversation is another one. */
export function forget() {
  chosen = null;
  byId("look-hint").hidden = false;
  byId("look-body").hidden = true;
}

const shown = (token) => token.trim() || JSON.stringify(token);

function drawToken({ token, logprob, top }, title) {
  const bar = (each) => {
    const probability = Math.exp(each.logprob);
    const length = el("span", { class: "bar-of" });
    length.style.width = `${100 * probability}%`;
    const own = each.token === token;
    return el(
      "li",
      { class: own ? "own" : null },
      el("span", { class: "word" }, shown(each.token)),
      el("span", { class: "track" }, length),
      el("span", { class: "share" }, percent(probability)),
    );
  };
  const others = top.some((each) => each.token === token) ? top : [{ token, logprob }, ...top];
  byId("token").replaceChildren(
    el(
      "p",
      { class: "chosen" },
      el("strong", {}, shown(token)),
      ` has probability ${percent(Math.exp(logprob))} in the answer of ${title}. The likeliest tokens:`,
    ),
    el("ol", { class: "alternatives" }, others.map(bar)),
  );
}

/** The maps of all heads of a token, `[images, layers, heads, rows, columns]`. */
function byHead(answer, { turn, column, token }) {
  if (!kept.has(answer)) kept.set(answer, new Map());
  const own = kept.get(answer);
  if (!own.has(token)) {
    const said = answer.ids ? { answer_ids: answer.ids } : { answer: answer.text };
    const found = attention({ ...request(turn, column, answer), ...said, token });
    found.catch(() => own.delete(token));
    own.set(token, found);
  }
  return own.get(token);
}

const drawMapSoon = later(drawMap, 60);

const headNow = () => (byId("head").value === "mean" ? "mean" : Number(byId("head").value));
const layerNow = () => (byId("all-layers").checked ? "mean" : Number(byId("layer").value));

async function drawMap() {
  const here = chosen;
  const answer = here && answerOf(here);
  if (!answer) return;
  const images = state.turns.slice(0, here.turn + 1).flatMap((turn) => turn.images);
  if (!images.length) return without("There is no image here, so there is no map.");
  if (answer.status === "running") return without("The map comes when the answer has ended.");
  const { maps, pictures, heads: count = heads } = mapsOf(answer);
  heads = count;
  if (maps === null) return without("The visual tokens of this model have no place on the image.");
  try {
    const quick = maps && headNow() === "mean";
    const array = quick ? maps : await byHead(answer, here);
    if (chosen !== here) return;
    if (!quick) heads = array.shape[2];
    setControls(array.shape[1]);
    const grids = images.map((_, n) => average(array, n, layerNow(), quick ? here.token : headNow()));
    await paint(images.map(({ uri }, n) => pictures?.[n] ?? uri), grids, array.shape.slice(3));
    drawLines();
    if (!heads) learnHeads(answer, here);
  } catch (error) {
    if (chosen === here) without(error.message);
  }
}

function without(why) {
  byId("controls").hidden = byId("numbers").hidden = true;
  byId("maps").replaceChildren(el("p", { class: "note" }, why));
}

/** Finds out how many heads there are to choose from; without them the mean is there. */
async function learnHeads(answer, here) {
  try {
    heads = (await byHead(answer, here)).shape[2];
    setControls(Number(byId("layer").max) + 1);
  } catch {
    // The map of the mean is shown all the same.
  }
}

function setControls(layers) {
  byId("controls").hidden = byId("numbers").hidden = false;
  const head = byId("head");
  if (head.options.length !== heads + 1) {
    const each = Array.from({ length: heads }, (_, n) => el("option", { value: n }, `head ${n}`));
    head.replaceChildren(el("option", { value: "mean" }, "mean over heads"), ...each);
  }
  const layer = byId("layer");
  if (Number(layer.max) !== layers - 1) {
    layer.max = layers - 1;
    layer.value = Math.floor(layers / 2);
  }
  layer.disabled = byId("all-layers").checked;
  byId("layer-name").textContent = layer.disabled ? "all" : layer.value;
}

/**
 * One image's attention patch by patch, of one place of the array's third axis or the mean over
 * it, and likewise of a layer or the mean over layers.
 */
export function average({ shape, values }, image, layer, third) {
  const [, layers, thirds, rows, columns] = shape;
  const patches = rows * columns;
  const over = (count, one) => (one === "mean" ? [...Array(count).keys()] : [one]);
  const chosenLayers = over(layers, layer);
  const chosenThirds = over(thirds, third);
  const sum = new Float64Array(patches);
  for (const l of chosenLayers) {
    for (const t of chosenThirds) {
      const start = ((image * layers + l) * thirds + t) * patches;
      for (let patch = 0; patch < patches; patch++) sum[patch] += values[start + patch];
    }
  }
  return sum.map((value) => value / (chosenLayers.length * chosenThirds.length));
}

async function paint(pictures, grids, [rows, columns]) {
  const top = Math.max(...grids.flatMap((grid) => [...grid]).filter(Number.isFinite), 1e-12);
  const images = pictures.map((picture) => ({ picture, rows, columns }));
  const canvases = await Promise.all(images.map((image, n) => canvasOf(image, grids[n], top, n)));
  const sum = grids.reduce((all, grid) => all + grid.reduce((a, b) => a + (b || 0), 0), 0);
  const said = `The brightest patch has ${percent(top)} of the token's attention, the image ${percent(sum)}.`;
  byId("maps").replaceChildren(...canvases, el("p", { class: "note" }, said));
  numbers(images, grids);
}

async function canvasOf(image, map, top, number) {
  const picture = await bitmap(image.picture);
  const scale = SIDE / Math.max(picture.width, picture.height);
  const [width, height] = [Math.round(picture.width * scale), Math.round(picture.height * scale)];
  const label = `Attention of the token over image ${number + 1}; the numbers are below`;
  const canvas = el("canvas", { class: "map", role: "img", "aria-label": label, width, height });
  const context = canvas.getContext("2d");
  context.filter = "grayscale(0.6)";
  context.drawImage(picture, 0, 0, width, height);
  context.filter = "none";
  const [across, down] = [width / image.columns, height / image.rows];
  map.forEach((value, patch) => {
    const [row, column] = [Math.floor(patch / image.columns), patch % image.columns];
    const share = Number.isFinite(value) ? value / top : 0;
    context.fillStyle = `hsl(${52 - 42 * share} 100% 52% / ${(0.82 * share).toFixed(3)})`;
    // Whole pixels, so that neighbours neither overlap nor leave a gap.
    const [x, y] = [Math.round(column * across), Math.round(row * down)];
    const [right, bottom] = [Math.round((column + 1) * across), Math.round((row + 1) * down)];
    context.fillRect(x, y, right - x, bottom - y);
  });
  canvas.addEventListener("pointermove", (event) => {
    const box = canvas.getBoundingClientRect();
    const column = Math.floor(((event.clientX - box.left) / box.width) * image.columns);
    const row = Math.floor(((event.clientY - box.top) / box.height) * image.rows);
    const value = map[row * image.columns + column];
    if (Number.isFinite(value)) canvas.title = `row ${row}, column ${column}: ${value.toPrecision(3)}`;
  });
  return canvas;
}

function numbers(images, maps) {
  const rows = images.flatMap((image, n) =>
    Array.from({ length: image.rows }, (_, row) => {
      const own = maps[n].slice(row * image.columns, (row + 1) * image.columns);
      const name = images.length > 1 ? `${n + 1}, ${row}` : `${row}`;
      const cells = [...own].map((value) => el("td", {}, Number.isFinite(value) ? value.toPrecision(6) : "–"));
      return el("tr", {}, el("th", { scope: "row" }, name), cells);
    }),
  );
  byId("numbers").querySelector("table").replaceChildren(...rows);
}

/** The mean of lists place by place, over the lists that have a number there. */
function mean(lists) {
  return lists[0].map((_, place) => {
    const own = lists.map((list) => list[place]).filter(Number.isFinite);
    return own.length ? own.reduce((sum, value) => sum + value, 0) / own.length : NaN;
  });
}

/** The lines of the columns of the turn that is looked at, and of the token itself. */
function drawLines() {
  const place = byId("lines");
  const turn = chosen && state.turns[chosen.turn];
  if (!turn) return;
  const layer = layerNow() === "mean" ? -1 : layerNow();
  const kinds = { share: "Share of attention on the image", lmar: "LMAR, image against text" };
  const figures = Object.entries(kinds).map(([kind, title]) => {
    const lines = [];
    turn.answers.forEach((answer, column) => {
      const own = answer.tokens.map((token) => token[kind]).filter(Boolean);
      if (!own.length) return;
      lines.push({ name: naming(answer), colour: column, values: mean(own) });
    });
    const own = turn.answers[chosen.column]?.tokens[chosen.token]?.[kind];
    if (own) lines.push({ name: "this token", colour: chosen.column, values: own, dashed: true });
    return lines.length ? [figure(title, lines, layer), legend(lines)] : null;
  });
  const there = figures.filter(Boolean);
  place.hidden = !there.length;
  place.replaceChildren(...there.flatMap(([drawing, words], n) => (n ? [drawing] : [words, drawing])));
}

/** Draws anew what depends on the conversation, when answers have ended. */
export function refresh() {
  if (!chosen) return;
  const { turn, column, token } = chosen;
  if (answerOf(chosen)?.tokens[token]) look(turn, column, token);
  else forget();
}

/** Listens to the layer slider and the choice of a head. */
export function listen() {
  const again = () => {
    drawMap();
    drawLines();
  };
  byId("layer").addEventListener("input", again);
  byId("all-layers").addEventListener("change", again);
  byId("head").addEventListener("change", again);
}
