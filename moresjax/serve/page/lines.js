// Lines over layers as SVG: one per column, with a legend and words for those who do not see it.

import { el, svg } from "./dom.js";

const WIDTH = 340;
const HEIGHT = 120;
const LEFT = 38;
const BOTTOM = 22;
const TOP = 8;
const RIGHT = 8;

const place = (value, from, to, low, high) =>
  high > low ? low + ((value - from) / (to - from || 1)) * (high - low) : low;

function rounded(value) {
  return value >= 100 ? value.toFixed(0) : Number(value.toPrecision(2)).toString();
}

/**
 * A figure of lines.
 *
 * @param {string} title What the lines show.
 * @param {{name: string, colour: number, values: number[], dashed?: boolean}[]} lines
 * @param {number} layer The layer to mark; below 0 for none.
 */
export function figure(title, lines, layer) {
  const values = lines.flatMap((line) => line.values).filter(Number.isFinite);
  const top = Math.max(...values, 1e-9);
  const layers = Math.max(...lines.map((line) => line.values.length));
  const x = (number) => LEFT + ((WIDTH - LEFT - RIGHT) * (number + 0.5)) / layers;
  const y = (value) => HEIGHT - BOTTOM - place(value, 0, top, 0, HEIGHT - BOTTOM - TOP);
  const label = `${title} by layer: ${lines
    .map(({ name, values: own }) => `${name} ${own.map((value) => (Number.isFinite(value) ? rounded(value) : "none")).join(", ")}`)
    .join("; ")}`;
  const drawing = svg("svg", {
    viewBox: `0 0 ${WIDTH} ${HEIGHT}`,
    role: "img",
    "aria-label": label,
    class: "lines",
  });
  for (const share of [0, 0.5, 1]) {
    const height = y(share * top);
    const ends = { x1: LEFT, x2: WIDTH - RIGHT, y1: height, y2: height, class: "grid" };
    const words = { x: LEFT - 5, y: height + 3.5, "text-anchor": "end" };
    drawing.append(svg("line", ends), svg("text", words, rounded(share * top)));
  }
  const step = Math.ceil(layers / 8);
  for (let number = 0; number < layers; number += step) {
    const words = { x: x(number), y: HEIGHT - 7, "text-anchor": "middle" };
    drawing.append(svg("text", words, String(number)));
  }
  if (layer >= 0) {
    const ends = { x1: x(layer), x2: x(layer), y1: TOP, y2: HEIGHT - BOTTOM, class: "here" };
    drawing.append(svg("line", ends));
  }
  for (const { values: own, colour, dashed } of lines) {
    const points = own
      .map((value, number) => [x(number), y(value)])
      .filter((point) => point.every(Number.isFinite));
    const kind = `line colour-${colour}${dashed ? " dashed" : ""}`;
    drawing.append(svg("polyline", { points: points.join(" "), class: kind }));
    for (const [cx, cy] of points) {
      drawing.append(svg("circle", { cx, cy, r: dashed ? 1.5 : 2.2, class: `dot colour-${colour}` }));
    }
  }
  return el("figure", {}, el("figcaption", {}, title), drawing);
}

/** The names of the lines beside their colours. */
export function legend(lines) {
  const item = ({ name, colour, dashed }) =>
    el("li", {}, el("span", { class: `swatch colour-${colour}${dashed ? " dashed" : ""}` }), name);
  return el("ul", { class: "legend" }, lines.map(item));
}
