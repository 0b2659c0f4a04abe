"""Embeddings of clip-retrieval: read, taken as features, and added to an index; what does not fit together is told."""

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow
import pytest
from numpy.typing import NDArray
from pyarrow import parquet

from retriever import Retriever
from retriever.gallery import add_embeddings, build
from retriever.gallery.gallery import read_gallery
from tests.chain import Chain, encode_config
from tests.tiny import prepare_emb, rqvae_train
from tools import clip_retrieval, runs
from tools.captions import read_captions
from tools.embeddings import named_model, read_embeddings, rows_of_pictures, same_model
from tools.errors import BadInput
from tools.features import read_features

Vectors = NDArray[np.floating]


@pytest.fixture
def folder(chain: Chain, tmp_path: Path) -> Path:
    """A row per picture, in three parts, in single precision."""
    output = tmp_path / "by picture"
    config = clip_retrieval.Config(features=chain.features, output=output, by="picture", rows=20, dtype="float32")
    clip_retrieval.main(config)
    return output


@pytest.fixture
def pairs(chain: Chain, tmp_path: Path) -> Path:
    """A row per caption, in half precision, as clip-retrieval has them of pairs."""
    clip_retrieval.main(clip_retrieval.Config(features=chain.features, output=tmp_path / "pairs", rows=50))
    return tmp_path / "pairs"


@pytest.fixture
def own_index(index: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(index, tmp_path / "index"))


def write_part(folder: Path, number: str, images: Vectors, texts: Vectors | None = None, **columns: list[Any]) -> Path:
    """A part as LAION and clip-retrieval write it, with any columns."""
    for kind, vectors in (("img_emb", images), ("text_emb", texts)):
        if vectors is not None:
            (folder / kind).mkdir(parents=True, exist_ok=True)
            np.save(folder / kind / f"{kind}_{number}.npy", vectors)
    (folder / "metadata").mkdir(parents=True, exist_ok=True)
    parquet.write_table(pyarrow.table(columns), folder / "metadata" / f"metadata_{number}.parquet")
    return folder


def options(chain: Chain, folder: Path, index: Path, **more: Any) -> add_embeddings.Config:
    return add_embeddings.Config(index=index, folder=folder, model=str(chain.features / "clip"), device="cpu", **more)


def add(chain: Chain, folder: Path, index: Path, **more: Any) -> None:
    add_embeddings.main(options(chain, folder, index, **more))


def normal(vectors: Vectors) -> Vectors:
    return vectors / np.linalg.norm(vectors, axis=1, keepdims=True)


# Reading


def test_parts_are_read_in_the_order_of_their_numbers(tmp_path: Path) -> None:
    """Also where numbers are padded in other ways, there are eleven of them, and a row is asked for twice."""
    blocks = [np.full((2, 4), number, dtype=np.float16) + np.array([[0], [0.5]]) for number in range(11)]
    for number, block in enumerate(blocks):
        write_part(tmp_path, str(number), block, key=[f"{number}a", f"{number}b"])
    for kind, ending in (("img_emb", "npy"), ("metadata", "parquet")):
        place = tmp_path / kind / f"{kind}_3.{ending}"
        place.rename(place.with_name(f"{kind}_0003.{ending}"))
    found = read_embeddings(tmp_path)
    assert (len(found), found.width, found.has_texts, found.columns) == (22, 4, False, ["key"])
    assert found.column("key") == [f"{number}{letter}" for number in range(11) for letter in "ab"]
    rows = np.array([21, 6, 0, 6])
    np.testing.assert_array_equal(found.images(rows)[:, 0], rows / 2)
    assert found.unusable().tolist() == [0]


def test_files_in_the_folder_itself_are_found(folder: Path, tmp_path: Path) -> None:
    for path in [*folder.rglob("*.npy"), *folder.rglob("*.parquet")]:
        shutil.move(path, tmp_path / path.name)
    assert len(read_embeddings(tmp_path)) == 48


Change = Callable[[Path], object]


