// The shelf of steering vectors: how strongly, in which layers and at which tokens each acts.

import { el, byId, later } from "./dom.js";
import { saveSoon, state } from "./store.js";

const POSITIONS = {
  "last_prompt|generated": "every new token",
  generated: "after the first new token",
  all: "all tokens, the prompt too",
  image: "the image",
};
let shelf = [];

const setting = (vector) => ({
  alpha: 0,
  layers: (vector.layers ?? []).join(", "),
  positions: vector.positions ?? "last_prompt|generated",
  ...state.vectors[vector.name],
});

/** The numbers of layers in a text such as `3` or `0-5, 8`. */
function layersOf(text) {
  const pieces = text.split(/[\s,;]+/).filter(Boolean);
  return pieces.flatMap((piece) => {
    const [first, last = first] = piece.split("-").map(Number);
    const count = Math.min(Math.max(last - first + 1, 1), 1000);
    return Array.from({ length: count }, (_, number) => first + number);
  });
}

/** The steering of the next question: `[{vector, alpha, layers, positions}]` of what is not at 0. */
export function steering() {
  return shelf
    .map((vector) => ({ vector: vector.name, ...setting(vector) }))
    .filter(({ alpha }) => alpha !== 0)
    .map(({ layers, ...rest }) => (layers.trim() ? { ...rest, layers: layersOf(layers) } : rest));
}

/** Where a vector's file is, for the command line. */
export const fileOf = (name) => shelf.find((vector) => vector.name === name)?.file ?? name;

/** Puts the server's vectors on the page; `moved` is called when a slider has moved. */
export function fill(vectors, moved) {
  shelf = vectors;
  const soon = later(moved, 200);
  byId("shelf").replaceChildren(...vectors.map((vector) => item(vector, soon)));
  const live = byId("live");
  live.checked = state.settings.live;
  live.addEventListener("change", () => {
    state.settings.live = live.checked;
    saveSoon();
  });
}

function item(vector, moved) {
  const own = setting(vector);
  const id = `vector-${vector.name}`;
  const set = (change) => {
    state.vectors[vector.name] = { ...setting(vector), ...change };
    saveSoon();
    if (state.settings.live) moved();
  };
  const shown = el("output", { for: id }, String(own.alpha));
  const slider = el("input", {
    id,
    type: "range",
    min: -8,
    max: 8,
    step: 0.25,
    oninput: () => {
      shown.textContent = slider.value;
      set({ alpha: Number(slider.value) });
    },
  });
  slider.value = own.alpha;
  const layers = el("input", {
    type: "text",
    inputmode: "numeric",
    value: own.layers,
    placeholder: "all",
    "aria-label": `Layers of ${vector.name}, such as 3 or 0-5`,
    onchange: () => set({ layers: layers.value }),
  });
  const positions = el("select", {
    "aria-label": `Tokens that ${vector.name} steers`,
    onchange: () => set({ positions: positions.value }),
  });
  const kinds = own.positions in POSITIONS ? POSITIONS : { ...POSITIONS, [own.positions]: own.positions };
  positions.append(...Object.entries(kinds).map(([value, name]) => el("option", { value }, name)));
  positions.value = own.positions;
  const zero = el(
    "button",
    {
      type: "button",
      class: "quiet",
      "aria-label": `Set ${vector.name} to 0`,
      onclick: () => {
        slider.value = 0;
        shown.textContent = "0";
        set({ alpha: 0 });
      },
    },
    "Reset",
  );
  return el(
    "li",
    { class: "vector" },
    el("div", { class: "name" }, el("label", { for: id }, vector.name), shown),
    el("div", { class: "slide" }, slider, zero),
    el(
      "div",
      { class: "fields" },
      el("label", {}, "Layers ", layers),
      el("label", {}, "Tokens ", positions),
    ),
    vector.description ? el("p", { class: "note" }, vector.description) : null,
  );
}
