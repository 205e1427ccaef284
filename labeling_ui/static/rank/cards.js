// The prompt and the cards: Gradio renders the Markdown in them, this file draws what stands around it.
//
// Texts were made inert on the server by noncharacters (labeling_ui/markdown.py); `revive` puts the characters back,
// as text. A card shows Markdown only once the mark of this very task stands in it: were the Markdown of one text to
// fail, the text of the task before would stay. Until then, and on demand, it shows the text as written.

import { ASIDE, LETTERS, POOL, board, isRank, move, nextCard, where } from "./board.js";
import { button, make } from "./dom.js";
import { makeHandle } from "./rows.js";

const CHARACTERS = { "\ufdd0": "<", "\ufdd1": "&", "\ufdd2": "!", "\ufdd8": "%" };
const MARK = "\ufdd3";
const ROLES = { system: "Instructions", user: "Person", assistant: "Assistant" };
const restore = (text) => text.replace(/[\ufdd0-\ufdd2\ufdd8]/g, (each) => CHARACTERS[each]);
const BLOCKS = "p, li, ul, ol, h1, h2, h3, h4, h5, h6, blockquote, td, th, table";

let key = null;       // the mark of the task on the page
let onRate = () => {};
let touched = false;  // whether the annotator has scrolled the prompt
let ratings = {};     // criterion -> for each card 1 to 5, or null

export const rated = () => ratings;

// ---------------------------------------------------------------- texts

function revive(root) {
  const walker = document.createTreeWalker(root, NodeFilter.SHOW_TEXT);
  for (let node = walker.nextNode(); node; node = walker.nextNode()) {
    if (/[\ufdd0-\ufdd2\ufdd8]/.test(node.data)) node.data = restore(node.data);
  }
  for (const link of root.querySelectorAll("a[href]")) {  // shown, never followed
    link.title = restore(decodeURI_(link.getAttribute("href")));
    link.removeAttribute("href");
    link.removeAttribute("target");
  }
  for (const block of root.querySelectorAll(BLOCKS)) block.dir = "auto";
  const mark = root.querySelector("p");
  if (!mark?.textContent.startsWith(MARK)) return;
  mark.hidden = true;
  root.dataset.mark = mark.textContent.slice(1, -1);
}

function decodeURI_(text) {
  try { return decodeURI(text); } catch { return text; }
}

function formatted(block) {
  return block.querySelector(".block.model-text");
}

function drawText(block, text) {
  const written = block.querySelector(".written");
  written.textContent = text;
  written.dir = "auto";
  block.dataset.empty = String(!text.trim());
  freshen(block);
}

function freshen(block) {
  const root = formatted(block);
  block.dataset.form = key !== null && root.dataset.mark === key ? "markdown" : "written";
}

// Watches for Markdown that arrives after its task.
export function watchTexts() {
  for (const block of document.querySelectorAll(".text-block")) {
    const root = formatted(block);
    const look = () => { revive(root); freshen(block); requestAnimationFrame(measure); showLastTurn(); };
    new MutationObserver(look).observe(root, { childList: true, subtree: true });
    look();
  }
}

export function drawTexts(task) {
  key = task.key;
  touched = false;
  const turns = [...document.querySelectorAll("#prompt .text-block")];
  turns.forEach((block, index) => {
    const turn = task.turns[index];
    block.hidden = !turn;
    drawText(block, turn?.text ?? "");
    block.dataset.role = turn?.role ?? "";
    block.querySelector(".turn-head").textContent = turn?.role ? (ROLES[turn.role] ?? turn.role) : "";
  });
  cards().forEach((card, slot) => {
    card.hidden = slot >= task.count;
    drawText(card, task.texts[slot] ?? "");
    card.classList.remove("open");
  });
  document.getElementById("cards").dataset.count = task.count;
  ratings = Object.fromEntries(task.criteria.map((name) => [name, Array(task.count).fill(null)]));
  requestAnimationFrame(measure);
  showLastTurn();
}

// What the completions answer is the last turn of a conversation.
function showLastTurn() {
  const prompt = document.getElementById("prompt"), turns = prompt.querySelectorAll(".text-block:not([hidden])");
  if (turns.length > 1 && !touched) prompt.scrollTop = prompt.scrollHeight;
}

export const cards = () => [...document.querySelectorAll("#cards .text-block")];

