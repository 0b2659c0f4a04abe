"""Bad input, case by case: the line that says what is wrong; and input that is odd but fine: what becomes of it."""

import base64
import io
import json
import os
import pickle
import shutil
import struct
import subprocess
import sys
import zlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from models.clip import Pictures, assemble_clip, load_clip
from models.compute import load_state
from models.rqvae import RqVae
from models.scorer import LORA_TARGETS, TRAINED_WHOLE, ImageTokens, Lora, build_scorer
from models.seed_tokenizer import SeedTokenizer
from models.voken_lm import VokenLM, build_causal, build_seq2seq
from reranker import convert
from reranker import test as test_reranker
from reranker import train as train_reranker
from retriever import prepare, rank_splits, retrieve, train, train_stage2
from retriever import test as test_retriever
from retriever.data import read_data
from retriever.gallery import add as add_pictures
from retriever.gallery import build as build_index
from retriever.gallery import search
from retriever.gallery.answers import Found
from retriever.gallery.api import Retriever
from retriever.pseudo_queries import generate as generate_pseudo_query
from retriever.pseudo_queries.endpoint import data_url
from retriever.queries import LONGEST_QUERY, read_query
from tests import folders, tiny
from tests.tiny import assemble_clip as assemble_clip_command
from tests.tiny import (
    clip_folder,
    codebooks,
    generate_codes,
    llama_folder,
    prepare_emb,
    rqvae_train,
    tiny_t5,
    train_heads,
)
from tools import fetch_emoji, prepare_captions, results, runs
from tools.captions import Record, read_captions, read_records
from tools.command_line.commands import run_command
from tools.contact_sheet import SheetRow, draw_sheet
from tools.errors import BadInput
from tools.files import read_array, read_json
from tools.pictures import find_unreadable, open_picture, read_again
from tools.vokens import VokenSpace

ROOT = Path(__file__).parent.parent
SPACE = VokenSpace(levels=3, codebook_size=4, shared=False)
RED, GREEN, BLUE, WHITE, BLACK = (255, 0, 0), (0, 255, 0), (0, 0, 255), (255, 255, 255), (0, 0, 0)


# Pictures that cannot be used


def plain(path: Path, **options: Any) -> Path:
    Image.effect_noise((64, 48), 90).convert("RGB").save(path, **options)
    return path


def cut(path: Path) -> None:
    plain(path)
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


def bomb(path: Path, side: int = 20_000) -> None:
    """A PNG of a few bytes that says it is 400 million pixels large."""

    def chunk(kind: bytes, content: bytes) -> bytes:
        return struct.pack(">I", len(content)) + kind + content + struct.pack(">I", zlib.crc32(kind + content))

    header = struct.pack(">IIBBBBB", side, side, 8, 2, 0, 0, 0)
    path.write_bytes(
        b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(b"\0")) + chunk(b"IEND", b"")
    )


def locked(path: Path) -> None:
    plain(path)
    path.chmod(0)


def outside(path: Path) -> None:
    path.symlink_to(plain(path.parent.parent / "private.png"))


def fifo(path: Path) -> None:
    os.mkfifo(path)


@contextmanager
def without_privileges() -> Iterator[None]:
    """Root may read everything: be somebody else."""
    if os.geteuid():
        yield
        return
    os.seteuid(65534)
    try:
        yield
    finally:
        os.seteuid(0)


case = pytest.param
BAD_PICTURES = [
    case("zero.jpg", lambda path: path.write_bytes(b""), "picture file is empty", id="zero bytes"),
    case("cut.jpg", cut, "picture unreadable (image file is truncated)", id="truncated JPEG"),
    case("cut.png", cut, "picture unreadable (image file is truncated)", id="truncated PNG"),
    case("text.jpg", lambda path: path.write_text("no picture"), "file is no picture", id="text named .jpg"),
    case("page.png", lambda path: path.write_text("<html></html>"), "file is no picture", id="web page named .png"),
    case("bomb.png", bomb, "picture of more than 178,956,970 pixels", id="decompression bomb"),
    case("thin.png", lambda path: Image.new("L", (1, 201)).save(path), "picture more than 200 times as long as wide",
         id="ribbon of a pixel"),
    case("print.jpg", lambda path: Image.new("RGB", (4, 4)).save(path, "EPS"), "file is no picture", id="PostScript"),
    case("folder.png", Path.mkdir, "is a folder, not a picture", id="folder named .png"),
    case("pipe.png", os.mkfifo, "special file, not a picture", id="pipe"),
    case("none.png", lambda path: path.symlink_to("gone.png"), "link that leads nowhere", id="dangling link"),
    case("loop.png", lambda path: path.symlink_to(path.name), "link that leads nowhere", id="symlink loop"),
    case("caf\udce9.png", plain, "file name not UTF-8", id="name not UTF-8"),
]  # fmt: skip


@pytest.mark.parametrize(("name", "make", "reason"), BAD_PICTURES)
def test_a_picture_that_cannot_be_used(name: str, make: Callable[[Path], object], reason: str, tmp_path: Path) -> None:
    make(tmp_path / name)
    assert find_unreadable([name], workers=0, folder=tmp_path) == {name: reason}


@pytest.mark.parametrize("locked", ["picture", "folder"])
def test_a_picture_without_permission(locked: str, tmp_path: Path) -> None:
    for folder in (tmp_path, *tmp_path.parents):
        if folder.stat().st_uid == os.geteuid() and not folder.stat().st_mode & 0o001:
            folder.chmod(folder.stat().st_mode | 0o011)  # pytest's own: the way there is open
    (tmp_path / "in").mkdir()
    plain(tmp_path / "in" / "a.png").chmod(0 if locked == "picture" else 0o644)
    (tmp_path / "in").chmod(0 if locked == "folder" else 0o755)
    with without_privileges():
        found = find_unreadable(["in/a.png"], workers=0, folder=tmp_path)
    (tmp_path / "in").chmod(0o755)
    assert found == {"in/a.png": "no permission to read the picture"}


# Pictures that are odd, and fine


def cmyk(path: Path) -> None:
    Image.new("CMYK", (4, 4), (0, 255, 255, 0)).save(path, quality=100)


def sixteen_bits(path: Path) -> None:
    Image.fromarray(np.full((4, 4), 0x8000, np.uint16)).save(path)


def palette_with_alpha(path: Path) -> None:
    picture = Image.new("P", (2, 1))
    picture.putpalette([0, 0, 0, *RED])
    picture.putpixel((1, 0), 1)
    picture.save(path, transparency=0)


