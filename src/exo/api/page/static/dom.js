// Elements of the page. Text becomes text nodes, never HTML.

/**
 * Makes an element.
 * @param {string} tag
 * @param {object} properties DOM properties; names with "-", "role" and "for" are attributes, "on" holds listeners.
 * @param {...(Node|string|null)} children Null is left out.
 */
export function h(tag, properties = {}, ...children) {
  const element = document.createElement(tag);
  for (const [name, value] of Object.entries(properties)) {
    if (name === "on") {
      for (const [event, listener] of Object.entries(value)) element.addEventListener(event, listener);
    } else if (name.includes("-") || name === "role" || name === "for") {
      element.setAttribute(name, value);
    } else {
      element[name] = value;
    }
  }
  element.append(...children.filter((child) => child !== null));
  return element;
}

let last = 0;

/** Makes a labelled form control: the label, then the control. */
export function labelled(text, control) {
  control.id ||= `control-${++last}`;
  return h("div", { className: "field" }, h("label", { for: control.id }, text), control);
}

/** Makes a button. */
export function button(text, click, properties = {}) {
  return h("button", { type: "button", on: { click }, ...properties }, text);
}

/** Sets the text of an element that has nothing else. What is there already is not laid out or painted again. */
export function setText(element, text) {
  if (!element.firstChild) element.append(text);
  else if (element.firstChild.data !== text) element.firstChild.data = text;
}

/** The same for an attribute. */
export function setAttribute(element, name, value) {
  if (element.getAttribute(name) !== String(value)) element.setAttribute(name, value);
}

/** Children of one element, by key. A child stays the same element for as long as its key is shown. */
export class Children {
  /** make(key) returns a new child. */
  constructor(parent, make) {
    this.parent = parent;
    this.make = make;
    this.shown = new Map();
  }

  /** Shows the children of these keys in this order, and returns them. */
  show(keys) {
    const wanted = new Map(keys.map((key) => [key, this.shown.get(key) ?? this.make(key)]));
    for (const [key, child] of this.shown) if (!wanted.has(key)) child.element.remove();
    this.shown = wanted;
    let next = this.parent.firstElementChild;
    for (const { element } of wanted.values()) {
      if (element === next) next = next.nextElementSibling;
      else this.parent.insertBefore(element, next);
    }
    return [...wanted.values()];
  }
}
