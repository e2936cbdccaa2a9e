"""Draws a trace as lines of text: where the time of a generation went, and that of its slowest tokens.

Pure. Knows the width that it may fill and the styles of `printing.py`; writes nothing.
"""

from __future__ import annotations

import textwrap
from collections.abc import Iterable, Iterator, Mapping, Sequence
from itertools import pairwise

from fermata.blame import (
    Verdict,
    batch_mates,
    between_tokens,
    judge,
    outliers,
    quantile,
    summaries,
    usual_interval,
)
from fermata.parts import PARTS, duration, percent
from fermata.printing import BOLD, DIM, RED
from fermata.screen import Line
from fermata.trace import Activity, Trace, TracedToken

NARROWEST = 60
"""Columns below which lines are not made shorter."""
MOST_SLOW = 5
"""Slow tokens that are shown."""
MOST_MATES = 6
HIGHEST = 6
"""Usual intervals that a column may be high."""
_LABEL, _PLACE, _PART, _TIME, _SHARE = 16, 14, 13, 10, 9
_EIGHTHS = " ▏▎▍▌▋▊▉"
_LEVELS = "▁▂▃▄▅▆▇█"


def waterfall(trace: Trace, width: int = 80) -> list[Line]:
    """The whole picture, no line wider than `width` columns."""
    width = max(width, NARROWEST)
    slow = outliers(trace)
    sections = [
        _header(trace, len(slow), width),
        _request(trace, width),
        _first_token(trace, width),
        _between(trace, width),
        _slowest(trace, slow, width),
    ]
    lines: list[Line] = []
    for section in sections:
        found = list(section)
        lines += [Line(""), *found] if lines and found else found
    return lines


def headline(trace: Trace) -> list[str]:
    """What a generation comes to, as short statements."""
    tokens, later = trace.tokens, between_tokens(trace.tokens)
    facts = [f"{len(tokens)} token{'s' * (len(tokens) != 1)} in {duration((trace.end_ns - trace.start_ns) / 1e3)}"]
    first = [choice[0] for choice in trace.choices.values() if not choice[0].offset]
    if first:
        facts.append(f"first token after {duration(min(token.interval for token in first))}")
    if later:
        intervals = [token.interval for token in later]
        facts.append(f"then {duration(sum(intervals) / len(intervals))} per token")
        facts.append(f"p50 {duration(quantile(intervals, 0.5))}, p99 {duration(quantile(intervals, 0.99))}")
    return facts


def _header(trace: Trace, slow: int, width: int) -> Iterator[Line]:
    yield Line(_cut(f"generation {trace.generation_id}", width), BOLD)
    known = [f"{trace.operation} {trace.model}".strip()]
    if trace.prompt_tokens is not None:
        cached = f", {trace.cached_tokens} cached" if trace.cached_tokens else ""
        known.append(f"{trace.prompt_tokens} prompt tokens{cached}")
    if trace.finish_reasons:
        known.append(f"ended by {', '.join(trace.finish_reasons)}")
    facts = [*filter(None, known), *headline(trace)]
    if slow:
        facts.append(f"{slow} slow token{'s' * (slow != 1)}")
    yield from map(Line, _joined(facts, width))
    if trace.error:
        yield from (Line(line, RED) for line in _wrapped(f"it failed: {trace.error}", width))


def _joined(facts: Iterable[str], width: int) -> Iterator[str]:
    """Short statements with dots between them, on as few lines as they need."""
    line = ""
    for fact in facts:
        longer = f"{line} · {fact}" if line else fact
        if len(longer) > width and line:
            yield line
            longer = fact
        line = longer
    yield _cut(line, width)


def _request(trace: Trace, width: int) -> Iterator[Line]:
    """One bar for each thing that was done, on one axis of time."""
    whole = trace.end_ns - trace.start_ns
    room = width - _LABEL - _PLACE - _TIME
    yield Line(f"{'the request':<{_LABEL + _PLACE}}{'0':<{room}}{duration(whole / 1e3):>{_TIME}}", BOLD)
    for label, activity in activity_rows(trace):
        begin = (activity.start_ns - trace.start_ns) / (whole or 1)
        end = (activity.end_ns - trace.start_ns) / (whole or 1)
        took = duration((activity.end_ns - activity.start_ns) / 1e3)
        row = f"{label:<{_LABEL}}{activity.place:<{_PLACE}}{_bar(begin, end, room - 1):<{room}}{took:>{_TIME}}"
        yield Line(row, RED if activity.error else "")


def activity_rows(trace: Trace) -> list[tuple[str, Activity]]:
    """What is shown of what was done, each with what it is called: what was done for all choices, then for each.

    A sequence is left out: its admission looks the same.
    """
    shown = [activity for activity in trace.activities if activity.name != "sequence"]
    if len(trace.choices) < 2:
        return [(activity.name, activity) for activity in shown]
    shown.sort(key=lambda activity: -1 if activity.choice is None else activity.choice)
    return [
        (activity.name if activity.choice is None else f"{activity.name} {activity.choice}", activity)
        for activity in shown
    ]


