"""Tables of captions: each row is read exactly, or is a problem with its line; nothing is changed without a word."""

import csv
import io
import json
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from tools.captions import Record, read_captions
from tools.data.columns import Wanted, texts_in_cell
from tools.data.found import Found, check_captions
from tools.data.tables import read_table
from tools.errors import BadInput
from tools.prepare_captions import Config, main
from tools.texts import clean

case = pytest.param


@pytest.fixture
def images(tmp_path: Path) -> Path:
    for name in ("a.jpg", "b.jpg", "c.jpg"):
        (tmp_path / "images").mkdir(exist_ok=True)
        Image.new("RGB", (4, 4), "red").save(tmp_path / "images" / name)
    return tmp_path / "images"


def prepare(images: Path, name: str, content: str | bytes, **options: Any) -> list[Record]:
    source = images.parent / name
    source.write_bytes(content if isinstance(content, bytes) else content.encode())
    config = Config(
        images=images, source=(source,), output=images.parent / "out", workers=0, split_rule="test", **options
    )
    main(config)
    return read_captions(config.output).records


def captions(records: list[Record]) -> dict[str, list[str]]:
    return {record.file: list(record.captions) for record in records}


# What is wrong with one row: its problem, and what --skip-bad leaves

BAD_ROWS = [
    case("t.csv", "image,caption\na.jpg,a red car, parked\nb.jpg,x\n",
         "row with more cells than the header (put texts with separators in quotation marks): t.csv, line 2",
         {"b.jpg": ["x"]}, id="comma without quotes"),
    case("t.tsv", "image\tcaption\na.jpg\ta red\tcar\nb.jpg\tx\n",
         "row with more cells than the header (leave separators out of texts): t.tsv, line 2",
         {"b.jpg": ["x"]}, id="tab in a TSV"),
    case("t.csv", 'image,caption\na.jpg,"a red car\nb.jpg,x\nc.jpg,y\n',
         "quotation mark that is opened and not closed: t.csv, line 2",
         {"b.jpg": ["x"], "c.jpg": ["y"]}, id="quote up to the end"),
    case("t.csv", 'image,caption\na.jpg,"a red car\nb.jpg,"x, y"\nc.jpg,z\n',
         "quotation mark that is opened and not closed: t.csv, line 2",
         {"b.jpg": ["x, y"], "c.jpg": ["z"]}, id="quote up to the next quote"),
    case("t.csv", 'caption,image\n"a red car,a.jpg\nx,b.jpg\n"y",c.jpg\n',
         "quotation mark that is opened and not closed: t.csv, line 2",
         {"b.jpg": ["x"], "c.jpg": ["y"]}, id="quote where the caption comes first"),
    case("t.csv", 'image,caption,by\na.jpg,"a red car,me\nb.jpg,x,"you"\nc.jpg,y,me\n',
         "quotation mark that is opened and not closed: t.csv, line 2",
         {"b.jpg": ["x"], "c.jpg": ["y"]}, id="quote that ends before another cell"),
    case("t.csv", 'image,caption\na.jpg,"a red car\nb.jpg,x",y"\nc.jpg,z\n',
         "quotation mark that is opened and not closed before the next rows: t.csv, line 2",
         {"c.jpg": ["z"]}, id="quote that swallows a row"),
    case("t.csv", 'image,caption\na.jpg,"a red car\nb.jpg,x"\nc.jpg,5" y\n',
         "quotation mark that may close one of a row before: t.csv, line 3",
         {"c.jpg": ['5" y']}, id="quote that is closed in another row"),
    case("t.csv", 'image,caption\na.jpg,"a "red" car"\nb.jpg,x\n',
         'quotation mark within a quoted cell (write it twice: ""): t.csv, line 2', {"b.jpg": ["x"]},
         id="quotes within quotes"),
    case("t.csv", 'image,caption\na.jpg, "a red, car"\nb.jpg,x\n',
         "blank before the quotation mark that opens a cell (leave the blank out): t.csv, line 2", {"b.jpg": ["x"]},
         id="blank before a quote"),
    case("t.csv", "image,caption\n,x\nb.jpg,x\n", "row without a picture: t.csv, line 2", {"b.jpg": ["x"]},
         id="no picture"),
    case("t.csv", "image,caption\na.jpg\nb.jpg,x\n", "row without a caption: t.csv, line 2", {"b.jpg": ["x"]},
         id="no caption"),
    case("t.csv", "image,caption\na.jpg,\nb.jpg,x\n", "empty caption: t.csv, line 2", {"b.jpg": ["x"]},
         id="empty caption"),
    case("t.csv", "image,caption\nb.jpg,x\nb.jpg,\n", "empty caption: t.csv, line 3", {"b.jpg": ["x"]},
         id="empty second caption"),
    case("t.csv", "image,caption,split\na.jpg,x\nb.jpg,x,test\n", "row with fewer cells than the header: t.csv, line 2",
         {"b.jpg": ["x"]}, id="too few cells"),
    case("t.csv", "image,caption,split\na.jpg,x,\nb.jpg,x,test\n",
         "row without a split, where others have one: t.csv, line 2: a.jpg", {"b.jpg": ["x"]}, id="empty split"),
    case("t.csv", "image,caption\na.jpg,x\0y\nb.jpg,x\n",
         "NUL character (save the file as UTF-8): t.csv, line 2", {"b.jpg": ["x"]}, id="NUL"),
    case("t.csv", b"image,caption\na.jpg,caf\xe9\nb.jpg,x\n",
         "line that is not UTF-8 (save the file as UTF-8): t.csv, line 2", {"b.jpg": ["x"]}, id="Latin-1"),
    case("t.csv", "image,caption\na.jpg,one\rtwo\nb.jpg,x\n",
         "line break within a cell that is not quoted: t.csv, line 2", {"b.jpg": ["x"]}, id="carriage return"),
    case("t.csv", "image,captions\na.jpg,\"['one' 'two']\"\nb.jpg,x\n",
         "a list in a cell that is neither a JSON nor a Python list of texts: t.csv, line 2", {"b.jpg": ["x"]},
         id="numpy's array"),
    case("t.csv", "image,captions\na.jpg,\"['one', 'tw\"\nb.jpg,x\n",
         "a list in a cell that is neither a JSON nor a Python list of texts: t.csv, line 2", {"b.jpg": ["x"]},
         id="list that is cut off"),
    case("t.csv", 'image,captions\na.jpg,"[1, 2]"\nb.jpg,x\n',
         "a list in a cell that is neither a JSON nor a Python list of texts: t.csv, line 2", {"b.jpg": ["x"]},
         id="list of numbers"),
    case("t.jsonl", '{"image": "a.jpg", "caption": "x", "caption": "y"}\n{"image": "b.jpg", "caption": "x"}\n',
         "key that stands twice: t.jsonl, line 1: caption", {"b.jpg": ["x"]}, id="JSON key twice"),
    case("t.jsonl", '{"image": "a.jpg"}\n{"image": "b.jpg", "caption": "x"}\n',
         "row without a caption: t.jsonl, line 1", {"b.jpg": ["x"]}, id="JSON without a caption"),
    case("t.jsonl", '{"caption": "y"}\n{"image": "b.jpg", "caption": "x"}\n',
         "row without a picture: t.jsonl, line 1", {"b.jpg": ["x"]}, id="JSON without a picture"),
    case("t.jsonl", '{"image": \n{"image": "b.jpg", "caption": "x"}\n', "line that is not JSON: t.jsonl, line 1",
         {"b.jpg": ["x"]}, id="no JSON"),
    case("t.token", "a.jpg#0 one\nb.jpg#0\tx\n",
         "line that is not PICTURE#NUMBER, a tab, and a caption: t.token, line 1", {"b.jpg": ["x"]},
         id="token without a tab"),
    case("results.csv", "image_name| comment_number| comment\na.jpg| 0| one | two\nb.jpg| 0| x\n",
         "row with more cells than the header (leave separators out of texts): results.csv, line 2", {"b.jpg": ["x"]},
         id="separator in results.csv"),
]  # fmt: skip


