/**
 * Requests as `{body, images}`: the body without control images, and each image as `{name, data}` with base64
 * data. The browser stores them by job id, so that they can be repeated later.
 */

const KEPT = 200;

const FIELDS = ["ctrl_img_1", "ctrl_img_2", "ctrl_img_3"];

/** Return the field names for the control images; a single image is `ctrl_img`, which previews prefer. */
export const imageFields = (images) => (images.length === 1 ? ["ctrl_img"] : FIELDS.slice(0, images.length));

/** Return the body to send, with all control images in every prompt. */
export function wire({ body, images }) {
  const fields = imageFields(images);
  const controls = Object.fromEntries(fields.map((field, index) => [field, images[index].data]));
  return { ...body, prompts: body.prompts.map((prompt) => ({ ...prompt, ...controls })) };
}

/** Return the same request with new random seeds. */
export function reseeded({ body, images }) {
  const seed = Math.floor(Math.random() * 2 ** 31);
  const prompts = body.prompts.map((prompt, index) => ({ ...prompt, seed: seed + index }));
  return { body: { ...body, prompts }, images };
}

/** Store a request under its job's id, if the browser allows storage. */
export async function keep(id, request) {
  // The query of a URL is often a secret, and this storage outlives the tab.
  if (request.body.loras.some((lora) => lora.path.includes("?"))) return;
  const store = await open("readwrite").catch(() => null);
  if (store === null) return;
  store.put({ id, at: Date.now(), request });
  let spare = KEPT;
  store.index("at").openCursor(null, "prev").onsuccess = ({ target }) => {
    if (target.result === null) return;
    spare -= 1;
    if (spare < 0) target.result.delete();
    target.result.continue();
  };
}

/** Return the request of a job, or null if this browser has not stored it. */
export async function recall(id) {
  const store = await open("readonly").catch(() => null);
  return store && ((await done(store.get(id)))?.request ?? null);
}

async function open(mode) {
  const opening = indexedDB.open("lora-serve", 1);
  opening.onupgradeneeded = () => {
    opening.result.createObjectStore("requests", { keyPath: "id" }).createIndex("at", "at");
  };
  return (await done(opening)).transaction("requests", mode).objectStore("requests");
}

function done(operation) {
  return new Promise((resolve, reject) => {
    operation.onsuccess = () => resolve(operation.result);
    operation.onerror = () => reject(operation.error);
  });
}
