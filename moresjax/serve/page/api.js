// The server's HTTP API, as far as the page uses it.

/** Headers of a request: the key of a server that wants one is kept for this tab only. */
function headers(more = {}) {
  const key = sessionStorage.getItem("key");
  return key ? { ...more, Authorization: `Bearer ${key}` } : more;
}

/** Remembers the key of a server that answers only to those who have it. */
export function useKey(key) {
  sessionStorage.setItem("key", key);
}

async function refused(response) {
  let message = `The server answered ${response.status}.`;
  try {
    message = (await response.json()).error.message;
  } catch {
    // It said no more.
  }
  const error = new Error(message);
  error.status = response.status;
  return error;
}

async function reach(path, options = {}) {
  try {
    return await fetch(path, { ...options, headers: headers(options.headers) });
  } catch (error) {
    if (error.name === "AbortError") throw error;
    throw new Error("The server does not answer: is `moresjax serve` still running?");
  }
}

async function get(path) {
  const response = await reach(path);
  if (!response.ok) throw await refused(response);
  return response.json();
}

async function post(path, body, signal) {
  const json = { "Content-Type": "application/json" };
  const options = { method: "POST", headers: json, body: JSON.stringify(body), signal };
  const response = await reach(path, options);
  if (!response.ok) throw await refused(response);
  return response;
}

/** A list of the API, empty where the server has no such thing. */
async function list(path) {
  try {
    return (await get(path)).data;
  } catch (error) {
    if (error.status === 404) return [];
    throw error;
  }
}

/** The base model and the adapters: `[{id, parent, root}]`. */
export const models = async () => (await get("/v1/models")).data;

/** The server's shelf of steering vectors: `[{name, layers, positions}]`. */
export const vectors = () => list("/v1/steering_vectors");

/** Images to begin with: `[{name, question, image}]`. */
export const samples = () => list("/v1/samples");

/** The events of a stream, one JSON object after the other. */
async function* events(response) {
  const reader = response.body.getReader();
  const decoder = new TextDecoder();
  let held = "";
  for (;;) {
    const { value, done } = await reader.read();
    if (done) return;
    held += decoder.decode(value, { stream: true }).replaceAll("\r", "");
    const pieces = held.split("\n\n");
    held = pieces.pop();
    for (const piece of pieces) {
      const lines = piece.split("\n").filter((line) => line.startsWith("data:"));
      const data = lines.map((line) => line.slice(5).trimStart()).join("\n");
      if (data === "[DONE]") continue; // the connection ends with it
      if (data) yield JSON.parse(data);
    }
  }
}

/** Streams an answer; yields the chunks of `/v1/chat/completions`. */
export async function* complete(body, signal) {
  const whole = { ...body, stream: true, stream_options: { include_usage: true } };
  const response = await post("/v1/chat/completions", whole, signal);
  for await (const chunk of events(response)) {
    if (chunk.error) throw new Error(chunk.error.message);
    yield chunk;
  }
}

/** An array that travels as the base64 of little-endian fp32, as `{shape, values}`. */
export function array({ shape, data }) {
  const bytes = Uint8Array.from(atob(data), (letter) => letter.charCodeAt(0));
  return { shape, values: new Float32Array(bytes.buffer) };
}

/**
 * Where one token of an answer looks on the images of its conversation, head by head.
 *
 * The array has the shape `[images, layers, heads, rows, columns]`; nan stands for a patch without
 * a token.
 */
export async function attention(body) {
  return array(await (await post("/v1/attention", body)).json());
}
