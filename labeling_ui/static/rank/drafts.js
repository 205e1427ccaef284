// What is not submitted yet: at once into this browser, and a moment later to the server.

import { ask } from "./server.js";

const PAUSE = 1000;  // ms without a change before the server is told

export class Drafts {
  #name = null;      // of this person's draft of this task in this browser
  #task = null;
  #timer = null;
  #sending = null;
  #unsent = null;
  #held = false;     // nothing is sent: something else is on its way that must not be overtaken
  #report;

  // `report(state, error)`: "unsent", "saved" or "failed".
  constructor(report) {
    this.#report = report;
  }

  // The newest draft of a task, of this browser's and the server's; null without any.
  open(person, task) {
    clearTimeout(this.#timer);
    this.#task = task.id;
    this.#unsent = null;
    this.#held = false;
    this.#name = `rlhf-draft:${person}:${task.draft}`;
    const [here, there] = [this.#read(), task.saved];
    if (here && !(here.at <= task.said_at) && (!there || here.at > there.at)) {
      this.#later(here);
      return here;
    }
    return there ?? null;
  }

  close() {
    clearTimeout(this.#timer);
    this.#unsent = this.#name = null;
  }

  keep(said) {
    if (this.#name === null) return;
    const draft = { ...said, at: Date.now() };
    try { localStorage.setItem(this.#name, JSON.stringify(draft)); } catch { /* full or forbidden: the server has it in a moment */ }
    this.#later(draft);
  }

  get unsent() {
    return this.#unsent !== null;
  }

  // Another tab's newer draft of the same task, from a storage event; null where it is none.
  fromOtherTab(event) {
    if (event.key !== this.#name || !event.newValue) return null;
    clearTimeout(this.#timer);
    this.#unsent = null;
    return this.#read();
  }

  async flush(options = {}) {
    clearTimeout(this.#timer);
    await this.#sending;
    const draft = this.#unsent;
    if (draft === null || this.#held) return;
    this.#sending = this.#send(draft, options);
    await this.#sending;
  }

  // Waits for a draft under way and sends no other, so that none can arrive after what is done next.
  async settle() {
    clearTimeout(this.#timer);
    this.#held = true;
    await this.#sending;
  }

  // Goes on after `settle`, where what came next failed.
  resume() {
    this.#held = false;
    if (this.#unsent !== null) this.#later(this.#unsent);
  }

  drop() {
    clearTimeout(this.#timer);
    this.#unsent = null;
    try { localStorage.removeItem(this.#name); } catch { /* nothing was kept */ }
  }

  #later(draft) {
    this.#unsent = draft;
    this.#report("unsent");
    clearTimeout(this.#timer);
    this.#timer = setTimeout(() => this.flush(), PAUSE);
  }

  async #send(draft, options) {
    const task = this.#task;
    try {
      await ask("draft", { task, body: draft }, { attempts: 2, ...options });
      if (this.#unsent === draft) {
        this.#unsent = null;
        this.#report("saved");
      }
    } catch (error) {
      if (task === this.#task) this.#report("failed", error);  // of an item that is gone from the page it is no news
    }
  }

  #read() {
    try { return JSON.parse(localStorage.getItem(this.#name)); } catch { return null; }
  }
}
