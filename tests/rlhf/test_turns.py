"""Turns come in the order of asking, to one at a time, and none is lost."""

from __future__ import annotations

import threading
import time

from rlhf.turns import Turns


def test_who_asked_first_is_served_first() -> None:
    turns, served, threads = Turns(), [], []
    assert turns.acquire(1)

    def serve(number: int) -> None:
        assert turns.acquire(30)
        served.append(number)
        turns.release()

    for number in range(20):
        threads.append(threading.Thread(target=serve, args=(number,)))
        threads[-1].start()
        while len(turns._waiting) <= number:
            time.sleep(0.001)
    turns.release()
    for thread in threads:
        thread.join(30)
    assert served == list(range(20))


def test_one_at_a_time() -> None:
    turns, inside, most = Turns(), 0, 0

    def work() -> None:
        nonlocal inside, most
        for _ in range(200):
            assert turns.acquire(30)
            inside += 1
            most = max(most, inside)
            inside -= 1
            turns.release()

    threads = [threading.Thread(target=work) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    assert most == 1
    assert turns.acquire(0)


def test_who_gave_up_takes_no_turn() -> None:
    turns = Turns()
    assert turns.acquire(0)
    assert not turns.acquire(0.01)
    turns.release()
    assert turns.acquire(0)
    turns.release()