def resaved(change: Callable[[Vectors], Any]) -> Change:
    def apply(folder: Path) -> None:
        path = folder / "img_emb" / "img_emb_1.npy"
        np.save(path, change(np.load(path)))

    return apply


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda folder: shutil.rmtree(folder / "img_emb"), r"has no img_emb/img_emb_0\.npy: name a folder"),
        (
            lambda folder: (folder / "metadata" / "metadata_1.parquet").unlink(),
            r"img_emb_1\.npy has no file metadata_1",
        ),
        (
            lambda folder: (folder / "img_emb" / "img_emb_2.npy").unlink(),
            r"metadata_2\.parquet has no img_emb_2 beside",
        ),
        (
            lambda folder: (folder / "metadata" / "metadata_1.parquet").write_bytes(b"PAR1 and no more"),
            r"metadata_1\.parquet is no readable parquet file",
        ),
        (lambda folder: (folder / "img_emb" / "img_emb_1.npy").write_bytes(b"x"), r"is not a readable \.npy file"),
        (resaved(lambda vectors: vectors[1:]), r"img_emb_1\.npy has 19 rows and .*metadata_1\.parquet 20"),
        (resaved(lambda vectors: vectors[:, 1:]), r"vectors of width 24, .*img_emb_1\.npy of width 23"),
        (resaved(lambda vectors: vectors[0]), r"img_emb_1\.npy holds float32 of shape \(24,\)"),
        (resaved(lambda vectors: vectors.astype(int)), r"img_emb_1\.npy holds int64 of shape"),
        (
            lambda folder: (folder / "img_emb" / "img_emb_1.npy").rename(folder / "img_emb" / "all.npy"),
            r"all\.npy has no number in its name: call it img_emb_0\.npy",
        ),
        (
            lambda folder: shutil.copy(folder / "img_emb" / "img_emb_1.npy", folder / "img_emb" / "img_emb_01.npy"),
            r"have the same number: move one of them away",
        ),
    ],
)
def test_parts_that_do_not_fit_together_are_refused(folder: Path, change: Change, message: str) -> None:
    change(folder)
    with pytest.raises(BadInput, match=message):
        read_embeddings(folder)


def test_parts_without_any_row_are_refused(folder: Path, tmp_path: Path) -> None:
    """One among others is none to complain about."""
    write_part(folder, "2", np.zeros((0, 24), np.float32), key=[])
    assert len(read_embeddings(folder)) == 40
    write_part(tmp_path, "0", np.zeros((0, 24), np.float32), key=[])
    with pytest.raises(BadInput, match="has parts without any row"):
        read_embeddings(tmp_path)


def test_a_model_is_known_by_either_name(tmp_path: Path) -> None:
    assert named_model("ViT-B/32", None) == ("ViT-B-32", "openai")
    assert named_model("RN50x4", None) == ("RN50x4", "openai")
    assert named_model("open_clip:ViT-H-14", "laion2b_s32b_b79k") == ("ViT-H-14", "laion2b_s32b_b79k")
    assert same_model(("ViT-L-14-quickgelu", "openai"), ("ViT-L-14", "openai"))
    assert not same_model(("ViT-L-14", "laion2b_s32b_b82k"), ("ViT-L-14", "openai"))
    (tmp_path / "link").symlink_to(tmp_path)
    assert same_model((str(tmp_path), None), (str(tmp_path / "link"), None))


# Features


