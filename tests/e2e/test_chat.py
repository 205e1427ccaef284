"""The page of `rlhf chat` in a real browser: two answers to one prompt, and nothing of what they hold is run."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
import threading
import time
import urllib.request
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from rlhf import chat, chat_page
from rlhf.chat import Chat
from rlhf.config import ChatConfig
from rlhf.generation import Generated
from rlhf.run_folder import read_records
from tests.e2e.serving import serving

HOSTILE = '<img src=x onerror="window.pwned=1">${window.pwned=2} {{constructor}} </script><script>pwned=3</script>'
HOSTILE_PROMPT = "A <b>bold</b> prompt ${window.pwned=5} <iframe src='http://evil.example'></iframe>"
ROOT = Path(__file__).parents[2]


class Says:
    """An engine that writes one text, whatever it is asked, as soon as it may."""

    def __init__(self, tokenizer: Any, text: str):
        self.ids = tokenizer(text, add_special_tokens=False).input_ids
        self.may = threading.Event()
        self.may.set()

    def generate(self, prompts: Any, **_: Any) -> list[Generated]:
        assert self.may.wait(60)
        return [Generated(self.ids, [0.0] * len(self.ids), True) for _ in prompts]

    def sync(self) -> None: ...

    def rest(self) -> None: ...


def length_of(prompts: Any, completions: list[str]) -> list[float]:
    """A reward: longer is better."""
    return [len(completion) / 10 for completion in completions]


@pytest.fixture
def both(tiny_chat_model_folder: Path, tmp_path: Path) -> Chat:
    """Two tiny policies with examples, one of which is hostile."""
    prompts = tmp_path / "prompts.csv"
    prompts.write_text(f'prompt\n"{HOSTILE_PROMPT}"\n')
    source = str(tiny_chat_model_folder)
    models = {"policy": source, "baseline": source, "reward": "a:b", "max_completion_tokens": 16}
    config = ChatConfig(**models, prompts=str(prompts), output=str(tmp_path), precision="fp32")
    return chat.load(config, load_reward=lambda source, contract: length_of)


def saying(both: Chat, *texts: str) -> Chat:
    """The same chat with these answers."""
    both.sides = tuple(
        replace(side, engine=Says(side.tokenizer, text)) for side, text in zip(both.sides, texts, strict=True)
    )
    return both


@pytest.fixture
def serve() -> Iterator[Callable[[Chat], str]]:
    with ExitStack() as stack:
        yield lambda chat: stack.enter_context(serving(chat_page.create(chat, ChatConfig(policy="x", seed=3))))


@pytest.fixture
def visit(browser: Any) -> Iterator[Callable[..., Any]]:
    """A visitor at a page, whose `problems` are errors, dialogs and requests to elsewhere."""
    contexts = []

    def start(url: str, width: int = 1280, **options: Any) -> Any:
        context = browser.new_context(viewport={"width": width, "height": 850}, **options)
        contexts.append(context)
        page = context.new_page()
        page.set_default_timeout(60_000)
        page.problems = []
        page.on("pageerror", lambda error: page.problems.append(str(error)))
        page.on("dialog", lambda dialog: page.problems.append(dialog.message))
        own = (url, "data:", "blob:")
        page.on("request", lambda asked: None if asked.url.startswith(own) else page.problems.append(asked.url))
        page.goto(url)
        page.wait_for_selector("#answer")
        page.wait_for_function("window.gradio_config && document.querySelector('#prompt textarea')")
        return page

    yield start
    for context in contexts:
        context.close()


def answered(page: Any, exchanges: int) -> None:
    """Wait until so many exchanges stand there whole."""
    whole = "n => document.querySelectorAll('.side ul').length == 2 * n && !document.querySelector('.waiting')"
    page.wait_for_function(whole, arg=exchanges)


def value(page: Any, name: str) -> str:
    return page.locator(f"#{name} input, #{name} textarea").first.input_value()


def test_what_is_hostile_is_shown_and_does_nothing(
    both: Chat, serve: Callable[..., str], visit: Callable[..., Any], tmp_path: Path
) -> None:
    page = visit(serve(saying(both, HOSTILE, "harmless")))
    page.locator("#example").click()
    page.wait_for_function("document.querySelector('#prompt textarea').value")
    assert value(page, "prompt") == HOSTILE_PROMPT
    page.locator("#answer").click()
    answered(page, 1)
    shown = page.locator(".side .text").all_inner_texts()
    assert shown == [HOSTILE_PROMPT + HOSTILE, HOSTILE_PROMPT + "harmless"]
    assert "score +0.80" in page.locator(".side[data-place='1']").inner_text()
    assert page.locator(".side[data-wins='true'] b").all_inner_texts() == [both.sides[0].name]
    assert page.locator("#transcript img, #transcript iframe, #transcript script, #transcript .text b").count() == 0
    page.get_by_label("Conversation").check()
    page.locator("#prompt textarea").fill(HOSTILE)
    page.locator("#answer").click()
    answered(page, 2)
    assert page.locator(".asked .text").inner_text() == HOSTILE
    assert value(page, "prompt") == ""
    assert page.evaluate("window.pwned") is None
    assert page.problems == []
    assert [record["answers"][0]["text"] for record in read_records(tmp_path / "chat.jsonl")] == [HOSTILE] * 2


def test_a_prompt_by_keyboard_then_another_seed_and_a_reset(
    both: Chat, serve: Callable[..., str], visit: Callable[..., Any]
) -> None:
    page = visit(serve(both))
    page.locator("#tokens input").fill("6")
    page.locator("#prompt textarea").fill("the film")
    page.keyboard.press("Enter")
    answered(page, 1)
    one, other = page.locator(".side .text").all_inner_texts()
    assert one == other  # copies of one model, and the same numbers
    assert page.locator(".exchange .how").inner_text().startswith("#1 · seed 3 · temperature 1 · at most 6 tokens")
    page.keyboard.press("Escape")
    page.keyboard.press("n")
    answered(page, 2)
    assert value(page, "seed") != "3"
    assert f"seed {value(page, 'seed')} " in page.locator(".exchange .how").first.inner_text()
    page.keyboard.press("r")
    page.wait_for_function("!document.querySelector('.exchange')")
    page.keyboard.press("a")
    page.wait_for_selector(".problem")
    assert "there is no prompt yet" in page.locator(".problem").inner_text()
    page.keyboard.press("/")
    assert page.evaluate("document.activeElement.tagName") == "TEXTAREA"
    assert page.problems == []


def test_answers_appear_one_after_the_other_and_a_reset_in_between_stays(
    both: Chat, serve: Callable[..., str], visit: Callable[..., Any]
) -> None:
    saying(both, "first", "second")
    engine: Any = both.sides[1].engine
    engine.may.clear()
    page = visit(serve(both))
    page.locator("#prompt textarea").fill("p")
    page.locator("#answer").click()
    page.wait_for_function("document.querySelectorAll('.side ul').length == 1")
    waiting = page.locator(".waiting")
    waiting.get_by_text(re.compile(r"\d+\.\d s")).wait_for()
    assert "is writing" in waiting.inner_text()
    page.locator("#reset").click()
    page.wait_for_function("!document.querySelector('.exchange') && !document.querySelector('#prompt textarea').value")
    engine.may.set()
    page.locator("#prompt textarea").fill("q")
    page.locator("#answer").click()
    answered(page, 1)
    assert page.locator(".side .text").all_inner_texts() == ["qfirst", "qsecond"]


def test_asking_twice_answers_once(both: Chat, serve: Callable[..., str], visit: Callable[..., Any]) -> None:
    saying(both, "first", "second")
    engine: Any = both.sides[1].engine
    engine.may.clear()
    page = visit(serve(both))
    page.locator("#prompt textarea").fill("p")
    page.locator("#answer").dblclick()
    page.wait_for_function("document.querySelectorAll('.side ul').length == 1")
    page.locator("#answer").click()  # while it is being answered
    page.locator("#prompt textarea").press("Enter")
    engine.may.set()
    answered(page, 1)
    page.wait_for_timeout(1000)
    assert page.locator(".side .text").all_inner_texts() == ["pfirst", "psecond"]


def test_a_conversation_is_regenerated_with_another_seed(
    both: Chat, serve: Callable[..., str], visit: Callable[..., Any]
) -> None:
    page = visit(serve(saying(both, "one", "two")))
    page.get_by_label("Conversation").check()
    for number, turn in enumerate(("hello", "and?"), start=1):
        page.locator("#prompt textarea").fill(turn)
        page.locator("#answer").click()
        answered(page, number)
    page.locator("#again").click()
    page.wait_for_function("!document.querySelector('.exchange .how').textContent.includes('seed 3 ')")
    answered(page, 2)
    assert page.locator(".asked .text").all_inner_texts() == ["and?", "hello"]


def test_a_phone_needs_no_scrolling_sideways(both: Chat, serve: Callable[..., str], visit: Callable[..., Any]) -> None:
    long = "averyveryverylongword" * 9
    page = visit(serve(saying(both, long, long)), 390, has_touch=True, is_mobile=True, color_scheme="dark")
    page.locator("#tokens input").fill("16")
    page.locator("#prompt textarea").fill(long[:150])
    page.locator("#answer").tap()
    answered(page, 1)
    assert page.evaluate("document.documentElement.scrollWidth <= window.innerWidth")
    assert page.evaluate("document.body.classList.contains('dark')")


def test_ctrl_c_ends_it_with_one_line_while_a_page_is_open(tiny_chat_model_folder: Path, tmp_path: Path) -> None:
    command = [sys.executable, "-m", "rlhf", "chat", "--policy", str(tiny_chat_model_folder), "--port", "0"]
    errors = tmp_path / "stderr"
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    with errors.open("w") as file:
        process = subprocess.Popen(command, cwd=tmp_path, stderr=file, env=environment)
    try:
        deadline = time.monotonic() + 120
        while not (opened := re.search(r"chat at (\S+);", errors.read_text())) and time.monotonic() < deadline:
            time.sleep(0.1)
        assert opened, errors.read_text()
        before = errors.read_text()
        assert "tiny_chat0" in urllib.request.urlopen(opened[1] + "/config", timeout=60).read().decode()
        with urllib.request.urlopen(f"{opened[1]}/gradio_api/heartbeat/me", timeout=60):  # as an open page does
            process.send_signal(signal.SIGINT)
            assert process.wait(timeout=60) == 0
        assert errors.read_text().removeprefix(before).strip() == "chat: ended"
    finally:
        process.kill()
    assert not list(tmp_path.glob("**/chat.jsonl"))
