// The ranking widget. It knows letters only: no model text ever reaches this script.
// Gradio runs it once with `element`, `props`, `trigger` and `watch`; `props.value` is the task to rank.

const LETTERS = "ABCDEFGHIJKLMNOPQRSTUVWXYZ";
const POOL = "pool", ASIDE = "aside";
const root = element.querySelector(".rank") || element;
let task = null;      // {id, key, count, draft, before, ranked, remaining, skipped, wordings}
let places = [];      // for each letter: POOL, ASIDE, or a row number from 0
let picked = null;    // the letter that the next row click moves
let busy = false;
let shownAt = 0;
let waiting = null;   // runs out when the next task does not come

// ---------------------------------------------------------------- building blocks

function make(tag, attributes = {}, ...children) {
  const node = document.createElement(tag);
  for (const [name, value] of Object.entries(attributes)) {
    if (name.startsWith("on")) node.addEventListener(name.slice(2), value);
    else if (value !== null && value !== false) node.setAttribute(name, value === true ? "" : value);
  }
  node.append(...children);
  return node;
}

const status = make("p", { class: "rank-status", role: "status", "aria-live": "polite" });
const body = make("div", { class: "rank-body" });
const rationale = make("textarea", { rows: 2, maxlength: 4000, "aria-label": "Why (optional)", oninput: saveDraft });
const flags = make("div", { class: "rank-flags" });
const notes = make("details", { class: "rank-notes" }, make("summary", {}, "Notes and flags (optional)"), flags, rationale);
rationale.placeholder = "Why this order? (optional)";
const submitButton = make("button", { type: "button", class: "rank-submit", onclick: submit }, "Submit ranking");
const skipButton = make("button", { type: "button", class: "rank-plain", onclick: skip }, "Skip");
const undoButton = make("button", { type: "button", class: "rank-plain", onclick: undo, title: "Take back your last ranking or skip" }, "Undo");
const actions = make("div", { class: "rank-actions" }, submitButton, skipButton, undoButton);
const help = make("details", { class: "rank-help" }, make("summary", {}, "Keyboard"),
  make("dl", {}, ...[["A B C …", "pick a card"], ["1 2 3 …", "put it on that rank"], ["↑ ↓", "move it"], ["0", "set it aside"],
    ["Backspace", "take it back"], ["Ctrl + Enter", "submit"]].flatMap(([keys, what]) => [make("dt", {}, keys), make("dd", {}, what)])));

function say(text, kind = "") {
  status.textContent = text;
  status.dataset.kind = kind;
}

const rankName = (row) => (row === 0 ? "best" : row === task.count - 1 ? "worst" : "");
const placed = () => places.filter((place) => place !== POOL).length;
const ranked = () => places.filter((place) => typeof place === "number").length;
const ready = () => task && task.id !== null && !busy && placed() === task.count && ranked() >= 2;

// ---------------------------------------------------------------- drawing

function chip(slot) {
  const letter = LETTERS[slot], place = places[slot];
  const where = place === POOL ? "not placed" : place === ASIDE ? "set aside" : `rank ${place + 1}`;
  const node = make("button", { type: "button", class: "rank-chip", "data-slot": slot, "aria-pressed": String(picked === slot),
    "aria-label": `Completion ${letter}, ${where}`, disabled: busy }, letter);
  node.addEventListener("pointerdown", (event) => startDrag(event, slot, node));
  node.addEventListener("click", (event) => { event.stopPropagation(); if (!dragged) { pick(picked === slot ? null : slot); } });
  node.addEventListener("dblclick", (event) => event.preventDefault());
  return node;
}

function row(place, label, note) {
  const slots = places.flatMap((each, slot) => (each === place ? [slot] : []));
  const name = typeof place === "number" ? `Rank ${label}${note ? ", " + note : ""}` : label;
  return make("div", { class: "rank-row", "data-row": place, role: "group", "aria-label": name,
    onclick: () => { if (picked !== null) move(picked, place); } },
    make("span", { class: "rank-label" }, make("b", {}, label), note ? make("small", {}, note) : ""),
    make("div", { class: "rank-chips" }, ...slots.map(chip), slots.length > 1 && typeof place === "number" ? make("em", {}, "tie") : ""));
}

function draw() {
  const focused = root.contains(document.activeElement) ? document.activeElement.dataset.slot : undefined;
  const none = !task || task.id === null;
  body.replaceChildren();
  if (!none) {
    body.append(row(POOL, "To place", ""),
      ...Array.from({ length: task.count }, (_, place) => row(place, String(place + 1), rankName(place))),
      row(ASIDE, "Set aside", "cannot judge"));
  }
  for (const node of [notes, help, submitButton, skipButton]) node.hidden = none;
  submitButton.disabled = !ready();
  submitButton.textContent = none || ready() || busy ? (busy ? "Saving…" : "Submit ranking") : hint();
  skipButton.disabled = undoButton.disabled = busy;
  undoButton.hidden = !task || task.ranked + task.skipped === 0;
  if (focused !== undefined) root.querySelector(`[data-slot="${focused}"]`)?.focus();
  drawProgress();
  drawCards();
}

