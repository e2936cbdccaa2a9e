"""Whom to ask next."""

from __future__ import annotations

from services.common.directory import StaticDirectory, by_preference
from services.tokenizer.route import PAUSE, Route

ADDRESSES = ["a:1", "b:1", "c:1"]
DIRECTORY = StaticDirectory(ADDRESSES)


def test_the_preferred_one_is_first_unless_another_is_named() -> None:
    assert Route(DIRECTORY, "s").address == by_preference(ADDRESSES, "s")[0]
    assert Route(DIRECTORY, "s", "x:1").address == "x:1"


def test_who_answered_is_asked_once_more_then_all_others_then_again_after_a_pause() -> None:
    route = Route(DIRECTORY, "s")
    order = by_preference(ADDRESSES, "s")
    route.succeeded()
    seen = [(route.failed(), route.address) for _ in range(5)]
    assert seen == [(0.0, order[0]), (0.0, order[1]), (0.0, order[2]), (PAUSE, order[0]), (0.0, order[1])]


def test_who_never_answered_or_leaves_is_not_asked_again_at_once() -> None:
    order = by_preference(ADDRESSES, "s")
    route = Route(DIRECTORY, "s")
    assert (route.failed(), route.address) == (0.0, order[1])
    route.succeeded()
    assert (route.failed(leaving=True), route.address) == (0.0, order[0])


def test_it_goes_where_it_is_sent_but_not_in_circles() -> None:
    route = Route(DIRECTORY, "s", "a:1")
    assert (route.redirected("z:9"), route.address) == (0.0, "z:9")
    assert (route.redirected("a:1"), route.address) == (PAUSE, "a:1")
    assert (route.redirected("z:9"), route.address) == (0.0, "z:9")
    route.failed()
    assert route.address != "z:9"


def test_nobody_is_known_yet() -> None:
    known: list[str] = []

    class Growing:
        def addresses(self) -> list[str]:
            return known

    route = Route(Growing(), "s")
    assert (route.failed(), route.address) == (PAUSE, "")
    known.append("a:1")
    assert (route.failed(), route.address) == (0.0, "a:1")


def test_a_single_one_is_asked_again_and_again() -> None:
    route = Route(StaticDirectory(["a:1"]), "s")
    route.succeeded()
    assert [(route.failed(), route.address) for _ in range(3)] == [(0.0, "a:1"), (PAUSE, "a:1"), (PAUSE, "a:1")]
