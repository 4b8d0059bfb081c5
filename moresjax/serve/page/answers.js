// Asking: what is sent for an answer, and what its stream brings.

import * as api from "./api.js";
import { saveSoon, state } from "./store.js";

// The running answers with what stops them.
const running = new Map();
// By answer what its attention on the images looks like, as `mapsOf` says: too large to keep.
const seen = new WeakMap();

/**
 * An answer that has not begun: `{model, steer, options, text, tokens, attention, status}`.
 *
 * `tokens` are `{token, logprob, top: [{token, logprob}], share: [layer], lmar: [layer]}`,
 * `status` is `running`, `done`, `stopped` or `failed`, with the reason in `problem`.
 */
export function begin(column, steer, turn) {
  const { max_tokens, temperature, top_p, seed, system } = state.settings;
  const options = { max_tokens, temperature, top_p, seed: seed + turn };
  return {
    model: column.model,
    steer: column.steer ? steer : [],
    system,
    options,
    text: "",
    tokens: [],
    usage: null,
    status: "running",
    problem: "",
  };
}

/** The messages of a conversation up to turn `last`, as one column has heard it. */
export function messages(turns, last, column, system) {
  const found = system ? [{ role: "system", content: system }] : [];
  turns.slice(0, last + 1).forEach((turn, number) => {
    const images = turn.images.map(({ uri }) => ({ type: "image_url", image_url: { url: uri } }));
    const text = { type: "text", text: turn.text };
    found.push({ role: "user", content: images.length ? [...images, text] : turn.text });
    if (number < last) {
      const answer = turn.answers[Math.min(column, turn.answers.length - 1)];
      found.push({ role: "assistant", content: answer.text });
    }
  });
  return found;
}

/** What every request about an answer says: the model, the conversation and the steering. */
export function request(number, column, answer) {
  const said = messages(state.turns, number, column, answer.system);
  const body = { model: answer.model, messages: said };
  return answer.steer.length ? { ...body, steer: answer.steer } : body;
}

function take(answer, chunk) {
  if (chunk.usage) answer.usage = chunk.usage;
  const choice = chunk.choices?.[0];
  if (!choice) return;
  answer.text += choice.delta?.content ?? "";
  for (const { token, logprob, top_logprobs: likely } of choice.logprobs?.content ?? []) {
    const top = likely.map((each) => ({ token: each.token, logprob: each.logprob }));
    answer.tokens.push({ token, logprob, top });
  }
  if (choice.finish_reason) answer.finish = choice.finish_reason;
  if (choice.attention) look(answer, choice.attention);
}

/** Takes in what the tokens of a chunk look at, of which the first has the number `first`. */
function look(answer, { first, ids, share, lmar, maps, pictures, heads }) {
  ids.forEach((_, place) => {
    const token = answer.tokens[first + place];
    token.share = share[place];
    token.lmar = lmar[place];
  });
  answer.ids = [...(answer.ids ?? []).slice(0, first), ...ids];
  const before = first ? mapsOf(answer) : { pictures, heads };
  const more = maps && api.array(maps);
  seen.set(answer, { ...before, maps: before.maps ? joined(before.maps, more) : more });
}

/** Two arrays `[images, layers, tokens, rows, columns]`, one after the other over tokens. */
function joined(before, after) {
  const [images, layers, , rows, columns] = before.shape;
  const [mine, added] = [before, after].map(({ shape }) => shape[2] * rows * columns);
  const values = new Float32Array(images * layers * (mine + added));
  for (let block = 0; block < images * layers; block++) {
    const start = block * (mine + added);
    values.set(before.values.subarray(block * mine, (block + 1) * mine), start);
    values.set(after.values.subarray(block * added, (block + 1) * added), start + mine);
  }
  return { shape: [images, layers, before.shape[2] + after.shape[2], rows, columns], values };
}

/** The maps of an answer that this visit has seen: `{maps: {shape, values}, pictures, heads}`. */
export const mapsOf = (answer) => seen.get(answer) ?? {};

/**
 * Streams an answer of a turn; `changed` is called whenever there is more of it.
 *
 * Those of one question are in one batch: `together` is `{id, count}`, the same for all of them.
 */
export async function ask(number, column, answer, together, changed) {
  const control = new AbortController();
  running.set(answer, control);
  const images = state.turns.slice(0, number + 1).some((turn) => turn.images.length);
  const body = { ...request(number, column, answer), ...answer.options };
  Object.assign(body, { logprobs: true, top_logprobs: 5, attention: images, together });
  try {
    for await (const chunk of api.complete(body, control.signal)) {
      take(answer, chunk);
      changed(answer);
    }
    answer.status = "done";
  } catch (error) {
    answer.status = control.signal.aborted ? "stopped" : "failed";
    answer.problem = control.signal.aborted ? "" : error.message;
  }
  running.delete(answer);
  changed(answer);
  saveSoon();
}

/** Stops an answer, or all of them. */
export function stop(answer) {
  const chosen = answer ? [running.get(answer)] : [...running.values()];
  chosen.forEach((control) => control?.abort());
}

/** Whether any answer is on its way. */
export const busy = () => running.size > 0;
