// The ranking page. Gradio brings each task as `props.value` and the Markdown of its texts; the rest happens here.

import { ASIDE, POOL, board, onChange, onPlace, ranked, set, tiers, unplaced } from "./board.js";
import { buildCards, drawCards, drawTexts, measure, rated, setRatings, toggleAllLong, watchTexts } from "./cards.js";
import { buildGuidelines, openCompare, openHelp, openRecent, showGuidelines } from "./dialogs.js";
import { announce, box, button, clock, keepingFocus, make } from "./dom.js";
import { Drafts } from "./drafts.js";
import { buildFrame, draftStatus, drawMessage, drawProgress, drawSteps, hideTrouble, loginLink, say, sayDraft, showTrouble, status, toggleWritten } from "./frame.js";
import { listen } from "./keys.js";
import { buildNotes, drawNotes, notes, notesSaid, nothingNeedsARank, openNotes, setNotes } from "./notes.js";
import { drawQuiz } from "./quiz.js";
import { drawRows, rows } from "./rows.js";
import { Refused, ask } from "./server.js";

const PATIENCE = 15000;  // ms for the next task to come

let gradio = null;       // {props, watch, next}
let task = null;
let busy = false;        // nothing may be changed: it is being saved, or the next task is on its way
let asking = false;      // the server has not answered yet
let elsewhere = false;   // the task was ended in another tab
let ended = false;       // the session
let seconds = 0;         // looked at this task, while the page was visible
let since = 0;
let waiting = null;
let retry = null;        // what to do again once there is a session

const drafts = new Drafts(onDraft);
const submitButton = button("Submit ranking", submit, { class: "main submit", "data-focus": "submit" });
const skipButton = button("Skip", skip, { class: "plain", "data-focus": "skip", title: "Leave this item to others (Shift S)" });
const undoButton = button("Undo", undo, { class: "plain", "data-focus": "undo", title: "Take back your last submit or skip (Shift U)" });
const quiz = make("section", { class: "quiz", "aria-label": "Questions" });
const working = () => task?.screen === "rank";

export function start(tools) {
  gradio = tools;
  buildFrame({ task: () => task, reopen });
  buildCards(edited);
  buildNotes(edited);
  buildGuidelines();
  box("side").replaceChildren(rows, notes, make("div", { class: "bar" }, make("div", { class: "actions" }, submitButton, skipButton, undoButton), status, draftStatus));
  box("quiz-place").replaceChildren(quiz);
  onChange((text, changed) => { if (text) announce(text); if (changed) edited(); else draw(); });
  listen({ "?": openHelp, G: () => { if (task?.screen !== "quiz") showGuidelines(); }, R: () => openRecent(reopen), X: toggleAllLong, W: toggleWritten, N: openNotes,
    C: () => { if (working()) openCompare(task); }, S: skip, U: undo }, submit);
  watchTexts();
  gradio.watch("value", adopt);
  watchWindow();
  adopt();
}

// ---------------------------------------------------------------- one task after the other

function adopt() {
  const value = gradio.props.value;
  if (!value || value.person === undefined) return;
  clearTimeout(waiting);
  if (elsewhere) hideTrouble();
  retry = null;
  const other = !task || value.draft !== task.draft;
  task = value;
  busy = elsewhere = false;
  document.body.dataset.screen = task.screen;
  set(task.count, undefined);
  drawTexts(task);
  if (working()) takeUp(drafts.open(task.person, task) ?? saidBefore(task.before) ?? {});
  else drafts.close();
  drawMessage(task.message, undo, reopen);
  drawProgress(task.progress);
  drawSteps(task.person, task.progress.ranked);
  if (task.screen === "quiz") drawQuiz(quiz, task.questions, next);
  if (task.screen === "quiz" || task.screen === "rank") offerGuidelines();
  if (other) window.scrollTo({ top: 0 });
  if (other && working()) announce(`New item with ${task.count} completions`);
}

function takeUp(said) {
  set(task.count, Array.isArray(said.places) && said.places.length === task.count ? said.places : undefined);
  setNotes(task.wordings, said);
  setRatings(said.ratings);
  seconds = said.seconds ?? 0;
  since = performance.now();
  if (said.at) sayDraft("Your draft is back");
  else sayDraft("");
  draw();
}

function saidBefore(before) {
  if (!before) return null;
  const places = Array(task.count).fill(POOL);
  before.tiers.forEach((tier, row) => { for (const slot of tier) places[slot] = row; });
  for (const slot of before.aside) places[slot] = ASIDE;
  const flags = before.flags ?? {};
  return { places, flags: Object.keys(flags).filter((name) => flags[name] === true), note: flags.note, ratings: flags.ratings, rationale: before.rationale };
}

// The guidelines open by themselves the first time that there are new ones.
function offerGuidelines() {
  const { version, given } = task.guidelines, name = `rlhf-guidelines:${task.person}`;
  if (task.screen === "quiz") return showGuidelines(true, true);
  if (!given) return;
  try {
    if (localStorage.getItem(name) === String(version)) return;
    localStorage.setItem(name, String(version));
  } catch { return; }
  showGuidelines(true);
}

function next() {
  clearTimeout(waiting);
  waiting = setTimeout(() => showTrouble("The next item does not come.", button("Try again", next), button("Reload", () => location.reload())), PATIENCE);
  gradio.next();
}

// ---------------------------------------------------------------- what is being said

function lookedAt() {
  return seconds + (document.hidden ? 0 : (performance.now() - since) / 1000);
}

function edited() {
  say("");
  retry = null;  // what was refused is no longer what is said
  drafts.keep({ places: [...board.places], ratings: rated(), seconds: Math.round(lookedAt()), ...notesSaid() });
  draw();
}

