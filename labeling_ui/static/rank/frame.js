// What stands around the work: progress, tools, the first steps, the bar for trouble, the status of drafts and submits.

import { base } from "./server.js";
import { toggleAllLong, measure } from "./cards.js";
import { openCompare, openHelp, openRecent, showGuidelines } from "./dialogs.js";
import { box, button, make } from "./dom.js";

const STEPS = [
  ["Read", "all of them; their order means nothing."],
  ["Rank", "each with its numbers: 1 is best, the same number is a tie, – sets aside."],
  ["Submit.", "You can take it back."],
];

const progressText = make("span", { class: "progress-text" }, "\u00a0");
const progressBar = make("progress", { value: 0, max: 1, "aria-label": "Progress" });
export const status = make("p", { class: "status", role: "status", "aria-live": "polite" });
export const draftStatus = make("p", { class: "draft-status" });
const trouble = make("div", { class: "trouble", role: "alert", hidden: true });

export function buildFrame(actions) {
  box("top").replaceChildren(make("h1", {}, "Rank completions"),
    make("div", { class: "progress-box" }, progressText, progressBar),
    make("nav", { "aria-label": "Page" }, button("Guidelines", () => showGuidelines(), { class: "plain to-guidelines" }, "G"),
      button("Recent", () => openRecent(actions.reopen), { class: "plain" }, "⇧R"), button("Keys", openHelp, { class: "plain to-keys" }, "?")), trouble);
  box("tools").replaceChildren(button("Compare", () => openCompare(actions.task()), { class: "plain" }, "⇧C"),
    button("Open all", toggleAllLong, { class: "plain" }, "⇧X"),
    button("As written", toggleWritten, { class: "plain to-written", "aria-pressed": "false", title: "Every character as the model wrote it, without formatting" }, "⇧W"));
}

export function toggleWritten() {
  const on = document.body.classList.toggle("as-written");
  document.querySelector(".to-written").setAttribute("aria-pressed", String(on));
  measure();
}

// The three steps, until they are put away or the first item is done.
export function drawSteps(person, ranked) {
  const name = `rlhf-steps:${person}`, place = box("steps");
  const seen = () => { try { return localStorage.getItem(name); } catch { return null; } };
  const away = () => { try { localStorage.setItem(name, "1"); } catch { /* shown again next time */ } place.replaceChildren(); };
  if (seen() || ranked) return place.replaceChildren();
  place.replaceChildren(make("ol", { "aria-label": "How it works" }, ...STEPS.map(([verb, rest]) => make("li", {}, make("b", {}, verb), ` ${rest}`))),
    button("Got it", away, { class: "plain" }));
}

const plural = (count, word) => `${count} ${word}${count === 1 ? "" : "s"}`;

function duration(minutes) {
  if (minutes < 1.5) return "about a minute left";
  if (minutes < 60) return `about ${Math.round(minutes)} min left`;
  return `about ${Math.floor(minutes / 60)} h ${Math.round(minutes % 60 / 10) * 10} min left`;
}

export function drawProgress({ ranked, skipped, remaining, per_hour: perHour, minutes_left: minutesLeft }) {
  const parts = [`${ranked} ranked`, `${remaining} to go`];
  if (skipped) parts.push(`${skipped} skipped`);
  if (perHour) parts.push(`${plural(Math.round(perHour), "item")} an hour`);
  if (minutesLeft && remaining) parts.push(duration(minutesLeft));
  progressText.textContent = parts.join(" · ");
  progressBar.max = Math.max(ranked + remaining, 1);
  progressBar.value = ranked;
}

export function say(text, kind = "") {
  status.textContent = text;
  status.dataset.kind = kind;
}

export function sayDraft(text, kind = "") {
  draftStatus.textContent = text;
  draftStatus.dataset.kind = kind;
}

// Where there is nothing to rank: why, and what can still be done.
export function drawMessage(text, undo, reopen) {
  box("message").replaceChildren(make("p", {}, text), button("Change the last one", undo, { class: "plain" }), button("Recent", () => openRecent(reopen), { class: "plain" }));
}

// A bar over the page, with what can be done about it.
export function showTrouble(text, ...todo) {
  trouble.replaceChildren(make("span", {}, text), ...todo);
  trouble.hidden = false;
}

export function hideTrouble() {
  trouble.hidden = true;
  trouble.replaceChildren();
}

export const loginLink = () => make("a", { href: `${base}/login`, target: "_blank", rel: "noopener" }, "Log in in a new tab");
