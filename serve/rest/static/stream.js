// One request to the server: sent, its events read as they come, its failures in words.

export class RequestError extends Error {
  constructor(message, { field = null, code = null } = {}) {
    super(message);
    this.field = field;
    this.code = code;
  }
}

function toError(body, status) {
  const error = body?.error;
  return error?.message
    ? new RequestError(error.message, { field: error.param, code: error.code })
    : new RequestError(`The server answered with status ${status}.`);
}

export function keyHeaders(key) {
  // A header carries bytes: the key's UTF-8, each byte as the character that fetch sends it as.
  const bytes = String.fromCharCode(...new TextEncoder().encode(key));
  return key ? { authorization: `Bearer ${bytes}` } : {};
}

export async function getJson(path, key) {
  const response = await fetch(path, { headers: keyHeaders(key) });
  const body = await response.json().catch(() => null);
  if (!response.ok) throw toError(body, response.status);
  return body;
}

// Posts the request and yields its frames; returns after [DONE]. Aborting the signal closes the connection, which is
// how the server learns that it may stop.
export async function* generate(body, { key, signal, onOpen }) {
  const response = await fetch("v1/generate", {
    method: "POST",
    headers: { "content-type": "application/json", ...keyHeaders(key) },
    body: JSON.stringify(body),
    signal,
  });
  if (!response.ok) {
    const error = toError(await response.json().catch(() => null), response.status);
    const wait = response.headers.get("retry-after");
    if (wait) error.message += ` (try again in ${wait} s)`;
    throw error;
  }
  onOpen(response.headers.get("x-request-id"));
  const reader = response.body.pipeThrough(new TextDecoderStream()).getReader();
  let buffer = "";
  for (;;) {
    const { done, value } = await reader.read();
    if (done) throw new RequestError("The connection ended before the answer was complete.");
    buffer += value;
    const events = buffer.split("\n\n");
    buffer = events.pop();
    for (const event of events) {
      if (!event.startsWith("data:")) continue; // a keep-alive comment
      const data = event.slice(5).trim();
      if (data === "[DONE]") return;
      const frame = JSON.parse(data);
      if (frame.error) throw toError(frame);
      yield frame;
    }
  }
}

// Time to first piece and pieces a second, as this page sees them; frozen by stop().
export class Meter {
  constructor() {
    this.began = performance.now();
    this.first = null;
    this.end = null;
    this.pieces = 0;
  }

  piece() {
    if (this.first === null) this.first = performance.now();
    this.pieces += 1;
  }

  stop() {
    if (this.end === null) this.end = performance.now();
  }

  get ttft() {
    return this.first === null ? null : this.first - this.began;
  }

  get rate() {
    if (this.first === null || this.pieces < 2) return null;
    const seconds = ((this.end ?? performance.now()) - this.first) / 1000;
    return seconds > 0 ? (this.pieces - 1) / seconds : null;
  }
}
