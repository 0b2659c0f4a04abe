"""What a report shows of the tokenizer: how evenly codes are used, how fast prefixes tell pictures apart, and the
pictures behind a code, from coarse to fine."""

from pathlib import Path
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageDraw, ImageFont

from tools.contact_sheet import BACKGROUND, FAINT, GAP, INK, TEXT_HEIGHT, THUMBNAIL, paste
from tools.files import replacing
from tools.plots import Line, Panel
from tools.texts import plural
from tools.tokenizer_report import CodeUse, code_use
from tools.vokens import VokenSpace

SHOWN = 8  # pictures of a level

Codes = NDArray[np.int64]


class Prefixes(NamedTuple):
    """How many pictures share their first so many codes."""

    codes: int
    mean: float
    """Of the group that a picture is in."""
    largest: int
    alone: float
    """Share of the pictures that no other has these codes of."""


class LevelOfPath(NamedTuple):
    """The pictures behind the first codes of one picture."""

    codes: tuple[int, ...]
    pictures: int
    """How many there are."""
    rows: list[int]
    """Some of them, the path's picture first."""


class Health(NamedTuple):
    """The tokenizer in figures."""

    use: list[CodeUse]
    prefixes: list[Prefixes]
    counts: list[NDArray[np.int64]]
    """For each level, how many pictures have each code, largest first; codes that none has are left out."""


def health(codes: Codes, space: VokenSpace) -> Health:
    """Figures of codes (pictures, levels)."""
    counts = []
    for level in range(space.levels):
        found = np.bincount(codes[:, level], minlength=space.codebook_size)
        counts.append(np.sort(found[found > 0])[::-1])
    prefixes = [prefix_groups(codes[:, :length]) for length in range(1, space.levels + 1)]
    return Health(code_use(codes, space.codebook_size), prefixes, counts)


def prefix_groups(prefixes: Codes) -> Prefixes:
    """Groups of equal rows of prefixes (pictures, codes)."""
    _, counts = np.unique(prefixes, axis=0, return_counts=True)
    mean = float((counts**2).sum() / counts.sum())
    return Prefixes(prefixes.shape[1], mean, int(counts.max()), float((counts == 1).sum() / counts.sum()))


def panels(found: Health) -> list[Panel]:
    """Use of the codes, and the pictures behind a prefix, to draw."""
    use = [
        Line(f"level {level + 1}", range(1, len(counts) + 1), counts.tolist(), style=level, points=False)
        for level, counts in enumerate(found.counts)
    ]
    lengths = [prefix.codes for prefix in found.prefixes]
    behind = [
        Line("largest group", lengths, [prefix.largest for prefix in found.prefixes], style=1),
        Line("group of a picture, on average", lengths, [prefix.mean for prefix in found.prefixes], style=2),
    ]
    return [
        Panel(
            "How often codes are used",
            "codes, the most used first",
            "pictures with the code",
            use,
            log_y=True,
            legend=True,
        ),
        Panel(
            "Pictures with the same first codes",
            "first codes",
            "pictures",
            behind,
            log_y=True,
            x_ticks=lengths,
            legend=True,
        ),
    ]


def paths(codes: Codes, *, count: int, seed: int) -> list[list[LevelOfPath]]:
    """For some pictures the pictures behind their first code, their first two, and so on.

    Pictures are drawn at random among those whose group shrinks with the most of their codes, each with another first
    code.
    """
    generator = np.random.default_rng(seed)
    order = generator.permutation(len(codes))
    sizes = np.stack([_group_sizes(codes[:, :length]) for length in range(1, codes.shape[1] + 1)])
    shrinks = (np.diff(sizes, axis=0) < 0).sum(axis=0)[order]
    ranked = order[np.argsort(-shrinks, kind="stable")]
    _, first = np.unique(codes[ranked, 0], return_index=True)
    chosen = ranked[np.sort(first)][:count]
    return [[_level(codes, int(row), length, generator) for length in range(1, codes.shape[1] + 1)] for row in chosen]


def _group_sizes(prefixes: Codes) -> NDArray[np.int64]:
    """(pictures,) how many pictures have the prefix of each."""
    _, inverse, counts = np.unique(prefixes, axis=0, return_inverse=True, return_counts=True)
    sizes: NDArray[np.int64] = counts[inverse.reshape(-1)]
    return sizes


def _level(codes: Codes, row: int, length: int, generator: np.random.Generator) -> LevelOfPath:
    group = np.flatnonzero((codes[:, :length] == codes[row, :length]).all(axis=1))
    others = generator.permutation(group[group != row])[: SHOWN - 1]
    return LevelOfPath(tuple(codes[row, :length].tolist()), len(group), [row, *others.tolist()])


def names(codes: tuple[int, ...], space: VokenSpace) -> str:
    """The vokens of the first codes, as the language model writes them."""
    padded = np.zeros(space.levels, dtype=np.int64)
    padded[: len(codes)] = codes
    return " ".join(space.tokens[row] for row in space.rows(padded)[: len(codes)])


def draw_paths(path: Path, found: list[list[LevelOfPath]], files: list[Path], space: VokenSpace) -> None:
    """Draw the paths to a PNG: a row a level, each path below the other."""
    width = GAP + SHOWN * (THUMBNAIL + GAP)
    row_height = TEXT_HEIGHT + THUMBNAIL + GAP
    sheet = Image.new("RGB", (width, sum(len(levels) * row_height + 2 * GAP for levels in found)), BACKGROUND)
    pen = ImageDraw.Draw(sheet)
    top = GAP
    for number, levels in enumerate(found):
        if number:
            pen.line((GAP, top - GAP, width - GAP, top - GAP), fill=FAINT)
        for level in levels:
            pen.text((GAP, top), names(level.codes, space), fill=INK, font=ImageFont.load_default(14))
            told = pen.textlength(names(level.codes, space), font=ImageFont.load_default(14))
            behind = plural(level.pictures, "picture")
            pen.text((2 * GAP + told, top), behind, fill=FAINT, font=ImageFont.load_default(14))
            for column, row in enumerate(level.rows):
                paste(sheet, files[row], GAP + column * (THUMBNAIL + GAP), top + TEXT_HEIGHT, frame=None)
            top += row_height
        top += 2 * GAP
    with replacing(path) as temporary:
        sheet.save(temporary, format="PNG")
