// The view Chat: a conversation with one model.

import { Answer } from "./answer.js";
import { ModelChoice, listModels } from "./choice.js";
import { button, h, labelled } from "./dom.js";
import { copyButton } from "./markdown.js";

export class Chat {
  constructor(section) {
    this.messages = []; // {role, content} as in a request
    this.answer = null; // while it is being made
    this.choice = new ModelChoice();
    this.log = h("div", { className: "log", tabIndex: 0, role: "group", "aria-label": "Conversation" });
    this.status = h("p", { className: "status", role: "status" });
    this.input = h("textarea", { rows: 3, placeholder: "Enter sends, Shift+Enter begins a line" });
    this.pictures = h("input", { type: "file", multiple: true, accept: "image/png,image/jpeg,image/webp,image/gif" });
    this.attaching = labelled("Pictures", this.pictures);
    this.system = h("textarea", { rows: 2 });
    this.temperature = h("input", { type: "number", min: 0, max: 2, step: 0.1 });
    this.limit = h("input", { type: "number", min: 1, step: 1 });
    this.sending = h("button", { type: "submit", className: "primary" }, "Send");
    this.stopping = button("Stop", () => this.answer?.stop(), { hidden: true });
    this.regenerating = button("Regenerate", () => this.regenerate(), { hidden: true });
    const settings = h(
      "details", {}, h("summary", {}, "Settings"), labelled("System message", this.system),
      h("div", { className: "choice" }, labelled("Temperature", this.temperature), labelled("Most tokens", this.limit)),
    );
    const form = h(
      "form", { on: { submit: (event) => this.submit(event) } }, labelled("Message", this.input), this.attaching, this.status,
      h("p", { className: "buttons" }, this.sending, this.stopping, this.regenerating, button("New chat", () => this.clear())),
    );
    section.append(this.choice.element, settings, this.log, form);
    this.offerPictures();
    this.choice.models.addEventListener("change", () => this.offerPictures());
    this.input.addEventListener("keydown", (event) => this.key(event));
    section.addEventListener("keydown", (event) => {
      if (event.key === "Escape") this.answer?.stop();
    });
  }

  /** Called when the view comes to be seen. */
  async open() {
    try {
      this.choice.show(await listModels());
      this.offerPictures();
    } catch (error) {
      this.status.textContent = error.message;
    }
  }

  offerPictures() {
    this.attaching.hidden = !this.choice.sees;
    if (this.attaching.hidden) this.pictures.value = "";
  }

  key(event) {
    if (event.key === "Enter" && !event.shiftKey && !event.isComposing) this.submit(event);
  }

  async submit(event) {
    event.preventDefault();
    const text = this.input.value;
    if (this.answer || !text.trim()) return;
    if (!this.choice.name) {
      this.status.textContent = "There is no model to answer.";
      return;
    }
    const files = [...this.pictures.files];
    this.input.value = this.pictures.value = "";
    const pictures = await Promise.all(files.map(readPicture));
    const content = pictures.length ? [...pictures, { type: "text", text }] : text;
    this.messages.push({ role: "user", content });
    const names = files.map((file) => h("p", { className: "hint" }, `Picture: ${file.name}`));
    this.append(h("article", { className: "question", "aria-label": "Question", dir: "auto" }, ...names, text));
    this.ask();
  }

  async ask() {
    const answer = new Answer((text) => (this.status.textContent = text));
    this.answer = answer;
    this.sending.disabled = true;
    this.stopping.hidden = false;
    this.regenerating.hidden = true;
    this.append(answer.element);
    const followed = new ResizeObserver(() => this.follow());
    followed.observe(answer.element);
    const state = await answer.run(this.request());
    followed.disconnect();
    this.follow();
    this.answer = null;
    this.sending.disabled = false;
    this.stopping.hidden = true;
    if (!this.messages.length) return; // the conversation was cleared meanwhile
    this.regenerating.hidden = false;
    if (state !== "failed" || answer.text.text) this.messages.push({ role: "assistant", content: answer.text.text });
    if (answer.text.text && navigator.clipboard) answer.element.append(copyButton(() => answer.text.text));
  }

  request() {
    const system = this.system.value.trim();
    const body = {
      model: this.choice.name,
      messages: [...(system ? [{ role: "system", content: system }] : []), ...this.messages],
    };
    if (this.temperature.value) body.temperature = Number(this.temperature.value);
    if (this.limit.value) body.max_tokens = Number(this.limit.value);
    return body;
  }

  /** Makes the last answer again, perhaps by another model. */
  regenerate() {
    if (this.answer) return;
    if (this.messages.at(-1)?.role === "assistant") this.messages.pop();
    this.log.lastElementChild.remove();
    this.ask();
    this.input.focus(); // the button is hidden meanwhile
  }

  clear() {
    this.answer?.stop();
    this.messages = [];
    this.log.replaceChildren();
    this.status.textContent = "";
    this.regenerating.hidden = true;
    this.input.focus();
  }

  append(element) {
    this.log.append(element);
    this.log.scrollTop = this.log.scrollHeight;
    this.atEnd = true;
  }

  // Stays at the end of a growing answer, unless the user has scrolled away.
  follow() {
    const { scrollTop, scrollHeight, clientHeight } = this.log;
    if (scrollTop + clientHeight > scrollHeight - 200) this.log.scrollTop = scrollHeight;
  }
}

/** Makes a part of a message of a file, as a data: URL. */
function readPicture(file) {
  const reader = new FileReader();
  return new Promise((resolve, reject) => {
    reader.onload = () => resolve({ type: "image_url", image_url: { url: reader.result } });
    reader.onerror = () => reject(reader.error);
    reader.readAsDataURL(file);
  });
}
