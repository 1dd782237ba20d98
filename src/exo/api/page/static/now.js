// The view Now: requests, runners, memory, deaths and replays as they happen.

import { follow, memoryOf } from "./activity.js";
import { send } from "./api.js";
import { h, update } from "./dom.js";
import { count, rounded, size } from "./format.js";
import { bar, sparkline } from "./svg.js";

const SECONDS = 60; // of a sparkline
const SHOWN = 30; // requests and incidents
const ENDED = ["finished", "failed", "cancelled"];

export class Now {
  constructor(section) {
    this.requests = new Map(); // by id and start
    this.instances = [];
    this.notices = [];
    this.speeds = new Map(); // by model and runner: tokens in each of the last seconds, the newest last
    this.memory = {};
    this.state = h("p", { className: "status", role: "status" });
    this.bars = h("div");
    this.runners = h("tbody");
    this.rows = h("tbody");
    this.incidents = h("ol", { "aria-live": "polite", "aria-label": "Deaths and replays" });
    section.append(
      this.state, h("h2", {}, "Memory"), this.bars,
      h("h2", {}, "Runners"), table(["Model", "State", "Running", "Waiting", "Memory", "Tokens/s"], this.runners, "Runners"),
      h("h2", {}, "Requests"),
      table(["Model", "Phase", "Prompt", "Output", "Tokens/s", "Time", "Client", "Route"], this.rows, "Requests"),
      h("h2", {}, "Deaths and replays"), this.incidents,
    );
  }

  open() {
    this.close();
    this.following = new AbortController();
    follow(this.following.signal, {
      request: (request) => this.request(request),
      instances: ({ data, notices }) => Object.assign(this, { instances: data, notices }),
      death: (death) => this.incident(`${death.model} on ${death.runner} died (${death.code}): ${death.message}`),
      replay: (replay) => this.incident(`${replay.model}: request ${replay.request} continues after ${count(replay.tokens)} tokens`),
      state: (text) => (this.state.textContent = text),
    });
    this.timers = [setInterval(() => this.tick(), 1000), setInterval(() => this.measure(), 5000)];
    this.measure();
  }

  close() {
    this.following?.abort();
    this.timers?.forEach(clearInterval);
  }

  request(request) {
    const key = `${request.id} ${request.started}`;
    const before = this.requests.get(key);
    if (before) {
      const speed = this.speed(request.model, request.runner);
      speed[speed.length - 1] += Math.max(0, request.completion_tokens - before.completion_tokens);
    }
    if (ENDED.includes(request.phase)) this.requests.delete(key);
    this.requests.set(key, request); // the running ones as they began, the others as they ended
    const ended = [...this.requests].filter(([, each]) => ENDED.includes(each.phase));
    for (const [old] of ended.slice(0, Math.max(0, ended.length - SHOWN))) this.requests.delete(old);
  }

  speed(model, runner) {
    const name = `${model} ${runner}`;
    if (!this.speeds.has(name)) this.speeds.set(name, new Array(SECONDS).fill(0));
    return this.speeds.get(name);
  }

  incident(text) {
    const time = new Date().toLocaleTimeString();
    this.incidents.prepend(h("li", {}, `${time} ${text}`));
    while (this.incidents.children.length > SHOWN) this.incidents.lastElementChild.remove();
  }

  tick() {
    for (const speed of this.speeds.values()) {
      speed.shift();
      speed.push(0);
    }
    this.show();
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
    update(this.bars, Object.entries(this.memory).map(([device, sizes]) => memoryBar(device, sizes)));
    const running = [...this.requests.values()].filter((each) => !ENDED.includes(each.phase));
    update(this.runners, this.instances.map((each) => this.runner(each, running)));
    const past = [...this.requests.values()].filter((each) => ENDED.includes(each.phase));
    update(this.rows, [...running.reverse(), ...past.reverse()].map(requestRow));
    if (!this.state.textContent) this.state.textContent = this.notices.join("; ");
  }

  runner(each, running) {
    const own = running.filter((request) => request.model === each.model && request.runner === each.runner);
    const busy = own.filter((request) => ["prefill", "decode"].includes(request.phase)).length;
    const speeds = this.speed(each.model, each.runner).slice(0, -1); // the last second is not over
    const last = speeds.slice(-5).reduce((sum, value) => sum + value, 0) / 5;
    const state = each.state === "Loading" && each.total_layers ? `Loading ${each.layers_loaded}/${each.total_layers}` : each.state;
    const failed = each.last_failure ? `, ${each.deaths} deaths` : "";
    const memory = [["RAM", each.memory_reserved], ...each.device_memory.map((one) => [one.device, one.reserved])];
    return cells(
      `${each.model}@${each.runner}${each.host && `@${each.host}`}`, `${state}${failed}`, `${busy} of ${each.slots}`, String(own.length - busy),
      memory.filter(([, bytes]) => bytes).map(([place, bytes]) => `${place} ${size(bytes)}`).join(", "),
      h("span", {}, sparkline(`Tokens per second of ${each.model} in the last minute, now ${rounded(last)}`, speeds), ` ${rounded(last)}`),
    );
  }
}

function table(columns, body, label) {
  const head = h("thead", {}, h("tr", {}, ...columns.map((name) => h("th", { scope: "col" }, name))));
  return h("div", { className: "scroll", tabIndex: 0, role: "region", "aria-label": label }, h("table", {}, head, body));
}

const cells = (...values) => h("tr", {}, ...values.map((value) => h("td", {}, value)));

function memoryBar(device, { reserved = 0, used, free }) {
  const total = used === undefined ? reserved : used + free;
  const text = used === undefined
    ? `${device}: ${size(reserved)} reserved`
    : `${device}: ${size(reserved)} reserved, ${size(used)} of ${size(total)} used`;
  const shares = [["reserved", reserved / (total || 1), 0], ["used", (used ?? 0) / (total || 1), 1]];
  return h("div", { className: "memory" }, h("p", {}, text), bar(text, shares));
}

function requestRow(request) {
  const prompt = request.phase === "prefill"
    ? `${count(request.prefill_done)} of ${count(request.prompt_tokens)}`
    : `${count(request.prompt_tokens)}${request.cached_tokens ? ` (${count(request.cached_tokens)} cached)` : ""}`;
  const end = request.error ?? request.finish_reason;
  return cells(
    request.model, `${request.phase}${end ? `: ${end}` : ""}${request.replays ? `, ${request.replays} replays` : ""}`, prompt,
    count(request.completion_tokens), request.tokens_per_second === null ? "" : rounded(request.tokens_per_second),
    `${rounded(request.seconds)} s`, request.client, request.runner ? `${request.runner}${request.host && `@${request.host}`}: ${request.route}` : "",
  );
}
