/** Requests as curl commands and Python programs to copy. They never contain the key. */

import { byId } from "./dom.js";
import { currentKey } from "./key.js";
import { imageFields } from "./requests.js";

const address = () => new URL("v1/inference", document.baseURI).href;

/** Return a bash command that submits the request with curl. */
export function asCurl({ body, images }) {
  const text = JSON.stringify(body, null, 2);
  const key = currentKey() === null ? "" : ` \\\n  -H "Authorization: Bearer $KEY"`;
  const curl = `curl -s ${quoted(address())}${key} \\\n  -H 'Content-Type: application/json' -d`;
  if (!images.length) return `${curl} ${quoted(text)}\n`;
  const fields = imageFields(images);
  const files = images.map(({ name }, index) => `  --rawfile ${fields[index]} <(base64 -w0 ${quoted(name)})`);
  const filter = fields.map((field) => `.prompts[].${field} = $${field}`).join(" | ");
  return `jq -n ${quoted(text)} | jq \\\n${files.join(" \\\n")} \\\n  ${quoted(filter)} |\n${curl} @-\n`;
}

/** Return a Python program that submits the request and waits for its result. */
export function asPython({ body, images }) {
  const fields = imageFields(images);
  const controls = images.map(
    ({ name }, index) =>
      `    prompt[${JSON.stringify(fields[index])}] = ` +
      `base64.b64encode(Path(${JSON.stringify(name)}).read_bytes()).decode()`,
  );
  const key = currentKey() === null ? "" : `, headers={"Authorization": f"Bearer {os.environ['KEY']}"}`;
  const lines = [
    ...(images.length ? ["import base64"] : []),
    ...(key ? ["import os"] : []),
    ...(images.length ? ["from pathlib import Path"] : []),
    "",
    "import httpx",
    "",
    `request = ${literal(body)}`,
    ...(images.length ? ['for prompt in request["prompts"]:', ...controls] : []),
    "",
    `service = httpx.Client(base_url=${JSON.stringify(document.baseURI)}, timeout=90${key})`,
    'answer = service.post("v1/inference", json=request).raise_for_status().json()',
    "path = f\"v1/requests/{answer['request_id']}/result\"",
    "result = None",
    'while result is None or result["status"] in ("in_queue", "in_progress"):',
    '    result = service.get(path, params={"wait": 60}).raise_for_status().json()',
    'print(result["outputs"] or result["error"])',
  ];
  return `${lines.join("\n").trimStart()}\n`;
}

/** Show a text with a copy button. */
export function showSnippet(title, text) {
  const area = byId("snippet");
  byId("snippet-title").textContent = title;
  byId("snippet-status").textContent = "";
  area.value = text;
  byId("snippet-copy").onclick = async () => {
    try {
      await navigator.clipboard.writeText(text);
      byId("snippet-status").textContent = "Copied.";
    } catch {
      // Browsers have no clipboard on pages without HTTPS.
      area.select();
      byId("snippet-status").textContent = "The text is selected. Copy it with Ctrl+C or Cmd+C.";
    }
  };
  byId("snippet-dialog").showModal();
  byId("snippet-copy").focus();
}

const quoted = (text) => `'${text.replaceAll("'", "'\\''")}'`;

function literal(value, indent = "") {
  const inner = `${indent}    `;
  if (Array.isArray(value)) {
    const items = value.map((item) => `${inner}${literal(item, inner)},\n`);
    return `[\n${items.join("")}${indent}]`;
  }
  if (value !== null && typeof value === "object") {
    const items = Object.entries(value).map(
      ([name, item]) => `${inner}${JSON.stringify(name)}: ${literal(item, inner)},\n`,
    );
    return `{\n${items.join("")}${indent}}`;
  }
  return { true: "True", false: "False", null: "None" }[value] ?? JSON.stringify(value);
}
