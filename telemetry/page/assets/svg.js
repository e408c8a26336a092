// What all drawings share. A drawing is as wide as its place on the page, so that its letters keep their size.

const namespace = "http://www.w3.org/2000/svg";

export function draw(name, attributes = {}, ...children) {
  const e = document.createElementNS(namespace, name);
  for (const [key, value] of Object.entries(attributes)) e.setAttribute(key, typeof value === "number" ? +value.toFixed(2) : value);
  e.append(...children);
  return e;
}

// begin empties a drawing and returns its width.
export function begin(svg, height) {
  const width = Math.max(svg.parentElement.clientWidth, 200);
  svg.setAttribute("viewBox", `0 0 ${width} ${height}`);
  svg.setAttribute("height", height);
  svg.replaceChildren();
  return width;
}

export const label = (x, y, anchor, content, kind = "") => draw("text", { x, y, "text-anchor": anchor, class: kind }, content);

// empty says in a drawing why there is nothing to see.
export function empty(svg, height, content) {
  const width = begin(svg, height);
  svg.append(label(width / 2, height / 2, "middle", content, "soft"));
}

// ceiling is the next number up that is easy to halve in the head.
export function ceiling(value) {
  const power = 10 ** Math.floor(Math.log10(value) + 1e-9);
  return [1, 1.5, 2, 3, 4, 5, 6, 8, 10].map((s) => s * power).find((s) => s >= value * (1 - 1e-9));
}

// round125 is the next of 1, 2, 5, 10, … that is not smaller, or not larger.
export function round125(value, up = true) {
  const power = 10 ** Math.floor(Math.log10(value) + 1e-9);
  const steps = [1, 2, 5, 10].map((s) => s * power);
  return up ? steps.find((s) => s >= value * (1 - 1e-9)) : steps.findLast((s) => s <= value * (1 + 1e-9));
}
