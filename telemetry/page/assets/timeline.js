// A number over the last minutes.
import { begin, ceiling, draw, label } from "./svg.js";
import { axis } from "./format.js";

const height = 190;
const edge = { left: 44, right: 10, top: 10, bottom: 24 };

const minute = 60000;

// timeline draws points {at, value}, at in milliseconds. Where they are further than gap apart the line breaks.
export function timeline(svg, points, { gap }) {
  const width = begin(svg, height);
  const end = points.at(-1)?.at ?? Date.now();
  const most = ceiling(Math.max(1, ...points.map((p) => p.value)));
  const span = Math.max(1, Math.ceil((end - (points[0]?.at ?? end)) / minute)) * minute;
  const floor = height - edge.bottom;
  const x = (at) => width - edge.right - ((end - at) / span) * (width - edge.left - edge.right);
  const y = (value) => floor - (value / most) * (floor - edge.top);
  for (const value of [0, most / 2, most]) {
    svg.append(draw("line", { x1: edge.left, x2: width - edge.right, y1: y(value), y2: y(value), class: "line" }));
    svg.append(label(edge.left - 8, y(value) + 4, "end", axis(value)));
  }
  times(svg, span, (ago) => x(end - ago));
  for (const run of runs(points, gap)) {
    const path = run.map((p) => `${x(p.at).toFixed(1)},${y(p.value).toFixed(1)}`).join("L");
    const first = x(run[0].at).toFixed(1);
    const last = x(run.at(-1).at).toFixed(1);
    svg.append(draw("path", { d: `M${first},${floor}L${path}L${last},${floor}Z`, class: "area" }), draw("path", { d: `M${path}`, class: "curve" }));
  }
  if (points.length) svg.append(draw("circle", { cx: x(end), cy: y(points.at(-1).value), r: 3, class: "dot" }));
}

// times writes below the line how long ago it was.
function times(svg, span, x) {
  const step = span > minute ? minute : minute / 4;
  for (let ago = 0; ago <= span; ago += step) {
    const anchor = ago === 0 ? "end" : ago === span ? "start" : "middle";
    svg.append(label(x(ago), height - 6, anchor, ago === 0 ? "now" : step === minute ? `−${ago / minute} min` : `−${ago / 1000} s`));
  }
}

function runs(points, gap) {
  const all = [];
  for (const p of points) {
    if (!all.length || p.at - all.at(-1).at(-1).at > gap) all.push([]);
    all.at(-1).push(p);
  }
  return all;
}
