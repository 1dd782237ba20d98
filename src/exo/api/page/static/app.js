// The page: one view at a time, chosen by the address after "#".

import { Chat } from "./chat.js";
import { Compare } from "./compare.js";
import { Models } from "./models.js";
import { Now } from "./now.js";

const VIEWS = { chat: Chat, models: Models, now: Now, compare: Compare };
const made = {};

const chosen = () => (location.hash.slice(1) in VIEWS ? location.hash.slice(1) : "chat");

function show() {
  const name = chosen();
  for (const view of Object.keys(VIEWS)) {
    const section = document.getElementById(view);
    const link = document.querySelector(`nav a[href="#${view}"]`);
    section.hidden = view !== name;
    if (view === name) link.setAttribute("aria-current", "page");
    else link.removeAttribute("aria-current");
    if (view !== name) made[view]?.close?.();
  }
  made[name] ??= new VIEWS[name](document.getElementById(name));
  made[name].open();
  document.title = `${document.querySelector('nav a[aria-current="page"]').textContent} \u00b7 exo`;
}

document.getElementById("no-script").remove();
addEventListener("hashchange", show);
// A tab that nobody sees asks the server for nothing. No answer is ended by that.
document.addEventListener("visibilitychange", () => (document.hidden ? made[chosen()].close?.() : show()));
show();
