// The server's API: JSON, streams of events, and errors in words for people.

const KEY = "onebit.key";

export const key = {
  get: () => sessionStorage.getItem(KEY) ?? "",
  set: (value) => sessionStorage.setItem(KEY, value),
};

export class ApiError extends Error {
  constructor(status, message, code, retryS) {
    super(message);
    this.status = status;
    this.code = code;
    this.retryS = retryS;
  }
}

async function request(path, options = {}) {
  const headers = { ...options.headers };
  if (key.get()) headers.Authorization = `Bearer ${key.get()}`;
  let response;
  try {
    response = await fetch(path, { ...options, headers });
  } catch (error) {
    if (error.name === "AbortError") throw error;
    throw new ApiError(0, "", "unreachable", null);
  }
  if (response.ok) return response;
  const body = await response.json().catch(() => null);
  const retryS = Number(response.headers.get("Retry-After")) || null;
  throw new ApiError(response.status, body?.error?.message ?? response.statusText, body?.error?.code, retryS);
}

export const json = async (path) => (await request(path)).json();
export const text = async (path) => (await request(path)).text();

// The events of a streamed answer, as they come.
export async function* stream(path, body, signal) {
  const response = await request(path, {
    method: "POST",
    headers: { "Content-Type": "application/json" },
    body: JSON.stringify({ ...body, stream: true, stream_options: { include_usage: true } }),
    signal,
  });
  const reader = response.body.pipeThrough(new TextDecoderStream()).getReader();
  let rest = "";
  for (;;) {
    let part;
    try {
      part = await reader.read();
    } catch (error) {
      if (error.name === "AbortError") throw error;
      part = { done: true };
    }
    // What ends without its last event was cut off.
    if (part.done) throw new ApiError(0, "", "cut_off", null);
    const events = (rest + part.value).split("\n\n");
    rest = events.pop();
    for (const event of events) {
      const data = event.replace(/^data: /, "");
      if (data === "[DONE]") return;
      const value = JSON.parse(data);
      if (value.error) throw new ApiError(0, value.error.message, value.error.code, null);
      yield value;
    }
  }
}

// What to tell the user.
export function explain(error) {
  if (!(error instanceof ApiError)) return `The page failed: ${error.message}`;
  switch (error.code ?? error.status) {
    case "unreachable": return "The server does not answer. Is it still running?";
    case "cut_off": return "The connection was cut before the answer was complete.";
    case "server_full": return "Everybody is being served and no place is left. It will not take long.";
    case "shutting_down": return "The server is shutting down.";
    case "invalid_api_key": return "This server asks for an API key. You find the field in the settings.";
    case "context_length_exceeded": return "This has become longer than the model can read. Start over, or shorten it.";
    default: return error.status === 503 ? `The server is not ready: ${error.message}` : error.message;
  }
}