@pytest.mark.parametrize(("name", "content", "problem", "left"), BAD_ROWS)
def test_a_bad_row_is_counted_and_the_others_are_read(
    name: str, content: str | bytes, problem: str, left: dict[str, list[str]], images: Path
) -> None:
    with pytest.raises(BadInput) as caught:
        prepare(images, name, content)
    assert f"  {problem}" in str(caught.value).splitlines()
    del caught
    assert captions(prepare(images, name, content, skip_bad=True)) == left


# What is read

GOOD_TABLES = [
    case("t.tsv", 'image\tcaption\na.jpg\t"Stop" says the sign\nb.jpg\t" an odd quote\nc.jpg\ta 5" ruler\n',
         {"a.jpg": ['"Stop" says the sign'], "b.jpg": ['" an odd quote'], "c.jpg": ['a 5" ruler']},
         id="quotes in a TSV"),
    case("t.csv", "image,caption,caption\na.jpg,one,two\n", {"a.jpg": ["one", "two"]}, id="doubled column"),
    case("t.csv", "image,caption,caption_2\na.jpg,one,two\n", {"a.jpg": ["one", "two"]}, id="numbered columns"),
    case("t.csv", "image,caption_0,caption_1,Caption 2\na.jpg,x,y,x\n", {"a.jpg": ["x", "y", "x"]}, id="from 0"),
    case("t.csv", 'image,captions\na.jpg,"[""one"", ""two""]"\n',
         {"a.jpg": ["one", "two"]}, id="JSON list"),
    case("t.csv", "image,caption\na.jpg,\"['one', 'two, three']\"\nb.jpg,[sic]\n",
         {"a.jpg": ["one", "two, three"], "b.jpg": ["[sic]"]}, id="Python list"),
    case("t.csv", 'image,caption\na.jpg,"two\nlines, and ""quotes"""\nb.jpg,a 5" ruler\n',
         {"a.jpg": ['two lines, and "quotes"'], "b.jpg": ['a 5" ruler']}, id="line break in quotes"),
    case("t.csv", "Image, Caption\na.jpg, A dog\nb.jpg, \"A cat, asleep\"\n",
         {"a.jpg": ["A dog"], "b.jpg": ["A cat, asleep"]}, id="blanks and capitals"),
    case("t.csv", "sep=;\nimage;caption\na.jpg;x, y\n", {"a.jpg": ["x, y"]}, id="Excel's first line"),
    case("t.csv", "image|caption\na.jpg|x, y\n", {"a.jpg": ["x, y"]}, id="bars"),
    case("t.csv", "image,caption\r\na.jpg,caf\xe9\r\n".encode("utf-16"), {"a.jpg": ["café"]}, id="UTF-16"),
    case("t.csv", "image,caption\ra.jpg,x\rb.jpg,y\r", {"a.jpg": ["x"], "b.jpg": ["y"]}, id="carriage returns alone"),
    case("t.csv", "\n\nimage,caption\n\na.jpg,x\n\n", {"a.jpg": ["x"]}, id="blank lines"),
    case("t.csv", 'image,caption,,\na.jpg,x,,\n,,,\n"",,,\n', {"a.jpg": ["x"]}, id="rows of nothing but commas"),
    case("t.tsv", "image\tcaption\na.jpg\tx\n\t\n", {"a.jpg": ["x"]}, id="rows of nothing but tabs"),
    case("t.jsonl", '{"image": "a.jpg", "caption": "x", "captions": ["x", "y"]}\n', {"a.jpg": ["x", "y"]},
         id="caption that captions repeats"),
]  # fmt: skip


