/** Questions to the service: paths, the bearer token, errors. Knows nothing of the page. */

const TOKEN_KEY = "adaswitch-token";

export class Problem extends Error {
  /** @param {{status: number, detail: string, errors?: string[]}} document_ */
  constructor(document_) {
    super(document_.detail);
    this.status = document_.status;
    this.errors = document_.errors;
  }
}

/** The token for this tab. It is never part of an address. @param {string} token */
export const setToken = (token) => sessionStorage.setItem(TOKEN_KEY, token);
export const hasToken = () => sessionStorage.getItem(TOKEN_KEY) !== null;

export const runPath = (run, rest = "") => `/runs/${encodeURIComponent(run)}${rest}`;
export const sequencePath = (run, id, rest = "") => runPath(run, `/sequences/${encodeURIComponent(id)}${rest}`);

async function ask(path, options = {}) {
  const token = sessionStorage.getItem(TOKEN_KEY);
  const headers = { ...options.headers, ...(token ? { Authorization: `Bearer ${token}` } : {}) };
  const response = await fetch(`api/v1${path}`, { ...options, headers });
  if (response.ok) return response;
  const fallback = { status: response.status, detail: `The service answered ${response.status}.` };
  throw new Problem(await response.json().catch(() => fallback));
}

/** @param {string} path @param {Record<string, any>} [query] null and "" are left out @param {AbortSignal} [signal] */
export async function get(path, query = {}, signal) {
  const given = Object.entries(query).filter(([, value]) => value !== null && value !== undefined && value !== "");
  const text = new URLSearchParams(given).toString();
  return (await ask(text ? `${path}?${text}` : path, { signal })).json();
}

/** @param {string} path @param {object} body @param {AbortSignal} [signal] */
export async function post(path, body, signal) {
  const headers = { "Content-Type": "application/json" };
  return (await ask(path, { method: "POST", headers, body: JSON.stringify(body), signal })).json();
}

/** A run's events. @returns {AsyncGenerator<any>} the data of each */
export async function* follow(run, signal) {
  for await (const [, data] of events(await ask(runPath(run, "/events"), { signal }))) yield data;
}

/** Events in answer to a question. @returns {AsyncGenerator<[string, any]>} name and data of each */
export async function* stream(path, body, signal) {
  const headers = { "Content-Type": "application/json" };
  yield* events(await ask(path, { method: "POST", headers, body: JSON.stringify(body), signal }));
}

/** Server-sent events by fetch, since EventSource can't carry a token. @returns {AsyncGenerator<[string, any]>} */
async function* events(response) {
  const reader = response.body.pipeThrough(new TextDecoderStream()).getReader();
  let text = "";
  while (true) {
    const { value, done } = await reader.read();
    if (done) return;
    text += value;
    const whole = text.split("\n\n");
    text = whole.pop() ?? "";
    for (const event of whole) {
      const field = (name) => event.split("\n").find((part) => part.startsWith(`${name}: `))?.slice(name.length + 2);
      const data = field("data");
      if (data) yield [field("event") ?? "", JSON.parse(data)];
    }
  }
}
