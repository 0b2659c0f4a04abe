"""Pictures come into the index and go: found by the next search, never half-written, never seen torn."""

import dataclasses
import itertools
import multiprocessing
import os
import re
import shutil
import sys
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray

from models.clip import Pictures, encode_images, load_clip
from models.rqvae import RqVae, tokenize
from retriever import index, prepare
from retriever.data import read_data
from retriever.gallery import add as add_pictures
from retriever.gallery import build as build_index
from retriever.gallery import gallery, search, segments
from retriever.gallery import remove as remove_pictures
from retriever.gallery.compact import stored_features
from retriever.gallery.contents import unknown
from retriever.gallery.gallery import Gallery, read_gallery
from retriever.gallery.merge import merge_all
from retriever.gallery.overlay import overlay_to_device
from retriever.gallery.pictures import Picture
from retriever.gallery.publish import changing, replace_pictures
from retriever.gallery.segments import Block
from tests.chain import Chain, files_of
from tests.folders import as_earlier
from tests.tiny import draw_picture, generate_codes
from tools import finished, runs
from tools.captions import SPLITS
from tools.errors import BadInput
from tools.features import Floats, read_features
from tools.files import read_array, read_json, write_array

NEW = (("red", "square"), ("orange", "ring"), ("grey", "cross"))
CHANGE = ["codes.npy", "features.npy", "pictures.sqlite"]  # files of a segment that lies over another
WHOLE = [
    "codes.npy", "features.npy",
    *(f"level{level}_{part}.npy" for level in range(3) for part in ("bases", "codes", "deltas")),
    "pictures.npy", "pictures.sqlite",
]  # fmt: skip


@pytest.fixture
def folder(index: Path, tmp_path: Path) -> Path:
    """An index of 48 pictures that the test may change."""
    return Path(shutil.copytree(index, tmp_path / "index"))


@pytest.fixture
def new(chain: Chain, tmp_path: Path) -> Path:
    """Three drawings and copies of three pictures of the index, below a folder with a link to itself."""
    photos = tmp_path / "new photos"
    for number, (colour, shape) in enumerate(NEW):
        draw_picture(photos / "mes dessins" / f"n° {number}.png", colour, shape, 100 + number)
    for name in ("red-circle.png", "blue-ring.png", "grey-line.png"):
        shutil.copy(chain.root / "images" / name, photos / f"copy of {name}")
    (photos / "mes dessins" / "loop").symlink_to(photos)
    (photos / "itself.png").symlink_to(photos / "itself.png")
    (photos / "notes.txt").write_text("no picture")
    return photos


def add(folder: Path, new: Path, **options: Any) -> None:
    settings = {"precision": "fp32", "device": "cpu", "workers": 0, **options}
    add_pictures.main(add_pictures.Config(folder=new, index=folder, **settings))


def remove(folder: Path, *names: str) -> None:
    remove_pictures.main(remove_pictures.Config(names=names, index=folder))


def images(folder: Path) -> list[str]:
    return [picture.image for picture in read_gallery(folder).pictures()]


def below(photos: Path) -> list[str]:
    """Ids of the pictures below a folder, in the order in which they are added."""
    return sorted(str(path.relative_to(photos)) for path in photos.rglob("*.png") if path.is_file())


def found_files(folder: Path, retriever: Path, sheet: Path, capsys: pytest.CaptureFixture[str]) -> set[str]:
    """Files that a search wide enough for all pictures prints."""
    capsys.readouterr()
    search.main(
        search.Config(
            queries=("a red circle",), index=folder, retriever=retriever, sheet=sheet, beams=64, keep=64,
            precision="fp32", device="cpu",
        )
    )  # fmt: skip
    return {line.split(maxsplit=3)[3] for line in capsys.readouterr().out.splitlines()[1:-1]}


def assert_same_tree(folder: Path, codes: Sequence[Sequence[int]], scratch: Path) -> None:
    """A search walks the index that is built from nothing over codes (pictures, levels); merged, it is that file by
    file."""
    scratch.mkdir()
    index.save_index(scratch, index.build_index(np.array(codes)))
    assert read_gallery(folder).read_codes().tolist() == np.array(codes).tolist()
    assert_whole_tree(read_gallery(folder))
    merge_all(folder)
    opened = read_gallery(folder)
    assert opened.read_codes().tolist() == np.array(codes).tolist()
    [segment] = opened.segments
    for path in scratch.iterdir():
        assert path.read_bytes() == (folder / segment.name / path.name).read_bytes(), path.name