@pytest.mark.parametrize(("name", "content", "expected"), GOOD_TABLES)
def test_a_table_is_read_as_it_stands(
    name: str, content: str | bytes, expected: dict[str, list[str]], images: Path
) -> None:
    assert captions(prepare(images, name, content)) == expected


def test_kaggles_line_without_its_second_bar(images: Path, capsys: pytest.CaptureFixture[str]) -> None:
    table = "image_name| comment_number| comment\na.jpg| 0| A dog .\na.jpg| 1   A hound .\n"
    assert captions(prepare(images, "results.csv", table)) == {"a.jpg": ["A dog .", "A hound ."]}
    assert "results.csv, line 3: a separator is missing, read as the caption: A hound ." in capsys.readouterr().out


def test_columns_that_are_not_read_are_named_in_one_line(images: Path, capsys: pytest.CaptureFixture[str]) -> None:
    prepare(images, "t.csv", ",image,caption,width,caption_en\n0,a.jpg,x,4,y\n1,b.jpg,x,4,y\n")
    assert "t.csv: columns that are not read: number 1, width, caption_en" in capsys.readouterr().out.splitlines()


@pytest.mark.parametrize(
    ("header", "options", "message"),
    [
        (
            "id,words",
            {},
            "no column names the pictures; the columns are id, words: name the columns with --image-column",
        ),
        ("image,words", {}, "no column holds captions; the columns are image, words: name the columns with"),
        ("image,image,caption", {}, "the column image stands 2 times: rename the others"),
        ("id,id,caption", {"image_column": "id"}, "the column id stands 2 times: rename the others"),
        ("image,filename,caption", {}, r"several columns could name the picture \(image, filename\)"),
        ("image,title,caption", {}, r"several columns could hold captions \(title, caption\): name them with"),
        ("image,caption,split,split", {}, "the column split stands 2 times"),
        ("image,caption", {"caption_column": ("titel",)}, "--caption-column titel: the columns are image, caption"),
        ("image,caption", {"image_column": "id"}, "--image-column id: the columns are image, caption"),
        ('"image,caption', {}, "the header cannot be read"),
        ("", {}, "is empty: it needs a header"),
    ],
)
def test_a_header_that_does_not_say_what_is_what(
    header: str, options: dict[str, Any], message: str, images: Path
) -> None:
    with pytest.raises(BadInput, match=message):
        prepare(images, "t.csv", f"{header}\n", **options)


