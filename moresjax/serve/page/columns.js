// Who answers the next question: one to four columns, each a model with or without steering.

import { byId, el } from "./dom.js";
import { saveSoon, state } from "./store.js";

export const MOST = 4;
let models = [];
let canSteer = false;

/** Tells which models there are, and whether there are vectors to steer with. */
export function fill(found, vectors) {
  models = found;
  canSteer = vectors;
  const known = new Set(models.map(({ id }) => id));
  for (const column of state.columns) if (!known.has(column.model)) column.model = models[0].id;
  render();
}

/** What a model is called on the page: an adapter by its name, the base by its own. */
export function nameOf(id) {
  const card = models.find((model) => model.id === id);
  return card && !card.parent ? `${id} (base)` : id;
}

function changed() {
  saveSoon();
  render();
}

function add() {
  const used = new Set(state.columns.map(({ model }) => model));
  const other = models.find(({ id }) => !used.has(id)) ?? models[0];
  state.columns.push({ model: other.id, steer: true });
  changed();
  byId("columns").querySelectorAll("select")[state.columns.length - 1].focus();
}

function chooser(column, number) {
  const select = el("select", {
    "aria-label": `Model of column ${number + 1}`,
    onchange: () => {
      column.model = select.value;
      saveSoon();
    },
  });
  select.append(...models.map(({ id }) => el("option", { value: id }, nameOf(id))));
  select.value = column.model;
  const steer = el("input", {
    type: "checkbox",
    checked: column.steer,
    onchange: () => {
      column.steer = steer.checked;
      saveSoon();
    },
  });
  const remove = el(
    "button",
    {
      type: "button",
      class: "quiet",
      "aria-label": `Remove column ${number + 1}`,
      title: "Remove this column",
      onclick: () => {
        state.columns.splice(number, 1);
        changed();
      },
    },
    "×",
  );
  return el(
    "div",
    { class: "column" },
    el("span", { class: `swatch colour-${number}` }),
    select,
    canSteer ? el("label", { class: "check" }, steer, "steered") : null,
    state.columns.length > 1 ? remove : null,
  );
}

/** Draws the choice of every column. */
export function render() {
  const more =
    state.columns.length < MOST
      ? el("button", { id: "add-column", type: "button", class: "quiet", onclick: add }, "+ Side by side")
      : null;
  const own = state.columns.map(chooser);
  byId("columns").replaceChildren(...own, ...(more ? [more] : []));
}