def half_transparent(path: Path) -> None:
    Image.new("RGBA", (2, 2), (0, 0, 255, 0)).save(path)


def animated(path: Path) -> None:
    frames = [Image.new("RGB", (2, 2), colour) for colour in (GREEN, RED)]
    frames[0].save(path, save_all=True, append_images=frames[1:])


def turned(orientation: int) -> Callable[[Path], None]:
    """A picture with red at the top left as it is seen, stored as a camera stores it."""

    def make(path: Path) -> None:
        seen = Image.new("RGB", (2, 3), WHITE)
        seen.putpixel((0, 0), RED)
        stored = seen.transpose(Image.Transpose.ROTATE_90 if orientation == 6 else Image.Transpose.FLIP_LEFT_RIGHT)
        exif = Image.Exif()
        exif[0x0112] = orientation
        stored.save(path, exif=exif)

    return make


def damaged_exif(path: Path) -> None:
    Image.new("RGB", (2, 2), GREEN).save(path, exif=b"Exif\0\0nothing of the kind")


FINE_PICTURES = [
    case("cmyk.jpg", cmyk, (4, 4), RED, id="CMYK JPEG"),
    case("deep.png", sixteen_bits, (4, 4), (128, 128, 128), id="16 bits a pixel"),
    case("palette.png", palette_with_alpha, (2, 1), WHITE, id="palette with alpha"),
    case("alpha.png", half_transparent, (2, 2), WHITE, id="transparent"),
    case("grey.png", lambda path: Image.new("LA", (2, 2), (0, 255)).save(path), (2, 2), BLACK, id="grey with alpha"),
    case("bits.png", lambda path: Image.new("1", (2, 2), 1).save(path), (2, 2), WHITE, id="one bit a pixel"),
    case("moving.gif", animated, (2, 2), GREEN, id="animated GIF"),
    case("moving.webp", animated, (2, 2), GREEN, id="animated WebP"),
    case("camera.png", turned(6), (2, 3), RED, id="EXIF: turned by 90 degrees"),
    case("mirror.png", turned(2), (2, 3), RED, id="EXIF: mirrored"),
    case("torn-exif.jpg", damaged_exif, (2, 2), GREEN, id="EXIF: damaged"),
    case("1x1.png", lambda path: Image.new("RGB", (1, 1), BLUE).save(path), (1, 1), BLUE, id="1 x 1"),
    case("Ünïcødé 图 😀.png", lambda path: Image.new("RGB", (1, 1), BLUE).save(path), (1, 1), BLUE, id="unicode name"),
    case("two\nlines.png", lambda path: Image.new("RGB", (1, 1), BLUE).save(path), (1, 1), BLUE, id="newline in name"),
]


@pytest.mark.parametrize(("name", "make", "size", "colour"), FINE_PICTURES)
def test_an_odd_picture_is_seen_as_people_see_it(
    name: str, make: Callable[[Path], object], size: tuple[int, int], colour: tuple[int, int, int], tmp_path: Path
) -> None:
    (tmp_path / "images").mkdir()
    make(tmp_path / "images" / name)
    config = prepare_captions.Config(images=tmp_path / "images", output=tmp_path / "out", workers=0)
    prepare_captions.main(config)
    (record,) = read_captions(config.output).records
    assert (record.image, record.file) == (name, name)
    picture = open_picture(tmp_path / "images" / record.file)
    assert (picture.mode, picture.size) == ("RGB", size)
    assert np.abs(np.asarray(picture)[0, 0] - np.array(colour)).max() <= 2  # JPEG is not exact


def test_every_reader_turns_pictures_upright(tmp_path: Path) -> None:
    turned(6)(tmp_path / "camera.png")
    (seen,) = [Pictures(["camera.png"], np.asarray, folder=tmp_path)[0]]  # type: ignore[arg-type]
    assert np.asarray(seen).shape == (3, 2, 3)
    assert read_again(tmp_path / "camera.png", "mend it").size == (2, 3)
    assert Found("camera.png", tmp_path / "camera.png", 0.0, ()).thumbnail(9).size == (2, 3)
    sent = data_url(tmp_path / "camera.png").partition(",")[2]
    assert Image.open(io.BytesIO(base64.b64decode(sent))).size == (2, 3)
    draw_sheet(tmp_path / "sheet.png", [SheetRow("x\ny", [tmp_path / "camera.png"], None)], title="t")


def test_a_picture_that_has_been_damaged_says_what_to_do(tmp_path: Path) -> None:
    """Pillow refuses this one with another error than those of files."""
    bomb(tmp_path / "a.png")
    with pytest.raises(BadInput, match=r"a\.png cannot be read any more \(picture of more than .*\): mend it, then"):
        Pictures(["a.png"], np.asarray, folder=tmp_path)[0]  # type: ignore[arg-type]
    with pytest.raises(BadInput, match=r"mend it, or run scripts/01_prepare_captions\.sh --overwrite --skip-bad"):
        data_url(tmp_path / "a.png")
    with pytest.raises(BadInput, match=r"^a\.png: picture of more than [\d,]* pixels$"):
        Found("a.png", tmp_path / "a.png", 0.0, ()).thumbnail(9)
    draw_sheet(tmp_path / "sheet.png", [SheetRow("x", [tmp_path / "a.png"], None)], title="t")


# Captions


def images(folder: Path, *names: str) -> Path:
    folder.mkdir(parents=True)
    for name in names or ("a.jpg", "b.jpg"):
        Image.new("RGB", (4, 4), "red").save(folder / name)
    return folder


def prepared(tmp_path: Path, name: str, content: str | bytes, **options: Any) -> list[Record]:
    source = tmp_path / name
    source.write_bytes(content if isinstance(content, bytes) else content.encode())
    config = prepare_captions.Config(
        images=images(tmp_path / "images"), source=(source,), output=tmp_path / "out", workers=0, **options
    )
    prepare_captions.main(config)
    return read_captions(config.output).records


def row(caption: Any, **more: Any) -> str:
    return json.dumps({"image": "a.jpg", "captions": caption, "split": "train", **more}) + "\n"


