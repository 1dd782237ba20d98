// Markdown that a model writes, as elements. A model's text is never trusted: HTML in it is shown as text, nothing in
// it is loaded, and what marked makes of it passes DOMPurify.

import { button, h } from "./dom.js";
import { Marked } from "./vendor/marked.esm.js";
import DOMPurify from "./vendor/purify.es.mjs";

const LONGEST_BLOCK = 20000; // characters; what a longer block has more is shown as it is
const REST = 4; // times the duration of the last rendering, which passes before the next one

const ALLOWED = {
  ALLOWED_TAGS: [
    "a", "blockquote", "br", "code", "del", "em", "h1", "h2", "h3", "h4", "h5", "h6", "hr", "li", "ol", "p", "pre",
    "strong", "table", "tbody", "td", "th", "thead", "tr", "ul",
  ],
  ALLOWED_ATTR: ["align", "href", "start"],
  ALLOW_ARIA_ATTR: false,
  ALLOW_DATA_ATTR: false,
  ALLOWED_URI_REGEXP: /^(?:https?|mailto):/i,
  RETURN_DOM_FRAGMENT: true,
};

// Characters that change the order of those around them. Shown, they cannot disguise a link or a line of code.
const BIDI_CONTROLS = /[\u202a-\u202e\u2066-\u2069]/g;

const escaped = (text) => text.replace(/[&<>"']/g, (character) => `&#${character.charCodeAt(0)};`);

const marked = new Marked({
  gfm: true,
  breaks: true,
  renderer: {
    html: ({ text }) => escaped(text),
    image: ({ href, text }) => escaped(text ? `[image: ${text}] (${href})` : `[image] (${href})`),
    checkbox: ({ checked }) => (checked ? "\u2611 " : "\u2610 "),
  },
});

/** What make() returns; null if a text is nested so deeply that the stack is full. */
function unlessTooDeep(make) {
  try {
    return make();
  } catch (error) {
    if (error instanceof RangeError) return null;
    throw error;
  }
}

/** Makes elements of Markdown. */
function render(source) {
  const text = source.replace(BIDI_CONTROLS, (one) => `[U+${one.charCodeAt(0).toString(16).toUpperCase()}]`);
  const short = source.length < LONGEST_BLOCK;
  const fragment = short ? unlessTooDeep(() => DOMPurify.sanitize(marked.parse(text), ALLOWED)) : null;
  if (fragment === null) return h("pre", { className: "long" }, text);
  for (const link of fragment.querySelectorAll("a")) {
    link.rel = "noopener noreferrer";
    link.target = "_blank";
    link.title = link.getAttribute("href") ?? "";
  }
  for (const code of fragment.querySelectorAll("pre")) {
    code.tabIndex = 0; // it may scroll
    if (navigator.clipboard) code.before(copyButton(() => code.textContent));
  }
  for (const table of fragment.querySelectorAll("table")) {
    const scroll = h("div", { className: "scroll", tabIndex: 0, role: "group", "aria-label": "Table" });
    table.replaceWith(scroll);
    scroll.append(table);
  }
  return fragment;
}

/** A button that copies what text() returns. */
export function copyButton(text) {
  const copy = button("Copy", async () => {
    try {
      await navigator.clipboard.writeText(text());
      copy.textContent = "Copied";
    } catch {
      copy.textContent = "Not copied";
    }
    setTimeout(() => (copy.textContent = "Copy"), 2000);
  }, { className: "small copy" });
  return copy;
}

/** An element that shows Markdown while it is written. Finished blocks are rendered once. */
export class MarkdownText {
  constructor() {
    this.element = h("div", { className: "markdown", dir: "auto" });
    this.text = "";
    this.tail = h("div");
    this.element.append(this.tail);
    this.settled = 0; // characters that are rendered for good
    this.timer = null;
    this.pause = 0;
  }

  /** Adds text, which appears shortly afterwards. */
  add(text) {
    this.text += text.replaceAll("\r", "");
    this.timer ??= setTimeout(() => this.show(), this.pause);
  }

  /** Shows all text. */
  show() {
    clearTimeout(this.timer);
    this.timer = null;
    const began = performance.now();
    this.settle();
    this.tail.replaceChildren(render(this.text.slice(this.settled)));
    this.pause = Math.max(16, REST * (performance.now() - began));
  }

  // A list may go on after blank lines, so the last block that is not blank stays open.
  settle() {
    for (;;) {
      const part = this.text.slice(this.settled, this.settled + LONGEST_BLOCK);
      const blocks = unlessTooDeep(() => marked.lexer(part)) ?? [];
      const open = blocks.findLastIndex((block) => block.type !== "space");
      let done = blocks.slice(0, Math.max(open, 0)).reduce((length, block) => length + block.raw.length, 0);
      if (done === 0 && part.length === LONGEST_BLOCK) done = LONGEST_BLOCK;
      if (done === 0) return;
      this.tail.before(render(part.slice(0, done)));
      this.settled += done;
    }
  }
}
