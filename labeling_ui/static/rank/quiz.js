// Before the first item: the guidelines, and questions about them where there are any.

import { button, make } from "./dom.js";
import { ask } from "./server.js";

// Draws the quiz into `place`; `done` is called when it is passed and the annotator wants to begin.
export function drawQuiz(place, questions, done) {
  const fields = questions.map((question, index) => make("fieldset", { "data-question": index },
    make("legend", { dir: "auto" }, `${index + 1}. ${question.text}`),
    ...question.options.map((choice, value) => make("label", { dir: "auto" }, make("input", { type: "radio", name: `question-${index}`, value }), ` ${choice}`)),
    make("p", { class: "explained", role: "status" })));
  const status = make("p", { class: "status", role: "status" });
  const send = button("Check my answers", check, { class: "main" });
  place.replaceChildren(make("h2", {}, questions.length === 1 ? "One question before you begin" : `${questions.length} questions before you begin`),
    make("p", { class: "quiet" }, "Read the guidelines above. You may try as often as you like."), ...fields, make("div", { class: "actions" }, send), status);

  async function check() {
    const answers = fields.map((field) => Number(field.querySelector("input:checked")?.value ?? -1));
    if (answers.includes(-1)) {
      status.textContent = "Answer every question first.";
      fields[answers.indexOf(-1)].querySelector("input").focus();
      return;
    }
    send.disabled = true;
    try {
      explain(await ask("quiz", { answers }));
    } catch (error) {
      status.textContent = `Not saved: ${error.message}`;
    }
    send.disabled = false;
  }

  function explain(result) {
    fields.forEach((field, index) => {
      const { right, explanation } = result.answers[index];
      field.dataset.right = String(right);
      field.querySelector(".explained").textContent = `${right ? "Right." : "Not quite."} ${explanation ?? ""}`.trim();
    });
    if (!result.passed) {
      status.textContent = "Change the answers that are marked and check again.";
      fields.find((field) => field.dataset.right === "false")?.querySelector("input").focus();
      return;
    }
    status.textContent = "All right. Thank you.";
    const begin = button("Begin ranking", done, { class: "main" });
    send.replaceWith(begin);
    begin.focus();
  }
}