def test_columns_are_named_by_options(images: Path) -> None:
    table = "id,filename,title,caption\n1,a.jpg,x,y\n"
    found = prepare(images, "t.csv", table, image_column="Filename", caption_column=("caption", "title"))
    assert captions(found) == {"a.jpg": ["y", "x"]}


# Generated tables

PICTURES = [f"p{number}.jpg" for number in range(4)]
ANY_TEXT = st.text(st.characters(exclude_categories=["Cs"], exclude_characters="\0"), min_size=1, max_size=12)
WHAT_TABLES_ARE_MADE_OF = st.text(st.sampled_from('"",,\n\r ax[]\';|\t0'), min_size=1, max_size=12)
TEXTS = (ANY_TEXT | WHAT_TABLES_ARE_MADE_OF).filter(lambda text: texts_in_cell(text) == [text] and bool(clean(text)))
ROWS = st.lists(st.tuples(st.sampled_from(PICTURES), TEXTS), min_size=1, max_size=6)


def as_csv(rows: list[tuple[str, str]], separator: str) -> list[str]:
    """A table as Python's writer makes it: header and rows, each with its line end."""
    written = []
    for row in [("image", "caption"), *rows]:
        text = io.StringIO()
        csv.writer(text, delimiter=separator).writerow(row)
        written.append(text.getvalue())
    return written


