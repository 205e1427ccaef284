"""The page's scripts fit together: what one imports, the other exports, and no text becomes markup."""

from __future__ import annotations

import re

import pytest

from labeling_ui.rank_view import STATIC

SCRIPTS = sorted((STATIC / "rank").glob("*.js"))


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda path: path.name)
def test_every_import_is_exported_and_used(script: object) -> None:
    text = script.read_text(encoding="utf-8")  # type: ignore[attr-defined]
    rest = re.sub(r"^import .*$", "", text, flags=re.MULTILINE)
    for names, source in re.findall(r'^import \{ (.*?) \} from "\./(.*?)";$', text, flags=re.MULTILINE):
        exporting = (STATIC / "rank" / source).read_text(encoding="utf-8")
        for name in names.split(", "):
            assert re.search(rf"^export (async )?(function|const|class) {name}\b", exporting, flags=re.MULTILINE)
            assert re.search(rf"\b{name}\b", rest), f"{name} is imported and not used"


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda path: path.name)
def test_nothing_is_parsed_as_markup_or_run(script: object) -> None:
    text = script.read_text(encoding="utf-8")  # type: ignore[attr-defined]
    assert not re.search(r"innerHTML|outerHTML|insertAdjacentHTML|document\.write|\beval\(|new Function|srcdoc", text)
    assert len(text.splitlines()) <= 300
