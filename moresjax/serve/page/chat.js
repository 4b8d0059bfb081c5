// The conversation: turns with an answer for each column, side by side.

import { ask, begin, busy, stop } from "./answers.js";
import { differing } from "./diff.js";
import { announce, byId, el } from "./dom.js";
import { thumbnail } from "./pictures.js";
import { steering } from "./shelf.js";
import { save, state } from "./store.js";
import * as tokens from "./tokens.js";

const hooks = { look: () => {}, ended: () => {}, command: () => {}, name: (id) => id };
// The article of every answer on the page.
const articles = new Map();

/** Says who is told of tokens that are looked at and of commands that are wanted. */
export function connect(more) {
  Object.assign(hooks, more);
}

const steps = (answer) => answer.steer.map((each) => `${each.alpha} × ${each.vector}`).join(", ");

/** What an answer is called: its model, and how it was steered. */
export function title(answer) {
  const steer = steps(answer);
  return steer ? `${hooks.name(answer.model)} + ${steer}` : hooks.name(answer.model);
}

function button(text, action, label) {
  return el("button", { type: "button", class: "quiet", onclick: action, "aria-label": label }, text);
}

function article(answer, number, column) {
  const name = title(answer);
  const box = tokens.box(`Answer of ${name}; the arrow keys move over its tokens`);
  const last = number === state.turns.length - 1;
  const node = el(
    "article",
    { class: "answer", "data-turn": number, "data-column": column, "aria-label": name },
    el("header", {}, el("span", { class: `swatch colour-${column}` }), el("span", { class: "who" }, name)),
    box,
    el("p", { class: "note" }),
    el(
      "footer",
      {},
      el("span", { class: "for-running" }, button("Stop", () => stop(answer), `Stop ${name}`)),
      el(
        "span",
        { class: "for-ended" },
        last ? button("Retry", () => retry(number, column), `Retry ${name}`) : null,
        button("Command", () => hooks.command(number, column), `The command for ${name}`),
      ),
    ),
  );
  articles.set(answer, node);
  show(answer);
  return node;
}

/** Brings an answer on the page up to date. */
function show(answer) {
  const node = articles.get(answer);
  if (!node) return;
  const box = node.querySelector(".tokens");
  tokens.draw(box, answer);
  box.setAttribute("aria-busy", answer.status === "running");
  node.dataset.status = answer.status;
  const count = answer.tokens.length;
  const notes = {
    running: count ? "" : "Reading …",
    stopped: "Stopped.",
    failed: answer.problem,
    done: answer.finish === "length" ? `Cut off after ${count} tokens.` : count ? "" : "An empty answer.",
  };
  node.querySelector(".note").textContent = notes[answer.status];
}

function compare(turn) {
  const ended = turn.answers.every((answer) => answer.status !== "running");
  const several = turn.answers.length > 1 && ended;
  const ranges = several ? differing(turn.answers.map((answer) => answer.text)) : null;
  turn.answers.forEach((answer, column) => {
    const box = articles.get(answer)?.querySelector(".tokens");
    if (box) tokens.mark(box, answer, ranges ? ranges[column] : []);
  });
}

function question(turn, number) {
  const images = turn.images.map(({ name, uri }) => thumbnail(uri, name, 120));
  return el(
    "div",
    { class: "question" },
    images.length ? el("div", { class: "images" }, images) : null,
    el("p", { class: "said" }, turn.text),
    el(
      "div",
      { class: "tools" },
      button("Edit", () => edit(number), `Edit question ${number + 1}`),
      number === state.turns.length - 1
        ? button("Ask again", () => again(number), "Ask again with the columns as they are now")
        : null,
    ),
  );
}

/** Draws the whole conversation. */
export function render() {
  articles.clear();
  const items = state.turns.map((turn, number) =>
    el(
      "li",
      { class: "turn" },
      question(turn, number),
      el(
        "div",
        { class: `answers of-${turn.answers.length}` },
        turn.answers.map((answer, column) => article(answer, number, column)),
      ),
    ),
  );
  byId("turns").replaceChildren(...items);
  byId("empty").hidden = items.length > 0;
  state.turns.forEach(compare);
  buttons();
}

function buttons() {
  byId("send").hidden = busy();
  byId("stop").hidden = !busy();
}

