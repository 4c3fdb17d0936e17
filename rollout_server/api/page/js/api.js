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

/** Server-sent events by fetch, since EventSource can't carry a token. @returns {AsyncGenerator<any>} the data of each */
export async function* follow(run, signal) {
  const response = await ask(runPath(run, "/events"), { signal });
  const reader = response.body.pipeThrough(new TextDecoderStream()).getReader();
  let text = "";
  while (true) {
    const { value, done } = await reader.read();
    if (done) return;
    text += value;
    const events = text.split("\n\n");
    text = events.pop() ?? "";
    for (const event of events) {
      const line = event.split("\n").find((part) => part.startsWith("data: "));
      if (line) yield JSON.parse(line.slice(6));
    }
  }
}
