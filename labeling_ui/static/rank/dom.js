// Small tools for drawing. What people or models wrote becomes a text node, never markup.

export function make(tag, attributes = {}, ...children) {
  const node = document.createElement(tag);
  for (const [name, value] of Object.entries(attributes)) {
    if (name.startsWith("on")) node.addEventListener(name.slice(2), value);
    else if (value !== null && value !== undefined && value !== false) node.setAttribute(name, value === true ? "" : value);
  }
  node.append(...children.filter((child) => child !== null && child !== undefined));
  return node;
}

export const box = (id) => document.querySelector(`#${id} .${id}`);

export const button = (text, onclick, attributes = {}, key = null) =>
  make("button", { type: "button", onclick, ...attributes }, text, key ? make("kbd", { "aria-hidden": "true" }, key) : null);

export const clock = (time = new Date()) => time.toLocaleTimeString([], { hour: "2-digit", minute: "2-digit" });

// Redraws what `draw` draws and leaves the focus where it was, or at its successor with the same `data-focus`.
export function keepingFocus(draw) {
  const key = document.activeElement?.dataset?.focus;
  draw();
  if (key && document.activeElement?.dataset?.focus !== key) document.querySelector(`[data-focus="${key}"]`)?.focus({ preventScroll: true });
}

const live = make("p", { class: "for-readers", role: "status", "aria-live": "polite" });

document.body.append(live);  // before it speaks: readers listen to what is there already

// Says something to those who listen to the page.
export function announce(text) {
  live.textContent = live.textContent === text ? `${text}\u00a0` : text;
}