def assert_whole_tree(opened: Gallery) -> None:
    """The tree with its changes has the leaves of one built anew, in their order, with the same pictures behind."""
    fresh = index.build_index(np.asarray(opened.read_codes()))
    expected, owners = fresh.expand(np.arange(fresh.leaves))
    found, ours = opened.overlay.expand(all_leaves(opened))
    assert found.tolist() == opened.rows[expected].tolist()
    assert ours.tolist() == owners.tolist()


def all_leaves(opened: Gallery) -> NDArray[np.int64]:
    """Leaves that a search can come to, in the order of their codes."""
    nodes = torch.zeros(1, dtype=torch.long)
    for level in overlay_to_device(opened.overlay, index.to_device(opened.overlay.tree, torch.device("cpu"))):
        children = level.children(nodes)
        nodes = children.nodes[children.exist]
    return nodes.numpy()


def told_apart(codes: Sequence[Sequence[int]]) -> Floats:
    """Features (pictures, 24), as wide as the chain's, from which codes (pictures, 3) below 8 can be read."""
    return np.eye(8, dtype=np.float32)[np.array(codes)].reshape(len(codes), 24)


def assert_whole(opened: Gallery) -> None:
    """All parts are of one version: the pictures of `numbered` are called by their codes, and so are their features."""
    assert [picture.image for picture in opened.pictures()] == [str(row) for row in opened.read_codes().tolist()]
    assert opened.read_features().tolist() == stored_features(told_apart(opened.read_codes().tolist()), None).tolist()
    assert_whole_tree(opened)


