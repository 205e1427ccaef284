// What opens over the page: the keys, two cards compared, what was done lately. And the drawer with the guidelines.

import { LETTERS, board } from "./board.js";
import { box, button, clock, make } from "./dom.js";
import { ask } from "./server.js";

export const dialogOpen = () => Boolean(document.querySelector("dialog[open]"));

function open(title, name, ...children) {
  const close = () => node.close();
  const node = make("dialog", { class: `over ${name}`, "aria-label": title, onclose: () => node.remove(),
    onclick: (event) => { if (event.target === node) close(); } },  // the backdrop
    make("div", { class: "over-inside" }, make("header", {}, make("h2", {}, title), button("Close", close, { class: "plain" }, "Esc")), ...children));
  document.body.append(node);
  node.showModal();
  return node;
}

// ---------------------------------------------------------------- keys

const KEYS = [
  ["A B C …", "pick a card"], ["1 2 3 …", "put it there; with no card picked, the next one to place"], ["0", "set it aside"],
  ["=", "tie it with the card placed last"], ["↑ ↓", "move the picked card"], ["Backspace", "put it back among those to place"],
  ["Enter", "show all of the picked card, or less"], ["Ctrl Enter", "submit"], ["Shift S", "skip"], ["Shift U", "undo the last submit or skip"],
  ["Shift C", "compare two cards"], ["Shift X", "show all of every card, or less"], ["Shift W", "texts as written, or formatted"],
  ["Shift N", "flags and notes"], ["Shift G", "guidelines"], ["Shift R", "what you did lately"], ["?", "this list"], ["Esc", "close; drop what is picked"],
];

export function openHelp() {
  open("Keyboard", "help", make("dl", {}, ...KEYS.flatMap(([keys, what]) => [make("dt", {}, ...keys.split(" ").map((key) => make("kbd", {}, key))), make("dd", {}, what)])),
    make("p", { class: "quiet" }, "C, G, N, R, W and X work without Shift, too, where no card has that letter."));
}

// ---------------------------------------------------------------- two cards compared

const shownCharacters = 20000;  // what the server compares of each text

export function openCompare(task, first = board.picked ?? 0) {
  if (!board.count || dialogOpen()) return;
  let pair = [first, first === 0 ? 1 : 0];
  const sides = [make("div", { class: "half" }), make("div", { class: "half" })];
  const note = make("p", { class: "quiet", role: "status" });
  const chosen = [0, 1].map((side) => make("select", { "aria-label": side ? "Second card" : "First card", onchange: (event) => choose(side, Number(event.target.value)) },
    ...Array.from({ length: board.count }, (_, slot) => make("option", { value: slot }, LETTERS[slot]))));
  const node = open("Compare", "compare", make("p", { class: "pair" }, chosen[0], " with ", chosen[1], " ",
    make("span", { class: "quiet" }, "A letter key changes the second card. Marked words stand in one of the two only.")), note, make("div", { class: "sides" }, ...sides));
  node.addEventListener("keydown", (event) => {
    const slot = LETTERS.indexOf(event.key.toUpperCase());
    if (event.key.length === 1 && !event.ctrlKey && !event.metaKey && slot >= 0 && slot < board.count) { event.preventDefault(); choose(1, slot); }
  });
  choose(1, pair[1]);

  async function choose(side, slot) {
    if (slot === pair[1 - side]) pair[1 - side] = pair[side];
    pair[side] = slot;
    const asked = pair.join();
    chosen.forEach((select, index) => { select.value = pair[index]; });
    note.textContent = "";
    try {
      const answer = await ask("diff", { task: task.id, first: pair[0], second: pair[1] });
      if (asked !== pair.join()) return;
      draw(answer.parts);
    } catch (error) {
      note.textContent = `Could not compare: ${error.message}`;
    }
  }

  function draw(pieces) {
    sides.forEach((side, index) => {
      const mine = pieces.filter(([kind]) => kind === "same" || kind === (index ? "new" : "gone"));
      side.replaceChildren(make("h3", {}, LETTERS[pair[index]]),
        make("div", { class: "words", dir: "auto" }, ...mine.map(([kind, text]) => (kind === "same" ? text : make("mark", { class: kind }, text)))));
    });
    const cut = pair.some((slot) => task.texts[slot].length > shownCharacters);
    const equal = pieces.every(([kind]) => kind === "same");
    note.textContent = [equal ? "The two are the same, word for word." : "", cut ? `Only the first ${shownCharacters} characters are compared.` : ""].join(" ").trim();
  }
}

// ---------------------------------------------------------------- what was done lately

export async function openRecent(reopen) {
  if (dialogOpen()) return;
  const list = make("ul", {}, make("li", { class: "quiet" }, "…"));
  const node = open("Recent", "recent", list);
  try {
    const answer = await ask("recent");
    const past = answer.tasks;
    list.replaceChildren(...past.map((each) => make("li", {}, make("span", { class: "past", dir: "auto" }, each.prompt_start),
      make("span", { class: "quiet" }, `${each.state} ${clock(new Date(each.at))}`),
      each.editable ? button("Change", () => { node.close(); reopen(each.task_id); }, { "aria-label": `Change: ${each.prompt_start}` }) : make("span", { class: "quiet" }, "closed"))));
    if (!past.length) list.replaceChildren(make("li", { class: "quiet" }, "Nothing yet. What you submit and skip is listed here, to be changed."));
    list.querySelector("button")?.focus();
  } catch (error) {
    list.replaceChildren(make("li", { role: "alert" }, `Could not be read: ${error.message}`));
  }
}

// ---------------------------------------------------------------- guidelines

const drawer = () => document.getElementById("guidelines");
let before = null;

export function buildGuidelines() {
  drawer().setAttribute("role", "region");
  drawer().setAttribute("aria-label", "Guidelines");
  box("guidelines-head").append(make("h2", { tabindex: "-1" }, "Guidelines"), button("Close", () => showGuidelines(false), { class: "plain" }, "Esc"));
  showGuidelines(false);
}

export const guidelinesOpen = () => !drawer().hidden;

export function showGuidelines(shown = !guidelinesOpen(), quietly = false) {
  if (shown && drawer().hidden) before = document.activeElement;
  drawer().hidden = !shown;
  document.body.classList.toggle("beside-guidelines", shown);
  if (shown && quietly) return;
  if (shown) drawer().querySelector("h2").focus({ preventScroll: true });
  else before?.focus?.({ preventScroll: true });
}
