/** The outputs of a job: each picture or video with its manifest, which loads when it is opened. */

import { sentence } from "./api.js";
import { offer } from "./compare.js";
import { el } from "./dom.js";

/** Return the figures of a result, in the order of its prompts; `body` is the request, or null if unknown. */
export function figures(result, body) {
  const { images, videos } = result.outputs;
  const loras = body?.loras.map(({ path }) => path.split("/").pop()).join(", ") ?? result.metadata.model;
  return [...images, ...videos].map((output, index) =>
    figure(output, body?.prompts[index].prompt ?? `Output ${index + 1}`, loras),
  );
}

function figure(output, prompt, loras) {
  const { width, height, url, seed, format } = output;
  const isVideo = format === "mp4";
  const media = isVideo
    ? el("video", { src: url, controls: true, loop: true, muted: true, width, height, "aria-label": prompt })
    : el("img", { src: url, alt: prompt, width, height, loading: "lazy" });
  const about = `${width} × ${height}, seed ${seed}, ${format}`;
  const caption = el("figcaption", {}, el("span", { className: "hint" }, about));
  if (!isVideo) {
    const compare = el("button", { type: "button", className: "quiet", "aria-pressed": "false" }, "Compare");
    compare.addEventListener("click", () => offer(compare, { url, name: `${prompt} (${loras}, seed ${seed})` }));
    caption.append(compare);
  }
  caption.append(el("a", { href: url, target: "_blank", rel: "noopener" }, "Open"), manifest(output));
  return el("figure", {}, media, caption);
}

function manifest({ manifest_url: url }) {
  const text = el("pre", { tabIndex: 0 });
  const details = el("details", {}, el("summary", {}, "Manifest"), text);
  details.addEventListener("toggle", async () => {
    if (!details.open || text.textContent) return;
    try {
      // Needs no key: the URL cannot be guessed.
      const response = await fetch(url);
      text.textContent = JSON.stringify(await response.json(), null, 2);
    } catch (error) {
      // Without CORS rules a bucket blocks fetch, but a link still opens the manifest.
      text.textContent = sentence(error);
      details.append(el("a", { href: url, target: "_blank", rel: "noopener" }, "Open the manifest"));
    }
  });
  return details;
}