function hint() {
  return placed() < task.count ? `${placed()} of ${task.count} placed` : "Rank at least two";
}

function drawProgress() {
  const node = document.querySelector("#progress .progress-text"), bar = document.querySelector("#progress progress");
  if (!task || !node) return;
  const skipped = task.skipped ? ` · ${task.skipped} skipped` : "";
  node.textContent = `${task.ranked} ranked · ${task.remaining} to go${skipped}`;
  bar.max = Math.max(task.ranked + task.remaining, 1);
  bar.value = task.ranked;
}

// Each card carries its own row of ranks, so that nobody has to scroll to the widget and back.
function drawCards() {
  const cards = document.getElementById("cards"), prompt = document.getElementById("prompt");
  if (!cards || !task) return;
  prompt.dataset.finished = String(task.id === null);
  cards.dataset.count = task.id === null ? 0 : task.count;
  for (const picks of cards.querySelectorAll(".card-picks")) {
    const slot = Number(picks.dataset.slot);
    const unused = task.id === null || slot >= task.count;
    picks.replaceChildren();
    picks.closest(".card").hidden = unused;
    if (unused) continue;
    const choice = (place, text, title) => make("button", { type: "button", disabled: busy, title, "aria-label": title,
      "aria-pressed": String(places[slot] === place), onclick: () => move(slot, places[slot] === place ? POOL : place) }, text);
    for (let place = 0; place < task.count; place++) picks.append(choice(place, String(place + 1), `Rank ${LETTERS[slot]} ${place + 1}`));
    picks.append(choice(ASIDE, "–", `Set ${LETTERS[slot]} aside`));
    picks.closest(".card").dataset.place = places[slot];
  }
}

// ---------------------------------------------------------------- moving letters

function pick(slot) {
  picked = slot;
  draw();
  if (slot !== null) root.querySelector(`[data-slot="${slot}"]`)?.focus();
}

function move(slot, place) {
  if (busy || !task || task.id === null) return;
  places[slot] = place;
  picked = null;
  saveDraft();
  say("");
  draw();
}

function shift(slot, step) {
  const order = [POOL, ...Array.from({ length: task.count }, (_, place) => place), ASIDE];
  const at = order.indexOf(places[slot]) + step;
  if (at < 0 || at >= order.length) return;
  move(slot, order[at]);
  pick(slot);
}

let dragged = false;

function startDrag(event, slot, node) {
  if (event.button !== 0 || busy) return;
  const from = [event.clientX, event.clientY];
  dragged = false;
  node.setPointerCapture(event.pointerId);
  const over = (at) => document.elementsFromPoint(at.clientX, at.clientY).map((each) => each.closest?.(".rank-row")).find(Boolean);
  const mark = (target) => root.querySelectorAll(".rank-row").forEach((each) => each.classList.toggle("over", each === target));
  const onMove = (at) => {
    const [x, y] = [at.clientX - from[0], at.clientY - from[1]];
    if (!dragged && Math.hypot(x, y) < 6) return;
    dragged = true;
    node.classList.add("dragging");
    node.style.transform = `translate(${x}px, ${y}px)`;
    mark(over(at));
  };
  const onEnd = (at) => {
    for (const [name, listener] of [["pointermove", onMove], ["pointerup", onEnd], ["pointercancel", onEnd]]) node.removeEventListener(name, listener);
    if (!dragged) return;
    const target = at.type === "pointerup" ? over(at) : null;
    if (target) move(slot, target.dataset.row === POOL || target.dataset.row === ASIDE ? target.dataset.row : Number(target.dataset.row));
    else draw();
    setTimeout(() => { dragged = false; });  // the click that follows a drag picks nothing
  };
  for (const [name, listener] of [["pointermove", onMove], ["pointerup", onEnd], ["pointercancel", onEnd]]) node.addEventListener(name, listener);
}

function onKey(event) {
  if (!task || task.id === null || busy || event.isComposing) return;
  if (event.key === "Enter" && (event.ctrlKey || event.metaKey)) { event.preventDefault(); submit(); return; }
  if (event.ctrlKey || event.metaKey || event.altKey || event.target.closest?.("input, textarea, select, [contenteditable]")) return;
  const slot = LETTERS.indexOf(event.key.toUpperCase()), digit = Number(event.key);
  if (event.key.length === 1 && slot >= 0 && slot < task.count) pick(slot);
  else if (picked === null) return;
  else if (event.key === "0") move(picked, ASIDE);
  else if (Number.isInteger(digit) && digit >= 1 && digit <= task.count) move(picked, digit - 1);
  else if (event.key === "Backspace") move(picked, POOL);
  else if (event.key === "ArrowUp") shift(picked, -1);
  else if (event.key === "ArrowDown") shift(picked, 1);
  else if (event.key === "Escape") pick(null);
  else return;
  event.preventDefault();
}

