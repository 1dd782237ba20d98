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

/** Gives an element these children. Those that are equal to the present ones stay, so that nothing is drawn again. */
export function update(parent, children) {
  children.forEach((child, at) => {
    const present = parent.children[at];
    if (!present) parent.append(child);
    else if (!present.isEqualNode(child)) present.replaceWith(child);
  });
  while (parent.children.length > children.length) parent.lastElementChild.remove();
}
