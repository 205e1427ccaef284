"""The page of `rlhf chat`: a prompt, two answers beside each other, and what the reward says of them.

Model text is hostile: every text is escaped here, on the server, and reaches the browser as the value of a component,
never in a template.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator
from contextlib import suppress
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rlhf import chat_html
from rlhf.chat import Chat, Exchange, Question, Talk, load
from rlhf.config import ChatConfig
from rlhf.contract import Contract
from rlhf.progress import say
from rlhf.types import RewardFn, UserError

if TYPE_CHECKING:
    import gradio as gr
    from fastapi import FastAPI

PLAIN, CONVERSATION = "Continue the text", "Conversation"
PLACEHOLDER = "Enter answers, Shift+Enter starts a new line"
NEW_SEEDS = 1_000_000
"""New seeds are below this: short enough to be read out."""


def run(config: ChatConfig, *, load_reward: Callable[[str, Contract], RewardFn]) -> None:
    """Load what the config names and serve the page until Ctrl-C. Raises UserError before it opens."""
    from labeling_ui import loopback

    chat: Chat | None = None
    with suppress(KeyboardInterrupt), loopback.listen(config.host, config.port) as listener:
        chat = load(config, load_reward=load_reward)
        app = create(chat, config)
        say(f"chat at {loopback.address(listener)}; Ctrl-C ends")
        loopback.serve(app, listener)
    kept = f"; the exchanges are in {chat.log}" if chat and chat.log and chat.log.is_file() else ""
    say(f"\nchat: ended{kept}")


def create(chat: Chat, config: ChatConfig) -> FastAPI:
    """The whole application."""
    from labeling_ui import loopback

    own = Path(__file__).parent
    style, script = ((own / name).read_text(encoding="utf-8") for name in ("chat.css", "chat.js"))
    head = f"<style>{style}</style><script>{script}</script>"
    return loopback.mount(loopback.application(), build(chat, config), head=head)


def build(chat: Chat, config: ChatConfig) -> gr.Blocks:
    """The components, and what happens when they are used."""
    import gradio as gr

    with gr.Blocks(title="Chat", analytics_enabled=False, fill_width=True) as page:
        _html(chat_html.header(chat), "top")
        with gr.Column(elem_id="compose"):
            prompt = gr.Textbox(
                label="Prompt", lines=1, max_lines=10, autofocus=True, elem_id="prompt", placeholder=PLACEHOLDER
            )
            with gr.Row(elem_id="settings"):
                mode = gr.Radio(
                    [PLAIN, CONVERSATION],
                    value=CONVERSATION if _converses(chat) else PLAIN,
                    label="The prompt is",
                    visible=chat.can_converse,
                    elem_id="mode",
                )
                temperature = gr.Number(config.temperature, label="Temperature", step=0.1, elem_id="temperature")
                tokens = gr.Number(chat.max_tokens, label="Max tokens", precision=0, elem_id="tokens")
                seed = gr.Number(config.seed, label="Seed", precision=0, elem_id="seed")
            with gr.Row(elem_id="actions"):
                answer = gr.Button("Answer", variant="primary", elem_id="answer")
                again = gr.Button("Again, new seed", elem_id="again")
                example = gr.Button("Example", elem_id="example", visible=bool(chat.examples))
                reset = gr.Button("Reset", elem_id="reset")
        status = _html("", "status")
        transcript = _html(chat_html.transcript(chat, Talk()), "transcript")
        talk, place = gr.State(Talk()), gr.State(0)

        how: dict[str, Any] = {"api_visibility": "private", "show_progress": "hidden"}
        shown = [transcript, status, talk, prompt]
        asking: dict[str, Any] = how | {"inputs": [prompt, mode, temperature, tokens, seed, talk], "outputs": shown}
        # "once" would lose a question that follows a reset: Gradio still takes the cancelled one for pending (chat.js)
        asking |= {"concurrency_id": "models", "concurrency_limit": 1, "trigger_mode": "multiple"}
        asked = gr.on([answer.click, prompt.submit], partial(_ask, chat), **asking)
        renewed = again.click(_new_seed, [prompt, talk], [seed, prompt, talk], queue=False, **how)
        asked_again = renewed.then(partial(_ask, chat), **asking)
        anew: dict[str, Any] = how | {"queue": False, "cancels": [asked, asked_again]}
        example.click(partial(_example, chat), [place, talk], [*shown, mode, place], **anew)
        reset.click(partial(_reset, chat), None, shown, **anew)
    return page.queue(api_open=False)


def _html(value: str, name: str) -> gr.HTML:
    """A place for HTML whose texts are escaped; it goes in as a value, because templates run what they hold."""
    import gradio as gr

    return gr.HTML(value, js_on_load=None, apply_default_css=False, elem_id=name)


Shown = tuple[str, str, Talk, str]
"""Transcript, status, talk and what stands in the prompt's box."""


def _ask(chat: Chat, text: str, mode: str, temperature: Any, tokens: Any, seed: Any, talk: Talk) -> Iterator[Shown]:
    """What is shown before, between and after the answers. A conversation empties the box for the next turn."""
    left = text
    try:
        question = Question(text, mode == CONVERSATION and chat.can_converse, temperature, tokens, seed)
        yield chat_html.transcript(chat, talk, Exchange(question)), "", talk, left
        for exchange in chat.ask(question, talk):
            if len(exchange.answers) < len(chat.sides):
                yield chat_html.transcript(chat, talk, exchange), "", talk, left
            else:
                talk, left = talk.plus(exchange), "" if question.conversation else text
                yield chat_html.transcript(chat, talk), "", talk, left
    except UserError as error:
        yield chat_html.transcript(chat, talk), chat_html.problem(error), talk, left


def _new_seed(text: str, talk: Talk) -> tuple[int, str, Talk]:
    """Another seed for the prompt in the box; where a conversation has emptied it, for its last turn in place of it."""
    if not text.strip() and talk.exchanges:
        text, talk = talk.exchanges[-1].question.text, talk.without_last()
    return random.randrange(NEW_SEEDS), text, talk


def _example(chat: Chat, place: int, talk: Talk) -> tuple[str, str, Talk, str, str, int]:
    """The next example in the box; one that is a conversation begins a new talk with its first turns."""
    prompt, place = chat.examples[place % len(chat.examples)], place + 1
    if isinstance(prompt, str):
        return chat_html.transcript(chat, talk), "", talk, prompt, PLAIN, place
    talk = Talk(opening=tuple(prompt[:-1]))
    return chat_html.transcript(chat, talk), "", talk, prompt[-1]["content"], CONVERSATION, place


def _reset(chat: Chat) -> Shown:
    return chat_html.transcript(chat, Talk()), "", Talk(), ""


def _converses(chat: Chat) -> bool:
    """Whether the page begins with a conversation: the examples decide, and without any the chat template."""
    if chat.examples:
        return not isinstance(chat.examples[0], str)
    return chat.can_converse
