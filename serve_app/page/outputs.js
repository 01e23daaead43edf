/** What a job has made: each picture or video with its manifest, which is read when it is asked for. */

import { sentence } from "./api.js";
import { offer } from "./compare.js";
import { el } from "./dom.js";

/** Return the figures of a result, in the order of its prompts; `body` is the request, null if not known here. */
export function figures(result, body) {
  const { images, videos } = result.outputs;
  const loras = body?.loras.map(({ path }) => path.split("/").pop()).join(", ") ?? result.metadata.model;
  return [...images, ...videos].map((output, index) =>
    figure(output, body?.prompts[index].prompt ?? `Output ${index + 1}`, loras),
  );
}

function figure(output, prompt, loras) {
  const { width, height, url, seed, format } = output;
  const film = format === "mp4";
  const shown = film
    ? el("video", { src: url, controls: true, loop: true, muted: true, width, height, "aria-label": prompt })
    : el("img", { src: url, alt: prompt, width, height, loading: "lazy" });
  const about = `${width} × ${height}, seed ${seed}, ${format}`;
  const caption = el("figcaption", {}, el("span", { className: "hint" }, about));
  if (!film) {
    const compare = el("button", { type: "button", className: "quiet", "aria-pressed": "false" }, "Compare");
    compare.addEventListener("click", () => offer(compare, { url, name: `${prompt} (${loras}, seed ${seed})` }));
    caption.append(compare);
  }
  caption.append(el("a", { href: url, target: "_blank", rel: "noopener" }, "Open"), manifest(output));
  return el("figure", {}, shown, caption);
}

function manifest({ manifest_url: url }) {
  const text = el("pre", { tabIndex: 0 });
  const details = el("details", {}, el("summary", {}, "Manifest"), text);
  details.addEventListener("toggle", async () => {
    if (!details.open || text.textContent) return;
    try {
      // No key: its address is its permission.
      const response = await fetch(url);
      text.textContent = JSON.stringify(await response.json(), null, 2);
    } catch (error) {
      // An object store that allows no page to read it still lets people.
      text.textContent = sentence(error);
      details.append(el("a", { href: url, target: "_blank", rel: "noopener" }, "Open the manifest"));
    }
  });
  return details;
}