BAD_CAPTIONS = [
    case("t.jsonl", row([""]), "  empty caption: t.jsonl, line 1", id="empty"),
    case("t.jsonl", row(["  \n"]), "  picture without a caption: t.jsonl, line 1: a.jpg", id="white space"),
    case("t.jsonl", row(["\x00\x07\x1b"]), "  empty caption: t.jsonl, line 1", id="nothing but control characters"),
    case("t.jsonl", row(["half \ud83d"]), "  caption with half a character (a lone surrogate): t.jsonl, line 1",
         id="lone surrogate"),
    case("t.jsonl", row(["x"], image="\ud800.jpg", file="a.jpg"), "  id not UTF-8: t.jsonl, line 1: a.jpg",
         id="lone surrogate in an id"),
    case("t.jsonl", row(["x", 5]), "  caption is no text but int: t.jsonl, line 1", id="a number among captions"),
    case("t.jsonl", row(7), "  caption is no text but int: t.jsonl, line 1", id="a number for captions"),
    case("t.jsonl", row({"text": "x"}), "  caption is no text but dict: t.jsonl, line 1", id="an object for captions"),
    case("t.jsonl", row(["x"], split=["train"]), "  split is not one of train, val, test: t.jsonl, line 1: ['train']",
         id="a list for the split"),
    case("t.jsonl", '{"image": "a.jpg"}\n', "t.jsonl: no column holds captions; the columns are image: name the",
         id="missing key"),
    case("t.jsonl", '["a.jpg", "x"]\n', "  line that is no JSON object: t.jsonl, line 1", id="a list for a row"),
    case("t.jsonl", "[" * 100_000 + "\n", "  line that is not readable JSON: t.jsonl, line 1", id="100,000 brackets"),
    case("t.jsonl", '{"image": ' + "1" * 5000 + "}\n", "  line that is not readable JSON: t.jsonl, line 1",
         id="5,000 digits"),
    case("t.csv", b"image,caption\na.jpg,caf\xe9\n", "  line that is not UTF-8 (save the file as UTF-8): t.csv, line 2",
         id="latin-1"),
    case("t.csv", "image,caption\na.jpg," + "x" * 200_000, "  cell of more than 131,072 characters: t.csv, line 2",
         id="an endless field"),
    case("t.csv", "image:caption\na.jpg:x\n", "t.csv, line 1: no column names the pictures; the columns are image:",
         id="colons"),
    case("k.json", '{"images": [{"filename": "a.jpg", "split": "val", "sentences": ["x"]}]}',
         "  entry that is not as in Karpathy's files: k.json, images[0]",
         id="Karpathy: texts"),
    case("k.json", '{"images": [{"filename": "a.jpg", "split": "val", "sentences": [{"raw": "x"}]}, '
         '{"filename": "a.jpg", "split": "val", "sentences": [{"raw": "y"}]}]}',
         "  duplicate id: k.json, images[1]: a.jpg", id="duplicate ids"),
    case("c.json", '{"images": [{"id": 1, "file_name": "a.jpg"}], "annotations": [{"image_id": 2, "caption": "x"}]}',
         "  annotation of an image that is not among the images: c.json, annotations[0]: image_id 2",
         id="COCO: another picture's caption"),
    case("p.json", '{"a.jpg": {"split": "train", "caption": {"text": "x"}}}',
         '  caption is no text but dict: p.json, entry "a.jpg"', id="published: an object for captions"),
    case("t.jsonl", row(["x"], image="two\nlines.jpg"), "  picture missing: t.jsonl, line 1: two\\nlines.jpg",
         id="newline in a name"),
    case("t.jsonl", row(["x"], image="\x1b[2Jgone.jpg"), "  picture missing: t.jsonl, line 1: \\x1b[2Jgone.jpg",
         id="escape sequence in a name"),
]  # fmt: skip


@pytest.mark.parametrize(("name", "content", "line"), BAD_CAPTIONS)
def test_bad_captions_are_named(name: str, content: str | bytes, line: str, tmp_path: Path) -> None:
    with pytest.raises(BadInput) as caught:
        prepared(tmp_path, name, content)
    lines = str(caught.value).splitlines()
    assert line in lines or (len(lines) == 1 and line in lines[0])
    assert not (tmp_path / "out" / "captions.jsonl").exists()


LONG = " ".join(f"word{number}" for number in range(10_000))
FINE_CAPTIONS = [
    case("t.jsonl", row([LONG]), LONG, id="10,000 words"),
    case("t.jsonl", row(["a\x00 red\x1b[31m\tcar\x7f"]), "a red [31m car", id="control characters"),
    case("t.jsonl", row(["سيارة حمراء"]), "سيارة حمراء", id="right-to-left"),
    case("t.jsonl", row(["\u202eright to left\u202c"]), "\u202eright to left\u202c", id="direction marks"),
    case("t.jsonl", row(["👩\u200d🚀 in space"]), "👩\u200d🚀 in space", id="joined emoji"),
    case("t.jsonl", b"\xef\xbb\xbf" + row(["x"]).encode(), "x", id="JSONL with BOM"),
    case("t.json", b"\xef\xbb\xbf" + b'{"a.jpg": {"split": "train", "caption": "x"}}', "x", id="JSON with BOM"),
    case("t.csv", b"\xef\xbb\xbfimage,caption,split\r\na.jpg,x,train\r\n", "x", id="CSV with BOM and CRLF"),
    case("t.jsonl", row(["two\r\nlines"]).encode().replace(b"\n", b"\r\n"), "two lines", id="JSONL with CRLF"),
    case("t.csv", 'image,caption,split\na.jpg,"two\n""lines""",train\n', 'two "lines"', id="a newline in a field"),
    case("t.tsv", "image\tcaption\tsplit\na.jpg\t=1+1\ttrain\n", "=1+1", id="a formula"),
]


@pytest.mark.parametrize(("name", "content", "text"), FINE_CAPTIONS)
def test_odd_captions_are_read(name: str, content: str | bytes, text: str, tmp_path: Path) -> None:
    assert prepared(tmp_path, name, content) == [Record("a.jpg", "a.jpg", "train", (text,))]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"file": "../x.png"}, "file '../x.png' lies outside the folder of pictures"),
        ({"captions": "text"}, "captions a list of texts"),
        ({"image": 5}, "image and file must be texts"),
    ],
)
def test_a_finished_folders_records_are_checked_too(change: dict[str, Any], message: str, tmp_path: Path) -> None:
    record = {"image": "a", "file": "a.png", "split": "train", "captions": ["x"], **change}
    (tmp_path / "captions.jsonl").write_text(json.dumps(record))
    with pytest.raises(BadInput, match=message):
        read_records(tmp_path / "captions.jsonl")


# Hyper-parameters