def test_features_are_taken_in_the_place_of_encoding(chain: Chain, pairs: Path, tmp_path: Path) -> None:
    """Those of pictures and of captions, to half precision; only a few pictures and captions are encoded."""
    config = encode_config(chain.captions, str(chain.features / "clip"), tmp_path / "taken", embeddings=pairs)
    prepare_emb.main(config)
    own, taken = read_features(chain.features), read_features(tmp_path / "taken")
    for mine, given in ((taken.images, own.images), (taken.texts, own.texts)):
        np.testing.assert_allclose(mine, normal(given), atol=2e-3)
    assert runs.read_manifest(tmp_path / "taken", "RQ-VAE.prepare_emb").facts["embeddings"] == str(pairs)
    settings: dict[str, Any] = {"width": 16, "hidden": (24,), "levels": 2, "codebook_size": 8, "epochs": 2}
    rqvae_train.main(rqvae_train.Config(features=tmp_path / "taken", output=tmp_path / "05", device="cpu", **settings))
    with pytest.raises(BadInput, match=r"--no-normalize reads the lengths of features, .* of length 1"):
        rqvae_train.main(
            rqvae_train.Config(
                features=tmp_path / "taken", output=tmp_path / "x", device="cpu", normalize=False, **settings
            )
        )


def test_captions_without_vectors_are_encoded(chain: Chain, folder: Path, tmp_path: Path) -> None:
    prepare_emb.main(encode_config(chain.captions, str(chain.features / "clip"), tmp_path / "taken", embeddings=folder))
    own, taken = read_features(chain.features), read_features(tmp_path / "taken")
    np.testing.assert_allclose(taken.images, normal(own.images), rtol=1e-5)
    np.testing.assert_allclose(taken.texts, own.texts, atol=1e-4)


def test_rows_are_found_by_keys_of_img2dataset(chain: Chain, tmp_path: Path) -> None:
    """Whose ids have no ending, in any order, among rows of other pictures."""
    captions = read_captions(chain.captions)
    keys = ["other", *(Path(record.image).stem for record in captions.records[::-1])]
    for column in ("key", "image_path"):
        write_part(tmp_path / column, "0", np.ones((49, 4), np.float16), None, **{column: keys})
        rows = rows_of_pictures(read_embeddings(tmp_path / column), captions)
        assert rows.tolist() == list(range(48, 0, -1))
    write_part(tmp_path / "some", "0", np.ones((48, 4), np.float16), key=keys[:-1])
    first = captions.records[0].image
    with pytest.raises(BadInput, match=rf"has no row for 1 of 48 pictures, the first: {first} \(file {first}\)"):
        rows_of_pictures(read_embeddings(tmp_path / "some"), captions)
    write_part(tmp_path / "none", "0", np.ones((48, 4), np.float16), url=keys[:-1])
    with pytest.raises(BadInput, match="has neither of the columns key and image_path"):
        rows_of_pictures(read_embeddings(tmp_path / "none"), captions)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            lambda vectors: vectors[:, ::-1].copy(),
            r"is not of the model that was named: the cosine .* 1\.00 is expected",
        ),
        (lambda vectors: vectors * 0, r"the vector of row \d+ has no direction"),
    ],
)
def test_features_of_another_model_are_not_taken(
    chain: Chain, folder: Path, tmp_path: Path, change: Callable[[Vectors], Vectors], message: str
) -> None:
    for path in (folder / "img_emb").iterdir():
        np.save(path, change(np.load(path)))
    with pytest.raises(BadInput, match=message):
        prepare_emb.main(
            encode_config(chain.captions, str(chain.features / "clip"), tmp_path / "taken", embeddings=folder)
        )
    with pytest.raises(BadInput, match="--embeddings are of the shared space"):
        encode_config(chain.captions, "x", tmp_path, embeddings=folder, layer="tower")


# An index


