// The forms work without this: it shows what is typed, and saves a login that is not needed.
const show = document.getElementById("show");
if (show) {
  const secrets = [...document.querySelectorAll("input[type=password]")];
  show.parentElement.hidden = secrets.length === 0;
  show.addEventListener("change", () => secrets.forEach((each) => { each.type = show.checked ? "text" : "password"; }));
}
// Who follows a link from elsewhere arrives without the cookie (SameSite=Strict), although logged in.
const next = document.querySelector("form[action=login] input[name=next]");
if (next) {
  fetch("login", { redirect: "manual" })
    .then((answer) => { if (answer.type === "opaqueredirect") location.replace("." + next.value); }).catch(() => {});
}
