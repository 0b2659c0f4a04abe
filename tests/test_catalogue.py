"""Codes as a catalogue of semantic ids, and features as an index of faiss."""

import json
import shutil
from pathlib import Path
from typing import Any

import faiss
import numpy as np
import pyarrow
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from pyarrow import parquet

from retriever import Retriever
from retriever.gallery import build, export_codes, export_faiss
from retriever.gallery.gallery import read_gallery
from retriever.gallery.query_encoder import load_encoder, query_features
from tests.chain import Chain, files_of
from tools.catalogue import KEY, collisions_of, read_catalogue, write_catalogue
from tools.embeddings import read_embeddings
from tools.errors import BadInput
from tools.vokens import VokenSpace

# Codes


def test_an_index_s_codes_are_written_and_read_back(index: Path, tmp_path: Path) -> None:
    file = tmp_path / "new" / "codes.parquet"
    export_codes.main(export_codes.Config(index=index, file=file))
    gallery, found = read_gallery(index), read_catalogue(file)
    assert list(zip(found.images, found.files, strict=True)) == [tuple(picture) for picture in gallery.pictures()]
    np.testing.assert_array_equal(found.codes, gallery.read_codes())
    assert not found.collisions.any()  # they were resolved
    assert found.facts["codebooks"] == gallery.codebooks_hash
    assert found.facts["clip"]["model"] == gallery.facts["clip"]["model"]
    schema = parquet.read_schema(file)
    kinds = {name: str(schema.field(name).type) for name in schema.names}
    assert kinds == {
        "id": "string", "file": "string", "codes": "list<element: int32>", "tokens": "list<element: string>",
        "collision": "int32",
    }  # fmt: skip
    [first, *_] = parquet.read_table(file).to_pylist()
    assert first["tokens"] == [f"<v{level}_{code}>" for level, code in enumerate(first["codes"])]
    with pytest.raises(BadInput, match="is there already: replace it with --overwrite"):
        export_codes.main(export_codes.Config(index=index, file=file))
    export_codes.main(export_codes.Config(index=index, file=file, overwrite=True))
    with pytest.raises(BadInput, match="is a folder: name a file in it"):
        export_codes.Config(index=index, file=tmp_path)


@settings(deadline=None, max_examples=40)
@given(data=st.data())
def test_any_codes_come_back(tmp_path_factory: pytest.TempPathFactory, data: st.DataObject) -> None:
    levels, size = data.draw(st.integers(1, 4)), data.draw(st.integers(1, 3))
    space = VokenSpace(levels, size, data.draw(st.booleans()))
    rows = data.draw(st.lists(st.tuples(*[st.integers(0, size - 1)] * levels), min_size=1, max_size=12))
    codes = np.array(rows, dtype=np.int64)
    images = [f"{number} ü" for number in range(len(rows))]
    file = tmp_path_factory.mktemp("catalogue") / "codes.parquet"
    write_catalogue(file, images, images, codes, space, {"codebooks": "x"})
    found = read_catalogue(file)
    assert (found.images, found.space) == (images, space)
    np.testing.assert_array_equal(found.codes, codes)
    assert found.collisions.tolist() == [rows[:place].count(row) for place, row in enumerate(rows)]
    assert len({(*row, place) for row, place in zip(rows, found.collisions.tolist(), strict=True)}) == len(rows)
    shutil.rmtree(file.parent)


def rewritten(path: Path, facts: dict[str, Any] | None = None, **columns: list[Any]) -> None:
    """The file with other columns, or another statement of what it is."""
    table = parquet.read_table(path)
    for name, values in columns.items():
        table = table.set_column(table.schema.get_field_index(name), name, pyarrow.array(values))
    if facts is not None:
        told = {**json.loads(table.schema.metadata[KEY]), **facts}
        table = table.replace_schema_metadata({KEY: json.dumps(told).encode()})
    parquet.write_table(table, path)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"codes": [[0, 9], [1, 0]]}, r"row 0: the codes are \[0, 9\]: expected 2 of 0 to 3"),
        ({"codes": [[0, 1], [1]]}, r"row 1: the codes are \[1\]: expected 2 of 0 to 3"),
        ({"codes": [[0, 1], None]}, r"has rows without codes"),
        ({"codes": [[0, 1], [1, None]]}, r"row 1: the codes are \[1, None\]: expected 2"),
        ({"codes": [["a", "b"], ["c", "d"]]}, r"a column is of another type"),
        ({"collision": [0, None]}, r"has rows without collision"),
        ({"facts": {"levels": "2"}}, r"levels is '2' in its metadata"),
        ({"tokens": [["<v0_0>", "<v1_1>"], ["<v0_1>", "<v1_1>"]]}, r"row 1: the tokens .* are not those of the codes"),
        ({"collision": [0, 1]}, r"row 1: collision is 1"),
        ({"id": ["a", "a"]}, r"row 1: row 0 has the id 'a', too"),
        ({"facts": {"pictures": 3}}, r"has 2 rows, its metadata says 3 pictures"),
        ({"facts": {"version": 2}}, r"has format semantic-ids 2, this program reads semantic-ids 1"),
    ],
)
def test_a_catalogue_that_contradicts_itself_is_refused(tmp_path: Path, change: dict[str, Any], message: str) -> None:
    file = tmp_path / "codes.parquet"
    codes = np.array([[0, 1], [1, 0]])
    write_catalogue(file, ["a", "b"], ["a.png", "b.png"], codes, VokenSpace(2, 4, False), {"codebooks": "x"})
    rewritten(file, **change)
    with pytest.raises(BadInput, match=message):
        read_catalogue(file)


