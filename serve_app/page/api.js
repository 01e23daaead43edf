/** Requests to the service: adds the key, and throws refusals as errors. */

import { askKey, currentKey } from "./key.js";

/** An error answer of the service: `message` for people, `code` and `status` (HTTP) for the page. */
export class Refusal extends Error {
  constructor(status, code, message) {
    super(message);
    this.status = status;
    this.code = code;
  }

  static async of(response) {
    const detail = (await response.json().catch(() => ({}))).detail;
    if (Array.isArray(detail)) {
      const lines = detail.map(({ loc, msg }) => `${loc.slice(1).join(".")}: ${msg}`);
      return new Refusal(response.status, "INVALID", lines.join("; "));
    }
    const { code, message, details } = detail?.error ?? {};
    const text = message ?? `The service answered ${response.status}.`;
    return new Refusal(response.status, code, details?.reason ? `${text} (${details.reason})` : text);
  }
}

/**
 * Send a request to a path of the service and return the response if its status is 2xx. Asks for a key after a
 * 401. Throws `Refusal` for other statuses, and `TypeError` if the service cannot be reached.
 */
export async function request(method, path, { body, headers = {}, signal } = {}) {
  for (;;) {
    const key = currentKey();
    const response = await fetch(new URL(path, document.baseURI), {
      method,
      signal,
      cache: "no-store",
      headers: {
        ...(body === undefined ? {} : { "Content-Type": "application/json" }),
        ...(key === null ? {} : { Authorization: `Bearer ${key}` }),
        ...headers,
      },
      body: body === undefined ? undefined : JSON.stringify(body),
    });
    if (response.ok) return response;
    if (response.status !== 401) throw await Refusal.of(response);
    // Another request may already have asked for a new key.
    if (key === currentKey()) await askKey();
  }
}

/** Like `request`, but returns the JSON of the answer. */
export async function json(method, path, options) {
  return (await request(method, path, options)).json();
}

/** Return a message for any error that `request` throws. */
export function sentence(error) {
  if (!(error instanceof Refusal)) return "The service cannot be reached.";
  return error.code ? `${error.code}: ${error.message}` : error.message;
}
