// The panel with the pool, the ranks and the letters in them: click, drag and touch.

import { ASIDE, LETTERS, POOL, board, isRank, move, onPlace, pick, where } from "./board.js";
import { make } from "./dom.js";

const panel = make("div", { class: "rows" });
let dragged = false;

export const rows = panel;

export function drawRows() {
  const ranks = Array.from({ length: board.count }, (_, row) => drawRow(row, String(row + 1), row === 0 ? "best" : row === board.count - 1 ? "worst" : ""));
  panel.replaceChildren(drawRow(POOL, "To place", ""), ...ranks, drawRow(ASIDE, "Set aside", "not ranked"));
  panel.classList.toggle("picking", board.picked !== null);
}

function drawRow(place, label, note) {
  const slots = onPlace(place), name = isRank(place) ? `Rank ${label}${note ? `, ${note}` : ""}` : label;
  return make("div", { class: "rank-row", "data-row": place, role: "group", "aria-label": name, onclick: () => { if (board.picked !== null) move(board.picked, place); } },
    make("span", { class: "row-label" }, make("b", {}, label), note ? make("small", {}, note) : null),
    make("div", { class: "chips" }, ...slots.map(chip), slots.length > 1 && isRank(place) ? make("em", {}, "tie") : null));
}

function chip(slot) {
  const node = make("button", { type: "button", class: "chip", "data-slot": slot, "data-focus": `chip-${slot}`, disabled: board.locked,
    "aria-pressed": String(board.picked === slot), "aria-label": `Completion ${LETTERS[slot]}, ${where(slot)}` }, LETTERS[slot]);
  makeHandle(node, slot);
  return node;
}

// A letter that can be clicked to pick its card, and dragged to a row.
export function makeHandle(node, slot) {
  node.addEventListener("pointerdown", (event) => startDrag(event, slot, node));
  node.addEventListener("click", (event) => { event.stopPropagation(); if (!dragged) pick(board.picked === slot ? null : slot); });
}

const rowAt = (at) => document.elementsFromPoint(at.clientX, at.clientY).map((each) => each.closest?.(".rank-row")).find(Boolean);

function startDrag(start, slot, node) {
  dragged = false;
  if (start.button !== 0 || board.locked) return;
  node.setPointerCapture(start.pointerId);
  const listeners = { pointermove: onMove, pointerup: onEnd, pointercancel: onEnd };
  for (const [name, listener] of Object.entries(listeners)) node.addEventListener(name, listener);

  function onMove(at) {
    const [x, y] = [at.clientX - start.clientX, at.clientY - start.clientY];
    if (!dragged && Math.hypot(x, y) < 6) return;
    dragged = true;
    node.classList.add("dragging");
    node.style.transform = `translate(${x}px, ${y}px)`;
    const over = rowAt(at);
    for (const row of panel.children) row.classList.toggle("over", row === over);
  }

  function onEnd(at) {
    for (const [name, listener] of Object.entries(listeners)) node.removeEventListener(name, listener);
    node.classList.remove("dragging");
    node.style.transform = "";
    for (const row of panel.children) row.classList.remove("over");
    if (!dragged) return;
    setTimeout(() => { dragged = false; });  // the click that follows a drag picks nothing
    const name = at.type === "pointerup" ? rowAt(at)?.dataset.row : undefined;
    if (name !== undefined) move(slot, name === POOL || name === ASIDE ? name : Number(name));
  }
}
