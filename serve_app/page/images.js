/** The control images of a request, dropped or chosen, as base64. */

import { byId, el } from "./dom.js";

/** The control images of the form. */
export class Images {
  #images = [];
  #most = 0;

  constructor() {
    const drop = byId("drop");
    const input = byId("control-files");
    input.addEventListener("change", () => {
      this.#take(input.files);
      input.value = "";
    });
    drop.addEventListener("dragover", (event) => {
      event.preventDefault();
      drop.classList.add("over");
    });
    drop.addEventListener("dragleave", () => drop.classList.remove("over"));
    drop.addEventListener("drop", (event) => {
      event.preventDefault();
      drop.classList.remove("over");
      this.#take(event.dataTransfer.files);
    });
  }

  /** Show how many images the model takes, and keep no more than that. */
  show(model) {
    const { least, most } = model.control_images;
    this.#most = most;
    byId("controls").hidden = most === 0;
    byId("control-files").multiple = most > 1;
    const count = most > 1 ? `${least} to ${most} pictures` : "one picture";
    byId("controls-about").textContent = `The model ${least ? "needs" : "can take"} ${count}.`;
    this.#images.length = Math.min(this.#images.length, most);
    this.#list();
  }

  /** Return the images, each with its name and base64. */
  read() {
    return this.#images.map(({ name, data }) => ({ name, data }));
  }

  async #take(files) {
    const pictures = [...files].filter((file) => file.type.startsWith("image/"));
    const taken = await Promise.all(pictures.map(async (file) => ({ name: file.name, data: await base64(file) })));
    // If there are too many, keep the newest.
    this.#images = [...this.#images, ...taken].slice(-this.#most);
    this.#list();
  }

  #list() {
    const items = this.#images.map((image) => {
      const remove = () => {
        this.#images = this.#images.filter((each) => each !== image);
        this.#list();
        byId("control-files").focus();
      };
      const shown = el("img", { src: URL.createObjectURL(blob(image.data)), alt: "" });
      shown.addEventListener("load", () => URL.revokeObjectURL(shown.src), { once: true });
      const label = { type: "button", className: "quiet", "aria-label": `Remove ${image.name}`, onclick: remove };
      return el("li", {}, shown, el("span", {}, image.name), el("button", label, "Remove"));
    });
    byId("control-list").replaceChildren(...items);
  }
}

function base64(file) {
  return new Promise((resolve, reject) => {
    const reader = new FileReader();
    reader.onload = () => resolve(reader.result.slice(reader.result.indexOf(",") + 1));
    reader.onerror = () => reject(reader.error);
    reader.readAsDataURL(file);
  });
}

const blob = (data) => new Blob([Uint8Array.from(atob(data), (char) => char.charCodeAt(0))]);
