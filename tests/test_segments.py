"""Changes of the index as segments: any life of it, killed at any moment, is that of one list of pictures."""

import gc
import os
import random
import resource
import signal
import sqlite3
import time
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from retriever.gallery import merge, segments
from retriever.gallery.compact import stored_features
from retriever.gallery.contents import CONTENT, unknown
from retriever.gallery.gallery import Gallery, read_gallery
from retriever.gallery.merge import merge_all
from retriever.gallery.overlay import overlay_to_device
from retriever.gallery.pictures import Picture, SqliteStore, write_store
from retriever.gallery.publish import changing, replace_pictures
from retriever.gallery.segments import Block
from retriever.index import build_index, to_device
from tests.folders import small_index
from tests.test_beam import CPU, SIZE
from tests.test_overlay import LEVELS, lists
from tools import files
from tools.command_line.failures import AGAIN
from tools.errors import BadInput
from tools.files import read_json

WIDTH = 4


class Known(NamedTuple):
    """A picture as the test remembers it."""

    image: str
    codes: tuple[int, ...]
    feature: tuple[float, ...]


def some(generator: np.random.Generator, names: list[str]) -> list[Known]:
    codes = generator.integers(0, SIZE, size=(len(names), LEVELS)).tolist()
    features = stored_features(generator.normal(size=(len(names), WIDTH)).astype(np.float32), None).tolist()
    return [Known(name, tuple(code), tuple(own)) for name, code, own in zip(names, codes, features, strict=True)]


def block_of(pictures: list[Known]) -> Block:
    contents = np.zeros(len(pictures), dtype=CONTENT)
    contents["hash"] = [picture.image.encode() for picture in pictures]
    return Block(
        np.array([picture.codes for picture in pictures], dtype=np.int16).reshape(-1, LEVELS),
        [Picture(picture.image, f"photos/{picture.image}.png") for picture in pictures],
        np.array([picture.feature for picture in pictures], dtype=np.float16).reshape(-1, WIDTH),
        contents,
    )


def change(folder: Path, removed: list[str], added: list[Known]) -> None:
    with changing(folder) as gallery:
        rows = np.array(list(gallery.with_images(removed)), dtype=np.int64)
        assert len(rows) == len(removed)
        replace_pictures(gallery, removed=rows, added=block_of(added) if added else None, source="test")


def after(pictures: list[Known], removed: list[str], added: list[Known]) -> list[Known]:
    return [picture for picture in pictures if picture.image not in removed] + added


def assert_holds(gallery: Gallery, pictures: list[Known]) -> None:
    """The gallery is, in every look-up and every search, one list of pictures."""
    assert len(gallery) == len(pictures)
    assert [picture.image for picture in gallery.pictures()] == [picture.image for picture in pictures]
    assert gallery.read_codes().tolist() == [list(picture.codes) for picture in pictures]
    assert gallery.read_features().tolist() == [list(picture.feature) for picture in pictures]
    assert [each.decode() for each in gallery.read_contents(gallery.rows)["hash"]] == [each.image for each in pictures]
    for row, picture in zip(gallery.rows.tolist(), pictures, strict=True):
        assert gallery.row(picture.image) == row
        assert list(gallery.with_files([f"photos/{picture.image}.png"])) == [row]
    for place in ("photos", "."):
        assert list(gallery.below(place)) == gallery.rows.tolist()
    assert not gallery.below("phot") | gallery.below("/")
    anew = build_index(gallery.read_codes())
    live = overlay_to_device(gallery.overlay, to_device(gallery.overlay.tree, CPU))
    for beams in (3, SIZE**LEVELS):
        options: dict[str, Any] = {"beams": beams, "grain": 1.0, "score_end": True}
        expected = [
            (gallery.rows[rows].tolist(), scores) for rows, scores in lists(to_device(anew, CPU), anew, **options)
        ]
        assert lists(live, gallery.overlay, **options) == expected