@pytest.mark.parametrize("kind", ["folder", "pairs"])
def test_pictures_are_added_as_their_files_would_be(
    chain: Chain, retriever: Path, own_index: Path, request: pytest.FixtureRequest, kind: str,
    capsys: pytest.CaptureFixture[str], tmp_path: Path,
) -> None:  # fmt: skip
    source: Path = request.getfixturevalue(kind)
    gone = [picture.image for picture in read_gallery(own_index).pictures()][::9]
    live: dict[str, Any] = {"retriever": retriever, "device": "cpu", "precision": "fp32"}
    by_files = Retriever.from_runs(index=own_index, **live)
    by_files.remove(gone)
    other = Path(shutil.copytree(own_index, tmp_path / "other index"))
    by_files.add([chain.root / "images" / image for image in gone])
    add(chain, source, other, skip_known=True)
    said = capsys.readouterr().out
    assert "ids are of the column key, files of the column image_path" in said
    assert f"{len(gone)} pictures encoded to compare: median cosine 1.000" in said
    assert f"{len(gone)} pictures added, 48 can be found" in said
    assert ("left out as it repeats an earlier row's picture: 96 rows" in said) == (kind == "pairs")
    taken, expected = read_gallery(other), by_files.gallery
    assert list(taken.pictures()) == list(expected.pictures())
    if kind == "folder":  # half precision may lead to another code
        np.testing.assert_array_equal(taken.read_codes(), expected.read_codes())
    np.testing.assert_allclose(
        taken.read_features().astype(np.float32), expected.read_features().astype(np.float32), atol=3e-3
    )
    found = Retriever.from_runs(index=other, **live).similar(gone[0], k=3)
    assert [one.image for one in found] == [one.image for one in by_files.similar(gone[0], k=3)]


