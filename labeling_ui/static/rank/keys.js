// The keyboard. Nothing that ends or replaces the work on an item hangs on a single bare key.

import { ASIDE, LETTERS, POOL, board, move, nextCard, pick, shift, tieWithLast } from "./board.js";
import { toggleLong } from "./cards.js";
import { dialogOpen, guidelinesOpen, showGuidelines } from "./dialogs.js";

const NEED_SHIFT = ["S", "U"];

// The letter or digit on the key, whatever alphabet the keyboard writes. The row of digits writes other signs on many
// keyboards (French, Czech), unless shift is held.
function character(event) {
  const digit = /^Digit(\d)$/.exec(event.code);
  if (digit && !event.shiftKey) return digit[1];
  if (/^[\x20-\x7e]$/.test(event.key)) return event.key.toUpperCase();
  const physical = /^(?:Key([A-Z])|(?:Digit|Numpad)(\d))$/.exec(event.code);
  return physical && event.key.length === 1 ? physical[1] ?? physical[2] : event.key;
}

// `commands`: letter -> what to do; `submit`.
export function listen(commands, submit) {
  document.addEventListener("keydown", (event) => {
    if (event.isComposing || dialogOpen()) return;
    if (event.key === "Enter" && (event.ctrlKey || event.metaKey)) { event.preventDefault(); submit(); return; }
    if (event.ctrlKey || event.metaKey || event.altKey) return;
    if (event.target.closest?.("input[type=text], textarea, select, [contenteditable]")) {
      if (event.key === "Escape") event.target.blur();
      return;
    }
    if (onKey(event, commands)) event.preventDefault();
  });
}

function onKey(event, commands) {
  const key = character(event);
  if (key === "?") return run(commands["?"]);
  if (key === "Escape") return escape();
  const slot = key.length === 1 ? LETTERS.indexOf(key) : -1;
  const isCard = slot >= 0 && slot < board.count;
  if (commands[key] && (event.shiftKey || !(isCard || NEED_SHIFT.includes(key)))) return run(commands[key]);
  const digit = /^[0-9]$/.test(key);
  if ((event.shiftKey && !digit) || board.locked) return key === "+" || key === "=" ? run(tieWithLast) : false;
  if (isCard) return pickCard(slot);
  if (/^[1-9]$/.test(key)) return Number(key) <= board.count && run(() => move(nextCard(), Number(key) - 1));
  if (key === "0" || key === "-") return run(() => move(nextCard(), ASIDE));
  if (key === "=" || key === "+") return run(tieWithLast);
  if (key === "Backspace") return run(() => move(board.picked ?? board.last, POOL));
  if (board.picked === null) return false;
  if (key === "ArrowUp" || key === "ArrowDown") return run(() => shift(board.picked, key === "ArrowUp" ? -1 : 1));
  if (key === "Enter" && !event.target.closest?.("button:not(.card-letter, .chip), summary, a")) return run(() => toggleLong(board.picked));
  return false;
}

function run(what) {
  what?.();
  return true;
}

function pickCard(slot) {
  pick(slot);
  document.querySelector(`[data-focus="card-${slot}"]`)?.focus({ preventScroll: true });
  document.querySelectorAll("#cards .text-block")[slot]?.scrollIntoView({ block: "nearest", behavior: "instant" });
  return true;
}

function escape() {
  if (guidelinesOpen()) return run(() => showGuidelines(false));
  return board.picked !== null && run(() => pick(null));
}