function missing() {
  if (elsewhere) return "Done in another tab";
  if (unplaced()) return `${board.count - unplaced()} of ${board.count} placed`;
  if (ranked() >= 2 || (ranked() === 0 && nothingNeedsARank())) return null;
  return ranked() === 1 ? "Rank at least two" : "Rank two, or say why not";
}

function draw() {
  if (!working()) return;
  keepingFocus(() => {
    board.locked = busy || elsewhere;
    drawRows();
    drawCards();
    drawNotes();
    const reason = missing();
    submitButton.disabled = busy || reason !== null;
    submitButton.firstChild.data = busy ? "Saving…" : reason ?? "Submit ranking";
    skipButton.disabled = undoButton.disabled = busy;
    undoButton.hidden = task.progress.ranked + task.progress.skipped === 0;
  });
}

function message() {
  const said = notesSaid(), flags = Object.fromEntries(said.flags.map((name) => [name, true]));
  if (said.note.trim()) flags.note = said.note;
  const ratings = Object.fromEntries(Object.entries(rated()).filter(([, values]) => values.some((value) => value !== null)));
  if (Object.keys(ratings).length) flags.ratings = ratings;
  return { task: task.id, key: task.key, tiers: tiers(), aside: onPlace(ASIDE), flags, rationale: said.rationale || null, seconds: Math.round(lookedAt() * 10) / 10 };
}

// ---------------------------------------------------------------- what is done

async function act(name, what, done) {
  if (busy) return;
  busy = asking = true;
  say("");
  draw();
  try {
    await drafts.settle();
    const answer = await ask(name, what);
    asking = false;
    hideTrouble();
    ended = false;
    retry = null;
    say(done(answer), "good");
    next();
  } catch (error) {
    busy = asking = false;
    drafts.resume();
    failed(name, error, () => act(name, what, done));
    draw();
  }
}

function failed(name, error, again) {
  const refused = error instanceof Refused;
  if (refused && error.status === 401) return sessionEnded(again);
  if (refused && error.status === 409) return name === "submit" ? goneElsewhere(error.message) : say(error.message, "bad");
  say(refused ? `Not saved: ${error.message}. Your ranking is still here; try again.`
    : "Not saved, as far as this page knows: the server does not answer. Your ranking is still here; try again.", "bad");
}

function submit() {
  if (!working() || busy || missing() !== null) return;
  act("submit", message(), () => {
    drafts.drop();
    tellTabs();
    return `Saved ${clock()}`;
  });
}

function skip() {
  if (!working() || elsewhere) return;
  act("skip", { task: task.id }, () => {
    if (task.before) drafts.drop();  // an edit was broken off: what was said before stands
    tellTabs();
    return "Skipped";
  });
}

function undo() {
  if (task && task.progress.ranked + task.progress.skipped > 0) {
    act("undo", { task: task.last }, (answer) => (answer.task === null ? "There is nothing to undo" : "Taken back: change it and submit again"));
  }
}

function reopen(id) {
  act("reopen", { task: id }, () => "Here it is again: change it and submit");
}

// ---------------------------------------------------------------- drafts, sessions, tabs

function onDraft(state, error) {
  if (state === "unsent") return sayDraft("Saving your draft…");
  if (state === "failed") {
    if (error instanceof Refused && error.status === 401) sessionEnded();
    else if (error instanceof Refused && error.status === 409) goneElsewhere(error.message);
    return sayDraft("Draft kept in this browser only", "bad");
  }
  sayDraft(`Draft saved ${clock()}`);
  if (ended) sessionBack();
}

function sessionEnded(again = null) {
  ended = true;
  retry = again ?? retry;
  showTrouble("Your session has ended. Your draft is kept in this browser. Log in, then come back to this tab.", loginLink(), button("Try again", tryAgain));
}

function sessionBack() {
  ended = false;
  hideTrouble();
  const again = retry;
  retry = null;
  again?.();
}

async function tryAgain() {
  if (!drafts.unsent && retry) return sessionBack();
  await drafts.flush();
}

const doneName = () => `rlhf-done:${task.person}`;

function tellTabs() {
  try { localStorage.setItem(doneName(), JSON.stringify({ draft: task.draft, at: Date.now() })); } catch { /* they will hear it from the server */ }
}

function goneElsewhere(reason) {
  elsewhere = true;
  showTrouble(`${reason} Nothing is lost: Recent shows what was saved.`, button("Next item", () => { hideTrouble(); drafts.drop(); next(); }));
  draw();
}

function onStorage(event) {
  if (!working() || busy) return;
  if (event.key === doneName() && event.newValue && JSON.parse(event.newValue).draft === task.draft) return goneElsewhere("This item was ended in another tab.");
  const draft = drafts.fromOtherTab(event);
  if (draft) { takeUp(draft); sayDraft("Changed in another tab"); }
}

function watchWindow() {
  window.addEventListener("storage", onStorage);
  window.addEventListener("resize", measure);
  window.addEventListener("beforeunload", (event) => { if (drafts.unsent || asking) event.preventDefault(); });
  window.addEventListener("pagehide", () => drafts.flush({ keepalive: true, attempts: 1 }));
  window.addEventListener("focus", () => { if (ended) tryAgain(); });
  document.addEventListener("visibilitychange", () => {
    if (document.hidden) { seconds += (performance.now() - since) / 1000; drafts.flush({ keepalive: true, attempts: 1 }); }
    else since = performance.now();
  });
  setInterval(() => { if (drafts.unsent && !busy && !ended) drafts.flush({ attempts: 1 }); }, 20000);
}
