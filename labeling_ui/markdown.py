"""Model text as Markdown that can do nothing: no HTML, no images, no diagrams, and LaTeX only where it is meant.

Gradio's Markdown would pass HTML on to a sanitiser that lets images through, fetch what an image names, and take the
dollars of a price list for LaTeX. Whether a parser sees code or HTML in a text depends on the parser, so nothing here
rests on guessing it: the characters that could start something are replaced by noncharacters everywhere, and
`static/cards.js` puts them back in the finished page, as text.
"""

from __future__ import annotations

import re
from itertools import cycle
from typing import Any

import gradio as gr

MAX_FORMATTED = 20_000
"""Characters; longer texts are shown as written, because a Markdown parser may take minutes for them."""
MAX_NESTING = 20
"""Quotes and lists within each other; deeper ones are shown as written, because they make the parser give up."""

LESS, AND, BANG, MARK, PERCENT = "\ufdd0", "\ufdd1", "\ufdd2", "\ufdd3", "\ufdd8"
_MATH = {"inline": ("\ufdd4", "\ufdd5"), "display": ("\ufdd6", "\ufdd7")}

DELIMITERS: list[dict[str, str | bool]] = [
    {"left": left, "right": right, "display": kind == "display"} for kind, (left, right) in _MATH.items()
]
"""What `gr.Markdown` is to take for LaTeX."""


def text_box(**options: Any) -> gr.Markdown:
    """A place for `as_markdown`, in which tabs and indentation are left alone."""
    box = gr.Markdown(line_breaks=True, latex_delimiters=DELIMITERS, **options)
    box.postprocess = _untouched  # a subclass would make Gradio write a .pyi file beside this one
    return box


def _untouched(value: Any) -> Any:
    return value


def as_markdown(text: str, mark: str) -> str:
    """`text` for a `text_box`, headed by `mark`, by which the page knows that it shows this and not the text before.

    Empty where the text is to be shown as written only.
    """
    if len(text) > MAX_FORMATTED or not text.strip() or _NESTED.search(text):
        return ""
    plain = re.sub("[\ufdd0-\ufdd8\0]", "\ufffd", text)
    parts = [form(part) for part, form in zip(re.split(_CODE, plain), cycle((_with_math, _inert)), strict=False)]
    return f"{MARK}{mark}{MARK}\n\n{''.join(parts)}"


def _inert(text: str) -> str:
    """The text without anything that Gradio or its Markdown would act upon."""
    text = text.replace("<", LESS).replace("&", AND).replace("![", f"{BANG}[")
    text = text.replace("%%%LATEX", f"%%{PERCENT}LATEX")  # Gradio's own stand-in for a formula
    return re.sub(r"([`~]{3}[ \t]*)mermaid", r"\1text", text, flags=re.IGNORECASE)


def _formula(text: str) -> str:
    """LaTeX for KaTeX, which reads it from the page, where these are characters again."""
    return text.replace("&", "&amp;").replace("<", "&lt;").replace("![", "!&#91;")


def _with_math(text: str) -> str:
    """Inert text with its formulas between noncharacters instead of dollars and brackets."""
    found, at, missing = [], 0, set()
    for opening in _OPENING.finditer(text):
        left = opening.group()
        if opening.start() < at or left in missing:
            continue
        kind, right = _CLOSING[left]
        end = _inline_end(text, opening.end()) if left == "$" else text.find(right, opening.end())
        if end < 0:
            missing |= {left} - {"$"}
            continue
        inside = text[opening.end() : end]
        if "\n\n" in inside or not inside.strip():
            continue
        begin, finish = _MATH[kind]
        found += [_inert(text[at : opening.start()]), begin, _formula(inside), finish]
        at = end + len(right)
    return "".join([*found, _inert(text[at:])])


def _inline_end(text: str, start: int) -> int:
    """Where a `$` formula ends, by Pandoc's rule, so that "from $5 to $6" is none; -1 where it is none."""
    match = _INLINE.match(text, start)
    return match.end() - 1 if match else -1


_OPENING = re.compile(r"(?<!\\)\$\$|\\\[|\\\(|(?<![\\$\w])\$")
_CLOSING = {
    "$$": ("display", "$$"),
    r"\[": ("display", r"\]"),
    r"\(": ("inline", r"\)"),
    "$": ("inline", "$"),
}
_INLINE = re.compile(r"(?![\s$])[^$\n]{0,300}(?<![\s\\])\$(?![\w$])")
_CODE = re.compile(
    r"(^[ >]*(?:`{3,}|~{3,})[^\n]*\n.*?(?:^[ >]*(?:```|~~~)|\Z)|(?<!`)`[^`\n]+`(?!`)|``[^\n]+?``)",
    flags=re.DOTALL | re.MULTILINE,
)
_NESTED = re.compile(
    rf"^(?:[ \t]*(?:>|(?:[-+*]|\d{{1,9}}[.)])[ \t])){{{MAX_NESTING}}}|^[ \t]{{{8 * MAX_NESTING}}}", re.MULTILINE
)