def test_added_pictures_are_found_and_removed_ones_are_not(
    folder: Path, new: Path, retriever: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    before = found_files(folder, retriever, tmp_path / "x.png", capsys)
    add(folder, new)
    assert capsys.readouterr().out.splitlines()[-1].startswith("6 pictures added, 54 can be found, ")
    files = {str(new / image) for image in below(new)}
    assert found_files(folder, retriever, tmp_path / "x.png", capsys) == before | files
    copy = str(new / "copy of red-circle.png")
    Path(copy).unlink()  # a file that has gone is still listed, and marked
    marked = before | (files - {copy}) | {f"{copy}  (file is gone)"}
    assert found_files(folder, retriever, tmp_path / "x.png", capsys) == marked
    remove(folder, *files)
    assert capsys.readouterr().out == "6 pictures removed, 48 can be found\n"
    assert found_files(folder, retriever, tmp_path / "x.png", capsys) == before


def test_an_interactive_search_sees_a_change_with_its_next_query(
    folder: Path,
    new: Path,
    retriever: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def typed() -> Iterator[str]:
        yield "a red circle"
        add(folder, new)
        yield "a red circle"

    monkeypatch.setattr(search, "typed_queries", typed)
    search.main(
        search.Config(
            queries=(), index=folder, retriever=retriever, sheet=tmp_path / "x.png", precision="fp32", device="cpu"
        )
    )
    lines = [line for line in capsys.readouterr().out.splitlines() if line.startswith('"a red')]
    assert [line.split(", ")[1] for line in lines] == ["48 pictures", "54 pictures"]


def test_adding_gives_the_index_that_is_built_from_nothing(
    chain: Chain, folder: Path, new: Path, tmp_path: Path
) -> None:
    """Codes, tree and collisions, with copies that collide; the pictures that were there keep their codes."""
    before = read_gallery(folder).read_codes().tolist()
    add(folder, new)
    features = read_features(chain.features)
    clip = load_clip(str(chain.features / "clip"))
    pictures = Pictures(below(new), clip.preprocess, folder=new)
    with torch.inference_mode():
        encoded = encode_images(clip, torch.stack([pictures[row] for row in range(6)])).numpy()
    groups = [*(features.image_rows(split) for split in SPLITS), np.arange(48, 54)]
    model = RqVae.from_pretrained(chain.rqvae)
    everything = np.concatenate([features.images, encoded])
    codes = tokenize(model, everything, groups=groups).codes.tolist()
    assert len({str(row) for row in tokenize(model, everything, groups=None).codes.tolist()}) < 54  # some collide
    assert len({str(row) for row in codes}) == 54
    assert codes[:48] == before
    assert_same_tree(folder, codes, tmp_path / "scratch")


def test_removing_gives_the_index_of_those_that_stay(folder: Path, tmp_path: Path) -> None:
    old = read_gallery(folder)
    names, codes = [picture.image for picture in old.pictures()], old.read_codes().tolist()
    remove(folder, names[3], old.picture(20).file, os.path.relpath(old.picture(7).file))
    stay = [row for row in range(48) if row not in (3, 7, 20)]
    assert images(folder) == [names[row] for row in stay]
    assert_same_tree(folder, [codes[row] for row in stay], tmp_path / "scratch")
    assert old.read_codes().tolist() == codes  # an open gallery stays what it was
    assert [picture.image for picture in old.pictures()] == names


def test_unresolved_collisions_stay_and_list_the_older_picture_first(chain: Chain, new: Path, tmp_path: Path) -> None:
    codes, dataset, folder = tmp_path / "codes", tmp_path / "dataset", tmp_path / "index"
    generate_codes.main(
        generate_codes.Config(
            features=chain.features, rqvae=chain.rqvae, output=codes, resolve_collisions=False, device="cpu"
        )
    )
    prepare.main(prepare.Config(codes=codes, output=dataset))
    build_index.main(build_index.Config(dataset=dataset, rqvae=chain.rqvae, output=folder))
    add(folder, new)
    opened = read_gallery(folder)
    names = images(folder)
    for name in ("red-circle.png", "blue-ring.png", "grey-line.png"):
        old, copy = names.index(name), names.index(f"copy of {name}")
        assert opened.read_codes()[old].tolist() == opened.read_codes()[copy].tolist()
        rows, owners = opened.overlay.expand(all_leaves(opened))
        together = rows[owners == owners[rows.tolist().index(copy)]].tolist()
        assert together == sorted(together)
        assert {old, copy} <= set(together)
    merge_all(folder)
    assert "leaf_repeats.npy" in {path.name for path in (folder / "segment-000002").iterdir()}


def test_known_pictures_are_refused_replaced_or_left_out(
    folder: Path, new: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    add(folder, new)
    with pytest.raises(
        BadInput, match=r"6 of 6 pictures are in the index already, the first: .*copy of blue-ring\.png"
    ):
        add(folder, new)
    with pytest.raises(BadInput, match="3 of 3 pictures are in the index already"):
        add(folder, new / "mes dessins")  # the same files under other ids
    capsys.readouterr()
    add(folder, new, skip_known=True)
    assert "nothing to add" in capsys.readouterr().out
    draw_picture(new / "mes dessins" / "n° 0.png", "black", "square", 7)
    draw_picture(new / "one more.png", "black", "cross", 8)
    add(folder, new, skip_known=True)
    assert images(folder)[-2:] == ["mes dessins/n° 2.png", "one more.png"]
    add(folder, new, replace=True)
    assert images(folder)[48:] == below(new)
    assert capsys.readouterr().out.splitlines()[-1].startswith("7 pictures added in the place of 7, 55 can be found")
    other = new.parent / "other"
    draw_picture(other / "one more.png", "black", "cross", 8)
    with pytest.raises(BadInput, match=r"1 of 1 .*there: id 'one more\.png', file .*new photos/one more\.png"):
        add(folder, other)
    add(folder, other, prefix="other/")
    assert images(folder)[-1] == "other/one more.png"


def directions(vectors: Floats) -> Floats:
    """Rows (rows, width) divided by their length, by hand."""
    return np.array([row / np.sqrt((row.astype(np.float64) ** 2).sum()) for row in vectors], dtype=np.float32)


def features_by_image(folder: Path) -> dict[str, list[float]]:
    """What the index keeps of each picture."""
    opened = read_gallery(folder)
    assert opened.read_features().dtype == np.float16
    return dict(zip((picture.image for picture in opened.pictures()), opened.read_features().tolist(), strict=True))


def test_features_stay_with_their_pictures(chain: Chain, folder: Path, new: Path) -> None:
    """Those of the dataset are the feature folder's; an added picture's are what its file gives, a copy's its twin's;
    adding, replacing and removing moves rows and changes none."""
    features = read_features(chain.features)
    expected = dict(zip((record.image for record in features.records), directions(features.images), strict=True))
    kept = features_by_image(folder)
    assert list(kept) == list(expected)
    for image, vector in expected.items():
        assert kept[image] == pytest.approx(vector.tolist(), abs=1e-3)
    add(folder, new)
    added = features_by_image(folder)
    assert {image: added[image] for image in kept} == kept
    assert list(added)[48:] == below(new)
    for name in ("red-circle.png", "blue-ring.png", "grey-line.png"):
        assert added[f"copy of {name}"] == pytest.approx(kept[name], abs=2e-3)
    clip = load_clip(str(chain.features / "clip"))
    pictures = Pictures(below(new), clip.preprocess, folder=new)
    with torch.inference_mode():
        encoded = encode_images(clip, torch.stack([pictures[row] for row in range(6)])).numpy()
    for image, vector in zip(below(new), directions(encoded), strict=True):
        assert added[image] == pytest.approx(vector.tolist(), abs=1e-3)
    remove(folder, "red-ring.png", below(new)[0])
    left = {image: row for image, row in added.items() if image not in ("red-ring.png", below(new)[0])}
    assert features_by_image(folder) == left
    shutil.copy(chain.root / "images" / "black-cross.png", new / below(new)[1])
    add(folder, new, replace=True)
    replaced = features_by_image(folder)
    assert replaced[below(new)[1]] == pytest.approx(kept["black-cross.png"], abs=2e-3)
    assert {image: replaced[image] for image in left if image not in below(new)} == {
        image: row for image, row in left.items() if image not in below(new)
    }


def forget_features(folder: Path) -> Path:
    """Make an index what an earlier version of this repository would have left."""
    manifest = read_json(as_earlier(folder) / "manifest.json")
    del manifest["facts"][gallery.KEEPS_FEATURES]
    del manifest["config"]["keep_features"]
    version = folder / manifest["facts"]["version"]
    del manifest["outputs"][f"{version.name}/features.npy"]
    runs.write_manifest(folder, manifest)
    (version / "features.npy").unlink()
    return folder


@pytest.mark.parametrize("origin", ["an earlier version", "--no-keep-features"])
def test_an_index_without_features_takes_and_loses_pictures(
    origin: str, chain: Chain, folder: Path, new: Path, tmp_path: Path
) -> None:
    if origin == "an earlier version":
        forget_features(folder)
    else:
        folder = tmp_path / "bare"
        build_index.main(
            build_index.Config(dataset=chain.dataset, rqvae=chain.rqvae, output=folder, keep_features=False)
        )
    add(folder, new)
    remove(folder, "red-ring.png")
    opened = read_gallery(folder)
    assert not opened.keeps_features
    assert len(opened) == 53
    assert sorted(path.name for path in (folder / "segment-000002").iterdir()) == ["codes.npy", "pictures.sqlite"]
    merge_all(folder)
    bare = [name for name in WHOLE if name != "features.npy"]
    assert sorted(path.name for path in (folder / "segment-000003").iterdir()) == bare


def test_features_of_other_pictures_are_refused(
    chain: Chain, folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(runs.VERIFY_VARIABLE, "off")  # else the hash would tell
    path = folder / "segment-000000" / "features.npy"
    write_array(path, np.asarray(read_array(path))[:-1])
    with pytest.raises(BadInput, match=r"features\.npy has 47 rows for 48 pictures: build the index again$"):
        read_gallery(folder)
    features = Path(shutil.copytree(chain.features, tmp_path / "features"))
    write_array(features / "images.npy", np.asarray(read_array(features / "images.npy"))[:-1])
    dataset = Path(shutil.copytree(chain.dataset, tmp_path / "dataset"))
    manifest = read_json(dataset / "manifest.json")
    manifest["facts"]["features"] = str(features)
    runs.write_manifest(dataset, manifest)
    with pytest.raises(BadInput, match=r"features of 47 pictures, .*dataset has 48: run scripts/06_generate_codes\.sh"):
        build_index.main(build_index.Config(dataset=dataset, rqvae=chain.rqvae, output=tmp_path / "index"))


def test_replacing_a_picture_frees_its_codes(folder: Path, new: Path) -> None:
    """A picture that takes its own place gets the codes that it had."""
    add(folder, new)
    before = read_gallery(folder).read_codes().tolist()
    add(folder, new, replace=True)
    assert read_gallery(folder).read_codes().tolist() == before


def test_run_folder_holds_what_the_last_two_versions_name(folder: Path, new: Path, tmp_path: Path) -> None:
    whole = [f"segment-000000/{name}" for name in WHOLE]
    assert files_of(folder) == ["manifest.json", *whole]
    empty = runs.fingerprint(folder)
    add(folder, new)
    filled = runs.fingerprint(folder)
    remove(folder, "red-circle.png", "red-ring.png", *below(new)[:2])
    manifest = runs.read_manifest(folder, gallery.COMMAND)
    changes = [f"segment-00000{number}/{name}" for number in (1, 2) for name in CHANGE]
    assert files_of(folder) == ["manifest.json", *whole, *changes]
    assert sorted(manifest.outputs) == [*whole, *changes]
    assert len({empty, filled, manifest.fingerprint}) == 3
    assert manifest.facts["pictures"] == 50
    history = [(row["added"], row["removed"], row["source"]) for row in manifest.facts["history"]]
    assert history[1:] == [
        (6, 0, str(new)), (0, 4, f"red-circle.png, red-ring.png, {below(new)[0]} ..."),
    ]  # fmt: skip
    assert history[0][:2] == (48, 0)
    remove(folder, "red-line.png", *below(new)[2:4])  # a quarter has changed now, so everything is merged
    merged = [f"segment-000004/{name}" for name in WHOLE]
    assert sorted(runs.read_manifest(folder, gallery.COMMAND).outputs) == merged
    changes += [f"segment-000003/{name}" for name in CHANGE]
    assert files_of(folder) == ["manifest.json", *whole, *changes, *merged]
    remove(folder, below(new)[4])
    changes = [f"segment-000005/{name}" for name in CHANGE]
    assert files_of(folder) == ["manifest.json", *merged, *changes]


def test_a_changed_index_is_still_finished(
    chain: Chain, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    config = build_index.Config(dataset=chain.dataset, rqvae=chain.rqvae, output=tmp_path / "index")
    arguments = [part for name in ("dataset", "rqvae", "output") for part in (f"--{name}", str(getattr(config, name)))]
    monkeypatch.setattr("sys.argv", ["x", *arguments])
    build_index.main(config)
    remove(config.output, "red-ring.png")
    assert finished.main(["-m", "retriever.gallery.build", *arguments]) == 0
    build_index.main(config)
    assert capsys.readouterr().out.count("is finished; nothing to do.") == 2
    assert len(read_gallery(config.output)) == 47
    build_index.main(dataclasses.replace(config, overwrite=True))
    assert len(read_gallery(config.output)) == 48


def numbered(folder: Path) -> Path:
    """Give an index twelve pictures that are called by their codes."""
    rename_all(folder, 12, seed=0)
    return folder


def rename_all(folder: Path, count: int, seed: int) -> None:
    """Replace half of the pictures (all that are not called by their codes) by `count` others."""
    codes = np.random.default_rng(seed).integers(0, 8, size=(count, 3))
    with changing(folder) as opened:
        named = opened.picture(0).image.startswith("[")
        removed = np.arange(len(opened))[:: 2 if named else 1]
        added = [Picture(str(row), f"{row}.png") for row in codes.tolist()]
        block = Block(codes, added, stored_features(told_apart(codes.tolist()), None), unknown(count))
        replace_pictures(opened, removed=opened.rows[removed], added=block, source="test")


def run_until(step: int, action: Callable[[], None]) -> int:
    """Run an action in a process that is killed right before its step-th write. Returns its exit status."""
    process = os.fork()
    if process:
        return os.waitstatus_to_exitcode(os.waitpid(process, 0)[1])
    writes = itertools.count(1)

    def kill(event: str, arguments: tuple[Any, ...]) -> None:
        writing = event == "open" and isinstance(arguments[2], int) and arguments[2] & (os.O_WRONLY | os.O_RDWR)
        if (writing or event in ("os.rename", "os.remove", "os.rmdir", "os.mkdir", "sqlite3.connect")) and next(
            writes
        ) == step:
            os._exit(9)

    try:
        sys.addaudithook(kill)
        action()
        os._exit(0)
    except BaseException:
        os._exit(1)


def test_a_writer_killed_at_any_step_leaves_a_whole_version(folder: Path, tmp_path: Path) -> None:
    rename_all(numbered(folder), 3, seed=1)  # so that the change has an old version to remove
    rename_all(shutil.copytree(folder, tmp_path / "done"), 5, seed=2)
    old, new, outcomes = images(folder), images(tmp_path / "done"), []
    for step in itertools.count(1):
        copy = Path(shutil.copytree(folder, tmp_path / f"killed at {step}"))
        status = run_until(step, lambda copy=copy: rename_all(copy, 5, seed=2))  # type: ignore[misc]
        opened = read_gallery(copy)
        assert_whole(opened)
        outcomes.append(images(copy) == new)
        assert images(copy) == (new if outcomes[-1] else old)
        rename_all(copy, 4, seed=3)
        assert_whole(read_gallery(copy))
        facts = read_gallery(copy).facts
        kept = {*facts[gallery.SEGMENTS], *facts[gallery.EARLIER]}
        assert {path.name for path in copy.iterdir()} == {".lock", "manifest.json", *kept}
        shutil.rmtree(copy)
        if status != 9:
            break
    assert status == 0
    assert step > 40
    assert outcomes == sorted(outcomes)
    assert outcomes.count(False) > 10
    assert outcomes.count(True) > 10  # killed while it removed the version before the last


def test_a_killed_build_is_repeated(chain: Chain, tmp_path: Path) -> None:
    config = build_index.Config(dataset=chain.dataset, rqvae=chain.rqvae, output=tmp_path / "index")
    for step in (3, 5, 8, 20, 40):
        assert run_until(step, lambda: build_index.main(config)) == 9
        with pytest.raises(BadInput, match=r"run scripts/14_build_index\.sh first"):
            read_gallery(config.output)
    build_index.main(config)
    assert files_of(config.output) == ["manifest.json", *(f"segment-000000/{name}" for name in WHOLE)]


def read_again_and_again(folder: Path, stop: Any, results: Any) -> None:
    """Open the index until told to stop; report how often, and how many versions were seen."""
    versions = []
    try:
        while not stop.is_set():
            opened = read_gallery(folder)
            assert_whole(opened)
            versions.append(opened.facts["version"])
        results.put((len(versions), len(set(versions)), versions == sorted(versions), ""))
    except BaseException as error:
        results.put((len(versions), 0, False, repr(error)))


def test_a_reader_never_sees_a_torn_version(folder: Path) -> None:
    numbered(folder)
    processes = multiprocessing.get_context("fork")
    stop, results = processes.Event(), processes.Queue()
    readers = [processes.Process(target=read_again_and_again, args=(folder, stop, results)) for _ in range(2)]
    for reader in readers:
        reader.start()
    for seed in range(1, 41):
        rename_all(folder, 1 + seed % 7, seed)
    stop.set()
    for reads, versions, in_order, error in (results.get(timeout=60) for _ in readers):
        assert not error
        assert in_order
        assert reads >= versions > 3
    for reader in readers:
        reader.join()


def test_a_reader_whose_version_went_reads_the_newest(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    numbered(folder)
    read, calls = segments.read_segment, []

    def overtaken(place: Path, name: str, **options: Any) -> segments.Segment:
        calls.append(name)
        if len(calls) == 1:
            with monkeypatch.context() as patch:
                patch.setattr(gallery, "read_segment", read)
                for seed in (1, 2):
                    rename_all(folder, 3, seed)
        return read(place, name, **options)

    before = list(read_gallery(folder).facts[gallery.SEGMENTS])
    monkeypatch.setattr(gallery, "read_segment", overtaken)
    opened = read_gallery(folder)
    assert_whole(opened)
    assert calls == [before[0], *opened.facts[gallery.SEGMENTS]]
    assert not set(before) & set(opened.facts[gallery.SEGMENTS])


def test_only_one_writes_at_a_time(folder: Path, new: Path) -> None:
    with changing(folder):
        with pytest.raises(BadInput, match="in use by another process: wait until it has finished"):
            add(folder, new)
        with pytest.raises(BadInput, match="in use by another process"):
            remove(folder, "red-ring.png")
        assert len(read_gallery(folder)) == 48  # who only reads need not wait
    add(folder, new)


def test_links_out_of_the_folder_are_added_when_asked_for(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (colour, shape), *_ = NEW
    for path in (tmp_path / "p" / "0.png", tmp_path / "trip" / "1.png"):
        draw_picture(path, colour, shape, 200)
    (tmp_path / "p" / "0.png").rename(tmp_path / "p" / "no ending")
    (tmp_path / "p" / "same.png").symlink_to("no ending")
    (tmp_path / "p" / "trip").symlink_to(tmp_path / "trip")
    with pytest.raises(
        BadInput, match=r"/p/trip: link to a folder, not followed \(--follow-links adds what is there\)"
    ):
        add(folder, tmp_path / "p")
    capsys.readouterr()
    add(folder, tmp_path / "p", follow_links=True)
    assert images(folder)[48:] == ["no ending", "trip/1.png"]
    said = f"{tmp_path / 'p'}: 1 other file: 1 link to a picture listed under another name"
    assert said in capsys.readouterr().out.splitlines()
    remove(folder, str(tmp_path / "p" / "trip" / "1.png"))  # as a search names it
    assert images(folder)[48:] == ["no ending"]


def test_a_damaged_picture_stops_all_or_is_left_out(
    folder: Path, new: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    whole = (new / "copy of blue-ring.png").read_bytes()
    (new / "cut.png").write_bytes(whole[: len(whole) // 2])
    (new / "words.JPG").write_text("not a picture")
    Path(os.fsdecode(os.fsencode(new) + b"/\xff.png")).write_bytes(whole)
    before = files_of(folder)
    with pytest.raises(BadInput) as error:
        add(folder, new)
    assert str(error.value) == (
        f"{new}/cut.png: picture unreadable (image file is truncated) (3 of 9 pictures cannot be used): mend it, or go "
        "on without it with --skip-bad; nothing was added"
    )
    assert files_of(folder) == before
    capsys.readouterr()
    add(folder, new, skip_bad=True)
    lines = capsys.readouterr().out.splitlines()
    assert lines[2:5] == [
        f"left out: {new}/cut.png: picture unreadable (image file is truncated)",
        f"left out: {new}/words.JPG: file is no picture",
        f"left out: {new}/\\udcff.png: file name not UTF-8",
    ]
    assert lines[5].startswith("6 pictures added")


@pytest.mark.parametrize(
    ("names", "message"),
    [
        (
            ("red-ring.png", "no such.png", "nor this"),
            r"2 of 3 names are neither .* the first: 'no such\.png'; nothing",
        ),
        ((), "no picture is named"),
    ],
)
def test_unknown_names_remove_nothing(folder: Path, names: tuple[str, ...], message: str) -> None:
    with pytest.raises(BadInput, match=message):
        remove(folder, *names)
    assert len(read_gallery(folder)) == 48


@pytest.fixture
def two_cars(folder: Path, tmp_path: Path) -> Path:
    """photos/car.png and photos/2024/car.png, both in the index, and a third that is not."""
    photos = tmp_path / "photos"
    for number, name in enumerate(("car.png", "2024/car.png", "dog.png")):
        draw_picture(photos / name, "red", "square", 100 + number)
    add(folder, photos)
    draw_picture(tmp_path / "elsewhere" / "car.png", "blue", "cross", 104)
    return photos


def test_a_name_that_is_two_pictures_is_refused(folder: Path, two_cars: Path) -> None:
    """The id of one, and a file where the user stands, whether that is in the index or not."""
    for place in (two_cars / "2024", two_cars.parent / "elsewhere"):
        with pytest.raises(BadInput, match=r"'car\.png' is the id of .*photos/car\.png, and also a file in .*: write "):
            remove_pictures.remove(folder, ["car.png"], seen_from=place)
    assert len(read_gallery(folder)) == 51
    with pytest.raises(BadInput, match="neither the id nor, as seen from"):
        remove_pictures.remove(folder, ["./car.png"], seen_from=two_cars.parent / "elsewhere")


def test_the_advice_for_such_a_name_can_be_followed(folder: Path, two_cars: Path) -> None:
    before = images(folder)
    with pytest.raises(BadInput) as refused:
        remove_pictures.remove(folder, ["car.png"], seen_from=two_cars / "2024")
    advised = re.search(r"write (\S+) for the file here, or (\S+) for the picture with this id", str(refused.value))
    assert advised is not None
    for name, image in zip(advised.groups(), ("2024/car.png", "car.png"), strict=True):
        remove_pictures.remove(folder, [name], seen_from=two_cars / "2024")
        assert [each for each in before if each not in images(folder)] == [image]
        before = images(folder)


@pytest.mark.parametrize(
    ("place", "name", "image"),
    [
        ("2024", "./car.png", "2024/car.png"),
        ("2024", "../car.png", "car.png"),
        ("2024", "2024/car.png", "2024/car.png"),  # an id
        ("2024", "dog.png", "dog.png"),  # an id, and no file here
        (".", "car.png", "car.png"),  # both, of one picture
        (".", "./2024/car.png", "2024/car.png"),
    ],
)
def test_a_name_is_seen_from_where_the_user_stands(
    folder: Path, two_cars: Path, place: str, name: str, image: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    before = images(folder)
    monkeypatch.chdir(two_cars / place)
    assert remove_pictures.remove(folder.absolute(), [name]).pictures == 1
    assert [each for each in before if each not in images(folder)] == [image]


def test_the_last_picture_stays(folder: Path) -> None:
    with pytest.raises(BadInput, match="an index holds at least one; nothing was removed"):
        remove(folder, *images(folder))
    first, *rest = images(folder)
    remove(folder, *rest)
    assert images(folder) == [first]


def test_wrong_folders_and_options_are_one_clear_line(folder: Path, new: Path, tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    for options, message in (
        ({"new": tmp_path / "nowhere"}, "nowhere is not a folder"),
        ({"new": tmp_path / "empty"}, "there is no picture below .*empty"),
        ({"folder": tmp_path / "empty"}, r"has no manifest\.json: run scripts/14_build_index\.sh first"),
        ({"replace": True, "skip_known": True}, "--replace and --skip-known contradict"),
        ({"batch_size": 0}, "--batch-size must be at least 1"),
    ):
        with pytest.raises(BadInput, match=message):
            add(**{"folder": folder, "new": new, **options})  # type: ignore[arg-type]
    assert not (tmp_path / "empty" / ".lock").exists()


@pytest.mark.parametrize("part", ["clip", "rqvae"])
def test_a_model_that_has_changed_is_refused(part: str, folder: Path, new: Path) -> None:
    manifest = read_json(folder / "manifest.json")
    manifest["facts"][part]["content"] = "another"
    runs.write_manifest(folder, manifest)
    with pytest.raises(BadInput, match=r"has changed, .* since .* was built"):
        add(folder, new)
    assert len(read_gallery(folder)) == 48


def copy_with_input(folder: Path, copy: Path, **inputs: dict[str, str]) -> Path:
    """A copy of a run folder whose manifest speaks of other inputs."""
    shutil.copytree(folder, copy)
    manifest = read_json(copy / "manifest.json")
    manifest["inputs"] = {name: {**manifest["inputs"].get(name, {}), **value} for name, value in inputs.items()}
    runs.write_manifest(copy, manifest)
    return copy


def test_stale_inputs_are_refused(chain: Chain, tmp_path: Path) -> None:
    """Codes made again behind the dataset's back, and towers behind the features'."""
    old = {"fingerprint": "older"}
    stale = copy_with_input(chain.dataset, tmp_path / "stale", codes=old)
    with pytest.raises(BadInput, match=r"codes has changed since .*: run scripts/07_prepare_retriever_dataset\.sh"):
        build_index.main(build_index.Config(dataset=stale, rqvae=chain.rqvae, output=tmp_path / "index"))
    towers = {"path": str(chain.root / "clip"), "by": "content", **old}
    features = copy_with_input(chain.features, tmp_path / "features", model=towers)
    rqvae = runs.read_manifest(chain.codes, "RQ-VAE.generate_codes").inputs["rqvae"]
    codes = copy_with_input(
        chain.codes, tmp_path / "codes", rqvae=rqvae,
        features={"path": str(features), "by": "content", "fingerprint": runs.fingerprint(features)},
    )  # fmt: skip
    codes_now = {"path": str(codes), "by": "content", "fingerprint": runs.fingerprint(codes)}
    dataset = copy_with_input(chain.dataset, tmp_path / "dataset", codes=codes_now)
    with pytest.raises(BadInput, match=r"clip has changed since .*features was made: run scripts/04_train_heads\.sh"):
        build_index.main(build_index.Config(dataset=dataset, rqvae=chain.rqvae, output=tmp_path / "index"))


@pytest.mark.parametrize(
    "name", ["pictures.sqlite", "codes.npy", "level1_codes.npy", "features.npy", "pictures.jsonl", "lines.npy"]
)
def test_damaged_files_are_named(name: str, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    version = folder / "segment-000000"
    if not (version / name).exists():
        version = as_earlier(folder) / "version-000000"
    (version / name).write_bytes((version / name).read_bytes()[:-2] if name.endswith("jsonl") else b"")
    with pytest.raises(BadInput, match=rf"/{name} is damaged.*: run scripts/14_build_index\.sh --overwrite"):
        read_gallery(folder)
    with monkeypatch.context() as patch:
        patch.setenv(runs.VERIFY_VARIABLE, "off")  # what is left out is told by the files themselves
        with pytest.raises(BadInput, match=r"build the index again|not a readable"):
            read_gallery(folder)
    (version / name).unlink()
    with pytest.raises(BadInput, match=rf"/{name} is missing: run scripts/14_build_index\.sh --overwrite"):
        read_gallery(folder)


def test_pictures_are_read_by_row(folder: Path, chain: Chain) -> None:
    opened, data = read_gallery(folder), read_data(chain.dataset)
    pictures = [
        Picture(image, str(data.image_folder / file)) for image, file in zip(data.images, data.files, strict=True)
    ]
    assert [opened.picture(row) for row in range(48)] == pictures
    assert list(opened.pictures()) == pictures
    assert all(Path(picture.file).is_file() for picture in opened.pictures())
