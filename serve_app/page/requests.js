/**
 * What a person asked for: `{body, images}`, the body without control images, each image `{name, data}` with
 * its base64. Kept in the browser by the id of its job, so that it can be repeated later.
 */

const KEPT = 200;

const FIELDS = ["ctrl_img_1", "ctrl_img_2", "ctrl_img_3"];

/** Return the fields of the control images: models that take one prefer the plain one in previews. */
export const imageFields = (images) => (images.length === 1 ? ["ctrl_img"] : FIELDS.slice(0, images.length));

/** Return the body to send: every prompt has all control images. */
export function wire({ body, images }) {
  const fields = imageFields(images);
  const controls = Object.fromEntries(fields.map((field, index) => [field, images[index].data]));
  return { ...body, prompts: body.prompts.map((prompt) => ({ ...prompt, ...controls })) };
}

/** Return the same request with seeds that nobody has seen yet. */
export function reseeded({ body, images }) {
  const seed = Math.floor(Math.random() * 2 ** 31);
  const prompts = body.prompts.map((prompt, index) => ({ ...prompt, seed: seed + index }));
  return { body: { ...body, prompts }, images };
}

/** Keep a request under the id of its job, where the browser keeps anything. */
export async function keep(id, request) {
  // The query of a URL often is a secret, and this store outlives the tab.
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

/** Return the request of a job, or null if it was not made here. */
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
