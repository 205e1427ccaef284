"""Small server-rendered pages: forms, and words for what went wrong. Everything that is put in is escaped.

They work without a script, and their Content-Security-Policy knows the one style and the one script by their hashes.
"""

from __future__ import annotations

import base64
import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from html import escape
from pathlib import Path

from starlette.responses import HTMLResponse

STATIC = Path(__file__).parent / "static"


@dataclass(frozen=True)
class Field:
    """One line of a form. `autocomplete` tells password managers what belongs there."""

    name: str
    label: str
    autocomplete: str
    hint: str = ""
    value: str = ""
    secret: bool = True
    fixed: bool = False


@dataclass(frozen=True)
class Form:
    """A page with one form; `hidden` goes along unseen. The form is sent to `action`, relative to the page."""

    title: str
    intro: str
    action: str
    button: str
    fields: Sequence[Field]
    hidden: Mapping[str, str]
    back: str = ""
    """Where a link leads that leaves things as they are."""


def form_page(form: Form, errors: Mapping[str, str] | None = None, status: int = 200) -> HTMLResponse:
    """The page of a form, with what is wrong beside the field, or under `form` above them all."""
    errors = errors or {}
    first = next((field.name for field in form.fields if field.name in errors), None)
    free = [field.name for field in form.fields if not field.fixed and not field.value]
    focus = first or next(iter(free), None)
    alert = f'<p class="alert" role="alert">{escape(errors["form"])}</p>' if "form" in errors else ""
    fields = "".join(_field(field, errors.get(field.name), field.name == focus) for field in form.fields)
    hidden = "".join(f'<input type="hidden" name="{escape(k)}" value="{escape(v)}">' for k, v in form.hidden.items())
    back = f'<p class="back"><a href="{escape(form.back)}">Back to the page</a></p>' if form.back else ""
    show = '<label class="show" hidden><input type="checkbox" id="show"> Show what I type</label>'
    main = (
        f"<h1>{escape(form.title)}</h1><p>{escape(form.intro)}</p>{alert}"
        f'<form method="post" action="{escape(form.action)}" novalidate>{hidden}{fields}{show}'
        f'<button type="submit">{escape(form.button)}</button></form>{back}'
    )
    return _page(form.title, main, status, problem=bool(errors))


def problem_page(text: str, status: int, prefix: str = "", headers: Mapping[str, str] | None = None) -> HTMLResponse:
    """A page that only says why there is nothing else."""
    sentence = escape(text[:1].upper() + text[1:])
    main = f'<h1>This did not work</h1><p role="alert">{sentence}.</p><p class="back"><a href="{escape(prefix)}/">'
    return _page("This did not work", main + "To the first page</a></p>", status, headers=headers)


def _field(field: Field, error: str | None, focus: bool) -> str:
    name = escape(field.name)
    notes = {"hint": field.hint, "error": error or ""}
    described = " ".join(f"{name}-{kind}" for kind, text in notes.items() if text)
    attributes = {
        "id": name,
        "name": name,
        "type": "password" if field.secret else "text",
        "autocomplete": field.autocomplete,
        "value": "" if field.secret else field.value,
        "aria-describedby": described,
        "maxlength": "200",
    }
    written = "".join(f' {key}="{escape(value)}"' for key, value in attributes.items() if value)
    written += ' autocapitalize="none" autocorrect="off" spellcheck="false" required'
    written += " readonly" if field.fixed else ""
    written += " autofocus" if focus else ""
    written += ' aria-invalid="true"' if error else ""
    below = "".join(f'<p class="{kind}" id="{name}-{kind}">{escape(text)}</p>' for kind, text in notes.items() if text)
    return f'<div class="field"><label for="{name}">{escape(field.label)}</label><input{written}>{below}</div>'


def _page(
    title: str, main: str, status: int, *, problem: bool = False, headers: Mapping[str, str] | None = None
) -> HTMLResponse:
    style, script = _static("forms.css"), _static("forms.js")
    mark = "Error: " if problem else ""  # a screen reader says the title first
    text = (
        f'<!doctype html><html lang="en"><head><meta charset="utf-8"><title>{mark}{escape(title)}</title>'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        f'<meta name="color-scheme" content="light dark"><link rel="icon" href="data:,"><style>{style}</style></head>'
        f"<body><main>{main}</main><script>{script}</script></body></html>"
    )
    return HTMLResponse(text, status, {**(headers or {}), "Content-Security-Policy": _policy()})


@cache
def _static(name: str) -> str:
    return (STATIC / name).read_text(encoding="utf-8")


@cache
def _policy() -> str:
    style, script = (_hash(_static(name)) for name in ("forms.css", "forms.js"))
    return (
        f"default-src 'none'; style-src {style}; script-src {script}; img-src data:; connect-src 'self'; "
        "form-action 'self'; frame-ancestors 'none'; base-uri 'none'"
    )


def _hash(text: str) -> str:
    return f"'sha256-{base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()}'"
