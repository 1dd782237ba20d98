// One answer of a model, shown while it is streamed.

import { ApiError, send } from "./api.js";
import { h } from "./dom.js";
import { readEvents } from "./events.js";
import { rounded } from "./format.js";
import { MarkdownText } from "./markdown.js";

/** An answer. It ends as "finished", "stopped" or "failed". */
export class Answer {
  /** status(text) is told what goes on. */
  constructor(status) {
    this.status = status;
    this.text = new MarkdownText();
    this.reasoning = h("pre", { tabIndex: 0, dir: "auto" });
    this.folded = h("details", { hidden: true }, h("summary", {}, "Reasoning"), this.reasoning);
    this.facts = h("p", { className: "facts" });
    this.element = h("article", { className: "answer", "aria-label": "Answer" }, this.folded, this.text.element, this.facts);
    this.abort = new AbortController();
    this.state = "running";
    this.tokens = 0;
    this.firstAt = null;
    this.lastAt = null;
    this.route = null;
  }

  /** Asks for the answer, and returns how it ended. Never raises. */
  async run(body) {
    this.status("Waiting for the model");
    const began = performance.now();
    try {
      await this.read(body);
      this.state = "finished";
    } catch (error) {
      this.state = this.abort.signal.aborted ? "stopped" : "failed";
      if (this.state === "failed") this.fail(error);
    }
    this.text.show();
    this.element.classList.add(this.state);
    this.tell(began);
    return this.state;
  }

  /** Ends the answer where it is; the server then frees the slot. */
  stop() {
    this.abort.abort();
  }

  async read(body) {
    const request = { ...body, stream: true, stream_options: { include_usage: true } };
    const reply = await send("v1/chat/completions", { body: request, signal: this.abort.signal });
    this.route = { runner: reply.headers.get("x-exo-runner"), reason: reply.headers.get("x-exo-route") };
    this.warning = reply.headers.get("x-exo-warning");
    for await (const { data, comment } of readEvents(reply)) {
      if (comment) this.status(comment === "keep-alive" ? "Still computing" : comment);
      if (data === "[DONE]") return;
      if (data) this.take(JSON.parse(data));
    }
    throw new ApiError(0, "the connection ended before the answer did");
  }

  take(chunk) {
    if (chunk.error) throw new ApiError(0, chunk.error.message);
    this.usage = chunk.usage ?? this.usage;
    const choice = chunk.choices[0];
    if (!choice) return;
    const { content, reasoning_content: reasoning } = choice.delta;
    this.reason = choice.finish_reason ?? this.reason;
    if (!content && !reasoning) return;
    if (this.firstAt === null) this.status("Answering");
    this.lastAt = performance.now();
    this.firstAt ??= this.lastAt;
    if (reasoning) {
      this.folded.hidden = false;
      this.reasoning.append(reasoning);
    }
    if (content) this.text.add(content);
  }

  fail(error) {
    this.element.append(h("p", { className: "error", role: "alert" }, error.message));
  }

  // Shows who answered and why, and how fast.
  tell(began) {
    const facts = [];
    if (this.route?.runner) facts.push(`${this.route.runner}: ${this.route.reason}`);
    if (this.firstAt !== null) facts.push(`first token after ${rounded((this.firstAt - began) / 1000)} s`);
    if (this.usage) {
      const { completion_tokens: made, prompt_tokens: prompt, prompt_tokens_details: details } = this.usage;
      facts.push(`${prompt} tokens in (${details.cached_tokens} cached), ${made} out`);
      const rate = ((made - 1) * 1000) / (this.lastAt - this.firstAt);
      if (made > 1 && Number.isFinite(rate)) facts.push(`${rounded(rate)} tokens/s`);
    }
    if (this.reason === "length") facts.push("cut off: the token limit or the context is reached");
    if (this.state === "stopped") facts.push("stopped");
    if (this.warning) facts.push(this.warning);
    this.facts.textContent = facts.join(" \u00b7 ");
    const ends = { finished: "Answer finished", stopped: "Answer stopped", failed: "Answer failed" };
    this.status(ends[this.state]);
  }
}
