// What the page remembers: the conversation, who answers, the shelf and the settings.
//
// It lives in IndexedDB, where images have room, and a reload brings it back. A browser that
// keeps nothing (a private window) still has a working page.

import { later } from "./dom.js";

const NAME = "moresjax";
const ROOM = "page";
const KEY = "state";
export const VERSION = 1;

const fresh = () => ({
  version: VERSION,
  // {model, steer}: who answers the next question, a column for each.
  columns: [{ model: "", steer: true }],
  // {id, text, images: [{name, uri}], answers: [answer]}; see `answers.js` for an answer.
  turns: [],
  // By name {alpha, layers, positions}, of vectors that are not as the server has them.
  vectors: {},
  settings: { max_tokens: 128, temperature: 0, top_p: 1, seed: 0, system: "", live: true },
});

export const state = fresh();

function open() {
  return new Promise((resolve, reject) => {
    const request = indexedDB.open(NAME, 1);
    request.onupgradeneeded = () => request.result.createObjectStore(ROOM);
    request.onsuccess = () => resolve(request.result);
    request.onerror = () => reject(request.error);
  });
}

function run(mode, action) {
  return open().then(
    (base) =>
      new Promise((resolve, reject) => {
        const change = base.transaction(ROOM, mode);
        const request = action(change.objectStore(ROOM));
        change.oncomplete = () => (base.close(), resolve(request.result));
        change.onerror = () => (base.close(), reject(change.error));
      }),
  );
}

/** Brings back what an earlier visit left; answers that it interrupted count as stopped. */
export async function restore() {
  try {
    const found = await run("readonly", (room) => room.get(KEY));
    if (!found || found.version !== VERSION) return;
    Object.assign(state, found, { settings: { ...state.settings, ...found.settings } });
    for (const answer of state.turns.flatMap((turn) => turn.answers)) {
      if (answer.status === "running") answer.status = "stopped";
    }
  } catch {
    // Nothing was kept.
  }
}

/** Keeps the state as it is now. */
export async function save() {
  try {
    await run("readwrite", (room) => room.put(JSON.parse(JSON.stringify(state)), KEY));
  } catch {
    // The page works without.
  }
}

/** Keeps the state soon. */
export const saveSoon = later(save, 150);

/** Forgets the conversation; who answers, the shelf and the settings stay. */
export function forget() {
  state.turns.length = 0;
  return save();
}