@settings(max_examples=15, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    seed=st.integers(0, 2**32),
    steps=st.integers(1, 12),
    most=st.sampled_from((2, 4, 12)),
    share=st.sampled_from((0, 4)),
)
def test_any_life_is_that_of_one_list(
    tmp_path_factory: pytest.TempPathFactory, seed: int, steps: int, most: int, share: int
) -> None:
    """Whatever is merged on the way."""
    generator = np.random.default_rng(seed)
    pictures = some(generator, [f"a{number}" for number in range(int(generator.integers(1, 30)))])
    folder = small_index(tmp_path_factory.mktemp("index"), block_of(pictures))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(merge, "MOST", most)
        patch.setattr(merge, "TOGETHER", 2)
        patch.setattr(merge, "SHARE", share)
        for step in range(steps):
            names = [picture.image for picture in pictures]
            removed = generator.permutation(names)[: int(generator.integers(0, len(names)))].tolist()
            added = some(generator, [f"{step}-{number}" for number in range(int(generator.integers(0, 6)))])
            change(folder, removed, added)
            pictures = after(pictures, removed, added)
            gallery = read_gallery(folder)
            assert_holds(gallery, pictures)
            assert len(gallery.segments) <= 1 + most
    merge_all(folder)
    assert_holds(read_gallery(folder), pictures)
    assert len(read_gallery(folder).segments) == 1


def test_codes_behind_prefixes(tmp_path: Path) -> None:
    generator = np.random.default_rng(3)
    pictures = some(generator, [f"a{number}" for number in range(60)])
    folder = small_index(tmp_path, block_of(pictures[:54]))
    change(folder, ["a3", "a30"], pictures[54:57])
    change(folder, ["a55"], pictures[57:])
    gallery = read_gallery(folder)
    assert len(gallery.segments) == 3
    kept = [each for each in pictures if each.image not in ("a3", "a30", "a55")]
    prefixes = np.array([picture.codes[:-1] for picture in pictures[::3]] + [(9, 9)])
    without = np.array([gallery.row("a7"), gallery.row("a58")])
    expected = sorted(
        picture.codes
        for picture in kept
        if picture.image not in ("a7", "a58") and picture.codes[:-1] in set(map(tuple, prefixes.tolist()))
    )
    assert sorted(map(tuple, gallery.codes_behind(prefixes, without=without).tolist())) == expected
    assert len(expected) > 10


def live(folder: Path, log: Path, seed: int) -> None:
    """Change an index again and again. A line of the log says what is about to be changed, the next that it is done."""
    generator = np.random.default_rng(seed)
    with log.open("a") as file:
        for step in range(1000):
            names = [picture.image for picture in read_gallery(folder).pictures()]
            if generator.random() < 0.1:
                merge_all(folder)
                continue
            removed = generator.permutation(names)[: int(generator.integers(0, min(4, len(names))))].tolist()
            added = [f"{seed}-{step}-{number}" for number in range(int(generator.integers(0 if removed else 1, 4)))]
            file.write(f"{' '.join(removed)}|{' '.join(added)}\n")
            file.flush()
            change(folder, removed, called(added))
            file.write("done\n")
            file.flush()


def called(names: list[str]) -> list[Known]:
    """Pictures whose codes and features follow from their names."""
    return [some(np.random.default_rng(list(name.encode())), [name])[0] for name in names]


def read_on(folder: Path) -> None:
    """Open and search an index until killed."""
    while True:
        gallery = read_gallery(folder)
        assert_holds(gallery, called([picture.image for picture in gallery.pictures()]))


def in_process(action: Any, *arguments: Any) -> int:
    process = os.fork()
    if not process:
        try:
            torch.set_num_threads(1)
            action(*arguments)
        finally:
            os._exit(1)
    return process


