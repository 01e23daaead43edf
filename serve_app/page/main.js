/** The page at `/`: connects the form and the list of jobs. */

import { json, sentence } from "./api.js";
import { byId } from "./dom.js";
import { Form } from "./form.js";
import { Jobs } from "./jobs.js";
import { currentKey, forgetKey } from "./key.js";
import { asCurl, asPython, showSnippet } from "./snippets.js";

function start(models) {
  const form = new Form(models);
  const jobs = new Jobs();
  byId("request").addEventListener("submit", async (event) => {
    event.preventDefault();
    const button = byId("generate");
    button.disabled = true;
    byId("refusal").textContent = "";
    try {
      await jobs.submit(form.read());
    } catch (error) {
      byId("refusal").textContent = sentence(error);
    } finally {
      button.disabled = false;
    }
  });
  byId("as-curl").addEventListener("click", () => showSnippet("This request with curl", asCurl(form.read())));
  byId("as-python").addEventListener("click", () => showSnippet("This request in Python", asPython(form.read())));
  return jobs.load();
}

try {
  const { models } = await json("GET", "v1/models");
  byId("change-key").hidden = currentKey() === null;
  byId("change-key").addEventListener("click", forgetKey);
  await start(models);
} catch (error) {
  byId("results-about").textContent = sentence(error);
}
