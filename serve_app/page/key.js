/** The key of a service with keys: asked for after a 401, kept until the tab is closed. */

import { byId } from "./dom.js";

const PLACE = "lora-serve.key";

let asking = null;

/** Return the key, or null. */
export const currentKey = () => sessionStorage.getItem(PLACE);

/** Ask for a key; simultaneous callers share one dialog. Resolves once a key is entered. */
export function askKey() {
  asking ??= new Promise((resolve) => {
    const dialog = byId("key-dialog");
    const input = byId("key");
    input.value = "";
    // The page shows nothing without a key, so Escape must not close the dialog.
    dialog.addEventListener("cancel", (event) => event.preventDefault());
    dialog.addEventListener(
      "close",
      () => {
        sessionStorage.setItem(PLACE, input.value.trim());
        input.value = "";
        asking = null;
        resolve();
      },
      { once: true },
    );
    dialog.showModal();
  });
  return asking;
}

/** Forget the key and reload the page. */
export function forgetKey() {
  sessionStorage.removeItem(PLACE);
  location.reload();
}
