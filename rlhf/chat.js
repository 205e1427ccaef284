// Keys outside the boxes, and the seconds that an answer takes. Knows no text of a model.
const KEYS = { a: "answer", n: "again", e: "example", r: "reset" };
document.addEventListener("keydown", (event) => {
  const busy = event.target.closest && event.target.closest("input, textarea, select, [contenteditable]");
  const typing = busy && !["radio", "checkbox"].includes(busy.type);
  if (event.ctrlKey || event.metaKey || event.altKey || event.isComposing) return;
  if (typing) {
    if (event.key === "Escape") event.target.blur();
    return;
  }
  if (event.key === "/") {
    event.preventDefault();
    document.querySelector("#prompt textarea").focus();
  } else if (KEYS[event.key]) {
    const button = document.getElementById(KEYS[event.key]);
    if (button) button.click();
  }
});
setInterval(() => {
  for (const place of document.querySelectorAll(".elapsed")) {
    place.dataset.since = place.dataset.since || Date.now();
    place.textContent = `${((Date.now() - place.dataset.since) / 1000).toFixed(1)} s`;
  }
}, 100);
// One question at a time: while one is being answered, and on the second click of a double click, asking does nothing.
const ASKS = "#answer, #again";
function guard(event, asks) {
  if (!asks) return;
  if (!document.querySelector(".waiting") && event.detail < 2) return;
  event.preventDefault();
  event.stopImmediatePropagation();
}
document.addEventListener("click", (event) => guard(event, event.target.closest(ASKS)), true);
document.addEventListener("keydown", (event) => {
  guard(event, event.key === "Enter" && !event.shiftKey && event.target.closest("#prompt textarea"));
}, true);
