// Small drawings: a bar of memory and a line of speeds. Only what differs from the last drawing is changed.

import { setAttribute } from "./dom.js";

const SVG = "http://www.w3.org/2000/svg";

function s(tag, attributes, ...children) {
  const element = document.createElementNS(SVG, tag);
  for (const [name, value] of Object.entries(attributes)) element.setAttribute(name, value);
  element.append(...children);
  return element;
}

const drawing = (className, viewBox, ...children) =>
  s("svg", { class: className, viewBox, preserveAspectRatio: "none", role: "img" }, ...children);

/** A bar with two halves. */
export class Bar {
  constructor() {
    this.reserved = s("rect", { class: "reserved", x: 0, y: 0, height: 8 });
    this.used = s("rect", { class: "used", x: 0, y: 8, height: 8 });
    this.element = drawing("bar", "0 0 100 16", this.reserved, this.used);
  }

  /** Shows shares from 0 to 1: what is reserved in the upper half, what is used in the lower one. */
  show(label, reserved, used) {
    setAttribute(this.element, "aria-label", label);
    setAttribute(this.reserved, "width", 100 * Math.min(1, reserved));
    setAttribute(this.used, "width", 100 * Math.min(1, used));
  }
}

/** A line through values, from 0 to the greatest. */
export class Sparkline {
  constructor() {
    this.line = s("polyline", { "vector-effect": "non-scaling-stroke" });
    this.element = drawing("sparkline", "0 0 100 20", this.line);
  }

  show(label, values) {
    const top = Math.max(1, ...values);
    const points = values.map((value, at) => `${(100 * at) / Math.max(1, values.length - 1)},${19 - (18 * value) / top}`);
    setAttribute(this.element, "aria-label", label);
    setAttribute(this.line, "points", points.join(" "));
  }
}