def test_kills_lose_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Killed at seeded moments while it adds, removes, merges and searches: what was acknowledged is there.

    `KILLS=100` makes a hundred of them.
    """
    kills = int(os.environ.get("KILLS", "25"))
    monkeypatch.setattr(merge, "MOST", 4)
    monkeypatch.setattr(merge, "TOGETHER", 3)
    moments = random.Random(5)
    known = called([f"a{number}" for number in range(40)])
    folder = small_index(tmp_path / "index", block_of(known))
    reader = in_process(read_on, folder)
    done = torn = 0
    for number in range(kills):
        log = tmp_path / f"{number}.log"
        log.touch()
        writer = in_process(live, folder, log, number)
        while log.read_text().count("done") < number % 3:
            time.sleep(0.005)
        time.sleep(moments.uniform(0, 0.1))
        os.kill(writer, signal.SIGKILL)
        os.waitpid(writer, 0)
        assert os.waitpid(reader, os.WNOHANG) == (0, 0), "a reader failed"
        lines = log.read_text().splitlines()
        for line, acknowledged in zip(lines[::2], [*lines[1::2], ""], strict=False):
            removed, added = (part.split() for part in line.split("|"))
            changed = after(known, removed, called(added))
            there = [picture.image for picture in read_gallery(folder).pictures()] if not acknowledged else []
            if acknowledged or there == [picture.image for picture in changed]:
                known = changed
            done, torn = done + bool(acknowledged), torn + (not acknowledged)
        assert_holds(read_gallery(folder), known)
    os.kill(reader, signal.SIGKILL)
    os.waitpid(reader, 0)
    assert done >= kills - 1
    assert torn


def test_everything_is_on_the_disk_before_it_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A power cut keeps only what was forced to the disk: every file and folder is, before the manifest names it."""
    folder = small_index(tmp_path / "index", block_of(called(list("abcdeghijklm"))))
    events: list[tuple[str, str]] = []
    force, rename = files.force_to_disk, os.replace

    def forced(path: Path) -> None:
        events.append(("forced", path.name))
        force(path)

    def renamed(path: Any, target: Any) -> None:
        events.append(("named", Path(target).name))
        rename(path, target)

    monkeypatch.setattr(files, "force_to_disk", forced)
    monkeypatch.setattr("retriever.gallery.segments.force_to_disk", forced)
    monkeypatch.setattr(os, "replace", renamed)
    monkeypatch.setattr(os, "rename", renamed)
    change(folder, ["b"], called(["f"]))
    names = [name for _, name in events]
    segment = list(read_json(folder / "manifest.json")["facts"]["segments"])[-1]
    written = {path.name for path in (folder / segment).iterdir()}
    place = events.index(("named", segment))
    assert {*written, f".{segment}"} <= set(names[:place])
    assert names[place + 1] == "index"
    assert events.index(("named", "manifest.json")) > place + 1
    assert names[-2:] == ["manifest.json", "index"]
    assert names[-3].startswith(".manifest.json")