def refused(
    module: ModuleType, arguments: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> str:
    """What a command says of its arguments, and that it ends with status 2 before it has begun."""
    monkeypatch.setattr(sys, "argv", [module.__name__, *arguments.split()])
    monkeypatch.setattr(module, "main", _never)
    with pytest.raises(SystemExit) as ended:
        run_command(module.main, module.Config)
    assert ended.value.code == 2
    printed = capsys.readouterr()
    assert printed.out == ""
    assert "Traceback" not in printed.err
    return printed.err


def _never(config: Any) -> None:
    raise AssertionError(f"it has begun with {config}")


XY = "--features x --output y"
ENDPOINT = "--dataset x --output y --source endpoint --url http://x/v1 --language-model x"
RERANKER = "--lists x --tokens x --output y --language-model x"
HYPER_PARAMETERS = [
    case(rqvae_train, f"{XY} --codebok-size 5", "--codebok-size is not an option of this command; did you mean "
         "--codebook-size?", id="misspelt option"),
    case(rqvae_train, f"{XY} --no-normalise", "--no-normalise is not an option of this command; did you mean "
         "--no-normalize?", id="misspelt switch"),
    case(rqvae_train, f"{XY} --zzz 1", "--zzz is not an option of this command: --help lists the options",
         id="unknown option"),
    case(rqvae_train, f"{XY} --alignment contrasive", "--alignment contrasive: choose of none, mse, l1, contrastive; "
         "did you mean contrastive?", id="misspelt choice"),
    case(retrieve, "--dataset x --retriever x --output y --pools all tset", "--pools tset: choose of train, val, "
         "test, all; did you mean test?", id="misspelt choice among several"),
    case(rqvae_train, f"{XY} --lr nan", "--lr must be above 0, --weight-decay at least 0, and both finite",
         id="learning rate: not a number"),
    case(test_reranker, "--lists x --output y --summary x --name x --memory nan", "--memory nan is not a number: give "
         "one", id="memory: not a number"),
    case(rqvae_train, f"{XY} --lr 0", "--lr must be above 0, --weight-decay at least 0, and both finite",
         id="learning rate: zero"),
    case(train_heads, f"{XY} --weight-decay -1", "--lr must be above 0, --weight-decay at least 0, and both finite",
         id="weight decay: negative"),
    case(rqvae_train, f"{XY} --warmup 2", "--warmup is a share of the steps, 0 to 1, not 2.0", id="warm-up: 200 %"),
    case(rqvae_train, f"{XY} --seed -1", "--seed must be at least 0", id="seed: negative"),
    case(rqvae_train, f"{XY} --batch-size 1", "--batch-size must be at least 2", id="batch of one"),
    case(rqvae_train, f"{XY} --dropout 1", "--epochs must not be negative, --dropout must be in [0, 1)",
         id="everything dropped"),
    case(retrieve, "--dataset x --retriever y --output z --early-beams 0", "--early-beams must be at least 1",
         id="early beams: none"),
    case(train_heads, f"{XY} --image-dropout 1", "--image-dropout must be at least 0 and below 1, not 1.0",
         id="all of a picture hidden"),
    case(rqvae_train, f"{XY} --hidden 64 0", "--hidden takes widths of at least 1", id="hidden width: zero"),
    case(rqvae_train, f"{XY} --kmeans-sample 0", "--kmeans-iterations, --revive-every and --alignment-weight must not "
         "be negative, --kmeans-sample must be at least 1", id="k-means of nothing"),
    case(train_heads, f"{XY} --temperature 0", "--epochs must be at least 1, --batch-size at least 2, --temperature "
         "above 0", id="temperature: zero"),
    case(train, "--dataset x --output y --language-model x --lora-rank 8", "--lora-rank 8 is for --kind causal, not "
         "for --kind seq2seq", id="LoRA of a T5"),
    case(train, "--dataset x --output y --language-model x --lora-targets q_proj", "--lora-targets are for --lora-rank "
         "above 0: give both or none", id="LoRA without a rank"),
    case(train, "--dataset x --output y --language-model x --decoder-heads 0", "--decoder-layers, --decoder-heads and "
         "--max-source must be at least 1", id="decoder without heads"),
    case(train, "--dataset x --output y --language-model x --max-grad-norm 0", "--max-grad-norm must be above 0",
         id="gradients of nothing"),
    case(train_stage2, "--dataset x --stage1 x --output y --mix 1", "--mix takes shares between 0 and 1; without "
         "values there is none", id="mix: 100 %"),
    case(generate_pseudo_query, "--dataset x --output y --source nearest --captioner blip", "--captioner is for "
         "--source model, not --source nearest", id="captioner without its source"),
    case(generate_pseudo_query, f"{ENDPOINT} --candidates 2", "--candidates 2 cannot give --per-picture 5: raise it",
         id="fewer candidates than kept"),
    case(generate_pseudo_query, ENDPOINT.replace("http://x/v1", "ftp://x"), "--url must begin with http:// or "
         "https:// and name a host", id="ftp endpoint"),
    case(search, "--index x --retriever x --sheet x --no-rerank --rerank-weight 0.5 a", "--no-rerank and "
         "--rerank-weight contradict each other: give one", id="share without re-ranking"),
    case(search, "--index x --retriever x --sheet x --rerank-weight 2 a", "--rerank-weight is a share, 0 to 1, not "
         "2.0", id="share: 200 %"),
    case(rank_splits, "--dataset x --retriever x --output y --pools train", "--pools train has no picture of the test "
         "captions: choose of test and all", id="pool without the pictures"),
    case(retrieve, "--dataset x --retriever x --output y --scoring voken --score-end", "--score-end needs --scoring "
         "full: the softmax over vokens has no end token", id="end token of vokens"),
    case(train_reranker, f"{RERANKER} --new-layers 2 --layers 2", "--new-layers makes a model from nothing, --layers "
         "cuts a trained one: give one of the two", id="new and trained layers"),
    case(train_reranker, f"{RERANKER} --random-negatives 9", "--random-negatives must be between 0 and the 7 "
         "--negatives", id="more random negatives than negatives"),
    case(train_reranker, f"{RERANKER} --optimizer admw", "; did you mean adamw?", id="misspelt optimiser"),
    case(test_reranker, "--lists x --output y --summary x --name x --reranker x", "--reranker and --tokens belong "
         "together: give both or none", id="reranker without tokens"),
    case(test_retriever, "--predictions x --output y --summary x --name x --examples -1",
         "--examples must be at least 1", id="negative examples"),
    case(convert, "--captions x --output y", "--tokenizer seed needs --quantizer seed_quantizer.pt and --vision "
         "eva_vit_g.pth", id="SEED without weights"),
    case(prepare_emb, "--captions x --model x --output y --batch-size 0", "--batch-size must be at least 1 and "
         "--workers at least 0", id="batch of nothing"),
    case(fetch_emoji, "--output y --size 0", "--size, --val, --test and --workers must each be at least 1",
         id="pictures of no size"),
    case(prepare_captions, "--images gone --output y", "--images gone is not a folder", id="no pictures"),
    case(prepare_captions, "--images . --output y --workers -1", "--workers must be at least 0", id="negative workers"),
    case(add_pictures, ". --index x --replace --skip-known", "--replace and --skip-known contradict each other: give "
         "one", id="replaced and left out"),
    case(results, "--summary x --levels imag", "--levels imag: choose of image, code; did you mean image?",
         id="misspelt level"),
    case(assemble_clip_command, "--image-weights gone.pt --text-tower x --output y", "--image-weights gone.pt does "
         "not exist", id="no weights"),
]  # fmt: skip


@pytest.mark.parametrize(("module", "arguments", "message"), HYPER_PARAMETERS)
def test_a_hyper_parameter_is_refused_in_one_line(
    module: ModuleType,
    arguments: str,
    message: str,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    line = refused(module, arguments, monkeypatch, capsys)
    assert line == f"error: {message}\n" or (message.startswith(";") and line.endswith(f"{message}\n"))
    assert line.count("\n") == 1


@pytest.mark.parametrize(
    ("arguments", "message"),
    [("--output y", "--features"), (f"{XY} --epochs many", "--epochs"), (f"{XY} --epochs", "--epochs")],
    ids=["left out", "no number", "no value"],
)
def test_what_the_parser_finds_is_named(
    arguments: str, message: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert message in refused(rqvae_train, arguments, monkeypatch, capsys)


@pytest.mark.parametrize(
    ("variables", "message"),
    [
        ({"DATASET": "emojy"}, "error: DATASET=emojy: there is no scripts/datasets/emojy.sh; did you mean emoji?\n"),
        ({"SYSTEM": "retreiver"}, "llama+pseudo or best; did you mean retriever?\n"),
        ({"SYSTEM": "retriever+psuedo"}, "llama+pseudo or best; did you mean retriever+pseudo?\n"),
        (
            {"DATASET": "flickr30k", "RECIPE": "fathful"},
            "error: RECIPE=fathful: write better, faithful or large-batch; did you mean faithful?\n",
        ),
    ],
    ids=lambda value: "+".join(value) if isinstance(value, dict) else "",
)
def test_a_misspelt_variable_of_the_scripts(variables: dict[str, str], message: str) -> None:
    done = subprocess.run(
        ["bash", "-c", "source scripts/env.sh"], cwd=ROOT, env={**os.environ, **variables, "CONDA_PREFIX": sys.prefix},
        capture_output=True, text=True,
    )  # fmt: skip
    assert done.returncode == 2
    assert done.stderr.startswith("error: ")
    assert done.stderr.endswith(message)
    assert done.stderr.count("\n") == 1


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["tools.results", "--summary", "gone.json"], "error: gone.json does not exist\n"),
        (
            ["tools.prepare_captions", "--imagse", ".", "--output", "y"],
            "error: --imagse is not an option of this command; did you mean --images?\n",
        ),
        (
            ["retriever.prepare", "--codes", "gone", "--output", "y"],
            "error: gone has no manifest.json: run bash scripts/06_generate_codes.sh first\n",
        ),
    ],
    ids=["missing file", "misspelt option", "missing stage"],
)
def test_a_real_command_ends_with_one_line(arguments: list[str], message: str) -> None:
    done = subprocess.run([sys.executable, "-m", *arguments], cwd=ROOT, capture_output=True, text=True)
    assert (done.returncode, done.stdout, done.stderr) == (2, "", message)


