// The ranking in the making. No drawing here: `onChange` tells those who draw and keep it.

export const LETTERS = "ABCDEFGHIJKLMNOPQRSTUVWXYZ";
export const POOL = "pool";
export const ASIDE = "aside";

export const board = {
  count: 0,
  places: [],     // of each card: POOL, ASIDE, or a row number from 0
  picked: null,   // the card that the next row or digit takes
  last: null,     // the card that was moved last
  locked: true,   // nothing moves: it is being saved, or there is nothing to rank
};

let changed = () => {};
export const onChange = (listener) => { changed = listener; };

export const isRank = (place) => typeof place === "number";
export const onPlace = (place) => board.places.flatMap((each, slot) => (each === place ? [slot] : []));
export const tiers = () => Array.from({ length: board.count }, (_, row) => onPlace(row)).filter((tier) => tier.length);
export const unplaced = () => onPlace(POOL).length;
export const ranked = () => board.places.filter(isRank).length;

// The card that a digit takes when none was picked: the first that is not placed yet.
export const nextCard = () => (board.picked ?? (onPlace(POOL)[0] ?? null));

export function set(count, places) {
  Object.assign(board, { count, places: places ?? Array(count).fill(POOL), picked: null, last: null, locked: count === 0 });
}

export function where(slot) {
  const place = board.places[slot];
  if (place === POOL) return "not placed";
  if (place === ASIDE) return "set aside";
  const others = onPlace(place).filter((each) => each !== slot).map((each) => LETTERS[each]);
  return `rank ${place + 1}${others.length ? `, tied with ${others.join(" and ")}` : ""}`;
}

export function pick(slot) {
  if (board.locked) return;
  board.picked = slot;
  changed(slot === null ? "" : `${LETTERS[slot]} picked, ${where(slot)}`, false);
}

export function move(slot, place) {
  if (board.locked || slot === null) return;
  board.places[slot] = place;
  board.picked = null;
  board.last = slot;
  const left = unplaced();
  changed(`${LETTERS[slot]}: ${where(slot)}. ${left ? `${left} left to place` : "All are placed"}`, true);
}

export function tieWithLast() {
  if (board.last !== null && nextCard() !== board.last) move(nextCard(), board.places[board.last]);
}

export function shift(slot, step) {
  const order = [POOL, ...Array.from({ length: board.count }, (_, row) => row), ASIDE];
  const place = order[order.indexOf(board.places[slot]) + step];
  if (place === undefined) return;
  move(slot, place);
  pick(slot);
}

export function setAllAside() {
  if (board.locked) return;
  board.places.fill(ASIDE);
  board.picked = null;
  changed("All are set aside", true);
}
