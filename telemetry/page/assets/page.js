// Reads the stream of events and shows the last one.
import { at } from "./dom.js";
import { KeyNeeded, Refused, snapshots } from "./stream.js";
import { askKey, keyTaken } from "./key.js";
import { figures } from "./figures.js";
import { Charts } from "./charts.js";

const longestPause = 10000;

const charts = new Charts();
let paused = false;
let latest = null;
let shown = null; // latest, except in a pause
let live = false;

function show(snapshot) {
  latest = snapshot;
  live = true;
  charts.remember(snapshot);
  keyTaken();
  at("figures").hidden = false;
  at("figures").classList.remove("stale");
  at("pause").hidden = at("last").hidden = false;
  // A pause stops the figures, not this.
  state(snapshot.ready ? "ready" : "down", snapshot.ready ? "ready" : "not ready");
  notice(warning(snapshot));
  try {
    if (!paused) render();
  } catch (e) {
    reportError(e); // or it would look like the end of the stream
  }
}

function render() {
  if (!live || document.hidden) return;
  shown = latest;
  document.title = latest.model ? `kvshield: ${latest.model}` : "kvshield";
  figures(latest);
  charts.draw(latest);
}

// warning is what nobody may overlook.
function warning(s) {
  if (!s.ready) return `No request is answered now: ${s.reason || "the engine is not ready"}.`;
  if (s.mode === "off") return "Mode off: the KV cache is in clear, nothing is shielded.";
  return "";
}

function lost(why) {
  live = false;
  state("lost", "no connection; trying again");
  if (why) notice(why);
  at("figures").classList.add("stale");
}

// Both are read aloud when they change, so they change only when there is something new.
function state(kind, content) {
  const e = at("state");
  e.dataset.state = kind;
  if (e.lastElementChild.textContent !== content) e.lastElementChild.textContent = content;
}

function notice(content) {
  if (at("notice").textContent !== content) at("notice").textContent = content;
  at("notice").hidden = !content;
}

const sleep = (ms) => new Promise((resolve) => setTimeout(resolve, ms));

async function follow() {
  let key = "";
  for (let pause = 1000; ; pause = Math.min(pause * 2, longestPause)) {
    try {
      for await (const snapshot of snapshots("events", key)) {
        show(snapshot);
        pause = 1000;
      }
      lost("");
    } catch (e) {
      if (e instanceof KeyNeeded) {
        state("waiting", "waiting for a key");
        key = await askKey(key !== "");
        continue;
      }
      lost(e instanceof Refused ? e.message : "");
    }
    await sleep(pause);
  }
}

at("pause").addEventListener("click", () => {
  paused = !paused;
  at("pause").setAttribute("aria-pressed", paused);
  render();
});
document.addEventListener("visibilitychange", render);
charts.onChange(() => shown && charts.draw(shown));
follow();