# Folders


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Stages of two datasets: a, and b, whose pictures have other captions."""
    root = tmp_path_factory.mktemp("made")
    for name in "ab":
        here = root / name
        captions = folders.captions(here / "captions", words=f"{name} red circle")
        features = folders.features(here / "features", captions, model=f"ViT-{name}")
        tokenizer = folders.rqvae(here / "rqvae", features, seed=ord(name))
        codes = folders.codes(here / "codes", features, tokenizer)
        prepare.main(prepare.Config(codes=codes, output=here / "dataset"))
        folders.retriever(here / "retriever", here / "dataset")
        folders.ranked(here / "lists", here / "dataset")
        folders.tokens(here / "tokens", captions)
    return root


def copied(made: Path, tmp_path: Path, name: str) -> Path:
    shutil.copytree(made / name, tmp_path / "copy" / Path(name).name)
    return tmp_path / "copy" / Path(name).name


def changed_manifest(folder: Path, **changes: Any) -> Path:
    """A folder whose manifest has other values, and no checksum that would tell."""
    values = read_json(folder / "manifest.json")
    values.pop("checksum", None)
    values = {key: value for key, value in {**values, **changes}.items() if value is not None}
    (folder / "manifest.json").write_text(json.dumps(values))
    return folder


def generate(features: Path, tokenizer: Path, output: Path) -> None:
    generate_codes.main(generate_codes.Config(features=features, rqvae=tokenizer, output=output, device="cpu"))


def search_of(dataset: Path, retriever: Path, output: Path) -> None:
    retrieve.main(retrieve.Config(dataset=dataset, retriever=retriever, output=output, device="cpu"))


def trained(dataset: Path, output: Path, **options: Any) -> None:
    train.main(train.Config(dataset=dataset, output=output, language_model="none", device="cpu", **options))


FOLDERS: list[Any] = [
    case(lambda made, new: generate(made / "b/features", made / "a/rqvae", new),
         r"a/rqvae was trained on features of another two-tower model than those of .*b/features \(ViT-b\): encode the "
         r"pictures with that model \(scripts/03_prepare_emb\.sh\)", id="another dataset's features"),
    case(lambda made, new: generate(made / "a/codes", made / "a/rqvae", new),
         r"a/codes was made by RQ-VAE\.generate_codes, not by RQ-VAE\.prepare_emb or RQ-VAE\.train_heads: "
         r"name a folder that scripts/03_prepare_emb\.sh or scripts/04_train_heads\.sh made", id="codes for features"),
    case(lambda made, new: generate(made / "gone", made / "a/rqvae", new),
         r"gone has no manifest\.json: run scripts/03_prepare_emb\.sh or scripts/04_train_heads\.sh first",
         id="no features"),
    case(lambda made, new: search_of(made / "a/dataset", made / "b/retriever", new),
         r"b/retriever writes vokens of another tokenizer than .*a/dataset: code the pictures with the RQ-VAE that the "
         r"retriever was trained with \(scripts/06_generate_codes\.sh --overwrite\), or train a retriever on them",
         id="another tokenizer's codes"),
    case(lambda made, new: search_of(made / "a/dataset", made / "a/rqvae", new),
         r"a/rqvae was made by RQ-VAE\.train, not by retriever\.train or retriever\.train_stage2: "
         r"name a folder that scripts/09_train_retriever_t5\.sh or scripts/10_train_retriever_t5_stage2\.sh made",
         id="no retriever"),
    case(lambda made, new: build_index.main(build_index.Config(
             dataset=made / "a/dataset", rqvae=made / "b/rqvae", output=new)),
         r"b/rqvae is not the RQ-VAE that coded .*a/dataset: give the one of its codes \(.*a/rqvae\), or run "
         r"scripts/06_generate_codes\.sh --overwrite and .* --overwrite", id="another tokenizer for the index"),
    case(lambda made, new: test_retriever.quantized_features(
             made / "b/rqvae", read_data(made / "a/dataset")),
         r"--rqvae .*b/rqvae is not the RQ-VAE that coded .*a/dataset: give that one", id="another tokenizer's table"),
    case(lambda made, new: train_reranker.main(train_reranker.Config(
             lists=made / "b/lists", tokens=made / "a/tokens", output=new, language_model="none")),
         r"b/lists ranks pictures of other captions than the image tokens are of: make both from one set",
         id="another dataset's lists"),
    case(lambda made, new: trained(made / "a/dataset", new, pseudo_queries=folders.finished(
             new.parent / "pseudo", "retriever.pseudo_queries.generate", lambda here: None,
             facts={"captions_fingerprint": "another"})),
         r"pseudo was made from other captions than .*a/dataset: run scripts/08_generate_pseudo_query\.sh --overwrite",
         id="another dataset's pseudo queries"),
    case(lambda made, new: train_heads.main(train_heads.Config(features=made / "a/features", output=new)),
         r"a/features holds embedding features, tower features are needed: run scripts/03_prepare_emb\.sh --layer "
         r"tower --overwrite", id="features of another layer"),
]  # fmt: skip


@pytest.mark.parametrize(("use", "message"), FOLDERS)
def test_a_folder_that_does_not_belong_is_refused(
    use: Callable[[Path, Path], object], message: str, made: Path, tmp_path: Path
) -> None:
    with pytest.raises(BadInput, match=f"{message}$") as caught:
        use(made, tmp_path / "new")
    assert "\n" not in str(caught.value)


AGAIN = "run scripts/05_train_rqvae.sh --overwrite"
MANIFESTS = [
    case(lambda folder: changed_manifest(folder, format=0), f"{{}} was made by an earlier version of this project "
         f"(format 0, this one reads {runs.FORMAT}): {AGAIN}", id="an older version"),
    case(lambda folder: changed_manifest(folder, format=99), f"{{}} was made by a later version of this project "
         f"(format 99, this one reads {runs.FORMAT}): update the project (git pull), or name another folder",
         id="a newer version"),
    case(lambda folder: changed_manifest(folder, format="1"), f"{{}}/manifest.json is damaged (its format is no "
         f"number): {AGAIN}", id="a version in words"),
    case(lambda folder: changed_manifest(folder, facts=None), f"{{}}/manifest.json is damaged (it has no facts): "
         f"{AGAIN}", id="a missing key"),
    case(lambda folder: changed_manifest(folder, outputs=["x"]), f"{{}}/manifest.json is damaged (its outputs is a "
         f"list): {AGAIN}", id="a list for an object"),
    case(lambda folder: (folder / "manifest.json").write_text("[1]"), f"{{}}/manifest.json is damaged (it holds a "
         f"list): {AGAIN}", id="a list"),
    case(lambda folder: (folder / "manifest.json").write_text("{"), "{}/manifest.json is damaged (line 1: not valid "
         f"JSON (Expecting property name enclosed in double quotes)): {AGAIN}", id="half a manifest"),
    case(lambda folder: (folder / "manifest.json").write_bytes(b"\xff"), "{}/manifest.json is damaged (is not UTF-8 "
         f"text (byte 0): save it as UTF-8): {AGAIN}", id="no text"),
    case(lambda folder: (folder / "manifest.json").rename(folder / "started.json"), "{} was not finished: run "
         "scripts/05_train_rqvae.sh first", id="not finished"),
]  # fmt: skip


@pytest.mark.parametrize(("change", "message"), MANIFESTS)
def test_a_manifest_that_cannot_be_read(
    change: Callable[[Path], object], message: str, made: Path, tmp_path: Path
) -> None:
    folder = copied(made, tmp_path, "a/rqvae")
    change(folder)
    with pytest.raises(BadInput) as caught:
        runs.read_manifest(folder, "RQ-VAE.train")
    assert str(caught.value) == message.format(folder)


def test_a_manifest_of_before_versions_is_read(made: Path, tmp_path: Path) -> None:
    folder = changed_manifest(copied(made, tmp_path, "a/rqvae"), format=None, environment=None)
    manifest = runs.read_manifest(folder, "RQ-VAE.train")
    assert (manifest.format, manifest.facts["levels"]) == (1, folders.LEVELS)
    assert read_json(made / "a/rqvae/manifest.json")["format"] == runs.FORMAT


# Checkpoints


class Code:
    """What a pickle runs when it is read: it makes a file."""

    def __init__(self, file: Path) -> None:
        self.file = file

    def __reduce__(self) -> tuple[Any, ...]:
        return (Path.touch, (self.file,))


def pickled(path: Path, mark: Path) -> Path:
    torch.save({"weight": torch.zeros(2), "code": Code(mark)}, path)
    return path


def old_pickle(path: Path, mark: Path) -> Path:
    path.write_bytes(pickle.dumps({"code": Code(mark)}))
    return path


def with_code(folder: Path, mark: Path, name: str = "pytorch_model.bin") -> Path:
    """A model folder whose weights are a pickle that runs code."""
    for weights in folder.glob("*.safetensors"):
        weights.unlink()
    pickled(folder / name, mark)
    return folder


def own_code(folder: Path, mark: Path) -> Path:
    """A model folder that asks for code of its own."""
    llama_folder(folder)
    values = read_json(folder / "config.json")
    values |= {"model_type": "mine", "auto_map": {"AutoConfig": "mine.Mine", "AutoModelForCausalLM": "mine.Mine"}}
    (folder / "config.json").write_text(json.dumps(values))
    (folder / "mine.py").write_text(f"from pathlib import Path\nPath({str(mark)!r}).touch()\nclass Mine: pass\n")
    return folder


def causal(name: Path) -> object:
    return build_causal(str(name), space=SPACE, codebooks=codebooks(SPACE, 16), max_source=8)


def seq2seq(name: Path) -> object:
    return build_seq2seq(str(name), space=SPACE, codebooks=codebooks(SPACE, 16), dropout=0.0, max_source=8)


def scorer(name: Path) -> object:
    return build_scorer(str(name), images=ImageTokens(4, 8))


NOT_RUN = "pickled code is not run"
CODE: list[Any] = [
    case(lambda tmp, mark: SeedTokenizer.from_checkpoints(pickled(tmp / "seed.pt", mark), tmp / "eva.pth"), NOT_RUN,
         id="SEED's quantizer"),
    case(lambda tmp, mark: SeedTokenizer.from_checkpoints(old_pickle(tmp / "seed.pt", mark), tmp / "eva.pth"), NOT_RUN,
         id="an old pickle"),
    case(lambda tmp, mark: load_clip("ViT-S-32", str(pickled(tmp / "clip.pt", mark))), NOT_RUN,
         id="open_clip checkpoint"),
    case(lambda tmp, mark: load_clip(str(with_code(clip_folder(tmp / "clip"), mark, "open_clip_pytorch_model.bin"))),
         NOT_RUN, id="open_clip folder"),
    case(lambda tmp, mark: causal(with_code(llama_folder(tmp / "llama"), mark)), NOT_RUN, id="language model"),
    case(lambda tmp, mark: seq2seq(with_code(tiny.t5_folder(tmp / "t5"), mark)), NOT_RUN, id="T5"),
    case(lambda tmp, mark: scorer(with_code(llama_folder(tmp / "llama"), mark)), NOT_RUN, id="reranker's model"),
    case(lambda tmp, mark: assemble_clip(
             image_tower="tf_efficientnet_lite0", image_weights=tmp, width=8, image_size=32,
             text_tower=with_code(tiny.bert_folder(tmp / "bert"), mark)), NOT_RUN, id="text tower"),
    case(lambda tmp, mark: load_state(pickled(tmp / "state.pt", mark)), "state.pt is damaged",
         id="state of a training"),
    case(lambda tmp, mark: read_array(_array_of_objects(tmp / "x.npy", mark)), "x.npy is not a readable .npy file",
         id="array of objects"),
    case(lambda tmp, mark: causal(own_code(tmp / "own", mark)), "own", id="code of a model's own"),
]  # fmt: skip


def _array_of_objects(path: Path, mark: Path) -> Path:
    np.save(path, np.array([Code(mark)], dtype=object), allow_pickle=True)
    return path


@pytest.mark.parametrize(("load", "message"), CODE)
def test_code_in_a_checkpoint_is_never_run(
    load: Callable[[Path, Path], object], message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("builtins.input", lambda *_: "y")  # nobody is asked, either
    with pytest.raises(BadInput) as caught:
        load(tmp_path, tmp_path / "ran")
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)
    assert "weights_only" not in str(caught.value)  # torch's advice would be to run it
    assert not (tmp_path / "ran").exists()


def test_the_code_would_have_run(tmp_path: Path) -> None:
    """The cases above prove something."""
    pickle.loads(old_pickle(tmp_path / "x.pt", tmp_path / "ran").read_bytes())
    assert (tmp_path / "ran").exists()


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Models as this project saves them."""
    root = tmp_path_factory.mktemp("models")
    tiny_t5(root / "t5", SPACE).save_pretrained(root / "lm")
    return root


