"""Lifetimes: freed once, by the last user, and never under one."""

from __future__ import annotations

import threading
from contextlib import suppress

import pytest

from llama_embeddings.inference.lifetimes import Lifetime


class Gone(Exception):
    pass


@pytest.fixture
def freed() -> list[str]:
    return []


@pytest.fixture
def lifetime(freed: list[str]) -> Lifetime:
    return Lifetime(lambda: freed.append("freed"), Gone)


def test_unused_is_freed_at_its_end_and_only_once(lifetime: Lifetime, freed: list[str]) -> None:
    """A second end does nothing."""
    with lifetime:
        pass
    assert freed == []
    lifetime.end()
    lifetime.end()
    assert freed == ["freed"]


def test_last_user_frees_what_has_ended(lifetime: Lifetime, freed: list[str]) -> None:
    """Not the first of two, and also one that fails."""
    with suppress(ZeroDivisionError), lifetime:
        with lifetime:
            lifetime.end()
        assert freed == []
        raise ZeroDivisionError
    assert freed == ["freed"]


def test_nobody_gets_in_after_the_end(lifetime: Lifetime, freed: list[str]) -> None:
    """And is told why; those inside are not disturbed."""
    with lifetime:
        lifetime.end()
        with pytest.raises(Gone), lifetime:
            pass
        assert freed == []
    assert freed == ["freed"]


def test_threads_that_come_and_go_while_it_ends_are_all_inside_before_it_is_freed(freed: list[str]) -> None:
    """Eight threads go in and out until they are refused; none is inside when the memory goes."""
    n_inside = [0]
    seen: list[int] = []
    lifetime = Lifetime(lambda: seen.append(n_inside[0]), Gone)
    lock = threading.Lock()

    def use() -> None:
        while True:
            try:
                with lifetime:
                    with lock:
                        n_inside[0] += 1
                    with lock:
                        n_inside[0] -= 1
            except Gone:
                return

    threads = [threading.Thread(target=use) for _ in range(8)]
    for thread in threads:
        thread.start()
    lifetime.end()
    for thread in threads:
        thread.join()
    assert seen == [0]
