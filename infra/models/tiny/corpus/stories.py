"""Stories of 50 to 300 tokens about an animal and an object that were asked for.

A story is a plot: a list of beats, each told in one of several ways. Its animal, object, hero, friend and place come
from outside and return again and again, so a teller has to look back at them. Knows nothing of conversations.
"""

from __future__ import annotations

import random
from collections.abc import Mapping
from dataclasses import dataclass, replace

from infra.models.tiny.corpus import words
from infra.models.tiny.corpus.phrases import read_sections
from infra.models.tiny.corpus.wording import Exchange, Slots, vary

_SECTIONS = read_sections("stories.txt")
_REQUESTS = {title: blocks[0] for title, blocks in read_sections("story_requests.txt").items()}
_OPENINGS, _HOMES, _DETAILS = (_SECTIONS.pop(title)[0] for title in ("openings", "homes", "details"))
_PLOTS = [(beats, tuple(map(int, title.partition(":")[2].split()))) for title, beats in _SECTIONS.items()]
"""Each plot with those of its beats that a short story tells."""
_CLOSINGS = ("The end.", "And they lived happily ever after.", "That is the whole story.", "")


@dataclass(frozen=True, slots=True)
class StoryRequest:
    """What a story is about.

    Attributes:
        animal: kind of the hero.
        object: the thing that matters.
        name: of the hero; empty lets the teller choose.
        length: "short" (about 50 tokens), "middle" or "long" (up to 300).
    """

    animal: str
    object: str
    name: str = ""
    length: str = "middle"


def asked_for(random_source: random.Random) -> Exchange:
    """A story and how it was asked for; the animal and the object together are the task."""
    return about_both(random_source) if random_source.random() < 0.7 else _asked(random_source, "open")


def about_both(random_source: random.Random) -> Exchange:
    """A story whose animal and object were asked for."""
    return _asked(random_source, "both")


def accepted(random_source: random.Random, talked_about: Mapping[str, str]) -> Exchange:
    """A story that the assistant had offered, about what was talked about."""
    request = replace(_request(random_source), name="")
    request = replace(
        request,
        animal=talked_about.get("animal", request.animal),
        object=talked_about.get("object", request.object),
    )
    return _told(random_source, request, vary(random_source, random_source.choice(_REQUESTS["accepted"])))


def tell(random_source: random.Random, request: StoryRequest) -> str:
    """Tells a story; equal sources of randomness tell equal stories."""
    choose = random_source.choice
    values = _cast(random_source, request)
    plot, short_beats = choose(_PLOTS)
    beats = [choose(variants) for variants in plot]
    if request.length == "short":
        lines = [choose(_OPENINGS), *(beats[index] for index in short_beats)]
    elif request.length == "middle":
        lines = [choose(_OPENINGS), *beats]
    else:
        lines = [choose(_OPENINGS), *random_source.sample(_DETAILS, 2), *beats]
    sentences = [line.format(**values) for line in lines]
    closing = choose(_CLOSINGS)
    if request.length == "short":
        return " ".join([*sentences, closing]).strip()
    middle = len(sentences) // 2
    paragraphs = [" ".join(sentences[:middle]), " ".join([*sentences[middle:], closing]).strip()]
    return "\n\n".join(paragraphs)


def _cast(random_source: random.Random, request: StoryRequest) -> dict[str, str]:
    """Chooses everything that the request leaves open, and the pronouns that fit."""
    choose = random_source.choice
    name = request.name or choose(words.NAMES)
    friend = choose([candidate for candidate in words.NAMES if candidate != name])
    place, second_place = random_source.sample(words.PLACES, 2)
    she = name in words.NAMES_SHE or (name not in words.NAMES_HE and random_source.random() < 0.5)
    they, them, their = ("she", "her", "her") if she else ("he", "him", "his")
    return {
        "animal": request.animal,
        "a_animal": words.with_article(request.animal),
        "object": request.object,
        "a_object": words.with_article(request.object),
        "wrong_object": choose(words.OBJECTS),
        "name": name,
        "friend": friend,
        "friend_animal": choose([animal for animal in words.ANIMALS if animal != request.animal]),
        "friend_adjective": choose(("friendly", "shy", "clever", "sleepy", "funny", "hungry")),
        "friend_their": "her" if friend in words.NAMES_SHE else "his",
        "adjective": choose(
            ("small", "brave", "shy", "clever", "kind", "young", "curious", "cheerful", "gentle", "lazy")
        ),
        "adjective_object": choose(("beautiful", "shiny", "lovely", "wonderful", "strange", "little", "fine", "big")),
        "adjective_day": choose(("warm", "quiet", "sunny", "long", "happy", "peaceful")),
        "home": choose(_HOMES).format(place=place),
        "place": place,
        "second_place": second_place,
        "time": choose(("morning", "afternoon", "evening", "day", "night")),
        "food": choose(words.FOODS),
        "hobby": choose(words.HOBBIES),
        "they": they,
        "They": they.capitalize(),
        "them": them,
        "their": their,
        "Their": their.capitalize(),
        "themself": f"{them}self",
    }


def _animal(random_source: random.Random) -> str:
    """Mostly an animal; sometimes a person or any other word, because users ask for anything."""
    draw = random_source.random()
    if draw < 0.7:
        return random_source.choice(words.ANIMALS)
    return random_source.choice(words.HEROES) if draw < 0.82 else words.any_word(random_source)


def _object(random_source: random.Random) -> str:
    """As `_animal`, of things."""
    return random_source.choice(words.OBJECTS) if random_source.random() < 0.8 else words.any_word(random_source)


def _asked(random_source: random.Random, kind: str) -> Exchange:
    request = _request(random_source)
    form = random_source.choice(_REQUESTS[kind])
    if "{name}" not in form:
        request = replace(request, name="")
    given = {"animal": request.animal, "object": request.object, "name": request.name, "length": request.length}
    given["length"] = "" if request.length == "middle" else request.length
    return _told(random_source, request, Slots(random_source, given).fill(form))


def _request(random_source: random.Random) -> StoryRequest:
    choose = random_source.choice
    length = choose(("short", "middle", "middle", "long"))
    return StoryRequest(_animal(random_source), _object(random_source), choose(words.NAMES), length)


def _told(random_source: random.Random, request: StoryRequest, question: str) -> Exchange:
    return Exchange(question, tell(random_source, request), f"story {request.animal} {request.object}")
