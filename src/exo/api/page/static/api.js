// Requests to the server. A server with API keys is asked again once the user has given one.

import { readEvents } from "./events.js";

const KEY = "exo-api-key";

/** An error that the server has answered with. */
export class ApiError extends Error {
  constructor(status, message) {
    super(message);
    this.status = status;
  }
}

/**
 * Sends a request.
 * @param {string} path Relative to the page.
 * @param {{body?: object, signal?: AbortSignal}} options With a body it is a POST.
 * @returns {Promise<Response>} A reply with a status of success. Raises ApiError.
 */
export async function send(path, { body, signal } = {}) {
  for (;;) {
    const key = sessionStorage.getItem(KEY);
    const headers = {
      ...(key === null ? {} : { authorization: `Bearer ${key}` }),
      ...(body === undefined ? {} : { "content-type": "application/json" }),
    };
    const reply = await fetch(path, {
      method: body === undefined ? "GET" : "POST",
      headers,
      body: body === undefined ? undefined : JSON.stringify(body),
      signal,
      cache: "no-store",
      credentials: "omit",
    });
    if (reply.ok) return reply;
    const error = await errorOf(reply);
    if (reply.status !== 401) throw error;
    if (sessionStorage.getItem(KEY) === key && !(await askForKey(key !== null))) throw error;
  }
}

/** The JSON document that the server answers with. */
export async function getJson(path, options) {
  return (await send(path, options)).json();
}

/** Sends a request whose reply is a stream of events; see readEvents. */
export async function* stream(path, options) {
  yield* readEvents(await send(path, options));
}

async function errorOf(reply) {
  const text = await reply.text();
  try {
    return new ApiError(reply.status, JSON.parse(text).error.message);
  } catch {
    return new ApiError(reply.status, `the server answered with status ${reply.status}`);
  }
}

let asking = null;

/** Asks the user for a key, once for all requests that wait for it. Returns whether one was given. */
function askForKey(wrong) {
  asking ??= new Promise((resolve) => {
    const dialog = document.getElementById("key");
    const value = document.getElementById("key-value");
    const reason = wrong ? "The server does not accept this key." : "This server asks for an API key.";
    document.getElementById("key-reason").textContent = reason;
    value.value = "";
    const close = (given) => {
      if (given !== null) sessionStorage.setItem(KEY, given);
      dialog.close();
      asking = null;
      resolve(given !== null);
    };
    dialog.querySelector("form").onsubmit = (event) => {
      event.preventDefault();
      close(value.value.trim());
    };
    document.getElementById("key-cancel").onclick = () => close(null);
    dialog.oncancel = () => close(null);
    dialog.showModal();
    value.focus();
  });
  return asking;
}