// ---------------------------------------------------------------- long cards

// Marks the cards whose text does not fit, so that they offer to open.
export function measure() {
  for (const card of cards()) {
    const body = card.dataset.form === "markdown" && !document.body.classList.contains("as-written") ? formatted(card) : card.querySelector(".written");
    if (!card.classList.contains("open")) card.classList.toggle("long", body.scrollHeight > body.clientHeight + 4);
    const more = card.querySelector(".more");
    more.hidden = !card.classList.contains("long");
    more.firstChild.data = card.classList.contains("open") ? "Show less" : "Show all of it";
    more.setAttribute("aria-expanded", String(card.classList.contains("open")));
  }
}

export function toggleLong(slot) {
  cards()[slot]?.classList.toggle("open");
  measure();
}

export function toggleAllLong() {
  const long = cards().filter((card) => !card.hidden && card.classList.contains("long"));
  const open = !long.every((card) => card.classList.contains("open"));
  for (const card of long) card.classList.toggle("open", open);
  measure();
}

// ---------------------------------------------------------------- heads, ranks and ratings

// Once: what a card has besides its text. Its two containers are static, so Gradio never draws over them.
export function buildCards(rate) {
  onRate = rate;
  for (const name of ["wheel", "touchmove", "keydown", "pointerdown"]) document.getElementById("prompt").addEventListener(name, () => { touched = true; }, { passive: true });
  cards().forEach((card, slot) => {
    card.setAttribute("role", "group");
    card.setAttribute("aria-label", `Completion ${LETTERS[slot]}`);
    const letter = button(LETTERS[slot], null, { class: "card-letter", "data-focus": `card-${slot}`, title: "Click to pick, drag to a rank" });
    makeHandle(letter, slot);
    card.querySelector(".card-head").replaceChildren(letter, make("span", { class: "card-where" }),
      make("div", { class: "picks", role: "group", "aria-label": `Rank of ${LETTERS[slot]}` }));
    card.querySelector(".card-tail").append(button("", () => toggleLong(slot), { class: "more plain" }), make("div", { class: "ratings" }));
  });
}

export function drawCards() {
  const next = board.locked ? null : nextCard();
  cards().slice(0, board.count).forEach((card, slot) => {
    const place = board.places[slot];
    card.dataset.place = isRank(place) ? "ranked" : place;
    card.classList.toggle("next", slot === next);
    card.classList.toggle("picked", slot === board.picked);
    const letter = card.querySelector(".card-letter");
    letter.setAttribute("aria-label", `Completion ${LETTERS[slot]}, ${where(slot)}`);
    letter.setAttribute("aria-pressed", String(board.picked === slot));
    card.querySelector(".card-where").textContent = place === POOL ? "" : place === ASIDE ? "set aside" : "";
    card.querySelector(".picks").replaceChildren(...picks(slot));
    card.querySelector(".ratings").replaceChildren(...Object.keys(ratings).map((name) => rating(name, slot)));
  });
}

function picks(slot) {
  const letter = LETTERS[slot], here = board.places[slot];
  const choice = (place, text, title) => button(text, () => move(slot, here === place ? POOL : place),
    { disabled: board.locked, title, "aria-label": title, "aria-pressed": String(here === place), "data-focus": `pick-${slot}-${place}` });
  const ranks = Array.from({ length: board.count }, (_, row) => choice(row, String(row + 1), `Rank ${letter} ${row + 1}`));
  return [...ranks, choice(ASIDE, "–", `Set ${letter} aside`)];
}

function rating(name, slot) {
  const star = (value) => button(String(value), () => { ratings[name][slot] = ratings[name][slot] === value ? null : value; onRate(); },
    { disabled: board.locked, "aria-pressed": String(ratings[name][slot] === value), "aria-label": `${LETTERS[slot]}: ${name} ${value} of 5`,
      "data-focus": `rate-${name}-${slot}-${value}` });
  return make("div", { class: "rating", role: "group", "aria-label": `${LETTERS[slot]}: ${name}, 1 to 5, optional` },
    make("span", { dir: "auto" }, name), make("div", {}, ...[1, 2, 3, 4, 5].map(star)));
}

export function setRatings(said) {
  for (const name of Object.keys(ratings)) {
    if (Array.isArray(said?.[name]) && said[name].length === board.count) ratings[name] = [...said[name]];
  }
}
