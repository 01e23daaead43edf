/** Inputs for the other fields of a model. They show its defaults; empty inputs are not sent. */

import { el, labelled } from "./dom.js";

const number = (name, placeholder, bounds = {}) =>
  el("input", { name, type: "number", placeholder: `${placeholder}`, ...bounds });

const choice = (name, values) => el("select", { name }, ...values.map((value) => el("option", { value }, value)));

/** The options of a request; `box` holds the inputs. */
export class Options {
  #model = null;

  constructor(box) {
    this.box = box;
  }

  /** Show the inputs of a model; values stay if the model has the same field. */
  show(model) {
    const before = this.#values();
    this.#model = model;
    const side = { min: 64, max: 4096 };
    const fields = [
      ["Width", number("width", model.default_width, side)],
      ["Height", number("height", model.default_height, side)],
      ["Seed", number("seed", 42, { min: -1, max: Number.MAX_SAFE_INTEGER })],
      ["Steps", number("sample_steps", model.default_steps, { min: 1, max: 150 })],
      ["Guidance", number("guidance_scale", model.default_guidance_scale, { min: 0, max: 20, step: "any" })],
      ["Trigger word", el("input", { name: "trigger_word", autocomplete: "off" })],
    ];
    if (model.negative_prompt) fields.push(["Negative prompt", el("input", { name: "neg" })]);
    if (model.is_video_model) {
      fields.push(["Frames", number("num_frames", model.default_num_frames, { min: 1, max: 1000 })]);
      fields.push(["Frames per second", number("fps", model.default_fps, { min: 1, max: 120 })]);
    }
    if (model.resolutions.length > 1) fields.push(["Resolution", choice("resolution", model.resolutions)]);
    fields.push(["Format", choice("output_format", model.output_formats)]);
    fields.push(["Sampling", choice("sampling", ["reference", "preview"])]);
    for (const [name, value] of Object.entries(model.options)) {
      fields.push([name, el("input", { name, type: "checkbox", checked: value })]);
    }
    this.box.replaceChildren(...fields.map(([text, input]) => labelled(text, input)));
    if (model.preview_differs) {
      this.box.append(el("p", { className: "hint wide" }, `Preview sampling: ${model.preview_differs}`));
    }
    this.#fill(before);
  }

  /** Return the fields of the request as `top`, and those of each prompt as `prompt`. */
  read() {
    const values = this.#values();
    const top = {};
    const prompt = {};
    for (const [name, value] of Object.entries(values)) {
      const isTop = ["output_format", "sampling", "trigger_word"].includes(name) || name in this.#model.options;
      if (value !== "") (isTop ? top : prompt)[name] = value;
    }
    return { top, prompt };
  }

  #values() {
    const inputs = [...this.box.querySelectorAll("[name]")];
    return Object.fromEntries(inputs.map((input) => [input.name, valueOf(input)]));
  }

  #fill(values) {
    for (const input of this.box.querySelectorAll("[name]")) {
      const value = values[input.name];
      if (value === undefined || input.type === "checkbox") continue;
      if (input.tagName !== "SELECT" || [...input.options].some((option) => option.value === value)) {
        input.value = value;
      }
    }
  }
}

function valueOf(input) {
  if (input.type === "checkbox") return input.checked;
  if (input.type === "number" && input.value !== "") return Number(input.value);
  return input.value.trim();
}
