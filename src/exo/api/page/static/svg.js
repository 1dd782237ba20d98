// Small drawings: a bar of memory and a line of speeds.

const SVG = "http://www.w3.org/2000/svg";

function s(tag, attributes, ...children) {
  const element = document.createElementNS(SVG, tag);
  for (const [name, value] of Object.entries(attributes)) element.setAttribute(name, value);
  element.append(...children);
  return element;
}

/** A bar with parts [class, share from 0 to 1, 0 for the upper half of the bar or 1 for the lower one]. */
export function bar(label, parts) {
  const drawn = parts.map(([name, share, half]) =>
    s("rect", { class: name, x: 0, y: 8 * half, width: 100 * Math.min(1, share), height: 8 }));
  return s("svg", { class: "bar", viewBox: "0 0 100 16", preserveAspectRatio: "none", role: "img", "aria-label": label }, ...drawn);
}

/** A line through the values, from 0 to the greatest. */
export function sparkline(label, values) {
  const top = Math.max(1, ...values);
  const points = values.map((value, at) => `${(100 * at) / Math.max(1, values.length - 1)},${19 - (18 * value) / top}`);
  const line = s("polyline", { points: points.join(" "), "vector-effect": "non-scaling-stroke" });
  return s("svg", { class: "sparkline", viewBox: "0 0 100 20", preserveAspectRatio: "none", role: "img", "aria-label": label }, line);
}
