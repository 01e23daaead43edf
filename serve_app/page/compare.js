/** The comparison: two pictures on top of each other, with a slider between them. */

import { byId } from "./dom.js";

let chosen = null;

/** Choose a picture `{url, name}` by its button; the second choice opens the comparison. */
export function offer(button, picture) {
  if (chosen?.button === button) {
    forget();
    return;
  }
  if (chosen === null) {
    chosen = { button, picture };
    button.setAttribute("aria-pressed", "true");
    byId("results-about").textContent = "Choose another picture to compare with.";
    return;
  }
  const first = chosen.picture;
  forget();
  show(first, picture);
}

function forget() {
  chosen.button.setAttribute("aria-pressed", "false");
  chosen = null;
  byId("results-about").textContent = "";
}

function show(first, second) {
  const sides = { left: first, right: second };
  for (const [side, { url, name }] of Object.entries(sides)) {
    byId(`compare-${side}`).src = url;
    byId(`compare-${side}`).alt = name;
    byId(`compare-${side}-name`).textContent = name;
  }
  const slider = byId("compare-slider");
  slider.oninput = () => {
    document.querySelector(".compare").style.setProperty("--seen", `${slider.value}%`);
    slider.setAttribute("aria-valuetext", `${slider.value} percent of the first picture`);
  };
  slider.value = 50;
  slider.oninput();
  byId("compare-dialog").showModal();
  slider.focus();
}
