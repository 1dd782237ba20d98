// The view Compare: one prompt to two models or engines, side by side.

import { Answer } from "./answer.js";
import { ModelChoice, listModels } from "./choice.js";
import { button, h, labelled } from "./dom.js";

export class Compare {
  constructor(section) {
    this.answers = [];
    this.sides = ["left", "right"].map((name) => {
      const choice = new ModelChoice(name);
      const place = h("div", { className: "place" });
      const status = h("p", { className: "status", role: "status" });
      const element = h("section", { className: "side", "aria-label": name }, choice.element, status, place);
      return { choice, place, status, element };
    });
    this.input = h("textarea", { rows: 3 });
    this.greedy = h("input", { type: "checkbox", checked: true, id: "greedy" });
    this.limit = h("input", { type: "number", min: 1, step: 1, value: 256 });
    this.sending = h("button", { type: "submit", className: "primary" }, "Ask both");
    this.stopping = button("Stop", () => this.stop(), { hidden: true });
    const form = h(
      "form", { on: { submit: (event) => this.submit(event) } }, labelled("Prompt", this.input),
      h("p", {}, this.greedy, " ", h("label", { for: "greedy", className: "beside" }, "Always the most likely token")),
      labelled("Most tokens of each", this.limit),
      h("p", { className: "buttons" }, this.sending, this.stopping),
    );
    section.append(form, h("div", { className: "sides" }, ...this.sides.map((side) => side.element)));
    this.input.addEventListener("keydown", (event) => {
      if (event.key === "Enter" && !event.shiftKey && !event.isComposing) this.submit(event);
    });
    section.addEventListener("keydown", (event) => {
      if (event.key === "Escape") this.stop();
    });
  }

  async open() {
    try {
      const models = await listModels();
      for (const side of this.sides) side.choice.show(models);
    } catch (error) {
      this.sides[0].status.textContent = error.message;
    }
  }

  async submit(event) {
    event.preventDefault();
    const content = this.input.value;
    if (this.answers.length || !content.trim()) return;
    this.sending.disabled = true;
    this.stopping.hidden = false;
    this.answers = this.sides.map((side) => {
      const answer = new Answer((text) => (side.status.textContent = text));
      side.place.replaceChildren(answer.element);
      return answer;
    });
    await Promise.all(
      this.sides.map((side, at) => this.answers[at].run({
        model: side.choice.name,
        messages: [{ role: "user", content }],
        ...(this.greedy.checked ? { temperature: 0 } : {}),
        ...(this.limit.value ? { max_tokens: Number(this.limit.value) } : {}),
      })),
    );
    this.answers = [];
    this.sending.disabled = false;
    this.stopping.hidden = true;
  }

  stop() {
    for (const answer of this.answers) answer.stop();
  }
}
