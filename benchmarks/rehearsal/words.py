"""Captions that nobody wrote: sentences as long as Flickr30k's and COCO's, from word lists and a seed."""

from collections.abc import Iterator

import numpy as np


def _words(text: str) -> tuple[str, ...]:
    return tuple(text.split())


COLOURS = _words("red blue green yellow black white brown grey orange pink purple striped dark bright")
PEOPLE = _words(
    "man woman boy girl child toddler skater cyclist surfer runner chef waiter musician drummer dancer painter farmer "
    "fisherman soldier nurse teacher student tourist climber swimmer golfer catcher pitcher referee rider sailor pilot "
    "carpenter welder plumber gardener postman policeman fireman vendor butcher baker barber clown juggler magician"
)
LOOKS = _words(
    "young old tall short smiling bearded blond tired happy barefoot elderly muscular busy curious cheerful lonely "
    "serious skinny freckled tattooed masked shirtless sleepy excited bald"
)
ACTS = _words(
    "holds carries lifts paints repairs washes throws catches kicks pushes pulls drags inspects sells buys "
    "photographs balances cleans unwraps watches opens closes rides steers polishes hides finds waves swings drops"
)
THINGS = _words(
    "umbrella bicycle skateboard guitar ladder suitcase kite bucket blanket basket camera ball bottle sandwich banana "
    "pizza cake teapot laptop mirror pillow lamp chair bench table boat canoe surfboard helmet hat scarf shovel broom "
    "hammer drum trumpet violin puppet balloon candle clock vase book newspaper map flag rope tent sled wagon tractor"
)
PLACES = _words(
    "bridge fountain church market stadium garden kitchen library station harbour beach river lake mountain forest "
    "desert playground museum bakery garage barn castle tower tunnel staircase balcony courtyard pier meadow vineyard "
    "runway crosswalk hospital classroom theatre"
)
NEAR = ("near a", "beside a", "behind a", "in front of a", "next to a")
SORTS = _words("wooden broken crowded empty famous flooded snowy sunny quiet narrow modern ancient rusty tiny huge")
ENDINGS = (
    *("",) * 8,
    "at night",
    "in the rain",
    "on a sunny day",
    "while people watch",
    "with two friends",
    "during the winter",
    "before the game starts",
)


def captions(count: int, generator: np.random.Generator) -> Iterator[str]:
    """Distinct sentences of 10 to 17 words."""
    seen: set[str] = set()
    while len(seen) < count:
        for sentence in _some(generator, 4096):
            if len(seen) < count and sentence not in seen:
                seen.add(sentence)
                yield sentence


def tokens(sentence: str) -> list[str]:
    """The words as Karpathy's files have them: in lower case, without the full stop."""
    return sentence.lower().rstrip(".").split()


def _some(generator: np.random.Generator, count: int) -> Iterator[str]:
    lists = (LOOKS, PEOPLE, ACTS, COLOURS, THINGS, NEAR, SORTS, PLACES, ENDINGS)
    drawn = (generator.integers(len(words), size=count) for words in lists)
    for places in zip(*(each.tolist() for each in drawn), strict=True):
        look, who, act, colour, thing, near, sort, place, ending = (
            words[number] for words, number in zip(lists, places, strict=True)
        )
        yield " ".join(f"A {look} {who} {act} a {colour} {thing} {near} {sort} {place} {ending}".split()) + "."
