// Questions to the server. `Refused` is an answer; anything else that is thrown means that no answer came.

export class Refused extends Error {
  constructor(message, status) {
    super(message);
    this.status = status;
  }
}

// The path before ours in this browser, such as "/rank" behind a proxy.
export const base = new URL(window.gradio_config?.root ?? "/", document.baseURI).pathname.replace(/\/$/, "");

const TIMEOUT = 20000;  // ms

const wait = (ms) => new Promise((resolve) => setTimeout(resolve, ms));

async function once(name, message, keepalive) {
  const how = message === undefined ? {} : { method: "POST", headers: { "Content-Type": "application/json" }, body: JSON.stringify(message), keepalive };
  how.signal = AbortSignal.timeout(TIMEOUT);
  const answer = await fetch(`${base}/api/v1/${name}`, how);
  const said = await answer.json();
  if (!answer.ok) throw new Refused(typeof said.error === "string" ? said.error : `the server answered ${answer.status}`, answer.status);
  return said;
}

// Asks up to three times where no answer came: what is sent carries a key, or does no harm twice.
export async function ask(name, message, { keepalive = false, attempts = 3 } = {}) {
  for (let attempt = 1; ; attempt++) {
    try {
      return await once(name, message, keepalive);
    } catch (error) {
      const final = error instanceof Refused && error.status < 500 && error.status !== 429;
      if (final || attempt >= attempts) throw error;
      await wait(600 * attempt);
    }
  }
}
