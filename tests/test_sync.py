"""A folder lives: after a sync the index is the one that would be built from the folder as it is."""

import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from retriever import Retriever, prepare
from retriever.gallery import add as add_pictures
from retriever.gallery import build as build_index
from retriever.gallery import contents, sync
from retriever.gallery import remove as remove_pictures
from retriever.gallery.answers import Found
from retriever.gallery.gallery import FOLDERS, read_gallery
from tests.chain import Chain, encode_config
from tests.folders import as_earlier
from tests.test_bad_input import without_privileges
from tests.test_picture_files import reachable
from tests.tiny import draw_picture, generate_codes, prepare_emb
from tools import prepare_captions, runs
from tools.errors import BadInput
from tools.files import hash_file, read_json

ROOT = Path(__file__).parent.parent
COLOURS, SHAPES = ("red", "green", "blue", "black", "orange"), ("circle", "square", "ring", "cross", "line")
NAMES = ("a.png", "b.png", "c/d.png", "c/é ü.png", "c/e/f.png", "z.png")


class Life(NamedTuple):
    """A folder of pictures, and the index that was built from it."""

    photos: Path
    index_folder: Path

    def sync(self, *places: Path, **options: Any) -> sync.Synced:
        config = {"precision": "fp32", "device": "cpu", "workers": 0, **options}
        return sync.sync(self.index_folder, places, sync.Config(index=self.index_folder, **config))

    def add(self, folder: Path, **options: Any) -> None:
        config = {"precision": "fp32", "device": "cpu", "workers": 0, **options}
        add_pictures.main(add_pictures.Config(folder=folder, index=self.index_folder, **config))

    def ids(self) -> list[str]:
        """In their own order."""
        return sorted(picture.image for picture in read_gallery(self.index_folder).pictures())

    def codes(self) -> dict[str, tuple[int, ...]]:
        """Of each picture, by its id."""
        gallery = read_gallery(self.index_folder)
        rows = zip(gallery.pictures(), gallery.rows.tolist(), strict=True)
        return {picture.image: gallery.code(row) for picture, row in rows}


