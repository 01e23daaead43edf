/** One job in the list of results: its state, its buttons and its outputs. */

import { json, sentence } from "./api.js";
import { el } from "./dom.js";
import { hasEnded } from "./events.js";
import { figures } from "./outputs.js";
import { asCurl, asPython, showSnippet } from "./snippets.js";

const NAMES = {
  in_queue: "Waiting",
  in_progress: "Running",
  succeeded: "Done",
  failed: "Failed",
  canceled: "Canceled",
};

const PHASES = {
  fetch: "fetching files",
  load: "loading the LoRA",
  encode: "reading the prompt",
  step: "drawing",
  decode: "decoding",
  publish: "saving",
};

/** The card of a job. `status` is its status answer; `repeat` is called with the request to submit again. */
export class Card {
  constructor(id, model, status, repeat) {
    this.id = id;
    this.repeat = repeat;
    this.status = {};
    this.request = null;
    this.titleText = el("h3", {}, model);
    this.state = el("p", { className: "state", role: "status" });
    this.where = el("p", { className: "hint" });
    this.bar = el("progress", { "aria-label": "Progress", max: 1 });
    this.error = el("p", { className: "bad" });
    this.media = el("div", { className: "media" });
    this.cancel = el("button", { type: "button", className: "quiet", onclick: () => this.#cancel() }, "Cancel");
    this.again = el("div", { className: "actions" }, this.cancel);
    this.node = el(
      "li",
      { className: "card", id: `job-${id}` },
      this.titleText,
      this.state,
      this.bar,
      this.where,
      this.error,
      this.media,
      this.again,
    );
    this.update(status);
  }

  get ended() {
    return hasEnded(this.status.status);
  }

  /** Show the prompt, and buttons that repeat and copy the request. */
  remember(request) {
    this.request = request;
    const [first, ...others] = request.body.prompts;
    const more = others.length ? ` and ${others.length} more` : "";
    this.titleText.textContent = `${request.body.model}: ${first.prompt}${more}`;
    const button = (text, onclick) => el("button", { type: "button", className: "quiet", onclick }, text);
    this.again.append(
      button("Repeat with another seed", () => this.repeat(request)),
      button("Copy as curl", () => showSnippet("This request with curl", asCurl(request))),
      button("Copy as Python", () => showSnippet("This request in Python", asPython(request))),
    );
  }

  /** Merge `changes` into the status and show it. */
  update(changes) {
    const before = this.status.status;
    if (changes.status && changes.status !== before) Object.assign(this.status, { progress: null });
    Object.assign(this.status, changes);
    const { status, progress, queue_position: ahead, error, error_code: code } = this.status;
    const canceling = this.status.cancel_requested && !this.ended ? ", canceling" : "";
    // Write only changes: screen readers announce every write to a status region.
    const state = NAMES[status] + canceling;
    if (this.state.textContent !== state) this.state.textContent = state;
    this.node.dataset.state = status;
    this.bar.hidden = this.ended;
    this.bar.removeAttribute("value");
    this.where.textContent = "";
    if (status === "in_queue" && ahead != null) {
      this.where.textContent = ahead ? `${ahead} ahead in the queue` : "Next in the queue";
    }
    if (status === "in_progress" && progress) {
      const { prompt, prompts, step, steps, phase } = progress;
      const which = prompts > 1 ? `prompt ${prompt + 1} of ${prompts}, ` : "";
      this.where.textContent = `${which}${PHASES[phase]}, step ${step} of ${steps}`;
      this.bar.value = (prompt + step / steps) / prompts;
    }
    this.error.textContent = status === "failed" ? `${code}: ${error}` : "";
    this.cancel.hidden = this.ended;
    if (status === "succeeded" && before !== "succeeded") this.#load();
  }

  async #load() {
    try {
      const result = await json("GET", `v1/requests/${this.id}/result`);
      this.media.replaceChildren(...figures(result, this.request?.body ?? null));
      const { inference_time: seconds, warnings } = result.metadata;
      this.where.textContent = [`${seconds.toFixed(1)} s`, ...warnings].join("; ");
    } catch (error) {
      this.error.textContent = sentence(error);
    }
  }

  async #cancel() {
    this.cancel.disabled = true;
    try {
      this.update(await json("DELETE", `v1/requests/${this.id}`));
    } catch (error) {
      this.where.textContent = sentence(error);
    } finally {
      this.cancel.disabled = false;
    }
  }
}