// ---------------------------------------------------------------- drafts: what was placed survives a reload

const draftName = () => `rlhf-draft-${task.draft}`;

function saveDraft() {
  if (!task || task.id === null) return;
  const chosen = [...flags.querySelectorAll("input:checked")].map((box) => box.value);
  try { localStorage.setItem(draftName(), JSON.stringify({ places, flags: chosen, rationale: rationale.value })); } catch { /* storage is full or off */ }
}

function readDraft() {
  try {
    const draft = JSON.parse(localStorage.getItem(draftName()));
    return draft && draft.places.length === task.count ? draft : null;
  } catch { return null; }
}

// What was said before an undo, in the form of a draft.
function taskBefore() {
  const before = task.before;
  if (!before) return null;
  const places = Array(task.count).fill(ASIDE);
  before.tiers.forEach((tier, place) => tier.forEach((slot) => { places[slot] = place; }));
  return { places, flags: Object.keys(before.flags), rationale: before.rationale };
}

function dropDraft() {
  try { localStorage.removeItem(draftName()); } catch { /* as above */ }
}

// ---------------------------------------------------------------- talking to the server

async function post(name, message) {
  const wait = (ms) => new Promise((resolve) => setTimeout(resolve, ms));
  for (let attempt = 0; ; attempt++) {
    try {
      const answer = await fetch(`api/v1/${name}`, { method: "POST", headers: { "Content-Type": "application/json" }, body: JSON.stringify(message) });
      const said = await answer.json();
      if (answer.ok) return said;
      const error = new Error(said.error || `the server answered ${answer.status}`);
      error.final = answer.status < 500;
      throw error;
    } catch (error) {  // no answer, or a broken one: the same key makes it safe to ask again
      if (error.final || attempt === 2) throw error;
      await wait(600 * (attempt + 1));
    }
  }
}

async function act(name, message, done) {
  if (busy) return;
  busy = true;
  say("");
  draw();
  try {
    const answer = await post(name, message);
    say(done(answer), "good");
    next();
  } catch (error) {
    busy = false;
    say(`Not saved: ${error.message}. Your ranking is still here; try again.`, "bad");
    draw();
  }
}

function submit() {
  if (!ready()) return;
  const slotsAt = (place) => places.flatMap((each, slot) => (each === place ? [slot] : []));
  const tiers = Array.from({ length: task.count }, (_, place) => slotsAt(place)).filter((tier) => tier.length);
  const chosen = Object.fromEntries([...flags.querySelectorAll("input:checked")].map((box) => [box.value, true]));
  const message = { task: task.id, key: task.key, tiers, aside: slotsAt(ASIDE), flags: chosen,
    rationale: rationale.value || null, seconds: Math.round((performance.now() - shownAt) / 100) / 10 };
  act("submit", message, () => { dropDraft(); return `Saved ${new Date().toLocaleTimeString([], { hour: "2-digit", minute: "2-digit" })}`; });
}

function skip() {
  if (task && task.id !== null) act("skip", { task: task.id }, () => "Skipped");
}

function undo() {
  act("undo", {}, (answer) => (answer.task === null ? "There is nothing to undo" : "Taken back: change it and submit again"));
}

function next() {
  clearTimeout(waiting);
  waiting = setTimeout(() => say(`${status.textContent}. The next task does not come: reload the page.`, "bad"), 10000);
  trigger("next");
}

function adopt() {
  clearTimeout(waiting);
  const value = props.value;
  if (!value || value.key === undefined) return;
  const fresh = !task || value.draft !== task.draft;
  task = value;
  busy = false;
  picked = null;
  const said = (task.id !== null && readDraft()) || taskBefore() || {};
  places = said.places || Array(task.count).fill(POOL);
  rationale.value = said.rationale || "";
  flags.replaceChildren(...Object.entries(task.wordings).map(([name, text]) => {
    const box = make("input", { type: "checkbox", value: name, onchange: saveDraft });
    box.checked = Boolean(said.flags && said.flags.includes(name));
    return make("label", {}, box, " " + text);
  }));
  notes.open = Boolean(said.rationale || (said.flags && said.flags.length));
  shownAt = performance.now();
  attach();
  draw();
  if (fresh) window.scrollTo({ top: 0 });
}

function attach() {
  if (!body.isConnected) (element.querySelector(".rank") || element).replaceChildren(body, notes, actions, status, help);
}

if (window.__rankKeys) document.removeEventListener("keydown", window.__rankKeys);
window.__rankKeys = onKey;
document.addEventListener("keydown", onKey);
watch("value", adopt);
attach();
adopt();