def shorten(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-40])


def lack(path: Path, name: str) -> None:
    change(path, lambda state: state.pop(name))


def change(path: Path, edit: Callable[[dict[str, torch.Tensor]], object]) -> None:
    from safetensors.torch import load_file, save_file

    state = load_file(path)
    edit(state)
    save_file(state, path)


OVERWRITE = "let the script that made it overwrite it"
DAMAGED: list[Any] = [
    case("rqvae", lambda folder: shorten(folder / "model.safetensors"), r"model\.safetensors is not a readable file of "
         rf"tensors \(.*\): {OVERWRITE}", id="truncated safetensors"),
    case("rqvae", lambda folder: (folder / "model.safetensors").unlink(), r"model\.safetensors does not exist",
         id="no weights"),
    case("rqvae", lambda folder: lack(folder / "model.safetensors", "quantizer.codebooks"), r"model\.safetensors has "
         rf"no quantizer\.codebooks of shape \(3, 4, 4\): {OVERWRITE}", id="a tensor missing"),
    case("rqvae", lambda folder: change(folder / "model.safetensors", lambda state: state.update(
             {"quantizer.codebooks": torch.zeros(3, 5, 4)})), r"model\.safetensors: quantizer\.codebooks has the shape "
         rf"\(3, 5, 4\), expected \(3, 4, 4\): {OVERWRITE}", id="wrong shapes"),
    case("rqvae", lambda folder: change(folder / "model.safetensors", lambda state: state.update(
             {"more": torch.zeros(1)})), rf"model\.safetensors has more, which its config\.json knows nothing of: "
         rf"{OVERWRITE}", id="a tensor too many"),
    case("rqvae", lambda folder: (folder / "config.json").write_text('{"width": 4}'), r"config\.json is not an "
         rf"RQ-VAE's: {OVERWRITE}", id="another model's configuration"),
    case("lm", lambda folder: shorten(folder / "model.safetensors"), rf"lm cannot be read \(.*\): {OVERWRITE}",
         id="language model: truncated safetensors"),
    case("lm", lambda folder: lack(folder / "model.safetensors", "encoder.block.0.layer.0.SelfAttention.q.weight"),
         rf"lm lacks 1 of the model's weights, encoder\.block\.0\.layer\.0\.SelfAttention\.q\.weight among them: "
         rf"{OVERWRITE}", id="language model: a tensor missing"),
    case("lm", lambda folder: change(folder / "model.safetensors", lambda state: state.update(
             {"encoder.block.0.layer.0.SelfAttention.q.weight": torch.zeros(3, 3)})), rf"lm cannot be read \(.*\): "
         rf"{OVERWRITE}", id="language model: wrong shapes"),
    case("lm", lambda folder: (folder / "tokenizer.json").write_text("{"), rf"lm cannot be read \(.*\): {OVERWRITE}",
         id="language model: torn tokenizer"),
    case("lm", lambda folder: (folder / "vokens.json").unlink(), r"lm/vokens\.json does not exist",
         id="language model: no vokens"),
]  # fmt: skip


