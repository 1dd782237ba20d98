// The view Models: every model with a card, its plan and engines, and loading, unloading and downloading it.

import { getJson, send, stream } from "./api.js";
import { engineName, listModels } from "./choice.js";
import { button, h, labelled, setText } from "./dom.js";
import { count, rounded, size } from "./format.js";

const REFRESH = 5000; // milliseconds

export class Models {
  constructor(section) {
    this.rows = new Map(); // by model id
    this.filter = h("input", { type: "search", on: { input: () => this.sift() } });
    this.status = h("p", { className: "status", role: "status" });
    this.list = h("div");
    section.append(labelled("Find a model", this.filter), this.status, this.list);
  }

  async open() {
    clearInterval(this.timer);
    this.timer = setInterval(() => this.refresh(), REFRESH);
    await this.refresh();
  }

  close() {
    clearInterval(this.timer);
  }

  async refresh() {
    try {
      const listed = (await listModels()).filter((model) => !model.parent); // without adapters
      for (const model of listed) {
        if (!this.rows.has(model.id)) this.rows.set(model.id, new ModelRow(model.id, () => this.refresh()));
        this.rows.get(model.id).show(model);
      }
      const here = new Set(listed.map((model) => model.id));
      for (const [id, row] of this.rows) {
        if (!here.has(id)) {
          row.element.remove();
          this.rows.delete(id);
        } else if (!row.element.isConnected) this.list.append(row.element);
      }
      const disk = listed.filter((model) => model.downloaded).length;
      setText(this.status, `${count(listed.length)} models, ${count(disk)} on disk`);
      this.sift();
    } catch (error) {
      this.status.textContent = error.message;
    }
  }

  sift() {
    const wanted = this.filter.value.trim().toLowerCase();
    for (const row of this.rows.values()) row.element.hidden = !row.words.includes(wanted);
  }
}

/** One model. Its details are asked for when they are opened. */
class ModelRow {
  constructor(id, changed) {
    this.id = id;
    this.changed = changed;
    this.pulling = null; // AbortController
    this.state = h("span", { className: "hint" });
    this.engines = h("ul");
    this.plan = h("dl");
    this.said = h("p", { className: "status", role: "status" });
    this.progress = h("progress", { hidden: true, "aria-label": `Download of ${id}` });
    this.load = button("Load", () => this.act("v1/models/load", "Loading", "It is loaded."));
    this.unload = button("Unload", () => this.act("v1/models/unload", "Unloading", "It is unloaded."));
    this.pull = button("Download", () => this.download());
    this.cancel = button("Cancel", () => this.pulling?.abort(), { hidden: true });
    this.element = h(
      "details", { className: "model", on: { toggle: () => this.element.open && this.explain() } },
      h("summary", {}, h("strong", {}, id), " ", this.state),
      h("p", { className: "buttons" }, this.load, this.unload, this.pull, this.cancel), this.progress, this.said,
      h("h2", {}, "Engines"), this.engines, h("h2", {}, "Plan"), this.plan,
    );
  }

  show(model) {
    const state = model.status.value === "unloaded" ? (model.downloaded ? "on disk" : "not on disk") : model.status.value;
    const facts = [state, size(model.meta.size)];
    if (model.context_length) facts.push(`${count(model.context_length)} tokens`);
    setText(this.state, [...facts, ...model.aliases, ...model.capabilities].join(" \u00b7 "));
    this.words = [this.id, ...model.aliases, state].join(" ").toLowerCase();
    this.load.hidden = model.status.value !== "unloaded" || !model.downloaded;
    this.unload.hidden = model.status.value === "unloaded";
    this.pull.hidden = model.downloaded || this.pulling !== null;
  }

  async act(path, doing, done) {
    this.said.textContent = `${doing}\u2026`;
    try {
      await send(path, { body: { model: this.id } });
      this.said.textContent = done;
    } catch (error) {
      this.said.textContent = error.message;
    }
    await this.changed();
    await this.explain();
  }

  async download() {
    this.pulling = new AbortController();
    this.pull.hidden = true;
    this.progress.hidden = this.cancel.hidden = false;
    this.said.textContent = "Asking the hub\u2026";
    try {
      let last = null;
      for await (const { data } of stream("v1/models/pull", { body: { model: this.id }, signal: this.pulling.signal })) {
        if (data && data !== "[DONE]") this.tell((last = JSON.parse(data)));
      }
      this.said.textContent = last?.step === "done" ? "It is on disk." : "The download ended early.";
    } catch (error) {
      this.said.textContent = this.pulling.signal.aborted ? "The download is cancelled; it can go on later." : error.message;
    }
    this.pulling = null;
    this.progress.hidden = this.cancel.hidden = true;
    await this.changed();
    await this.explain();
  }

  tell(progress) {
    if (progress.error) throw new Error(progress.error.message);
    if (progress.step === "done") return;
    const { step, done, total, rate, seconds_left: left, note } = progress;
    this.progress.max = Math.max(total, 1);
    this.progress.value = done;
    const parts = [`${step}: ${size(done)} of ${size(total)}`];
    if (rate) parts.push(`${size(rate)}/s`);
    if (left !== null) parts.push(`${rounded(left)} s left`);
    if (note) parts.push(note);
    this.said.textContent = parts.join(" \u00b7 ");
  }

  // Shows the engines, and the plan if one of them could load the model.
  async explain() {
    const query = `model=${encodeURIComponent(this.id)}`;
    try {
      const { engines } = await getJson(`v1/engines?${query}`);
      this.engines.replaceChildren(
        ...engines.map(({ runner, available, reason }) =>
          h("li", {}, `${engineName(runner)}: ${available ? "available" : "not available"}; ${reason}`)),
      );
      const able = engines.some((engine) => engine.available);
      const report = able ? await getJson(`v1/route?${query}`) : null;
      this.plan.replaceChildren(...planRows(report));
    } catch (error) {
      this.plan.replaceChildren(...row("problem", error.message));
    }
  }
}

const row = (name, value) => [h("dt", {}, name), h("dd", {}, value)];

function* planRows(report) {
  if (report === null) {
    yield* row("runner", "none here");
    return;
  }
  yield* row("runner", `${report.runner}: ${report.reason}`);
  const { plan } = report;
  if (!plan) {
    yield* row("memory", "known once the model's files are here");
    return;
  }
  if (plan.problem) yield* row("problem", plan.problem);
  if (plan.context_length) {
    const trained = plan.trained_length ? ` of ${count(plan.trained_length)} trained` : "";
    yield* row("context", `${count(plan.context_length)} tokens${trained}${plan.limit ? `: ${plan.limit}` : ""}`);
  }
  if (plan.slots) yield* row("slots", `${plan.slots}${plan.kv_type ? `, KV cache of ${plan.kv_type}` : ""}`);
  for (const [place, layers] of Object.entries(plan.layers)) yield* row(`layers in ${place}`, count(layers));
  for (const [place, bytes] of Object.entries(plan.memory)) yield* row(place === "memory" ? "RAM" : place, size(bytes));
  for (const note of plan.notes) yield* row("note", note);
}
