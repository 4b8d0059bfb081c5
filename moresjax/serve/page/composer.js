// The question that is being written: its text, its images and the settings of answers.

import { stop } from "./answers.js";
import * as api from "./api.js";
import { byId, complain, el } from "./dom.js";
import { readImage, thumbnail } from "./pictures.js";
import { saveSoon, state } from "./store.js";

let attached = [];
let ask = async () => {};

function draw() {
  const items = attached.map((image, number) =>
    el(
      "li",
      {},
      thumbnail(image.uri, image.name, 56),
      el(
        "button",
        {
          type: "button",
          "aria-label": `Take ${image.name} away`,
          onclick: () => {
            attached.splice(number, 1);
            draw();
            byId("question").focus();
          },
        },
        "×",
      ),
    ),
  );
  byId("attached").replaceChildren(...items);
}

async function attach(files) {
  complain();
  for (const file of files) {
    try {
      attached.push(await readImage(file));
    } catch (error) {
      complain(error.message);
    }
  }
  draw();
}

function grow() {
  const field = byId("question");
  field.style.height = "auto";
  field.style.height = `${Math.min(field.scrollHeight, 160)}px`;
}

async function submit() {
  const field = byId("question");
  const text = field.value.trim();
  if (!text && !attached.length) {
    complain("Write a question first.");
    return;
  }
  complain();
  const images = attached;
  attached = [];
  field.value = "";
  grow();
  draw();
  await ask(text, images);
}

/** Puts images to begin with on the page. */
export function offer(samples) {
  const choose = (sample) => {
    attached = [{ name: `${sample.name}.png`, uri: sample.image }];
    const field = byId("question");
    if (sample.question && !field.value) field.value = sample.question;
    grow();
    draw();
    field.focus();
  };
  const items = samples.map((sample) => {
    const label = `Sample ${sample.name}${sample.question ? `: ${sample.question}` : ""}`;
    const picture = thumbnail(sample.image, "", 84);
    picture.setAttribute("aria-hidden", "true");
    const words = sample.question ? [el("span", { class: "words" }, sample.question)] : [];
    const attributes = { type: "button", "aria-label": label, onclick: () => choose(sample) };
    return el("li", {}, el("button", attributes, picture, ...words));
  });
  byId("samples").replaceChildren(...items);
}

function settings() {
  for (const name of ["max_tokens", "temperature", "top_p", "seed", "system"]) {
    const field = byId(name);
    field.value = state.settings[name];
    field.addEventListener("change", () => {
      if (!field.checkValidity()) {
        complain(`${field.parentElement.textContent.trim()}: ${field.validationMessage}`);
        field.value = state.settings[name];
        return;
      }
      complain();
      state.settings[name] = field.type === "number" ? Number(field.value) : field.value;
      saveSoon();
    });
  }
  byId("key").addEventListener("change", () => {
    api.useKey(byId("key").value);
    location.reload();
  });
}

/** Listens to everything that makes a question; `asked(text, images)` is called with one. */
export function listen(asked) {
  ask = asked;
  settings();
  byId("composer").addEventListener("submit", (event) => {
    event.preventDefault();
    submit();
  });
  const field = byId("question");
  field.addEventListener("input", grow);
  field.addEventListener("keydown", (event) => {
    if (event.key === "Enter" && !event.shiftKey && !event.isComposing) {
      event.preventDefault();
      if (byId("stop").hidden) submit();
    }
  });
  byId("stop").addEventListener("click", () => stop());
  document.addEventListener("keydown", (event) => {
    if (event.key === "Escape" && !document.querySelector("dialog[open]")) stop();
  });
  byId("file").addEventListener("change", async () => {
    await attach([...byId("file").files]);
    byId("file").value = "";
  });
  document.addEventListener("paste", (event) => {
    const files = [...(event.clipboardData?.files ?? [])];
    if (!files.length) return;
    event.preventDefault();
    attach(files);
  });
  const target = document.documentElement;
  document.addEventListener("dragover", (event) => {
    event.preventDefault();
    target.classList.add("dragging");
  });
  document.addEventListener("dragleave", (event) => {
    if (!event.relatedTarget) target.classList.remove("dragging");
  });
  document.addEventListener("drop", (event) => {
    event.preventDefault();
    target.classList.remove("dragging");
    attach([...event.dataTransfer.files]);
  });
}