@pytest.mark.parametrize(("name", "damage", "message"), DAMAGED)
def test_a_damaged_checkpoint_is_one_line(
    name: str, damage: Callable[[Path], object], message: str, made: Path, models: Path, tmp_path: Path
) -> None:
    folder = tmp_path / name
    shutil.copytree(made / "a/rqvae" if name == "rqvae" else models / name, folder)
    damage(folder)
    with pytest.raises(BadInput, match=message) as caught:
        RqVae.from_pretrained(folder) if name == "rqvae" else VokenLM.from_pretrained(folder)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("name", "pretrained", "message"),
    [
        ("ViT-B-23", "openai", r"`model` ViT-B-23 is neither a folder .*; did you mean ViT-B-32\?$"),
        ("ViT-B-32", None, r"`model` ViT-B-32 needs `pretrained`: a checkpoint file or one of openai"),
        ("ViT-B-32", "opnai", r"open_clip cannot load ViT-B-32 \(opnai\): .*"),
    ],
    ids=["misspelt name", "no tag", "misspelt tag"],
)
def test_a_misspelt_two_tower_model(name: str, pretrained: str | None, message: str) -> None:
    with pytest.raises(BadInput, match=message) as caught:
        load_clip(name, pretrained)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("flag", "names", "message"),
    [
        ("targets", ("q_proj", "v_prj"), r"`lora_targets` v_prj: .*llama has no module of that name, it has .*v_proj; "
         r"did you mean v_proj\?$"),
        ("whole", ("embed_tokens", "norms"), r"`lora_whole` norms: .*llama has no module of that name, it has .*; did "
         r"you mean norm\?$"),
        ("targets", (), None),
        ("whole", (), None),
    ],
    ids=["misspelt target", "misspelt whole module", "published targets", "published modules"],
)  # fmt: skip
def test_misspelt_names_of_modules(flag: str, names: tuple[str, ...], message: str | None, tmp_path: Path) -> None:
    lora = Lora(2, 4.0, 0.0, names or LORA_TARGETS, TRAINED_WHOLE)
    if flag == "whole":
        lora = lora._replace(targets=LORA_TARGETS, whole=names or (*TRAINED_WHOLE, "lm_head"))
    model = str(llama_folder(tmp_path / "llama"))
    if message is None:
        built = build_scorer(model, images=ImageTokens(4, 8), lora=lora)
        assert any(value.requires_grad for value in built.parameters())
        return
    with pytest.raises(BadInput, match=message):
        build_scorer(model, images=ImageTokens(4, 8), lora=lora)


