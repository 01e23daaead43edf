/** The LoRAs of a request: a row for each, with a description of its file. */

import { json, sentence } from "./api.js";
import { el, labelled } from "./dom.js";

/** The rows of LoRAs within `box`; `add` is the button that adds one. */
export class Loras {
  #model = null;

  constructor(box, add) {
    this.box = box;
    this.add = add;
    add.addEventListener("click", () => this.#append().querySelector("input").focus());
  }

  /** Show the first rows for a model; paths that were entered stay. */
  show(model) {
    const before = [...this.box.querySelectorAll("[name=path]")].map((input) => input.value);
    this.#model = model;
    this.box.replaceChildren();
    for (const transformer of model.transformers.length ? model.transformers : [""]) {
      this.#append(transformer, before.shift());
    }
    this.#refresh();
  }

  /** Return `loras` of the request body; rows without a path are skipped. */
  read() {
    const rows = [...this.box.children].map((row) => {
      const value = (name) => row.querySelector(`[name=${name}]`)?.value.trim();
      const lora = { path: value("path") };
      if (value("multiplier")) lora.network_multiplier = Number(value("multiplier"));
      if (value("transformer")) lora.transformer = value("transformer");
      return lora;
    });
    return rows.filter((lora) => lora.path);
  }

  get #most() {
    return this.#model.max_loras * Math.max(this.#model.transformers.length, 1);
  }

  #append(transformer = this.#model.transformers[0], value = "") {
    const hint = el("p", { className: "hint", role: "status" });
    const path = el("input", {
      name: "path",
      value,
      placeholder: "style.safetensors or https://…",
      autocomplete: "off",
      spellcheck: false,
      onchange: () => this.#inspect(path, hint),
    });
    const weight = { name: "multiplier", type: "number", min: -2, max: 2, step: "any", placeholder: "1" };
    const row = el("div", { className: "lora" }, labelled("Path or URL", path));
    row.append(labelled("Multiplier", el("input", weight)));
    if (this.#model.transformers.length) {
      const choices = this.#model.transformers.map((name) => el("option", { value: name }, name));
      const select = el("select", { name: "transformer" }, ...choices);
      select.value = transformer;
      row.append(labelled("Transformer", select));
    }
    const remove = () => {
      row.remove();
      this.#refresh();
      this.add.focus();
    };
    row.append(hint);
    if (this.box.children.length >= Math.max(this.#model.transformers.length, 1)) {
      row.append(el("button", { type: "button", className: "quiet", onclick: remove }, "Remove"));
    }
    this.box.append(row);
    this.#refresh();
    if (value) this.#inspect(path, hint);
    return row;
  }

  #refresh() {
    this.add.hidden = this.box.children.length >= this.#most;
  }

  async #inspect(input, hint) {
    const path = input.value.trim();
    const model = this.#model;
    const current = () => input.isConnected && input.value.trim() === path && this.#model === model;
    hint.classList.remove("bad");
    hint.textContent = path ? "Reading the file's header…" : "";
    if (!path) return;
    try {
      const found = await json("POST", "v1/loras/inspect", { body: { path } });
      const { text, bad } = describe(found, model);
      if (!current()) return;
      hint.textContent = text;
      hint.classList.toggle("bad", bad);
    } catch (error) {
      if (!current()) return;
      hint.textContent = sentence(error);
      hint.classList.add("bad");
    }
  }
}

/** Describe an inspected LoRA and how it fits the model; `bad` if most of it does not. */
function describe(found, model) {
  const rank = found.ranks.length ? `, rank ${found.ranks.join(", ")}` : "";
  const fit = found.models.find((each) => each.model === model.id);
  const others = found.fitting_models.join(", ");
  const text = `${found.dialect}${rank}, ${found.modules} module${found.modules === 1 ? "" : "s"}`;
  if (fit?.fit === "whole") return { text: `${text}; fits ${model.id}.`, bad: false };
  const elsewhere = others ? ` It fits ${others}.` : "";
  if (fit?.fit === "part") {
    const part = `${fit.matched} of them match ${model.id}`;
    return { text: `${text}; ${part}.${elsewhere}`, bad: fit.matched * 2 < found.modules };
  }
  return { text: `${text}; none of them matches ${model.id}.${elsewhere}`, bad: true };
}
