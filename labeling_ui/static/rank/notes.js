// Flags, a note, and why: what may be said beside the ranking.

import { board, setAllAside, unplaced } from "./board.js";
import { button, make } from "./dom.js";

const ALONE = ["all_bad", "cannot_judge"];  // with one of these, nothing needs a rank

let onSay = () => {};
const boxes = make("div", { class: "flags", role: "group", "aria-label": "Flags" });
const aside = button("Set every card aside", setAllAside, { class: "plain aside-all" });
const why = make("textarea", { rows: 2, maxlength: 4000, dir: "auto", id: "why", oninput: () => onSay() });
const note = make("textarea", { rows: 2, maxlength: 1000, dir: "auto", id: "note", oninput: () => onSay() });

export const notes = make("details", { class: "notes" }, make("summary", {}, "Flags and notes (optional) ", make("kbd", { "aria-hidden": "true" }, "⇧N")),
  boxes, aside, make("label", { for: "why" }, "Why this order?"), why, make("label", { for: "note" }, "Anything wrong with this item?"), note);

const checked = () => [...boxes.querySelectorAll("input:checked")].map((each) => each.value);

export const nothingNeedsARank = () => checked().some((name) => ALONE.includes(name));

export function buildNotes(said) {
  onSay = said;
}

export function openNotes() {
  notes.open = true;
  boxes.querySelector("input")?.focus();
}

export function setNotes(wordings, said) {
  boxes.replaceChildren(...Object.entries(wordings).map(([name, text]) =>
    make("label", {}, make("input", { type: "checkbox", value: name, checked: said.flags?.includes(name), onchange: () => onSay() }), ` ${text}`)));
  why.value = said.rationale ?? "";
  note.value = said.note ?? "";
  notes.open = Boolean(said.flags?.length || said.rationale || said.note);
}

export function drawNotes() {
  aside.hidden = !nothingNeedsARank() || unplaced() === 0;
  for (const each of [...boxes.querySelectorAll("input"), why, note]) each.disabled = board.locked;
}

export const notesSaid = () => ({ flags: checked(), rationale: why.value, note: note.value });