# Queries


@pytest.mark.parametrize(
    ("typed", "read"),
    [
        ("a red car", "a red car"),
        ("  a\tred\ncar\r\n", "a red car"),
        ("a\x00 red \x1b[31mcar", "a red [31mcar"),
        ("سيارة حمراء", "سيارة حمراء"),
        ("红色的汽车 красная машина 🚗", "红色的汽车 красная машина 🚗"),
        ("caf\udce9 au lait", "caf\ufffd au lait"),
        ("\ud83d\ude97 whole", "🚗 whole"),
        ("\ufeffa red car", "a red car"),
        ("", None),
        ("   \n", None),
        ("\x00\x1b", None),
    ],
    ids=["plain", "white space", "control characters", "right-to-left", "other scripts", "bytes that are no UTF-8",
         "a pair of surrogates", "BOM", "empty", "only spaces", "only control characters"],
)  # fmt: skip
def test_a_query_is_made_clean_or_refused(typed: str, read: str | None, models: Path) -> None:
    if read is None:
        with pytest.raises(BadInput, match=r"^an empty query finds nothing: write some words$"):
            read_query(typed)
        return
    assert read_query(typed) == read
    read.encode()


def test_an_enormous_query_is_cut_where_no_model_reads_on(models: Path) -> None:
    query = read_query("a red circle " * 33_334)
    assert len(query) <= LONGEST_QUERY
    lm = VokenLM.from_pretrained(models / "lm")
    (ids,) = lm.tokenize([query])
    assert ids == lm.tokenize(["a red circle " * 100])[0]
    assert len(ids) == lm.max_source


class Answering:
    """A retriever that cannot answer one query."""

    guide = None

    def __init__(self, file: Path) -> None:
        self.file = file
        self.asked: list[str] = []

    def __len__(self) -> int:
        return 1

    def refresh(self) -> bool:
        return False

    def share_of_features(self, **_: Any) -> float:
        return 0.0

    def search(self, queries: list[str], **_: Any) -> list[list[Any]]:
        (query,) = [read_query(query) for query in queries]
        self.asked.append(query)
        if query == "bad":
            raise BadInput("the scores are no numbers")
        return [[Found("a", self.file, 1.0, (0,))]]


def test_the_interactive_loop_survives_bad_queries(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    plain(tmp_path / "x\x1b.png")
    answering = Answering(tmp_path / "x\x1b.png")
    monkeypatch.setattr(Retriever, "from_runs", lambda **_: answering)
    typed = b"first\n\n  \n\x00\n\xff\xfe odd\nbad\n" + b"word " * 100_000 + b"\nlast"
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(typed), encoding="utf-8"))
    search.main(search.Config(queries=(), index=tmp_path, retriever=tmp_path, sheet=tmp_path / "sheet.png"))
    assert [query[:9] for query in answering.asked] == ["first", "\ufffd\ufffd odd", "bad", "word word", "last"]
    printed = capsys.readouterr()
    assert printed.err == "error: the scores are no numbers\n"
    assert "\x1b" not in printed.out
    assert "x\\x1b.png" in printed.out
    assert max(map(len, printed.out.splitlines())) < 300
    with pytest.raises(BadInput, match="no numbers"):
        search.main(search.Config(queries=("bad",), index=tmp_path, retriever=tmp_path, sheet=tmp_path / "sheet.png"))