def draw(path: Path, number: int) -> None:
    draw_picture(path, COLOURS[number % 5], SHAPES[number // 5 % 5], number)


def build(chain: Chain, photos: Path, root: Path, *, resolve: bool = True) -> Life:
    """What quickstart.sh does with a bare folder."""
    folders = [root / name for name in ("captions", "features", "codes", "dataset", "index")]
    captions, features, codes, dataset, index = folders
    prepare_captions.main(prepare_captions.Config(images=photos, output=captions, skip_bad=True, workers=0))
    prepare_emb.main(encode_config(captions, str(chain.features / "clip"), features, layer="embedding"))
    generate_codes.main(
        generate_codes.Config(
            features=features, rqvae=chain.rqvae, output=codes, resolve_collisions=resolve, device="cpu"
        )
    )
    prepare.main(prepare.Config(codes=codes, output=dataset))
    build_index.main(build_index.Config(dataset=dataset, rqvae=chain.rqvae, output=index))
    return Life(photos, index)


@pytest.fixture
def life(chain: Chain, tmp_path: Path) -> Life:
    for number, name in enumerate(NAMES[:4]):
        draw(tmp_path / "photos" / name, number)
    return build(chain, tmp_path / "photos", tmp_path)


@pytest.fixture
def nothing_is_encoded(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*arguments: object) -> None:
        raise AssertionError("a picture was encoded")

    monkeypatch.setattr(sync, "encode", refuse)


def assert_equal(ours: Life, fresh: Life, *, codes: bool) -> None:
    """Ids, files and features; codes whole, or up to the last level, at which collisions are resolved."""
    mine, other = read_gallery(ours.index_folder), read_gallery(fresh.index_folder)
    rows = {picture: row for row, picture in zip(mine.rows.tolist(), mine.pictures(), strict=True)}
    order = np.array([rows.pop(picture) for picture in other.pictures()])
    assert not rows
    np.testing.assert_allclose(
        mine.read_features(order).astype(np.float32), other.read_features().astype(np.float32), atol=2e-3
    )
    levels = slice(None) if codes else slice(-1)
    assert mine.read_codes(order)[:, levels].tolist() == other.read_codes()[:, levels].tolist()
    assert len(np.unique(mine.read_codes(), axis=0)) == len(np.unique(other.read_codes(), axis=0))


def apply(photos: Path, kind: str, source: str, target: str, number: int) -> None:
    """One thing that happens to a folder, where it can."""
    old, new = photos / source, photos / target
    if kind == "draw":
        draw(new, number)
    elif kind == "copy" and old.is_file() and old != new:
        new.parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(old, new)
    elif kind == "move" and old.is_file():
        new.parent.mkdir(parents=True, exist_ok=True)
        old.rename(new)
    elif kind == "delete":
        old.unlink(missing_ok=True)
    elif kind == "swap" and old.is_file() and new.is_file() and old != new:
        old.rename(photos / "between")
        new.rename(old)
        (photos / "between").rename(new)
    elif kind == "damage" and old.is_file():
        old.write_bytes(old.read_bytes()[:60])
    elif kind == "touch" and old.is_file():
        os.utime(old, (number, number))


EVENTS = st.lists(
    st.tuples(
        st.sampled_from(["draw", "copy", "move", "delete", "swap", "damage", "touch", "sync"]),
        st.sampled_from(NAMES),
        st.sampled_from(NAMES),
        st.integers(0, 24),
    ),
    min_size=1,
    max_size=10,
)


@settings(max_examples=12, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(events=EVENTS, resolve=st.booleans())
def test_after_any_life_the_index_is_that_of_a_fresh_build(
    chain: Chain, tmp_path_factory: pytest.TempPathFactory, events: list[tuple[str, str, str, int]], resolve: bool
) -> None:
    """Codes too where collisions stay; where they are resolved, pictures that were there keep theirs."""
    root = tmp_path_factory.mktemp("life")
    photos = root / "photos"
    for number, name in enumerate(("stays.png", *NAMES[:4])):
        draw(photos / name, number)
    ours = build(chain, photos, root / "ours", resolve=resolve)
    for kind, source, target, number in events:
        if kind == "sync":
            ours.sync()
        apply(photos, kind, source, target, number)
    ours.sync()
    fresh = build(chain, photos, root / "fresh", resolve=resolve)
    assert_equal(ours, fresh, codes=not resolve)
    assert not any(ours.sync()[:4])


def test_searches_answer_as_after_a_fresh_build(chain: Chain, retriever: Path, tmp_path: Path) -> None:
    photos = tmp_path / "photos"
    for number, name in enumerate(NAMES[:4]):
        draw(photos / name, number)
    ours = build(chain, photos, tmp_path / "ours", resolve=False)
    draw(photos / "new.png", 11)  # came
    draw(photos / "a.png", 12)  # was edited
    (photos / "b.png").rename(photos / "c" / "renamed.png")
    (photos / "c" / "d.png").unlink()
    assert ours.sync() == (1, 1, 1, 1, 1, 4)
    fresh = build(chain, photos, tmp_path / "fresh", resolve=False)
    answers = []
    for folder in (ours, fresh):
        loaded = Retriever.from_runs(index=folder.index_folder, retriever=retriever, device="cpu", precision="fp32")
        [found] = loaded.search(["a red circle"], k=4)
        answers.append([(one.image, one.file, one.codes, pytest.approx(one.score, abs=1e-2)) for one in found])
    assert answers[0] == answers[1]
    assert len(answers[0]) == 4


def test_what_moved_keeps_its_code_and_is_not_encoded(
    life: Life, nothing_is_encoded: None, capsys: pytest.CaptureFixture[str]
) -> None:
    codes = life.codes()
    (life.photos / "a.png").rename(life.photos / "c" / "moved.png")
    os.utime(life.photos / "b.png", (1, 1))
    assert life.sync(dry_run=True) == (0, 0, 1, 0, 3, 4)
    place = life.photos
    assert f"moved: {place}/a.png -> {place}/c/moved.png" in capsys.readouterr().out.splitlines()
    assert life.ids() == ["a.png", "b.png", "c/d.png", "c/é ü.png"]
    assert life.sync() == (0, 0, 1, 0, 3, 4)
    assert life.ids() == ["b.png", "c/d.png", "c/moved.png", "c/é ü.png"]
    assert life.codes() == {{"a.png": "c/moved.png"}.get(image, image): code for image, code in codes.items()}


def test_a_sync_hashes_only_what_may_have_changed(life: Life, monkeypatch: pytest.MonkeyPatch) -> None:
    hashed = []

    def noted(path: Path) -> str:
        hashed.append(path.name)
        return hash_file(path)

    monkeypatch.setattr(contents, "hash_file", noted)
    version = read_gallery(life.index_folder).facts["version"]
    life.sync()
    assert hashed == []
    assert read_gallery(life.index_folder).facts["version"] == version  # nothing was written
    os.utime(life.photos / "b.png", (1, 1))
    draw(life.photos / "new.png", 20)
    life.sync()
    assert hashed == ["b.png", "new.png"]
    life.sync()
    assert len(hashed) == 2


def test_an_edit_that_keeps_size_and_time_is_seen(life: Life) -> None:
    picture = life.photos / "a.png"
    state = picture.stat()
    draw(picture, 13)
    picture.write_bytes(picture.read_bytes()[: state.st_size].ljust(state.st_size, b"\0"))
    os.utime(picture, ns=(state.st_atime_ns, state.st_mtime_ns))
    assert life.sync()[:4] != (0, 0, 0, 0)


def test_an_edit_before_the_index_was_built_is_seen(chain: Chain, tmp_path: Path) -> None:
    """Between the reading of the captions and the end of the build."""
    photos = tmp_path / "photos"
    for number, name in enumerate(NAMES[:4]):
        draw(photos / name, number)
    life = build(chain, photos, tmp_path)
    shutil.rmtree(life.index_folder)
    draw(photos / "a.png", 13)
    config = build_index.Config(dataset=tmp_path / "dataset", rqvae=chain.rqvae, output=life.index_folder)
    build_index.main(config)
    manifest = read_json(life.index_folder / runs.MANIFEST)
    manifest["facts"]["history"][0]["time"] = "2099-01-01T00:00:00+00:00"  # however long the build took
    runs.write_manifest(life.index_folder, manifest)
    assert life.sync() == (0, 1, 0, 0, 3, 4)


def test_folders_are_followed_one_by_one(life: Life, tmp_path: Path) -> None:
    other = tmp_path / "other"
    draw(other / "x.png", 14)
    draw(other / "y.png", 15)
    life.add(other, prefix="other/")
    (life.photos / "a.png").unlink()
    draw(other / "a.png", 16)
    (other / "x.png").rename(other / "w.png")
    assert life.sync(other) == (1, 0, 1, 0, 1, 7)
    assert life.ids() == ["a.png", "b.png", "c/d.png", "c/é ü.png", "other/a.png", "other/w.png", "other/y.png"]
    assert life.sync() == (0, 0, 0, 1, 6, 6)  # all that pictures came from
    assert life.ids()[:3] == ["b.png", "c/d.png", "c/é ü.png"]
    draw(life.photos / "c" / "new.png", 17)
    draw(life.photos / "new.png", 18)
    assert life.sync(life.photos / "c") == (1, 0, 0, 0, 2, 7)  # ids are those that a sync of the whole folder gives
    assert "c/new.png" in life.ids()
    assert "new.png" not in life.ids()
    (tmp_path / "third").mkdir()
    with pytest.raises(BadInput, match=r"no picture of .* lies below .*third: add those .*scripts/add_pictures\.sh /"):
        life.sync(tmp_path / "third")
    with pytest.raises(BadInput, match=r"the pictures below .* came from .*photos, .*other: sync each of these"):
        life.sync(tmp_path)


def test_a_link_that_was_followed_is_a_folder_below(life: Life, tmp_path: Path) -> None:
    draw(tmp_path / "trip" / "1.png", 14)
    (life.photos / "trip").symlink_to(tmp_path / "trip")
    assert life.sync(follow_links=True).came == 1
    draw(tmp_path / "trip" / "2.png", 15)
    assert life.sync(life.photos / "trip") == (1, 0, 0, 0, 1, 6)
    assert life.ids()[-2:] == ["trip/1.png", "trip/2.png"]


@pytest.mark.parametrize("state", ["empty", "gone"])
def test_a_folder_that_is_not_mounted_does_not_empty_the_index(life: Life, tmp_path: Path, state: str) -> None:
    other = tmp_path / "other"
    draw(other / "x.png", 14)
    life.add(other)
    (other / "x.png").unlink()
    if state == "gone":
        other.rmdir()
    with pytest.raises(BadInput, match=r"is its disk mounted\? --allow-empty lets them go; nothing was changed"):
        life.sync(other)
    assert "x.png" in life.ids()
    assert life.sync(other, allow_empty=True) == (0, 0, 0, 1, 0, 4)
    shutil.rmtree(life.photos)
    with pytest.raises(BadInput, match=r"no folder .*photos, where all pictures of .* came from: is its disk mounted"):
        life.sync(allow_empty=True)


@pytest.mark.parametrize(("place", "mode", "named"), [("photos/c", 0, "c"), ("photos/c", 0o644, "c"), (".", 0, ".")])
def test_a_folder_that_cannot_be_read_keeps_its_pictures(
    life: Life, tmp_path: Path, place: str, mode: int, named: str
) -> None:
    """One that may not be listed, or listed and not entered, or that lies in such a one."""
    reachable(life.photos)
    gallery = read_gallery(life.index_folder)
    (tmp_path / place).chmod(mode)
    with without_privileges():
        changes = sync.look(gallery, gallery.folders[0], sync.Config(index=life.index_folder, device="cpu", workers=0))
        found = Found("c/d.png", life.photos / "c" / "d.png", 0.0, (0, 0, 0))
        assert found.gone
    (tmp_path / place).chmod(0o755)
    assert (len(changes.targets), changes.any()) == (4, False)
    assert changes.left_out == {named: "no permission to read the folder"}
    assert not found.gone


def test_what_cannot_be_used_is_named(life: Life, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    other = tmp_path / "other"
    draw(other / "x.png", 14)
    life.add(other)
    draw(other / "a.png", 15)  # as a picture of the first folder is called
    (other / "bad.png").write_bytes(b"no picture")
    (life.photos / "b.png").write_bytes(b"")
    (life.photos / "notes.txt").write_text("1")
    capsys.readouterr()
    assert life.sync() == (0, 0, 0, 1, 4, 4)
    lines = capsys.readouterr().out.splitlines()
    assert f"{life.photos}: 1 other file: 1 .txt" in lines
    assert f"left out: {life.photos}/b.png: picture file is empty" in lines
    assert f"left out: {other}/a.png: its id would be that of {life.photos}/a.png: rename it" in lines
    assert any(line.startswith(f"left out: {other}/bad.png: ") for line in lines)
    for number in range(20):
        (other / f"bad{number}.png").write_bytes(b"no picture")
    assert life.sync() == (0, 0, 0, 0, 4, 4)
    lines = [line for line in capsys.readouterr().out.splitlines() if line.startswith("left out: ")]
    assert len(lines) == 1 + 11  # that of the first folder, and ten and their number
    assert lines[-1].startswith("left out: 22 in all, of which 10 are named: 21 × file is no picture; 1 × ")


def test_an_index_of_an_earlier_version_is_followed(life: Life, capsys: pytest.CaptureFixture[str]) -> None:
    """It notes nothing of files: those that have not changed since it was made are trusted, and hashed once."""
    manifest = read_json(as_earlier(life.index_folder, contents=False) / runs.MANIFEST)
    del manifest["facts"][FOLDERS]
    manifest["facts"]["history"][0]["time"] = "2099-01-01T00:00:00+00:00"
    runs.write_manifest(life.index_folder, manifest)
    with pytest.raises(BadInput, match="does not say which folders its pictures came from: name the folder"):
        life.sync()
    draw(life.photos / "new.png", 20)
    assert life.sync(life.photos) == (1, 0, 0, 0, 4, 5)
    (life.photos / "a.png").rename(life.photos / "y.png")
    assert life.sync() == (0, 0, 1, 0, 4, 5)


def test_another_tokenizer_is_refused(life: Life, chain: Chain, tmp_path: Path) -> None:
    other = Path(shutil.copytree(chain.rqvae, tmp_path / "rqvae"))
    life.sync(rqvae=other)  # it is the same
    manifest = read_json(other / runs.MANIFEST)
    manifest["facts"]["levels"] = 4
    runs.write_manifest(other, manifest)
    with pytest.raises(BadInput, match=r"was coded by another tokenizer than .*quickstart\.sh --overwrite"):
        life.sync(rqvae=other)


@pytest.mark.parametrize("change", [add_pictures, remove_pictures])
def test_a_change_by_other_commands_is_kept(change: object, life: Life, nothing_is_encoded: None) -> None:
    """What was removed by hand comes back only where its file is still there."""
    if change is remove_pictures:
        remove_pictures.main(remove_pictures.Config(names=("a.png",), index=life.index_folder))
        (life.photos / "a.png").unlink()
        assert not any(life.sync()[:4])
    else:
        draw(life.photos / "new.png", 20)
        life.add(life.photos, skip_known=True)
        assert life.sync() == (0, 0, 0, 0, 5, 5)


def test_quickstart_follows_its_folder(life: Life, chain: Chain, tmp_path: Path, warm_python: Path) -> None:
    """Given again after pictures came and went; another folder is named and not mixed in."""
    (tmp_path / "14_index").mkdir()
    life.index_folder.rename(tmp_path / "14_index")
    life = life._replace(index_folder=tmp_path / "14_index")
    text = (ROOT / "scripts" / "datasets" / "folder.sh").read_text()
    own = f"RETRIEVER={tmp_path}\nRQVAE={chain.rqvae}\n"
    (tmp_path / "mine.sh").write_text(text + own)
    draw(life.photos / "new.png", 20)
    (life.photos / "a.png").unlink()
    done = quickstart(tmp_path, "photos", warm_python)
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines()[-1].startswith("1 came, 0 changed, 0 moved, 1 went, 3 as before; 4 pictures")
    assert life.ids() == ["b.png", "c/d.png", "c/é ü.png", "new.png"]
    draw(tmp_path / "other" / "x.png", 21)
    done = quickstart(tmp_path, "other", warm_python)
    assert done.returncode == 2
    variables = f"DATASET={tmp_path}/mine.sh PICTURES={tmp_path}/other"
    advice = f"{variables} bash {ROOT}/scripts/add_pictures.sh {tmp_path}/other"
    assert f"lies below {tmp_path}/other: add those that are there with {advice}, or" in done.stderr.splitlines()[-1]
    assert len(life.ids()) == 4


def quickstart(folder: Path, pictures: str, python: Path) -> "subprocess.CompletedProcess[str]":
    """Typed in a folder, with paths as seen from there."""
    path = f"{python}:{Path(sys.executable).parent}:{os.environ['PATH']}"
    return subprocess.run(
        ["bash", str(ROOT / "scripts" / "quickstart.sh")], cwd=folder, capture_output=True, text=True,
        env={**os.environ, "PATH": path, "DATASET": "mine.sh", "PICTURES": pictures},
    )  # fmt: skip


def test_a_dry_run_says_what_would_be(life: Life, capsys: pytest.CaptureFixture[str]) -> None:
    draw(life.photos / "new.png", 14)
    capsys.readouterr()
    twice = (life.photos, life.photos)  # which is once
    config = sync.Config(index=life.index_folder, folders=twice, dry_run=True, device="cpu", workers=0)
    sync.main(config)
    assert capsys.readouterr().out.splitlines()[-1] == (
        "1 would come, 0 change, 0 move, 0 go, 4 stay as they are; now 4 pictures can be found"
    )


def test_a_folder_that_has_an_index_in_it_names_it(life: Life) -> None:
    exported = life.index_folder.parent / "exported"
    exported.mkdir()
    life.index_folder.rename(exported / "index")
    with pytest.raises(BadInput, match=r"/exported is no index but has one, .*: name \S*/exported/index$"):
        read_gallery(exported)
