"""Makes one HTML page of a trace that needs nothing else: no network, no other files.

Pure. The look is in `trace_page.css`, the drawing of the tokens in `trace_page.js`; both become part of the page, and
so does the data. Everything that comes from the trace is escaped.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from html import escape
from importlib import resources
from typing import Any

from fermata.blame import (
    SLOW_FACTOR,
    Verdict,
    batch_mates,
    between_tokens,
    judge,
    outliers,
    quantile,
    slow_above,
    summaries,
)
from fermata.parts import PARTS, Place, duration, percent
from fermata.trace import Activity, Trace, TracedToken
from fermata.waterfall import activity_rows

MOST_SLOW = 50
"""Slow tokens that are explained; the slowest ones when there are more."""
MOST_MATES = 12
HIGHEST = 8
"""Usual intervals that the chart is high at first, unless it has to be higher for a slow token to be seen as one."""
DEEPEST = 0.3
"""Share of that height that the chart has for time that parts gave back."""
ROOM_FOR_ERROR = 0.7
"""Share of the axis before which a bar must end for its error to stand behind it."""

_COLOURS: Mapping[str, tuple[str, str]] = {
    # tokenizer: greens
    "open": ("#55722b", "#8fae5c"),
    "render": ("#7f9f4a", "#a9c47a"),
    "encode": ("#b4c979", "#c9db98"),
    "queue": ("#a6d189", "#b5dd9b"),
    "detokenize": ("#3f9a5b", "#5fb878"),
    "write": ("#1f6b45", "#2f8f60"),
    # orchestrator: ambers
    "claim": ("#a8591b", "#c9793a"),
    "place": ("#d9a05b", "#e0b27a"),
    "commit": ("#e8922a", "#f0a44a"),
    "relay": ("#f3c969", "#f6d587"),
    # shard: blues
    "admission": ("#1f4e79", "#3d75a8"),
    "prefill": ("#2b7a9b", "#4a9dbf"),
    "wait": ("#a9c8ea", "#9dbfe6"),
    "schedule": ("#63b3d1", "#78c4df"),
    "forward": ("#3f74c4", "#5b8fdc"),
    "sample": ("#7668c9", "#9285e0"),
    "publish": ("#b3abe6", "#bdb6ee"),
    # network: pinks
    "shard_hop": ("#c2477f", "#d9689b"),
    "hop": ("#e597bb", "#eaa9c8"),
    "unaccounted": ("#9a9da1", "#83878c"),
}
"""Of each part, on light and on dark ground."""
_OF_PLACE: Mapping[str, str] = {"tokenizer": "detokenize", "orchestrator": "commit", "shard": "forward"}
"""The part whose colour stands for a whole process."""
_ACTIVITIES: Mapping[str, str] = {
    "call": "from the call's arrival to its end",
    "render": "rendering the conversation as a prompt",
    "encode": "turning the prompt into ids",
    "open": "the orchestrator is asked to open the generation",
    "claim": "until the session store had the generation",
    "place": "until a shard was asked",
    "own": "an orchestrator owns the generation",
    "takeover": "an orchestrator takes the generation over from another",
    "resume": "an orchestrator takes up a generation that was parked",
    "admission": "a shard has a sequence of the generation",
    "waiting": "at the shard until the first step of the prompt",
    "prefill": "the steps of the prompt, until the first token was drawn",
    "decode": "from the first token's leaving the tokenizer to the last's",
}


def trace_page(trace: Trace) -> str:
    """The whole page."""
    slow = outliers(trace)
    body = [
        *_header(trace, len(slow)),
        *_request(trace),
        *_first_token(trace),
        *_tokens(trace),
        *_slow(trace, slow),
        *_parts(trace),
    ]
    title = escape(f"{trace.generation_id} · fermata trace")
    return "\n".join(
        [
            '<!doctype html>\n<html lang="en">\n<head>\n<meta charset="utf-8">',
            '<meta name="viewport" content="width=device-width, initial-scale=1">',
            f"<title>{title}</title>",
            f"<style>\n{_variables()}\n{_asset('trace_page.css')}</style>\n</head>\n<body>\n<main>",
            *body,
            "</main>",
            f'<script type="application/json" id="data">{_script_safe(_data(trace, slow[:MOST_SLOW]))}</script>',
            f"<script>\n{_asset('trace_page.js')}</script>\n</body>\n</html>\n",
        ]
    )


def _asset(name: str) -> str:
    return resources.files("fermata").joinpath(name).read_text(encoding="utf-8")


def _variables() -> str:
    light, dark = (
        " ".join(f"--part-{part}: {colours[scheme]};" for part, colours in _COLOURS.items()) for scheme in (0, 1)
    )
    return f":root {{ {light} }}\n@media (prefers-color-scheme: dark) {{ :root {{ {dark} }} }}"


def _script_safe(value: Any) -> str:
    """JSON that cannot end the element it stands in."""
    text = json.dumps(value, separators=(",", ":"))
    return text.replace("<", "\\u003c").replace(">", "\\u003e").replace("&", "\\u0026")


def _header(trace: Trace, slow: int) -> Iterator[str]:
    known = [f"{trace.operation} · {trace.model}".strip(" ·")]
    if trace.prompt_tokens is not None:
        known.append(f"{trace.prompt_tokens} prompt tokens")
    if trace.cached_tokens:
        known.append(f"{trace.cached_tokens} of them from the KV cache")
    if trace.finish_reasons:
        known.append(f"ended by {', '.join(trace.finish_reasons)}")
    yield f'<header>\n<p class="over">generation</p>\n<h1><code>{escape(trace.generation_id)}</code></h1>'
    yield f'<p class="about">{escape(" · ".join(filter(None, known)))}</p>'
    if trace.error:
        yield f'<p class="failed">It failed: {escape(trace.error)}</p>'
    yield '<dl class="facts">'
    for name, value in _facts(trace):
        yield f"<div><dt>{name}</dt><dd>{value}</dd></div>"
    yield f"<div{' class=alarm' if slow else ''}><dt>slow tokens</dt><dd>{slow}</dd></div>\n</dl>\n</header>"


def _facts(trace: Trace) -> Iterator[tuple[str, str]]:
    yield "tokens", str(len(trace.tokens))
    yield "whole time", duration((trace.end_ns - trace.start_ns) / 1e3)
    first = [tokens[0].interval for tokens in trace.choices.values() if not tokens[0].offset]
    if first:
        yield "first token", duration(min(first))
    intervals = [token.interval for token in between_tokens(trace.tokens)]
    if intervals:
        yield "mean per token", duration(sum(intervals) / len(intervals))
        yield "p50", duration(quantile(intervals, 0.5))
        yield "p99", duration(quantile(intervals, 0.99))


def _head(title: str, hint: str = "", more: str = "") -> str:
    return f'<div class="head"><h2>{title}</h2><p class="hint">{hint}</p>{more}</div>'


def _request(trace: Trace) -> Iterator[str]:
    """What was done, on one axis."""
    whole = (trace.end_ns - trace.start_ns) or 1
    step = _round_step(whole)
    yield f"<section>\n{_head('The request', 'what was done for it, and where')}"
    yield f'<div class="rows" style="--step:{step / whole:.3%}">'
    for label, activity in activity_rows(trace):
        yield _row(label, activity, trace.start_ns, whole)
    marks = "".join(
        f'<span style="left:{moment / whole:.3%}">{_round(moment / 1e3) if moment else "0"}</span>'
        for moment in range(0, int(0.97 * whole), step)
    )
    yield f'<div><span></span><span></span><span class="axis">{marks}</span><span></span></div>\n</div>\n</section>'


def _round_step(whole: int) -> int:
    """A round number of nanoseconds that divides a time into four to ten pieces."""
    power: int = 10 ** max(len(str(whole)) - 2, 0)
    return next(factor * power for factor in (1, 2, 5, 10, 20) if factor * power * 8 >= whole)


def _round(microseconds: float) -> str:
    """A round time without its zeros behind the point."""
    number, unit = duration(microseconds).split(" ")
    return f"{number.rstrip('0').rstrip('.') if '.' in number else number} {unit}"


def _row(label: str, activity: Activity, start_ns: int, whole: int) -> str:
    left = min(max((activity.start_ns - start_ns) / whole, 0.0), 1.0)
    right = min(max((activity.end_ns - start_ns) / whole, left), 1.0)
    colour = _OF_PLACE.get(activity.place, "unaccounted")
    bar = f'<i style="left:{left:.3%};width:{right - left:.3%};--bar:var(--part-{colour})"></i>'
    name, place, about = escape(label), escape(activity.place), escape(_ACTIVITIES.get(activity.name, ""))
    failed = ""
    if activity.error:
        failed = ' class="failure"'
        side = f"left:{right:.3%}" if right < ROOM_FOR_ERROR else f"right:{1 - left:.3%}"
        bar += f'<em style="{side}">{escape(activity.error)}</em>'
    took = duration((activity.end_ns - activity.start_ns) / 1e3)
    return (
        f'<div{failed}><span class="what" title="{about}">{name}</span><span class="where">{place}</span>'
        f'<span class="track">{bar}</span><span class="took">{took}</span></div>'
    )


def _first_token(trace: Trace) -> Iterator[str]:
    """The way to the first token, which is also its parts from left to right."""
    first = [tokens[0] for tokens in trace.choices.values() if not tokens[0].offset]
    if not first:
        return
    token = min(first, key=lambda item: item.interval)
    verdict = judge(trace, token)
    of_choice = f"of choice {token.choice}, " if len(trace.choices) > 1 else ""
    hint = f"{of_choice}{duration(token.interval)} from the call's arrival until it left"
    yield f"<section>\n{_head('The first token', hint)}\n{_stack(token)}\n" + '<ul class="shares">'
    for part, value in token.parts.items():
        share = value / token.interval if token.interval else 0.0
        yield (
            f'<li title="{escape(PARTS[part].description)}">{_swatch(part)}<span>{PARTS[part].title}</span>'
            f'<span class="value">{duration(value)}</span><span class="share">{percent(share, 1)}</span></li>'
        )
    yield f'</ul>\n<p class="reason">Mostly {PARTS[verdict.part].title}: {escape(verdict.reason)}.</p>\n</section>'


def _stack(token: TracedToken, scale: float = 1.0) -> str:
    """A bar of the parts that took time, as long as a share of the room."""
    given = {part: value for part, value in token.parts.items() if value > 0}
    whole = sum(given.values()) or 1
    bars = "".join(
        f'<i style="width:{value / whole * scale:.3%};background:var(--part-{part})" '
        f'title="{PARTS[part].title}: {duration(value)}"></i>'
        for part, value in given.items()
    )
    return f'<div class="stack">{bars}</div>'


def _swatch(part: str) -> str:
    return f'<i class="swatch" style="background:var(--part-{part})"></i>'


def _tokens(trace: Trace) -> Iterator[str]:
    """The chart; its script draws into it."""
    if not trace.tokens:
        return
    tabs = ""
    if len(trace.choices) > 1:
        tabs = "".join(
            f'<button data-choice="{choice}" aria-pressed="{str(not place).lower()}">choice {choice}</button>'
            for place, choice in enumerate(trace.choices)
        )
    whole = '<button id="whole" aria-pressed="false">whole height</button>'
    hint = "each bar is the time since the token before; below the line is what a part gave back"
    yield f'<section>\n{_head("The tokens", hint, f"""<div class="choices">{tabs}{whole}</div>""")}'
    yield '<div class="chart"><div class="scroller"><div class="spacer"><canvas class="window" tabindex="0" role="img" '
    yield 'aria-label="Bars of the tokens; the arrow keys go from one to the next"></canvas></div></div>'
    yield '<div id="tip" hidden></div></div>\n<canvas id="overview" aria-hidden="true"></canvas>\n<div class="legend">'
    used = summaries(trace.tokens)
    for place in Place:
        keys = "".join(
            f'<button data-part="{part}" aria-pressed="false" title="{escape(PARTS[part].description)}">'
            f"{_swatch(part)}{PARTS[part].title}</button>"
            for part in used
            if PARTS[part].place is place
        )
        if keys:
            yield f"<div><b>{place.value}</b>{keys}</div>"
    yield "</div>\n</section>"


def _slow(trace: Trace, slow: Sequence[Verdict]) -> Iterator[str]:
    """The slow tokens, each with its reason and whose tokens were in its step."""
    if not slow:
        return
    hint = f"{SLOW_FACTOR} times the usual and more"
    if len(slow) > MOST_SLOW:
        hint += f"; the slowest {MOST_SLOW} of {len(slow)}"
    yield f'<section>\n{_head("Slow tokens", hint)}\n<ol class="slow">'
    longest = slow[0].token.interval
    several = len(trace.choices) > 1
    for verdict in slow[:MOST_SLOW]:
        token = verdict.token
        name = f"token {token.offset}" + (f", choice {token.choice}" if several else "")
        sentence = verdict.sentence().partition(": ")[2].partition(", ")[2]
        yield (
            f'<li><div class="which"><button data-token="{token.choice} {token.offset}">{name}</button>'
            f'<span class="took">{duration(token.interval)}</span></div>'
            f"<div>{_stack(token, token.interval / longest)}<p>{escape(sentence)}</p></div>"
            f'<div class="mates">{_mates(trace, token)}</div></li>'
        )
    yield "</ol>\n</section>"


def _mates(trace: Trace, token: TracedToken) -> str:
    if token.step is None:
        return "its step is not known"
    step = trace.step_of(token)
    if step is None:
        return f"step {token.step} is no longer remembered"
    mates = batch_mates(trace, step)
    shown = "".join(
        f"<li><code>{escape(name)}</code><span>{length} token{'s' * (length != 1)}</span></li>"
        for name, length in mates[:MOST_MATES]
    )
    more = f"<li>and {len(mates) - MOST_MATES} more</li>" if len(mates) > MOST_MATES else ""
    return f"step {token.step}, {'with' if mates else 'alone'}<ul>{shown}{more}</ul>"


def _parts(trace: Trace) -> Iterator[str]:
    """All parts by place: what they are, and what they come to between tokens."""
    found = summaries(between_tokens(trace.tokens))
    if not found:
        return
    yield f"<section>\n{_head('Where the time went', 'between tokens, over all of them')}\n<table>"
    titles = "".join(f"<th>{title}</th>" for title in ("part", "mean", "p50", "p99", "share"))
    yield f'<thead><tr>{titles}<th class="meter"></th></tr></thead>'
    for place in Place:
        rows = [part for part in found if PARTS[part].place is place]
        if rows:
            yield f'<tbody><tr><th colspan="6">{place.value}</th></tr>'
        for part in rows:
            summary = found[part]
            times = "".join(f"<td>{duration(value)}</td>" for value in (summary.mean, summary.median, summary.high))
            meter = f"width:{max(summary.share, 0):.2%};background:var(--part-{part})"
            yield (
                f'<tr><td>{_swatch(part)}<span class="name">{PARTS[part].title}</span> '
                f'<span class="words">{escape(PARTS[part].description)}</span></td>{times}'
                f'<td>{percent(summary.share, 1)}</td><td class="meter"><i style="{meter}"></i></td></tr>'
            )
        if rows:
            yield "</tbody>"
    yield "</table>\n</section>"


def _data(trace: Trace, slow: Iterable[Verdict]) -> dict[str, Any]:
    """What the script draws."""
    names: dict[str, int] = {}
    steps = {
        f"{shard} {number}": [[names.setdefault(name, len(names)), length] for name, length in batch_mates(trace, step)]
        for (shard, number), step in trace.steps.items()
    }
    verdicts: dict[int, dict[int, str]] = {choice: {} for choice in trace.choices}
    firsts = [judge(trace, tokens[0]) for tokens in trace.choices.values() if not tokens[0].offset]
    for verdict in [*firsts, *slow]:
        verdicts[verdict.token.choice][verdict.token.offset] = verdict.sentence()
    used = summaries(trace.tokens)
    return {
        "parts": [{"name": part, "title": PARTS[part].title} for part in used],
        "names": list(names),
        "steps": steps,
        "choices": [_choice_data(choice, tokens, verdicts[choice]) for choice, tokens in trace.choices.items()],
    }


def _choice_data(choice: int, tokens: Sequence[TracedToken], verdicts: Mapping[int, str]) -> dict[str, Any]:
    columns = {part: [token.parts.get(part, 0) for token in tokens] for part in PARTS}
    above = [sum(max(value, 0) for value in token.parts.values()) for token in tokens]
    below = [sum(max(-value, 0) for value in token.parts.values()) for token in tokens]
    slow = slow_above(tokens)
    # What is usual is to be seen at first, and from where on a token is slow; the few that are far above are cut.
    usual = min(quantile(above, 0.995), HIGHEST * quantile(above, 0.5))
    top = max(min(max(above), max(usual, 1.25 * slow)), 1)
    return {
        "choice": choice,
        "slow": slow,
        "top": top,
        "highest": max([*above, top]),
        "bottom": min(quantile(below, 0.995), DEEPEST * top),
        "offsets": [token.offset for token in tokens],
        "intervals": [token.interval for token in tokens],
        "steps": [token.step for token in tokens],
        "shards": [token.shard for token in tokens],
        "parts": {part: values for part, values in columns.items() if any(values)},
        "verdicts": verdicts,
    }