def read(folder: Path, name: str, content: str) -> tuple[list[tuple[str, str]], int]:
    """Pictures and captions that are read from a table, and the number of problems."""
    path = folder / name
    path.write_bytes(content.encode())
    good: list[tuple[str, str]] = []
    problems = 0
    for row in read_table(path, Wanted()):
        wrong = bool(row.problem) or row.image not in PICTURES or bool(check_captions(row)[1])
        problems += wrong
        good += [] if wrong else [(row.image, text) for text in row.captions]
    return good, problems


@settings(deadline=None)
@given(rows=ROWS, separator=st.sampled_from([",", ";", "|"]))
def test_what_pythons_writer_writes_is_read_exactly(
    rows: list[tuple[str, str]], separator: str, tmp_path_factory: pytest.TempPathFactory
) -> None:
    content = "".join(as_csv(rows, separator))
    assert read(tmp_path_factory.getbasetemp(), "t.csv", content) == (rows, 0)


@settings(deadline=None)
@given(rows=ROWS)
def test_what_json_lines_hold_is_read_exactly(
    rows: list[tuple[str, str]], tmp_path_factory: pytest.TempPathFactory
) -> None:
    content = "".join(json.dumps({"image": image, "caption": text}) + "\n" for image, text in rows)
    assert read(tmp_path_factory.getbasetemp(), "t.jsonl", content) == (rows, 0)


@settings(deadline=None)
@given(rows=st.lists(st.tuples(st.sampled_from(PICTURES), TEXTS.filter(lambda text: not set("\t\n\r") & set(text)))))
def test_tabs_alone_separate_the_cells_of_a_tsv(
    rows: list[tuple[str, str]], tmp_path_factory: pytest.TempPathFactory
) -> None:
    content = "".join(f"{image}\t{text}\n" for image, text in [("image", "caption"), *rows])
    assert read(tmp_path_factory.getbasetemp(), "t.tsv", content) == (rows, 0)


def damaged(line: str, row: tuple[str, str], kind: str) -> str:
    """A row as it was written, with one cell too many or too few, an emptied one, or a quotation mark opened."""
    image, caption = line[: len(row[0])], line[len(row[0]) + 1 :].removesuffix("\r\n")
    return {
        "cell added": f"{image},{caption},more\r\n",
        "empty cell added": f"{image},{caption},\r\n",
        "cell lost": f"{image}\r\n",
        "caption emptied": f"{image},\r\n",
        "image emptied": f",{caption}\r\n",
        "quote opened": f'{image},"{caption}\r\n',
        "quote opened before the image": f'"{line}',
        "quote not closed": f'{image},"{caption.strip(chr(34))}\r\n',
    }[kind]


KINDS = ["cell added", "empty cell added", "cell lost", "caption emptied", "image emptied", "quote opened",
         "quote opened before the image", "quote not closed"]  # fmt: skip


@settings(deadline=None, max_examples=400)
@given(rows=ROWS, place=st.integers(0, 5), kind=st.sampled_from(KINDS))
def test_a_damaged_row_is_a_problem_and_changes_no_other_row(
    rows: list[tuple[str, str]], place: int, kind: str, tmp_path_factory: pytest.TempPathFactory
) -> None:
    place %= len(rows)
    lines = as_csv(rows, ",")
    lines[1 + place] = damaged(lines[1 + place], rows[place], kind)
    good, problems = read(tmp_path_factory.getbasetemp(), "t.csv", "".join(lines))
    assert problems
    written = [(image, clean(text)) for image, text in rows]
    assert all((image, clean(text)) in written or image == rows[place][0] for image, text in good)


def test_a_row_that_is_read_says_where_it_stands(tmp_path: Path) -> None:
    (tmp_path / "t.csv").write_text('image,caption\na.jpg,"x\ny"\nb.jpg,z\n')
    assert list(read_table(tmp_path / "t.csv", Wanted())) == [
        Found("a.jpg", "a.jpg", None, ["x\ny"], "t.csv, line 2", joins=True),
        Found("b.jpg", "b.jpg", None, ["z"], "t.csv, line 4", joins=True),
    ]