def test_what_is_no_catalogue_is_refused(tmp_path: Path) -> None:
    with pytest.raises(BadInput, match="does not exist"):
        read_catalogue(tmp_path / "codes.parquet")
    (tmp_path / "codes.parquet").write_bytes(b"PAR1")
    with pytest.raises(BadInput, match="is no readable parquet file"):
        read_catalogue(tmp_path / "codes.parquet")
    parquet.write_table(pyarrow.table({"id": ["a"]}), tmp_path / "codes.parquet")
    with pytest.raises(BadInput, match=r"its metadata has no avg\.semantic_ids"):
        read_catalogue(tmp_path / "codes.parquet")


def test_other_widths_of_the_same_types_are_read(tmp_path: Path) -> None:
    """As polars and pandas write them, where the metadata was kept."""
    file = tmp_path / "codes.parquet"
    write_catalogue(file, ["a"], ["a.png"], np.array([[0, 1]]), VokenSpace(2, 4, False), {"codebooks": "x"})
    rewritten(file, codes=[[0, 1]], collision=[0])
    assert str(parquet.read_schema(file).field("collision").type) == "int64"
    assert read_catalogue(file).codes.tolist() == [[0, 1]]
    table = parquet.read_table(file)
    for told in (b"{", b"[]"):
        parquet.write_table(table.replace_schema_metadata({KEY: told}), file)
        with pytest.raises(BadInput, match=r"avg\.semantic_ids in its metadata is no JSON object"):
            read_catalogue(file)


def test_places_in_a_collision_are_those_of_the_rows() -> None:
    assert collisions_of(np.array([[2], [1], [2], [2], [1]])).tolist() == [0, 0, 1, 2, 1]


# faiss


@pytest.fixture
def written(index: Path, tmp_path: Path) -> Path:
    export_faiss.main(export_faiss.Config(index=index, folder=tmp_path / "faiss", embeddings=True))
    return tmp_path / "faiss"


def test_faiss_finds_what_a_two_tower_search_finds(written: Path, index: Path, retriever: Path) -> None:
    """With the ids of the metadata, and by the calls of clip-retrieval's back end."""
    assert files_of(written) == ["image.index", "img_emb/img_emb_0.npy", "metadata/metadata_0.parquet"]
    searcher = Retriever.from_runs(index=index, retriever=retriever, device="cpu", precision="fp32")
    queries = ["a red circle", "green ring"]
    texts = query_features(load_encoder(searcher.gallery, "fp32", searcher.device), queries)
    table = parquet.read_table(written / "metadata" / "metadata_0.parquet").to_pylist()
    for flags in (0, faiss.IO_FLAG_MMAP | faiss.IO_FLAG_READ_ONLY):
        read = faiss.read_index(str(written / "image.index"), flags)
        scores, rows, vectors = read.search_and_reconstruct(texts, 10)
        for number, expected in enumerate(searcher.two_tower(queries, k=10)):
            assert [table[row]["key"] for row in rows[number]] == [one.image for one in expected]
            assert [table[row]["id"] for row in rows[number]] == rows[number].tolist()
            assert scores[number].tolist() == pytest.approx([one.score for one in expected], abs=1e-6)
        np.testing.assert_array_equal(vectors, searcher.gallery.read_features()[rows].astype(np.float32))


def test_the_files_of_the_metadata_are_there(written: Path, index: Path) -> None:
    table = parquet.read_table(written / "metadata" / "metadata_0.parquet").to_pylist()
    assert all(Path(row["image_path"]).is_file() for row in table)
    embeddings = read_embeddings(written)
    np.testing.assert_array_equal(embeddings.images(np.arange(48)), read_gallery(index).read_features())
    assert embeddings.column("key") == [picture.image for picture in read_gallery(index).pictures()]


def test_features_that_are_not_kept_are_not_written(chain: Chain, index: Path, written: Path, tmp_path: Path) -> None:
    with pytest.raises(BadInput, match="is there already: name another folder"):
        export_faiss.main(export_faiss.Config(index=index, folder=written))
    config = build.Config(dataset=chain.dataset, rqvae=chain.rqvae, output=tmp_path / "without", keep_features=False)
    build.main(config)
    with pytest.raises(BadInput, match="keeps no features to search by"):
        export_faiss.main(export_faiss.Config(index=config.output, folder=tmp_path / "none"))
    assert not (tmp_path / "none").exists()
