// The page of `moresjax serve`: brings its parts together.

import { stop } from "./answers.js";
import * as api from "./api.js";
import * as chat from "./chat.js";
import * as columns from "./columns.js";
import * as composer from "./composer.js";
import { announce, byId, complain } from "./dom.js";
import * as exports from "./export.js";
import * as look from "./look.js";
import * as shelf from "./shelf.js";
import { forget, restore, state } from "./store.js";

let models = [];

function view(name) {
  document.body.dataset.view = name;
  for (const button of byId("views").children) {
    button.setAttribute("aria-pressed", String(button.dataset.view === name));
  }
}

function theme() {
  const dark = matchMedia("(prefers-color-scheme: dark)").matches;
  const root = document.documentElement;
  const now = root.dataset.theme ?? (dark ? "dark" : "light");
  root.dataset.theme = now === "dark" ? "light" : "dark";
  localStorage.setItem("theme", root.dataset.theme);
}

function command(number, column) {
  const { text, note } = exports.commandOf(number, column, models);
  const images = exports.imagesOf(number);
  byId("command-text").textContent = text;
  byId("command-note").textContent = note;
  byId("command-images").hidden = !images.length;
  byId("command-images").onclick = () => exports.saveImages(number);
  byId("command-copy").onclick = async () => {
    try {
      await navigator.clipboard.writeText(text);
      announce("Copied.");
      byId("command-copy").textContent = "Copied";
    } catch {
      getSelection().selectAllChildren(byId("command-text"));
    }
  };
  byId("command-copy").textContent = "Copy";
  byId("command").showModal();
}

function listen() {
  composer.listen((text, images) => chat.send(text, images));
  chat.listen();
  look.listen();
  byId("theme").addEventListener("click", theme);
  byId("new").addEventListener("click", async () => {
    stop();
    await forget();
    look.forget();
    chat.render();
    byId("question").focus();
  });
  byId("export").addEventListener("click", () => exports.saveJson(models));
  byId("command-close").addEventListener("click", () => byId("command").close());
  byId("views").addEventListener("click", (event) => {
    const button = event.target.closest("button");
    if (button) view(button.dataset.view);
  });
}

async function start() {
  const chosen = localStorage.getItem("theme");
  if (chosen) document.documentElement.dataset.theme = chosen;
  await restore();
  chat.connect({
    look: (turn, column, token, kind) => {
      look.look(turn, column, token);
      const narrow = getComputedStyle(byId("views")).display !== "none";
      if (kind === "click" && narrow) view("look");
    },
    ended: look.refresh,
    command,
    name: columns.nameOf,
  });
  look.name(chat.title);
  listen();
  try {
    models = await api.models();
  } catch (error) {
    if (error.status === 401) byId("keyed").hidden = !(byId("settings").open = true);
    complain(error.status === 401 ? "This server wants its key: write it into the settings." : error.message);
    chat.render();
    return;
  }
  const [vectors, samples] = await Promise.all([api.vectors(), api.samples()]);
  const base = models.find(({ parent }) => !parent) ?? models[0];
  byId("serving").textContent = base.id;
  document.title = `${base.id} – moresjax`;
  shelf.fill(vectors, chat.steerAgain);
  byId("vectors").hidden = !vectors.length;
  byId("views").querySelector("[data-view=vectors]").hidden = !vectors.length;
  columns.fill(models, vectors.length > 0);
  composer.offer(samples);
  chat.render();
  document.body.dataset.ready = "yes";
  if (matchMedia("(pointer: fine)").matches) byId("question").focus();
}

start();
