// The drawings, what is said below them, and their tables.
import { at, rows } from "./dom.js";
import { clock, count, digits, duration, percent, text } from "./format.js";
import { buckets, histogram, linear, logarithmic, total } from "./histogram.js";
import { strip } from "./layers.js";
import { timeline } from "./timeline.js";

const span = 5 * 60 * 1000;
const gap = 3500;

const short = (v) => text(duration(v)).replace(/\.0+(?=\D)|(?<=\.\d)0+(?=\D)/, "");
const distributions = {
  share: { scale: linear, format: percent, unit: (v) => `${Math.round(v * 100)}\u202f%`, noun: "Tokens", none: "no token was decoded in the last minute" },
  transition: { scale: logarithmic, format: duration, unit: short, noun: "Transitions", none: "no transition in the last minute" },
};

export class Charts {
  #history = [];
  #chosen = -1;
  #layerAt = () => -1;
  #changed = () => {};

  constructor() {
    const box = at("layers");
    box.addEventListener("keydown", (event) => this.#move(event, +box.getAttribute("aria-valuemax")));
    const point = (event) => this.#choose(this.#layerAt(event.clientX - box.getBoundingClientRect().left));
    box.addEventListener("pointermove", point);
    box.addEventListener("pointerdown", point);
    box.addEventListener("pointerleave", () => document.activeElement !== box && this.#choose(-1));
    for (const d of document.querySelectorAll("details")) d.addEventListener("toggle", () => this.#changed());
  }

  #choose(i) {
    if (i === this.#chosen) return;
    this.#chosen = i;
    this.#changed();
  }

  #move(event, last) {
    const i = this.#chosen;
    const to = { ArrowRight: i + 1, ArrowUp: i + 1, ArrowLeft: i - 1, ArrowDown: i - 1, Home: 0, End: last }[event.key];
    if (to === undefined) return;
    event.preventDefault();
    this.#choose(Math.min(Math.max(to, 0), last));
  }

  // onChange is called when the drawings have to be drawn again without news from the server.
  onChange(f) {
    this.#changed = f;
    new ResizeObserver(f).observe(at("figures"));
  }

  remember(snapshot) {
    const now = Date.parse(snapshot.time);
    this.#history.push({ at: now, value: snapshot.tokens.rate });
    this.#history = this.#history.filter((p) => p.at > now - span && p.at <= now);
  }

  draw(snapshot) {
    this.#tokens();
    for (const id of Object.keys(distributions)) distribution(id, snapshot[id]);
    this.#layers(snapshot.layers);
  }

  #tokens() {
    timeline(at("tokens"), this.#history, { gap });
    const values = this.#history.map((p) => p.value);
    if (values.length) at("tokens-text").textContent = `now ${digits(values.at(-1))}, most ${digits(Math.max(...values))}, least ${digits(Math.min(...values))}`;
    table("tokens-table", ["Time", "Tokens/s"], () => [...this.#history].reverse().map((p) => [clock(new Date(p.at)), digits(p.value)]));
  }

  #layers(layers) {
    const box = at("layers");
    if (this.#chosen >= layers.length) this.#chosen = -1;
    this.#layerAt = strip(box.firstElementChild, layers, this.#chosen);
    const content = layerText(layers, this.#chosen);
    at("layer").textContent = content;
    box.setAttribute("aria-valuemax", Math.max(0, layers.length - 1));
    box.setAttribute("aria-valuenow", Math.max(0, this.#chosen));
    box.setAttribute("aria-valuetext", content);
    table("layers-table", ["Layer", "Engine waited", "In the enclave", "Share"], () => layers.map((l, i) => [`${i}`, text(duration(l.wait)), text(duration(l.enclave)), part(l)]));
  }
}

const part = (l) => text(percent(l.wait > 0 ? l.enclave / l.wait : 0));

function layerText(layers, chosen) {
  if (!layers.some((l) => l.wait > 0)) return "";
  const slowest = layers.reduce((most, l, i) => (l.wait > layers[most].wait ? i : most), 0);
  const i = chosen < 0 ? slowest : chosen;
  const l = layers[i];
  return `${chosen < 0 ? "Slowest: layer" : "Layer"} ${i}: the engine waited ${text(duration(l.wait))}, of that the enclave worked ${text(duration(l.enclave))} (${part(l)})`;
}

function distribution(id, d) {
  const { scale, format, unit, noun, none } = distributions[id];
  const all = total(d);
  const quantile = (v) => (all ? text(format(v)) : "–");
  at(`${id}-note`).textContent = `p50 ${quantile(d.p50)}, p99 ${quantile(d.p99)}, of ${count(all)} ${noun.toLowerCase()}`;
  histogram(at(id), d, { scale, unit, none });
  table(`${id}-table`, ["More than", "Up to", noun], () => buckets(d, scale).map((b) => [text(format(b.low)), text(format(b.high)), count(b.count)]));
}

// table fills a table that somebody looks at.
function table(id, head, body) {
  if (at(id).closest("details").open) rows(at(id), head, body());
}
