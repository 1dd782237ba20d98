// The choice of a model and an engine.

import { getJson } from "./api.js";
import { h, labelled } from "./dom.js";

/** The names of the runners, and what people call their engines. */
export const ENGINES = { cuda: "llama.cpp", mlx: "MLX", vllm: "vLLM" };
export const RUNNERS = document.body.dataset.runners.split(" ");

export const engineName = (runner) => (ENGINES[runner] ? `${ENGINES[runner]} (${runner})` : runner);

/** All models of the server. */
export async function listModels() {
  return (await getJson("v1/models")).data;
}

/** Two lists: the models that make text, those on disk first, and the engines. */
export class ModelChoice {
  constructor(label = "") {
    this.models = h("select");
    this.engines = h("select", {}, h("option", { value: "" }, "any engine"));
    for (const runner of RUNNERS) this.engines.append(h("option", { value: runner }, engineName(runner)));
    const name = (what) => (label ? `${what} ${label}` : what);
    this.element = h(
      "div", { className: "choice" }, labelled(name("Model"), this.models), labelled(name("Engine"), this.engines),
    );
  }

  /** The name for a request, such as "model@cuda"; empty if there is no model. */
  get name() {
    const model = this.models.value;
    return model && this.engines.value ? `${model}@${this.engines.value}` : model;
  }

  /** Whether the chosen model takes pictures, as far as the list says. */
  get sees() {
    return Boolean(this.seeing?.has(this.models.value));
  }

  /** Shows these models and keeps the choice; at first a loaded one is chosen. */
  show(listed) {
    const chosen = this.models.value;
    const fit = listed.filter((model) => model.capabilities.includes("completion"));
    this.seeing = new Set(fit.filter((model) => model.architecture.input_modalities.includes("image")).map((model) => model.id));
    const group = (label, models) =>
      h("optgroup", { label }, ...models.map((model) => h("option", { value: model.id }, model.id)));
    const here = fit.filter((model) => model.downloaded);
    const others = fit.filter((model) => !model.downloaded);
    this.models.replaceChildren();
    if (here.length) this.models.append(group("On disk", here));
    if (others.length) this.models.append(group("Not on disk", others));
    const loaded = here.find((model) => model.status.value === "loaded");
    const first = fit.find((model) => model.id === chosen) ?? loaded ?? here[0] ?? others[0];
    if (first) this.models.value = first.id;
  }
}
