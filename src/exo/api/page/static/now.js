// The view Now: requests, runners, memory, deaths and replays as they happen.

import { follow, memoryOf } from "./activity.js";
import { send } from "./api.js";
import { Children, h, setText } from "./dom.js";
import { count, rounded, size } from "./format.js";
import { Bar, Sparkline } from "./svg.js";

const SECONDS = 60; // of a sparkline
const QUIET = 3000; // milliseconds without a message after which the view is drawn anyway
const SHOWN = 20; // requests and incidents
const ENDED = ["finished", "failed", "cancelled"];

export class Now {
  constructor(section) {
    this.requests = new Map(); // by id and start
    this.instances = [];
    this.notices = [];
    this.speeds = new Map(); // by model and runner: tokens of each of the last seconds, the newest last, and those made since
    this.memory = {};
    this.state = h("p", { className: "status", role: "status" });
    const bars = h("div");
    const runners = h("tbody");
    const rows = h("tbody");
    this.bars = new Children(bars, () => new DeviceMemory());
    this.runners = new Children(runners, () => new RunnerRow());
    this.rows = new Children(rows, () => new RequestRow());
    this.incidents = h("ol", { "aria-live": "polite", "aria-label": "Deaths and replays" });
    section.append(
      this.state, h("h2", {}, "Memory"), bars,
      h("h2", {}, "Runners"), table(["Model", "State", "Running", "Waiting", "Memory", "Tokens/s"], runners, "Runners"),
      h("h2", {}, "Requests"),
      table(["Model", "Phase", "Prompt", "Output", "Tokens/s", "Time", "Client", "Route"], rows, "Requests"),
      h("h2", {}, "Deaths and replays"), this.incidents,
    );
  }

  open() {
    this.close();
    this.following = new AbortController();
    this.requests.clear();
    this.drawn = performance.now();
    const drawn = (take) => (data) => {
      take(data);
      this.draw(0); // once the other events of the message are taken
    };
    follow(this.following.signal, {
      known: drawn((requests) => requests.forEach((each) => this.keep(each))),
      request: drawn((request) => this.request(request)),
      instances: drawn(({ data, notices }) => Object.assign(this, { instances: data, notices })),
      death: (death) => this.incident(`${death.model} on ${death.runner} died (${death.code}): ${death.message}`),
      replay: (replay) => this.incident(`${replay.model}: request ${replay.request} continues after ${count(replay.tokens)} tokens`),
      state: (text) => setText(this.state, text),
    });
    this.measuring = setInterval(() => this.measure(), 5000);
    this.measure();
    this.draw(QUIET);
  }

  close() {
    this.following?.abort();
    clearInterval(this.measuring);
    clearTimeout(this.drawing);
  }

  // Takes a request whose tokens so far were made before the view was opened.
  keep(request) {
    const key = keyOf(request);
    if (ENDED.includes(request.phase)) this.requests.delete(key);
    this.requests.set(key, request); // the running ones as they began, the others as they ended
    const ended = [...this.requests].filter(([, each]) => ENDED.includes(each.phase));
    for (const [old] of ended.slice(0, Math.max(0, ended.length - SHOWN))) this.requests.delete(old);
  }

  request(request) {
    const made = request.completion_tokens - (this.requests.get(keyOf(request))?.completion_tokens ?? 0);
    if (made > 0) this.speed(request.model, request.runner).made += made;
    this.keep(request);
  }

  speed(model, runner) {
    const name = `${model} ${runner}`;
    if (!this.speeds.has(name)) this.speeds.set(name, { made: 0, seconds: new Array(SECONDS).fill(0) });
    return this.speeds.get(name);
  }

  incident(text) {
    const time = new Date().toLocaleTimeString();
    this.incidents.prepend(h("li", {}, `${time} ${text}`));
    while (this.incidents.children.length > SHOWN) this.incidents.lastElementChild.remove();
  }

  draw(after) {
    clearTimeout(this.drawing);
    this.drawing = setTimeout(() => {
      const seconds = Math.round((performance.now() - this.drawn) / 1000);
      this.drawn += 1000 * seconds;
      for (const speed of seconds ? this.speeds.values() : []) {
        speed.seconds.push(...new Array(Math.min(seconds, SECONDS)).fill(speed.made / seconds));
        speed.seconds.splice(0, speed.seconds.length - SECONDS);
        speed.made = 0;
      }
      this.show();
      this.draw(QUIET);
    }, after);
  }

