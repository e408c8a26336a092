// The numbers, and what is said about the shield.
import { at, element, fill, rows } from "./dom.js";
import { bytesPerSecond, clock, count, duration, percent, perSecond } from "./format.js";
import { total } from "./histogram.js";

const holds = { off: "keys and values in clear", permute: "permuted keys and values", resident: "zeros" };

function put(id, [number, unit]) {
  const small = document.createElement("small");
  small.textContent = unit;
  at(id).replaceChildren(number, small);
}

function quantiles(id, d, unit) {
  const none = total(d) === 0;
  put(`${id}50`, none ? ["–", ""] : unit(d.p50));
  put(`${id}99`, none ? ["–", ""] : unit(d.p99));
}

export function figures(s) {
  const time = new Date(s.time);
  at("clock").textContent = clock(time);
  at("clock").dateTime = s.time;
  at("model").textContent = s.model;
  put("rate", perSecond(s.tokens.rate));
  put("active", [count(s.requests.active), ""]);
  put("queued", [count(s.requests.queued), ""]);
  put("transitions", perSecond(s.transition_rate));
  put("bytes", bytesPerSecond(s.bytes_rate));
  quantiles("share", s.share, percent);
  quantiles("transition", s.transition, duration);
  shield(s);
  errors(s.errors);
}

function shield(s) {
  const facts = [
    ["Mode", s.mode],
    ["Cache holds", holds[s.mode] ?? "not known", s.mode === "off" && "bad"],
  ];
  if (s.tee) facts.push(["Enclave", s.tee], ["Hardware", s.hardware ? "protects the enclave" : "no hardware protection", !s.hardware && "warn"]);
  if (s.statement) facts.push(["Statement", s.statement]);
  facts.push(["Decoded", `${count(s.tokens.total)} tokens`]);
  facts.push(["Requests", `${count(s.requests.total)}, ${count(s.requests.failed)} of them failed`]);
  fill(at("shield"), facts.flatMap(([term, content, kind]) => [element("dt", term), element("dd", content, kind)]));
}

function errors(list) {
  const table = at("errors");
  table.parentElement.hidden = list.length === 0;
  at("errors-none").hidden = list.length > 0;
  rows(table, ["Time", "Kind", "What happened"], [...list].reverse().map((e) => [clock(new Date(e.time)), e.kind, e.message]));
}
