/** The list of results: the newest jobs of this key, updated until they have ended. */

import { json, sentence } from "./api.js";
import { Card } from "./card.js";
import { byId } from "./dom.js";
import { follow } from "./events.js";
import { keep, recall, reseeded, wire } from "./requests.js";

const SHOWN = 24;

/** Event streams at a time. Browsers allow six connections per host, shared by all tabs. */
const STREAMS = 2;

/** How often the jobs without a stream are polled. */
const POLL_MS = 3000;

/** The jobs on the page. */
export class Jobs {
  #cards = new Map();
  #streams = new Map();

  constructor() {
    setInterval(() => this.#poll(), POLL_MS);
    // A hidden tab leaves its connections to the visible ones.
    document.addEventListener("visibilitychange", () => this.#follow());
  }

  /** Show the newest jobs of this key. */
  async load() {
    const { requests } = await json("GET", `v1/requests?limit=${SHOWN}`);
    for (const status of requests.reverse()) {
      this.#add(status.request_id, status.model, status, await recall(status.request_id));
    }
    byId("results-about").textContent = requests.length ? "" : "No jobs yet.";
    this.#follow();
  }

  /** Submit a request and show its job; throws the errors of `request` in api.js. */
  async submit(request) {
    const headers = { "Idempotency-Key": crypto.getRandomValues(new Uint32Array(4)).join("-") };
    const { request_id: id } = await post(wire(request), headers);
    await keep(id, request);
    byId("results-about").textContent = "";
    this.#add(id, request.body.model, { status: "in_queue" }, request);
    this.#follow();
  }

  #add(id, model, status, request) {
    const card = new Card(id, model, status, (old) => this.#repeat(card, old));
    if (request) card.remember(request);
    this.#cards.set(id, card);
    byId("jobs").prepend(card.node);
  }

  async #repeat(card, request) {
    try {
      await this.submit(reseeded(request));
    } catch (error) {
      card.error.textContent = sentence(error);
    }
  }

  get #unfollowed() {
    return [...this.#cards.values()].filter((card) => !card.ended && !this.#streams.has(card.id));
  }

  /** Give free streams to the oldest jobs; while the page is hidden, end all streams. */
  #follow() {
    if (document.hidden) {
      for (const stream of this.#streams.values()) stream.abort();
      this.#streams.clear();
      return;
    }
    for (const card of this.#unfollowed.slice(0, STREAMS - this.#streams.size)) {
      const stream = new AbortController();
      this.#streams.set(card.id, stream);
      this.#watch(card, stream);
    }
  }

  async #watch(card, stream) {
    try {
      await follow(card.id, (name, data) => card.update(name === "progress" ? { progress: data } : data), stream.signal);
    } catch (error) {
      card.update({ status: "failed", error: error.message, error_code: error.code });
    } finally {
      if (this.#streams.get(card.id) === stream) this.#streams.delete(card.id);
      this.#follow();
    }
  }

  /** Update the jobs that have no stream. */
  async #poll() {
    if (document.hidden || !this.#unfollowed.length) return;
    const { requests } = await json("GET", `v1/requests?limit=${SHOWN}`).catch(() => ({ requests: [] }));
    for (const status of requests) {
      const card = this.#cards.get(status.request_id);
      if (card && !card.ended && !this.#streams.has(card.id)) card.update(status);
    }
  }
}

/** Submit with retries; the idempotency key in `headers` makes them one job. */
async function post(body, headers) {
  for (let attempt = 1; ; attempt += 1) {
    try {
      return await json("POST", "v1/inference", { body, headers });
    } catch (error) {
      const unavailable = error instanceof TypeError || error.status === 503;
      if (!unavailable || attempt === 3) throw error;
      await new Promise((resolve) => setTimeout(resolve, 1000 * attempt));
    }
  }
}