def test_pictures_on_the_web_are_added_by_their_addresses(
    chain: Chain, own_index: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Nobody has their files: the captions' vectors show the model."""
    features = read_features(chain.features)
    vectors, texts = normal(features.images).astype(np.float16), normal(features.texts[::3]).astype(np.float16)
    captions = [record.captions[0] for record in features.records]
    urls = [f"https://example.com/{number}.jpg" for number in range(48)]
    write_part(tmp_path / "web", "00", vectors, texts, url=urls, caption=captions, NSFW=["UNLIKELY"] * 48)
    add(chain, tmp_path / "web", own_index)
    said = capsys.readouterr().out
    assert "ids are of the column url, files of the column url" in said
    assert "16 captions encoded to compare: median cosine 1.000" in said
    pictures = list(read_gallery(own_index).pictures())
    assert [(picture.image, picture.file) for picture in pictures[48:]] == [(url, url) for url in urls]


def test_files_are_told_by_the_column_that_leads_to_them(
    chain: Chain, own_index: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Of shards, image_path has keys, and the addresses say more; else it stands."""
    vectors = read_features(chain.features).images[:2]
    here = {"image_path": ["0", "1"], "key": ["0", "1"], "url": ["https://a.example/0", "https://a.example/1"]}
    write_part(tmp_path / "shards", "0", vectors, None, **here)
    add(chain, tmp_path / "shards", own_index)
    write_part(tmp_path / "keys", "0", vectors, None, image_path=["2", "3"], key=["2", "3"])
    add(chain, tmp_path / "keys", own_index, images=tmp_path)
    said = capsys.readouterr().out
    assert "files of the column url" in said
    assert "files of the column image_path" in said
    files = [picture.file for picture in read_gallery(own_index).pictures()][48:]
    assert files == [*here["url"], str(tmp_path / "2"), str(tmp_path / "3")]


def test_where_nothing_shows_the_model_a_note_says_so(
    chain: Chain, own_index: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    vectors = read_features(chain.features).images[:3]
    write_part(tmp_path / "web", "0", vectors, key=["x", "y", "z"], caption=["a", "b", "c"])
    add(chain, tmp_path / "web", own_index, prefix="web/")
    assert "nothing shows that the embeddings are of" in capsys.readouterr().out
    assert [picture.image for picture in read_gallery(own_index).pictures()][48:] == ["web/x", "web/y", "web/z"]


def test_columns_are_chosen(chain: Chain, own_index: Path, tmp_path: Path) -> None:
    vectors = read_features(chain.features).images[:2]
    source = write_part(tmp_path / "web", "0", vectors, sku=[7, 0], thumb=["a.png", "b.png"], key=["x", "x"])
    add(chain, source, own_index, id_column="sku", file_column="thumb", images=tmp_path / "thumbs")
    last = list(read_gallery(own_index).pictures())[-1]
    assert (last.image, last.file) == ("0", str((tmp_path / "thumbs" / "b.png").resolve()))
    with pytest.raises(BadInput, match=r"has no column name: name one with --id-column, it has sku, thumb, key"):
        add(chain, source, own_index, id_column="name")


def test_known_pictures_are_left_out_or_replaced(
    chain: Chain, folder: Path, own_index: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(BadInput, match=r"48 of 48 rows are in the index already, the first: .*--skip-known"):
        add(chain, folder, own_index)
    add(chain, folder, own_index, skip_known=True)
    assert "nothing to add" in capsys.readouterr().out
    codes = np.array(read_gallery(own_index).read_codes())
    add(chain, folder, own_index, replace=True)
    assert "48 pictures added in the place of 48, 48 can be found" in capsys.readouterr().out
    assert len(np.unique(codes, axis=0)) == len(np.unique(read_gallery(own_index).read_codes(), axis=0))
    with pytest.raises(BadInput, match="--replace and --skip-known contradict each other"):
        options(chain, folder, own_index, replace=True, skip_known=True)


def test_rows_that_cannot_be_used_are_told_or_left_out(
    chain: Chain, own_index: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    vectors = np.array(read_features(chain.features).images[:6])
    vectors[1] = 0
    vectors[2, 3] = np.nan
    source = write_part(tmp_path / "web", "0", vectors, key=["a", "b", "c", None, "a", "d"])
    with pytest.raises(BadInput, match=r"4 of 6 rows cannot be used, the first: row 1: its vector has no direction"):
        add(chain, source, own_index)
    assert len(read_gallery(own_index)) == 48
    add(chain, source, own_index, skip_bad=True)
    assert "left out: 4 of 6 rows cannot be used" in capsys.readouterr().out
    assert [picture.image for picture in read_gallery(own_index).pictures()][48:] == ["a", "d"]
    vectors[4] = 2 * vectors[0]
    rest = [0, 4, 5]
    again = write_part(tmp_path / "again", "0", vectors[rest], key=["a", "a", "d"])
    add(chain, again, own_index, prefix="again/")
    assert "left out as it repeats an earlier row's picture: 1 row" in capsys.readouterr().out
    assert len(read_gallery(own_index)) == 52


def test_embeddings_of_another_model_are_not_added(chain: Chain, own_index: Path, folder: Path, tmp_path: Path) -> None:
    """By its name, its width, and its vectors."""
    vectors = read_features(chain.features).images
    with pytest.raises(
        BadInput, match=r"clip, the embeddings are of ViT-B-32 \(openai\): an index has features of one"
    ):
        add_embeddings.main(add_embeddings.Config(index=own_index, folder=folder, model="ViT-B/32", device="cpu"))
    narrow = write_part(tmp_path / "narrow", "0", vectors[:3, :8], key=["x", "y", "z"])
    with pytest.raises(BadInput, match=r"has vectors of width 8, .* of width 24"):
        add(chain, narrow, own_index)
    config = build.Config(dataset=chain.dataset, rqvae=chain.rqvae, output=tmp_path / "without", keep_features=False)
    build.main(config)
    with pytest.raises(BadInput, match=r"has vectors of width 8, .* of width 24"):
        add(chain, narrow, config.output)
    add(chain, write_part(tmp_path / "good", "0", vectors[:3], key=["x", "y", "z"]), config.output)
    assert len(read_gallery(config.output)) == 51
    for path in (folder / "img_emb").iterdir():
        np.save(path, np.load(path)[:, ::-1])
    with pytest.raises(BadInput, match=r"is not of .*: the cosine of its vectors"):
        add(chain, folder, own_index, replace=True)
    texts = read_features(chain.features).texts[::3]
    captions = [record.captions[0] for record in read_features(chain.features).records]
    keys = [f"web {number}" for number in range(48)]
    swapped = write_part(tmp_path / "swapped", "0", vectors, texts[::-1], key=keys, caption=captions)
    with pytest.raises(BadInput, match=r"is not of .*: the cosine of its vectors"):
        add(chain, swapped, own_index)
    assert len(read_gallery(own_index)) == 48