  async measure() {
    const { signal } = this.following;
    try {
      this.memory = memoryOf(await (await send("metrics", { signal })).text());
    } catch (error) {
      if (!signal.aborted) this.state.textContent = error.message;
    }
  }

  show() {
    const devices = Object.keys(this.memory);
    this.bars.show(devices).forEach((bar, at) => bar.show(devices[at], this.memory[devices[at]]));
    const all = [...this.requests].reverse();
    const running = all.filter(([, each]) => !ENDED.includes(each.phase));
    const shown = [...running, ...all.filter(([, each]) => ENDED.includes(each.phase))];
    this.rows.show(shown.map(([key]) => key)).forEach((row, at) => row.show(shown[at][1]));
    const rows = this.runners.show(this.instances.map((each) => each.instance));
    rows.forEach((row, at) => {
      const { model, runner } = this.instances[at];
      const own = running.filter(([, each]) => each.model === model && each.runner === runner).map(([, each]) => each);
      row.show(this.instances[at], own, this.speed(model, runner).seconds);
    });
    if (!this.state.textContent) this.state.textContent = this.notices.join("; ");
  }
}

const keyOf = (request) => `${request.id} ${request.started}`;

function table(columns, body, label) {
  const head = h("thead", {}, h("tr", {}, ...columns.map((name) => h("th", { scope: "col" }, name))));
  return h("div", { className: "scroll steady", tabIndex: 0, role: "region", "aria-label": label }, h("table", {}, head, body));
}

/** A row of a table, of so many cells. */
class Row {
  constructor(columns) {
    this.cells = Array.from({ length: columns }, () => h("td"));
    this.element = h("tr", {}, ...this.cells);
  }

  show(texts) {
    texts.forEach((text, at) => setText(this.cells[at], text));
  }
}

/** A runner, its requests, and the tokens of its model in each of the last seconds. */
class RunnerRow extends Row {
  constructor() {
    super(5);
    this.line = new Sparkline();
    this.rate = h("span");
    this.element.append(h("td", {}, this.line.element, " ", this.rate));
  }

  show(each, requests, speeds) {
    const busy = requests.filter((request) => ["prefill", "decode"].includes(request.phase)).length;
    const last = rounded(speeds.slice(-5).reduce((sum, value) => sum + value, 0) / 5);
    const state = each.state === "Loading" && each.total_layers ? `Loading ${each.layers_loaded}/${each.total_layers}` : each.state;
    const failed = each.last_failure ? `, ${each.deaths} deaths` : "";
    const memory = [["RAM", each.memory_reserved], ...each.device_memory.map((one) => [one.device, one.reserved])];
    super.show([
      `${each.model}@${each.runner}${each.host && `@${each.host}`}`, `${state}${failed}`, `${busy} of ${each.slots}`,
      String(requests.length - busy), memory.filter(([, bytes]) => bytes).map(([place, bytes]) => `${place} ${size(bytes)}`).join(", "),
    ]);
    this.line.show(`Tokens per second of ${each.model} in the last minute, now ${last}`, speeds);
    setText(this.rate, last);
  }
}

class DeviceMemory {
  constructor() {
    this.text = h("p");
    this.bar = new Bar();
    this.element = h("div", { className: "memory" }, this.text, this.bar.element);
  }

  show(device, { reserved = 0, used, free }) {
    const total = used === undefined ? reserved : used + free;
    const told = used === undefined ? "" : `, ${size(used)} of ${size(total)} used`;
    const text = `${device}: ${size(reserved)} reserved${told}`;
    setText(this.text, text);
    this.bar.show(text, reserved / (total || 1), (used ?? 0) / (total || 1));
  }
}

class RequestRow extends Row {
  constructor() {
    super(8);
  }

  show(request) {
    if (request === this.request) return;
    this.request = request;
    const prompt = request.phase === "prefill"
      ? `${count(request.prefill_done)} of ${count(request.prompt_tokens)}`
      : `${count(request.prompt_tokens)}${request.cached_tokens ? ` (${count(request.cached_tokens)} cached)` : ""}`;
    const end = request.error ?? request.finish_reason;
    super.show([
      request.model, `${request.phase}${end ? `: ${end}` : ""}${request.replays ? `, ${request.replays} replays` : ""}`, prompt,
      count(request.completion_tokens), request.tokens_per_second === null ? "" : rounded(request.tokens_per_second),
      `${rounded(request.seconds)} s`, request.client, request.runner ? `${request.runner}${request.host && `@${request.host}`}: ${request.route}` : "",
    ]);
  }
}
