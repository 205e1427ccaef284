"""Exchanges as HTML. Every text of a model or a person is escaped here, and nothing else goes into the page."""

from __future__ import annotations

from html import escape
from statistics import fmean

from rlhf.chat import Answer, Chat, Exchange, Talk
from rlhf.types import Message

GIVEN = 120
"""Characters of a prompt that are repeated before its continuation."""


def header(chat: Chat) -> str:
    """What is compared."""
    names = " and ".join(f"<b>{escape(side.name)}</b>" for side in chat.sides)
    sources = "".join(_fact(side.name, side.source) for side in chat.sides)
    sources += _fact("Reward", chat.reward_source or "none")
    sources += _fact("Kept in", str(chat.log)) if chat.log else ""
    how = "one prompt, the same random numbers" if len(chat.sides) > 1 else "alone: there is no second policy"
    return f"""<h1>{names}{" side by side" if len(chat.sides) > 1 else ""}</h1><p class="how">{how}</p>
<details><summary>What is loaded, and what the numbers mean</summary><dl>{sources}{_meanings(chat)}</dl></details>"""


def _meanings(chat: Chat) -> str:
    score = "What the reward says of the answer."
    if hasattr(chat.reward, "score_std"):
        score += " 0 is the mean of the completions that were ranked, and 1 their standard deviation."
    found = _fact("Score", score) if chat.reward else ""
    if len(chat.sides) == 2:
        ratio = " less ".join(f"log p({side.name})" for side in reversed(chat.sides))
        found += _fact(
            "KL, log ratio",
            f"{ratio} of that answer, in nats. Its mean over {chat.sides[1].name}'s answers is the KL from "
            f"{chat.sides[0].name}; that of one answer may be negative.",
        )
        found += _fact("Seed", "Both draw from the same numbers: where the answers differ, the policies do.")
    return found + _fact(
        "Keys", "Outside the boxes: a answer, n again with a new seed, e example, r reset, / to the prompt."
    )


def _fact(name: str, value: str) -> str:
    return f"<dt>{escape(name)}</dt><dd>{escape(value)}</dd>"


def problem(error: Exception) -> str:
    """Something that the person at the page can mend."""
    return f'<p class="problem" role="alert">{escape(str(error))}</p>'


def transcript(chat: Chat, talk: Talk, under_way: Exchange | None = None) -> str:
    """The exchanges, the last one first, and before them the one that is being answered."""
    exchanges = list(enumerate([*talk.exchanges, *([under_way] if under_way else [])], start=1))
    parts = [_exchange(chat, number, exchange) for number, exchange in reversed(exchanges)]
    opening = f'<div class="opening">{"".join(map(_turn, talk.opening))}</div>' if talk.opening else ""
    return f"{_tally(chat, talk)}{''.join(parts)}{opening}"


def _tally(chat: Chat, talk: Talk) -> str:
    """How often the policy scored higher so far, and how far from the baseline it is."""
    pairs = [exchange.answers for exchange in talk.exchanges if len(exchange.answers) == 2]
    gains = [two.score - one.score for one, two in pairs if one.score is not None and two.score is not None]
    ratios = [two.log_ratio for _, two in pairs if two.log_ratio is not None]
    found = []
    if gains:
        wins, total = sum(gain > 0 for gain in gains), len(gains)
        found.append(f"{chat.sides[1].name} scored higher in {wins} of {total} exchange{'s' if total > 1 else ''}")
        found.append(f"mean difference {_signed(fmean(gains))}")
    if ratios:
        found.append(f"mean KL {_signed(fmean(ratios))} nats")
    return f'<p class="tally">{escape("; ".join(found))}</p>' if found else ""


def _turn(turn: Message) -> str:
    return (
        f'<div class="asked"><span>{escape(turn["role"])}</span><div class="text">{escape(turn["content"])}</div></div>'
    )


def _exchange(chat: Chat, number: int, exchange: Exchange) -> str:
    question = exchange.question
    asked = ""
    if question.conversation or len(question.text) > GIVEN:
        asked = _turn({"role": "user" if question.conversation else "prompt", "content": question.text})
    scores = [answer.score for answer in exchange.answers if answer.score is not None]
    best = max(scores) if len(scores) == 2 and scores[0] != scores[1] else None
    sides = []
    for place, side in enumerate(chat.sides):
        if place < len(exchange.answers):
            sides.append(
                _answer(chat, exchange, place, wins=best is not None and exchange.answers[place].score == best)
            )
        else:
            sides.append(_waiting(side.name, place, writing=place == len(exchange.answers)))
    return f"""<article class="exchange"><p class="how">#{number} · seed {question.seed} · temperature
{question.temperature:g} · at most {question.max_tokens} tokens</p>{asked}
<div class="sides" data-count="{len(chat.sides)}">{"".join(sides)}</div></article>"""


def _answer(chat: Chat, exchange: Exchange, place: int, *, wins: bool) -> str:
    answer = exchange.answers[place]
    score = f'<span class="score">{"score " + _signed(answer.score)}</span>' if answer.score is not None else ""
    better = '<span class="better">higher</span>' if wins else ""
    given = (
        "" if exchange.question.conversation else f'<span class="given">{escape(_tail(exchange.question.text))}</span>'
    )
    text = escape(answer.text) if answer.text.strip() else '<i class="given">(nothing)</i>'
    numbers = "".join(f"<li>{escape(each)}</li>" for each in _numbers(chat, answer, place))
    return f"""<section class="side" data-place="{place}" data-wins="{str(wins).lower()}"><header>
<b>{escape(answer.name)}</b>{better}{score}</header><div class="text">{given}{text}</div><ul>{numbers}</ul></section>"""


def _numbers(chat: Chat, answer: Answer, place: int) -> list[str]:
    """What stands below an answer."""
    ended = "ended with EOS" if answer.finished else "cut at the limit"
    found = [f"{answer.tokens} token{'s' if answer.tokens != 1 else ''}", ended]
    if answer.log_ratio is not None:
        found.append(f"{'KL' if place == len(chat.sides) - 1 else 'log ratio'} {_signed(answer.log_ratio)} nats")
    return [*found, f"{answer.seconds:.1f} s"]


def _waiting(name: str, place: int, *, writing: bool) -> str:
    doing = 'is writing <span class="elapsed"></span>' if writing else "waits for its turn"
    return f"""<section class="side" data-place="{place}"><header><b>{escape(name)}</b></header>
<div class="text waiting">{doing}</div></section>"""


def _tail(text: str) -> str:
    return text if len(text) <= GIVEN else f"... {text[-GIVEN:]}"


def _signed(number: float) -> str:
    """With its sign, a true minus, and no minus zero."""
    return f"{round(number, 2) + 0.0:+.2f}".replace("-", "\u2212")
