/** The key of a service that has keys: asked for when it is missed, kept as long as the tab. */

import { byId } from "./dom.js";

const PLACE = "lora-serve.key";

let asking = null;

/** Return the key, or null. */
export const currentKey = () => sessionStorage.getItem(PLACE);

/** Ask for a key, once for all that miss one; resolves when there is one. */
export function askKey() {
  asking ??= new Promise((resolve) => {
    const dialog = byId("key-dialog");
    const input = byId("key");
    input.value = "";
    // Without a key there is nothing to see, so it comes again when it was dismissed.
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

/** Forget the key and begin anew. */
export function forgetKey() {
  sessionStorage.removeItem(PLACE);
  location.reload();
}
