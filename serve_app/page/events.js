/** The server-sent events of a job, read with fetch because an EventSource cannot send a key. */

import { Refusal, request } from "./api.js";

const ENDS = new Set(["succeeded", "failed", "canceled"]);

const LONGEST_PAUSE_MS = 20000;

/** Return whether this state is final. */
export const hasEnded = (status) => ENDS.has(status);

/**
 * Call `onEvent` with the name and data of each event until the job has ended or `signal` aborts. After a lost
 * connection, continues from the last event. Throws `Refusal` if the job does not exist.
 */
export async function follow(id, onEvent, signal) {
  let last = "";
  let pause = 1000;
  while (!signal.aborted) {
    try {
      const headers = last ? { "Last-Event-ID": last } : {};
      const response = await request("GET", `v1/requests/${id}/events`, { headers, signal });
      if (response.status === 204) return;
      for await (const event of parse(response.body)) {
        pause = 1000;
        last = event.id;
        const data = JSON.parse(event.data);
        onEvent(event.event, data);
        if (hasEnded(data.status)) return;
      }
    } catch (error) {
      if (signal.aborted) return;
      if (error instanceof Refusal && error.status < 500) throw error;
    }
    await new Promise((resolve) => setTimeout(resolve, pause * (0.5 + Math.random())));
    pause = Math.min(2 * pause, LONGEST_PAUSE_MS);
  }
}

/** Yield the fields of each event that has data. */
async function* parse(body) {
  const reader = body.pipeThrough(new TextDecoderStream()).getReader();
  let text = "";
  try {
    for (;;) {
      const { value, done } = await reader.read();
      if (done) return;
      const blocks = (text + value).split("\n\n");
      text = blocks.pop();
      for (const block of blocks) {
        const lines = block.split("\n").filter((line) => !line.startsWith(":"));
        const event = Object.fromEntries(lines.map((line) => line.split(/: (.*)/s, 2)));
        if (event.data) yield event;
      }
    }
  } finally {
    await reader.cancel().catch(() => {});
  }
}