@pytest.mark.parametrize(
    ("error", "told"),
    [
        (BadInput(f"no space is left, {AGAIN}"), "no space is left"),
        (OSError(24, "Too many open files"), "[Errno 24] Too many open files"),
        (MemoryError(), "MemoryError"),
    ],
)
def test_a_failed_merge_leaves_the_change(
    error: Exception, told: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    folder = small_index(tmp_path / "index", block_of(called(["a", "b"])))
    write = segments.write_segment

    def refuse(*arguments: Any, **options: Any) -> Any:
        if options.get("tree"):
            raise error
        return write(*arguments, **options)

    monkeypatch.setattr(merge, "write_segment", refuse)
    change(folder, [], called(["c"]))
    line = f"the change is made, but its segments were not merged: {told}; the next change tries it again\n"
    assert capsys.readouterr().out == line
    assert_holds(read_gallery(folder), called(["a", "b", "c"]))


def test_codes_that_come_may_be_larger_than_all_before(tmp_path: Path) -> None:
    pictures = called(list("abcdefghijklm"))
    folder = small_index(tmp_path / "index", block_of(pictures))
    large = Known("n", (40_000, *pictures[0].codes[1:]), pictures[0].feature)
    with changing(folder) as gallery:
        replace_pictures(
            gallery,
            removed=np.empty(0, dtype=np.int64),
            added=block_of([large._replace(codes=(0,) * LEVELS)])._replace(codes=np.array([large.codes])),
            source="test",
        )
    expected = [list(picture.codes) for picture in [*pictures, large]]
    assert len(read_gallery(folder).segments) == 2
    assert read_gallery(folder).read_codes().tolist() == expected
    change(folder, ["a"], called(["o"]))
    merge_all(folder)
    assert read_gallery(folder).read_codes()[:-1].tolist() == expected[1:]


def test_no_picture_has_a_name_that_is_not_unicode(tmp_path: Path) -> None:
    gallery = read_gallery(small_index(tmp_path / "index", block_of(called(["a"]))))
    for name in ("\udce9", "photos/\udce9"):
        assert gallery.row(name) is None
        assert not gallery.with_files([name]) | gallery.below(name)
    assert len(gallery.with_images(["\udce9", "a"])) == 1


def test_a_file_that_lacks_pictures_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Large files are not compared with their hashes."""
    folder = small_index(tmp_path / "index", block_of(called(["a", "b", "c"])))
    store = sqlite3.connect(folder / "segment-000000" / "pictures.sqlite", isolation_level=None)
    store.execute("DELETE FROM pictures WHERE row = 1")
    store.close()
    monkeypatch.setenv("VERIFY", "off")
    gallery = read_gallery(folder)
    for read in (
        lambda: list(gallery.pictures()),
        lambda: gallery.picture(1),
        lambda: gallery.read_contents(gallery.rows),
    ):
        with pytest.raises(BadInput, match="is damaged, it lacks 1 pictures: build the index again"):
            read()


def test_versions_let_go_of_their_files_at_once(tmp_path: Path) -> None:
    """Whether or not the garbage collector runs."""
    folder = small_index(tmp_path / "index", block_of(called(list("abcdefghijklm"))))
    gc.disable()
    try:
        before = len(os.listdir("/proc/self/fd"))  # noqa: PTH208
        for number in range(5):
            change(folder, [], called([str(number)]))
        assert len(os.listdir("/proc/self/fd")) == before  # noqa: PTH208
    finally:
        gc.enable()


def test_a_change_removes_nothing_but_segments(tmp_path: Path) -> None:
    """A copy of one that somebody put beside it is no segment."""
    folder = small_index(tmp_path / "index", block_of(called(["a"])))
    copies = [folder / name for name in ("segment-000000.bak", "version-before")]
    for copy in copies:
        copy.mkdir()
    for torn in (".segment-000004", "segment-000005", "version-0000006"):
        (folder / torn).mkdir()
    change(folder, [], called(["b"]))
    names = {path.name for path in folder.iterdir()} - {path.name for path in copies}
    assert all(copy.is_dir() for copy in copies)
    assert names == {
        "manifest.json",
        ".lock",
        *read_gallery(folder).facts["segments"],
        "segment-000000",
        "segment-000001",
    }


def test_too_few_handles_are_no_damage(tmp_path: Path) -> None:
    folder = small_index(tmp_path / "index", block_of(called(["a", "b", "c"])))
    limits = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (3, limits[1]))
    try:
        with pytest.raises(OSError, match="Too many open files"):
            SqliteStore(folder / "segment-000000" / "pictures.sqlite")
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, limits)


def test_a_full_disk_may_be_the_one_on_which_sqlite_sorts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SQLITE_TMPDIR", "/somewhere")
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (4096, limits[1]))
    try:
        with pytest.raises(
            BadInput, match=r"is the disk full\? \(.*; SQLite sorts in /somewhere, which needs space, too"
        ):
            write_store(
                tmp_path / "pictures.sqlite", ((Picture(str(row), "x" * 100), unknown(1)[0]) for row in range(999))
            )
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
