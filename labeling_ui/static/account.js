// In the head of every Gradio page behind a login. Each write of this site carries the session's CSRF token, Gradio's
// own writes too; and a bar says who is logged in. Other sites can neither read that cookie nor send this header.
(() => {
  const token = () => (document.cookie.match(/(?:^|; )(?:__Host-)?rlhf-csrf=([^;]*)/) || ["", ""])[1];
  const send = window.fetch;
  window.fetch = (input, init = {}) => {
    const asked = input instanceof Request ? input : null;
    const method = (init.method || (asked && asked.method) || "GET").toUpperCase();
    const here = new URL(asked ? asked.url : input, document.baseURI).origin === location.origin;
    if (!here || method === "GET" || method === "HEAD") return send.call(window, input, init);
    const headers = new Headers(init.headers || (asked ? asked.headers : undefined));
    headers.set("X-CSRF-Token", token());
    return send.call(window, input, { ...init, headers });
  };

  const root = () => (window.gradio_config ? new URL(window.gradio_config.root) : location).pathname.replace(/\/(admin\/?)?$/, "");
  const make = (tag, attributes, ...children) => {
    const node = document.createElement(tag);
    for (const [name, value] of Object.entries(attributes)) node.setAttribute(name, value);
    node.append(...children);
    return node;
  };
  const style = `#account { display: flex; flex-wrap: wrap; gap: .25rem 1rem; justify-content: flex-end; align-items: center;
    padding: .4rem 1rem; font: .875rem/1.4 system-ui, sans-serif; color: var(--body-text-color, inherit); }
    #account form { margin: 0; } #account b { margin-right: auto; overflow-wrap: anywhere; }
    #account a, #account button { padding: .3rem .1rem; border: 0; background: none; font: inherit; color: inherit;
      text-decoration: underline; cursor: pointer; }
    #account :focus-visible { outline: 2px solid currentColor; outline-offset: 2px; }`;
  const draw = async () => {
    const answer = await send.call(window, `${root()}/api/v1/me`);
    if (!answer.ok) return;
    const me = await answer.json();
    const leave = make("form", { method: "post", action: `${root()}/logout` },
      make("input", { type: "hidden", name: "csrf" }), make("button", { type: "submit" }, "Log out"));
    leave.addEventListener("submit", () => { leave.elements.csrf.value = token(); });
    const admin = location.pathname.startsWith(`${root()}/admin`);
    const other = me.role === "admin" && [make("a", { href: `${root()}/${admin ? "" : "admin/"}` }, admin ? "Ranking" : "Administration")];
    document.body.prepend(make("nav", { id: "account", "aria-label": "Account" }, make("style", {}, style), make("b", {}, me.name),
      ...(other || []), make("a", { href: `${root()}/password` }, "Password"), leave));
  };
  if (document.readyState === "loading") addEventListener("DOMContentLoaded", draw);  // Gradio may add this script later
  else draw();
})();