def _bar(begin: float, end: float, room: int) -> str:
    """A bar from one share of the room to another, at least an eighth of a column wide."""
    left = min(max(int(begin * room), 0), room - 1)
    eighths = max(round(min(end, 1.0) * room * 8) - left * 8, 1)
    return " " * left + "█" * (eighths // 8) + _EIGHTHS[eighths % 8].rstrip()


def _first_token(trace: Trace, width: int) -> Iterator[Line]:
    """The parts of the time to the first token, and what was most of it for the first tokens of other choices."""
    first = sorted((tokens[0] for tokens in trace.choices.values() if not tokens[0].offset), key=lambda t: t.interval)
    for token in first:
        name = f"first token of choice {token.choice}" if len(trace.choices) > 1 else "first token"
        yield Line(f"{name}: {duration(token.interval)}", BOLD)
        if token is first[0]:
            yield from _shares(token, width)
        verdict = judge(trace, token)
        yield from map(Line, _wrapped(f"mostly {PARTS[verdict.part].title}: {verdict.reason}", width))


def _shares(token: TracedToken, width: int) -> Iterator[Line]:
    """A row for each part of a token."""
    for part, value in token.parts.items():
        share = value / token.interval if token.interval else 0.0
        row = f"{PARTS[part].title:<{_PART}}{duration(value):>{_TIME}}{percent(share, 1):>{_SHARE}}  "
        yield Line(_cut(f"{row}{_share_bar(share, 7):<8}{PARTS[part].description}", width))


def _between(trace: Trace, width: int) -> Iterator[Line]:
    """The parts of the time between tokens, and how long each took, from the first to the last."""
    later = between_tokens(trace.tokens)
    if not later:
        return
    titles = "".join(f"{title:>{_TIME}}" for title in ("mean", "p50", "p99"))
    yield Line(f"{'between tokens':<{_PART}}{titles[1:]}{'share':>{_SHARE}}", BOLD)
    room = min(width - _PART - 3 * _TIME - _SHARE - 2, 30)
    for part, found in summaries(later).items():
        times = "".join(f"{duration(value):>{_TIME}}" for value in (found.mean, found.median, found.high))
        row = f"{PARTS[part].title:<{_PART}}{times}{percent(found.share, 1):>{_SHARE}}  {_share_bar(found.share, room)}"
        yield Line(row.rstrip())
    for choice, tokens in trace.choices.items():
        yield from _course(choice if len(trace.choices) > 1 else None, tokens, width)


def _share_bar(share: float, room: int) -> str:
    """A bar as long as a share of the room; nothing where it could not be seen."""
    return _bar(0, share, room) if share >= 0.005 else ""


def _course(choice: int | None, tokens: Sequence[TracedToken], width: int) -> Iterator[Line]:
    """A choice's intervals as a row of columns, each as high as the slowest of its tokens."""
    later = between_tokens(tokens)
    if len(later) < 2:
        return
    name = "" if choice is None else f" of choice {choice}"
    columns = min(len(later), width)
    edges = [len(later) * column // columns for column in range(columns + 1)]
    heights = [max(token.interval for token in later[a:b]) for a, b in pairwise(edges)]
    highest, limit = max(heights), HIGHEST * max(usual_interval(tokens), 1)
    top = max(min(highest, limit), 1)
    levels = (max(min(int(height / top * len(_LEVELS)), len(_LEVELS) - 1), 0) for height in heights)
    scale = f"{duration(top)} and more" if highest > limit else duration(top)
    yield Line("")
    yield Line(_cut(f"tokens {later[0].offset} to {later[-1].offset}{name}, each column up to {scale}", width), DIM)
    yield Line("".join(_LEVELS[level] for level in levels))


def _slowest(trace: Trace, slow: Sequence[Verdict], width: int) -> Iterator[Line]:
    """The slowest tokens: why, what their time was made of, and whose tokens were in their step."""
    if not slow:
        return
    shown = slow[:MOST_SLOW]
    several = len(trace.choices) > 1
    yield Line(f"the slowest of {len(slow)} slow tokens" if len(slow) > 1 else "the slow token", BOLD)
    longest = max(verdict.token.interval for verdict in shown)
    used: dict[str, None] = {}
    for verdict in shown:
        token = verdict.token
        yield from map(Line, _wrapped(verdict.sentence(with_choice=several), width))
        bar = _stacked(token.parts, round(token.interval / longest * (width - 2)))
        used |= dict.fromkeys(bar)
        yield Line(f"  {bar}")
        if step := trace.step_of(token):
            mates = [f"{name} {length}" for name, length in batch_mates(trace, step)]
            more = [f"{len(mates) - MOST_MATES} more"] * (len(mates) > MOST_MATES)
            with_whom = ", ".join([*mates[:MOST_MATES], *more]) or "nobody"
            yield from (Line(f"  {line}", DIM) for line in _wrapped(f"step {step.number} with {with_whom}", width - 2))
    legend = ", ".join(f"{part.letter} {part.title}" for part in PARTS.values() if part.letter in used)
    yield from (Line(line, DIM) for line in _wrapped(legend, width))


def _stacked(parts: Mapping[str, int], columns: int) -> str:
    """A bar with the letter of each part as often as its share says; parts that gave time back have none."""
    columns = max(columns, 1)
    given = {part: value for part, value in parts.items() if value > 0}
    whole = sum(given.values()) or 1
    bar, passed = "", 0
    for part, value in given.items():
        passed += value
        bar += PARTS[part].letter * (round(passed / whole * columns) - len(bar))
    return bar


def _wrapped(text: str, width: int) -> list[str]:
    return textwrap.wrap(text, width, subsequent_indent="  ", break_on_hyphens=False)


def _cut(text: str, width: int) -> str:
    return text if len(text) <= width else text[: width - 1] + "…"
