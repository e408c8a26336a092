// A strip of the model's layers: the darker, the longer a transition of that layer.
import { begin, draw, empty, label } from "./svg.js";
import { duration, text } from "./format.js";

const height = 104;
const edge = { left: 62, right: 8, top: 4 };
const cell = 26;
const rows = [
  { key: "wait", name: "waited", y: edge.top },
  { key: "enclave", name: "enclave", y: edge.top + cell + 2 },
];

// scale of the colours, at least half as wide as the mean: or noise would look like a pattern.
function scale(layers) {
  const all = layers.flatMap((l) => [l.wait, l.enclave]);
  const mean = all.reduce((a, b) => a + b, 0) / all.length;
  return [Math.min(...all, mean * 0.75), Math.max(...all, mean * 1.25)];
}

// strip draws the layers and returns which one is at an x of the drawing.
export function strip(svg, layers, chosen) {
  if (!layers.some((l) => l.wait > 0)) {
    empty(svg, height, "no transition in the last minute");
    return () => -1;
  }
  const width = begin(svg, height);
  const step = (width - edge.left - edge.right) / layers.length;
  const [low, high] = scale(layers);
  const shade = (v) => 0.08 + 0.92 * ((v - low) / (high - low));
  for (const row of rows) {
    svg.append(label(edge.left - 8, row.y + cell / 2 + 4, "end", row.name));
    layers.forEach((l, i) => {
      const size = { x: edge.left + i * step, y: row.y, width: Math.max(1, step - (step > 6 ? 1 : 0)), height: cell };
      svg.append(draw("rect", { ...size, class: "cell", "fill-opacity": shade(l[row.key]) }));
    });
  }
  const bottom = edge.top + 2 * cell + 2;
  const every = [1, 2, 4, 5, 8, 10, 16, 20, 32, 40, 64].find((n) => n * step >= 26) ?? 128;
  for (let i = 0; i < layers.length; i += every) svg.append(label(edge.left + (i + 0.5) * step, bottom + 15, "middle", `${i}`));
  svg.append(label(edge.left - 8, bottom + 15, "end", "layer"));
  if (chosen >= 0) svg.append(draw("rect", { x: edge.left + chosen * step - 1, y: edge.top - 1.5, width: step + 1, height: 2 * cell + 5, class: "chosen" }));
  legend(svg, width, low, high, bottom + 28);
  return (x) => Math.max(-1, Math.min(layers.length - 1, Math.floor((x - edge.left) / step)));
}

function legend(svg, width, low, high, y) {
  const size = Math.min(160, (width - edge.left) / 3);
  const from = edge.left + 56;
  svg.append(label(from - 6, y + 10, "end", text(duration(low))));
  for (let i = 0; i < 8; i++) svg.append(draw("rect", { x: from + (i * size) / 8, y, width: size / 8, height: 12, class: "cell", "fill-opacity": 0.08 + (0.92 * i) / 7 }));
  svg.append(label(from + size + 6, y + 10, "start", text(duration(high))));
}
