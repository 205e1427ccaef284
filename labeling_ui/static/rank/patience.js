// The first script of the ranking page. A script or an answer may be lost on the way; then nothing comes, and there is
// nothing on the page yet that a reload could lose.
(() => {
  const FIRST = 10000, TRIES = 3;  // ms; twice as long each time, so that a slow network gets its time
  const name = "rlhf-reloads", tries = Number(sessionStorage.getItem(name) ?? 0);
  setTimeout(() => {
    if (document.body.dataset.screen) return sessionStorage.removeItem(name);
    sessionStorage.setItem(name, String((tries + 1) % (TRIES + 1)));
    if (tries < TRIES) return location.reload();
    document.body.prepend("The page does not come. Reload it; if that does not help, tell whoever runs this round.");
  }, FIRST * 2 ** tries);
})();
