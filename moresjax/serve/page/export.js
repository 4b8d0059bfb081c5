// What leaves the page: the conversation as JSON, and the commands that repeat its answers.

import { fileOf } from "./shelf.js";
import { download } from "./dom.js";
import { toBlob } from "./pictures.js";
import { state, VERSION } from "./store.js";

const quote = (text) => (/^[\w@%+=:,./-]+$/.test(text) ? text : `'${text.replaceAll("'", `'\\''`)}'`);

/** Names for the images of turns up to `last`, none twice. */
function imageNames(last) {
  const taken = new Set();
  return state.turns.slice(0, last + 1).map((turn) =>
    turn.images.map(({ name }) => {
      const safe = name.replaceAll(/[^\w.-]+/g, "_").replace(/^\.+/, "") || "image.png";
      let free = safe;
      for (let n = 2; taken.has(free); n++) free = safe.replace(/(\.\w+)?$/, `-${n}$1`);
      taken.add(free);
      return free;
    }),
  );
}

/** The images of a question's conversation as `{name, uri}`, with the names of the command. */
export function imagesOf(number) {
  const names = imageNames(number);
  return names.flatMap((own, turn) =>
    own.map((name, n) => ({ name, uri: state.turns[turn].images[n].uri })),
  );
}

function steered(each) {
  const layers = each.layers ? `,layers=${each.layers.join(";")}` : "";
  return `steer:vector=${fileOf(each.vector)},alpha=${each.alpha},positions=${each.positions}${layers}`;
}

/** The options of `moresjax generate` for an answer: the model and what is put on it. */
function loading(answer, models) {
  const card = models.find(({ id }) => id === answer.model);
  const base = card?.parent ? models.find(({ id }) => id === card.parent) : card;
  const words = ["--model", base?.root ?? answer.model];
  if (card?.parent) words.push("--adapter", card.root);
  if (answer.steer.length) words.push("--steer", answer.steer.map(steered).join("/"));
  return words;
}

function decoding(answer, number) {
  const { max_tokens, temperature, top_p, seed } = answer.options;
  const words = ["--max-new-tokens", String(max_tokens)];
  if (answer.system) words.push("--system", answer.system);
  if (temperature > 0) {
    // A conversation at the terminal adds the number of the turn to the seed itself.
    words.push("--temperature", String(temperature), "--seed", String(seed - number));
    if (top_p < 1) words.push("--top-p", String(top_p));
  }
  return words;
}

/** The command that repeats an answer, and a sentence about it where one is needed. */
export function commandOf(number, column, models) {
  const turns = state.turns.slice(0, number + 1);
  const answer = turns[number].answers[column];
  const names = imageNames(number);
  const words = ["moresjax", "generate", ...loading(answer, models)];
  if (!number) {
    names[0].forEach((name) => words.push("--image", name));
    words.push("--prompt", turns[0].text, ...decoding(answer, 0));
    return { text: words.map(quote).join(" "), note: "" };
  }
  words.push(...decoding(answer, number));
  const lines = turns.flatMap((turn, n) => [
    ...(names[n].length ? [`/image ${names[n].join(" ")}`] : []),
    turn.text.replace(/^\//, "//").replaceAll("\n", "\\\n"),
  ]);
  const same = turns.every((turn) => {
    const own = turn.answers[Math.min(column, turn.answers.length - 1)];
    return own.model === answer.model && JSON.stringify(own.steer) === JSON.stringify(answer.steer);
  });
  const text = `printf '%s\\n' ${lines.map(quote).join(" ")} | ${words.map(quote).join(" ")}`;
  const note = same
    ? ""
    : "Earlier answers of this column came from other models or steering; the command asks this one all questions.";
  return { text, note };
}

/** The whole conversation with its commands as JSON. */
export function toJson(models) {
  const turns = state.turns.map((turn, number) => ({
    ...turn,
    answers: turn.answers.map((answer, column) => ({
      ...answer,
      command: commandOf(number, column, models).text,
    })),
  }));
  const content = { format: "moresjax-chat", version: VERSION, models, settings: state.settings, turns };
  return JSON.stringify(content, null, 1);
}

/** Hands the conversation to the reader of the page as a file. */
export function saveJson(models) {
  download("moresjax-chat.json", new Blob([toJson(models)], { type: "application/json" }));
}

/** Hands the images of a question's conversation to the reader, with the names of its command. */
export function saveImages(number) {
  imagesOf(number).forEach(({ name, uri }) => download(name, toBlob(uri)));
}
