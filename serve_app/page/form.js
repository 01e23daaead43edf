/** The form: shows the inputs of the chosen model and makes the request. */

import { byId, el } from "./dom.js";
import { Images } from "./images.js";
import { Loras } from "./loras.js";
import { Options } from "./options.js";

/** The form; `models` are the rows of `/v1/models`. */
export class Form {
  constructor(models) {
    this.models = new Map(models.map((model) => [model.id, model]));
    this.loras = new Loras(byId("loras"), byId("add-lora"));
    this.images = new Images();
    this.options = new Options(byId("options"));
    const select = byId("model");
    select.append(...models.map((model) => el("option", { value: model.id }, `${model.title} (${model.id})`)));
    select.addEventListener("change", () => this.#show());
    this.#show();
  }

  /** Return the request from the inputs. */
  read() {
    const { top, prompt } = this.options.read();
    const lines = byId("prompts").value.split("\n").map((line) => line.trim());
    const prompts = lines.filter(Boolean).map((line) => ({ prompt: line, ...prompt }));
    const body = { model: byId("model").value, loras: this.loras.read(), prompts, ...top };
    return { body, images: this.images.read() };
  }

  #show() {
    const model = this.models.get(byId("model").value);
    const kind = model.is_video_model ? "videos" : "pictures";
    const base = `${model.base_model}${model.gated ? " (gated)" : ""}`;
    byId("model-about").textContent = `Makes ${kind}. Base model: ${base}. Licence: ${model.licence}`;
    this.loras.show(model);
    this.images.show(model);
    this.options.show(model);
  }
}
