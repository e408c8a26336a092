// How values are distributed. A bar's area is its count, so buckets of different widths do not mislead.
import { begin, draw, empty, label, round125 } from "./svg.js";

const height = 180;
const edge = { left: 8, right: 8, top: 20, bottom: 24 };
const narrowest = 4; // pixels of a bar
const apart = 54; // pixels between numbers below

// A scale says where a value is, where the first bucket begins and the last one ends, and what to
// write below: many numbers, or few.
export const linear = { to: (v) => v, before: () => 0, after: (bounds) => Math.max(1, bounds.at(-1)), range: () => [0, 1], marks: () => [[0, 0.2, 0.4, 0.6, 0.8, 1], [0, 0.5, 1]] };

export const logarithmic = {
  to: Math.log10,
  before: ([first, second = 2 * first]) => (first * first) / second,
  after: (bounds) => bounds.at(-1) * (bounds.length > 1 ? bounds.at(-1) / bounds.at(-2) : 2),
  range: (low, high) => [round125(low, false), round125(Math.max(high, low * 10))],
  marks(low, high) {
    const all = [];
    for (let m = low; m <= high * 1.001; m = round125(m * 1.5)) all.push(m);
    return [all, all.filter((m) => Number.isInteger(+Math.log10(m).toFixed(6)))];
  },
};

export const total = (distribution) => distribution.counts.reduce((a, b) => a + b, 0);

// buckets of a distribution from the first to the last that has a count, as {low, high, count}.
export function buckets({ bounds, counts }, scale) {
  if (!bounds.length) return [];
  const edges = [scale.before(bounds), ...bounds, scale.after(bounds)];
  const all = counts.slice(0, edges.length - 1).map((n, i) => ({ low: edges[i], high: edges[i + 1], count: n }));
  const first = all.findIndex((b) => b.count > 0);
  return first < 0 ? [] : all.slice(first, all.findLastIndex((b) => b.count > 0) + 1);
}

export function histogram(svg, distribution, { scale, unit, none }) {
  const found = buckets(distribution, scale);
  if (!found.length) return empty(svg, height, none);
  const width = begin(svg, height);
  const [low, high] = scale.range(found[0].low, found.at(-1).high);
  const floor = height - edge.bottom;
  const x = (v) => edge.left + ((scale.to(v) - scale.to(low)) / (scale.to(high) - scale.to(low))) * (width - edge.left - edge.right);
  const bars = wide(found, x).map((b) => ({ left: x(b.low), right: x(b.high), count: b.count, density: b.count / (x(b.high) - x(b.low)) }));
  const most = Math.max(...bars.map((b) => b.density));
  for (const b of bars) {
    const h = b.count && Math.max(1, (b.density / most) * (floor - edge.top));
    svg.append(draw("rect", { x: b.left + 0.5, y: floor - h, width: Math.max(1, b.right - b.left - 1), height: h, class: "bar" }));
  }
  svg.append(draw("line", { x1: edge.left, x2: width - edge.right, y1: floor, y2: floor, class: "line" }));
  marks(svg, scale.marks(low, high), x, width, unit);
  quantile(svg, "p50", x(clamp(distribution.p50, low, high)), "end", width, floor);
  quantile(svg, "p99", x(clamp(distribution.p99, low, high)), "start", width, floor);
}

const clamp = (v, low, high) => Math.min(Math.max(v, low), high);

// wide puts neighbours together until each bar can be seen.
function wide(found, x) {
  const mean = (x(found.at(-1).high) - x(found[0].low)) / found.length;
  const together = Math.max(1, Math.ceil(narrowest / mean));
  const all = [];
  for (let i = 0; i < found.length; i += together) {
    const some = found.slice(i, i + together);
    all.push({ low: some[0].low, high: some.at(-1).high, count: some.reduce((n, b) => n + b.count, 0) });
  }
  return all;
}

function marks(svg, [many, few], x, width, unit) {
  const fits = (values) => values.every((v, i) => i === 0 || x(v) - x(values[i - 1]) >= apart);
  for (const v of fits(many) ? many : few) {
    const anchor = x(v) < 24 ? "start" : x(v) > width - 24 ? "end" : "middle";
    svg.append(draw("line", { x1: x(v), x2: x(v), y1: height - edge.bottom, y2: height - edge.bottom + 4, class: "line" }));
    svg.append(label(x(v), height - 6, anchor, unit(v)));
  }
}

function quantile(svg, name, at, side, width, floor) {
  const anchor = at < 34 ? "start" : at > width - 34 ? "end" : side;
  svg.append(draw("line", { x1: at, x2: at, y1: 4, y2: floor, class: `mark ${name}` }));
  svg.append(label(at + (anchor === "end" ? -4 : 4), 13, anchor, name, "strong"));
}