function toTheEnd() {
  const place = byId("scroll");
  place.scrollTop = place.scrollHeight;
}

async function answer(number, columns) {
  const turn = state.turns[number];
  const together = { id: `${Date.now()} ${Math.random()}`, count: columns.length };
  const asked = columns.map((column) => {
    const place = byId("scroll");
    return ask(number, column, turn.answers[column], together, (changed) => {
      const near = place.scrollHeight - place.scrollTop - place.clientHeight < 120;
      show(changed);
      compare(turn);
      if (near) toTheEnd();
    });
  });
  buttons();
  save();
  announce("The answer begins.");
  await Promise.all(asked);
  buttons();
  if (state.turns[number] !== turn) return;
  hooks.ended();
  const said = turn.answers.map((each) => `${title(each)}: ${each.text || each.problem}`);
  announce(said.join(". "));
}

/** Asks a question in all columns; the engine puts them into one batch. */
export async function send(text, images) {
  const number = state.turns.length;
  const answers = state.columns.map((column) => begin(column, steering(), number));
  state.turns.push({ text, images, answers });
  render();
  toTheEnd();
  await answer(number, [...answers.keys()]);
}

/** Asks a question of the conversation again with the columns as they are; drops later turns. */
export async function again(number, text) {
  const turn = state.turns[number];
  stop();
  state.turns.length = number;
  await send(text ?? turn.text, turn.images);
}

async function retry(number, column) {
  const turn = state.turns[number];
  const before = turn.answers[column];
  stop(before);
  const fresh = { ...begin({ model: before.model, steer: true }, before.steer, number) };
  // Drawn anew where answers are drawn at all; a greedy answer is what it was.
  fresh.options.seed = before.options.seed + (fresh.options.temperature > 0 ? 1 : 0);
  turn.answers[column] = fresh;
  render();
  await answer(number, [column]);
}

/** Asks the last question again in the columns that steer, with the shelf as it is now. */
export async function steerAgain() {
  const number = state.turns.length - 1;
  if (number < 0) return;
  const turn = state.turns[number];
  const chosen = [];
  turn.answers.forEach((before, column) => {
    const steers = (state.columns[column] ?? state.columns[0]).steer;
    if (!steers) return;
    stop(before);
    turn.answers[column] = begin({ model: before.model, steer: true }, steering(), number);
    chosen.push(column);
  });
  if (!chosen.length) return;
  render();
  await answer(number, chosen);
}

function edit(number) {
  const turn = state.turns[number];
  const place = byId("turns").children[number].querySelector(".question");
  const field = el("textarea", { "aria-label": `Question ${number + 1}`, rows: 2, value: turn.text });
  const done = () => again(number, field.value.trim() || turn.text);
  field.addEventListener("keydown", (event) => {
    if (event.key === "Enter" && !event.shiftKey) {
      event.preventDefault();
      done();
    } else if (event.key === "Escape") render();
  });
  const later = state.turns.length - 1 - number;
  place.querySelector(".said").replaceWith(field);
  place.querySelector(".tools").replaceChildren(
    el("button", { type: "button", class: "main", onclick: done }, "Ask"),
    button("Cancel", render),
    later ? el("span", { class: "note" }, "What came after it goes.") : "",
  );
  field.focus();
}

/** Listens to pointer and keys over tokens. */
export function listen() {
  const turns = byId("turns");
  const found = (event, kind) => {
    const node = event.target.closest?.(".token");
    if (!node) return;
    const { turn, column } = node.closest(".answer").dataset;
    turns.querySelectorAll(".token[aria-selected=true]").forEach((other) => {
      if (other !== node) other.setAttribute("aria-selected", "false");
    });
    node.setAttribute("aria-selected", "true");
    hooks.look(Number(turn), Number(column), Number(node.dataset.token), kind);
  };
  turns.addEventListener("pointerover", (event) => event.pointerType !== "touch" && found(event, "over"));
  turns.addEventListener("focusin", (event) => found(event, "focus"));
  turns.addEventListener("click", (event) => found(event, "click"));
  turns.addEventListener("keydown", (event) => {
    if (event.target.matches(".token") && tokens.move(event)) event.preventDefault();
  });
}
