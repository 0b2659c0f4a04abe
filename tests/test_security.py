"""What must not happen with files, texts and keys of others, sentence by sentence."""

import ast
import html.parser
import io
import json
import logging
import os
import re
import sys
import tarfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from retriever import prepare
from retriever.pseudo_queries import generate as generate_pseudo_query
from retriever.serve.uploads import safe_name
from tests import folders
from tests.test_pseudo_queries import Endpoint
from tools import environment, logs, prepare_captions, report_page, results, runs
from tools.captions import read_captions
from tools.command_line import arguments
from tools.errors import BadInput
from tools.fetch_emoji import Package, fetch, read_emojis, read_member
from tools.files import read_array

ROOT = Path(__file__).parent.parent
ROOMS = ("tools", "models", "RQ-VAE", "retriever", "reranker", "benchmarks")
SOURCES = sorted(path for room in ROOMS for path in (ROOT / room).rglob("*.py"))

# 1. No unpickling of untrusted files anywhere

FORBIDDEN = frozenset(
    {"eval", "exec", "compile", "__import__", "pickle.load", "pickle.loads", "pickle.Unpickler", "cPickle.loads"}
    | {"dill.load", "dill.loads", "joblib.load", "marshal.load", "marshal.loads", "shelve.open", "pandas.read_pickle"}
    | {"yaml.load", "yaml.unsafe_load", "yaml.full_load", "os.system", "os.popen", "subprocess.getoutput"}
    | {"torch.hub.load", "torch.jit.load", "shutil.unpack_archive", "tempfile.mktemp", "xml.etree.ElementTree.parse"}
)
WRITES_ARCHIVES_OUT = ("extract", "extractall")
LOADERS = re.compile(r"(Auto\w+|loader)\.from_pretrained")


def names_of_modules(tree: ast.AST) -> dict[str, str]:
    """What the names of a file stand for: "np" -> "numpy", "loads" -> "pickle.loads"."""
    names = {}
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            for alias in node.names:
                first = alias.name.split(".")[0]
                names[alias.asname or first] = alias.name if alias.asname else first
        elif isinstance(node, ast.ImportFrom) and node.module and not node.level:
            names |= {alias.asname or alias.name: f"{node.module}.{alias.name}" for alias in node.names}
    return names


def dangers(source: str) -> list[str]:
    """Calls of a file that could run code from data, or write where data says."""
    tree = ast.parse(source)
    names = names_of_modules(tree)
    found = []
    for node in ast.walk(tree):
        if not isinstance(node, ast.Call):
            continue
        first, _, rest = ast.unparse(node.func).partition(".")
        called = ".".join(filter(None, (names.get(first, first), rest)))
        options = {word.arg: ast.unparse(word.value) for word in node.keywords}
        wrong = (
            called in FORBIDDEN
            or (called == "torch.load" and options.get("weights_only") != "True")
            or (called == "numpy.load" and options.get("allow_pickle") != "False")
            or options.get("shell") not in (None, "False")
            or options.get("trust_remote_code") not in (None, "False")
            or options.get("weights_only") not in (None, "True")
            or options.get("allow_pickle") not in (None, "False")
            or (LOADERS.fullmatch(called.removeprefix("transformers.")) and options.get("trust_remote_code") != "False")
            or called.rpartition(".")[2] in WRITES_ARCHIVES_OUT
        )
        if wrong:
            found.append(f"line {node.lineno}: {ast.unparse(node)}")
    return found


@pytest.mark.parametrize("path", SOURCES, ids=lambda path: str(path.relative_to(ROOT)))
def test_no_module_runs_code_from_data(path: Path) -> None:
    assert dangers(path.read_text(encoding="utf-8")) == []


@pytest.mark.parametrize(
    "source",
    [
        "import pickle\npickle.load(file)",
        "from pickle import loads as read\nread(content)",
        "import torch\ntorch.load(path)",
        "import torch\ntorch.load(path, weights_only=False)",
        "import torch as t\nt.load(path, map_location='cpu')",
        "import numpy as np\nnp.load(path)",
        "import numpy as np\nnp.load(path, allow_pickle=True)",
        "import yaml\nyaml.load(file)",
        "eval(text)",
        "exec(text)",
        "import subprocess\nsubprocess.run(line, shell=True)",
        "import os\nos.system(line)",
        "from transformers import AutoModel\nAutoModel.from_pretrained(name)",
        "from transformers import AutoTokenizer as A\nA.from_pretrained(name, trust_remote_code=True)",
        "tar.extractall(folder)",
        "import joblib\njoblib.load(path)",
    ],
)
def test_the_rule_is_seen_when_broken(source: str) -> None:
    assert len(dangers(source)) == 1


def test_the_rule_lets_the_safe_ways_be() -> None:
    assert not dangers(
        "import torch, numpy as np\nmodel.eval()\ntorch.load(path, weights_only=True)\n"
        "np.load(path, allow_pickle=False)\nsubprocess.run(['git'])\nretriever.load(folder)"
    )


def test_no_script_runs_text_as_code() -> None:
    for path in [*(ROOT / "scripts").rglob("*.sh"), ROOT / ".ci" / "run"]:
        assert not re.search(r"(^|[\s;|&])(eval|bash -c \"|sh -c \")", path.read_text()), path


def test_no_page_makes_html_of_text() -> None:
    for path in (ROOT / "retriever" / "page").glob("*.js"):
        found = re.search(
            r"innerHTML|outerHTML|insertAdjacentHTML|document\.write|\beval\(|new Function", path.read_text()
        )
        assert found is None, f"{path.name}: {found}"


# 2. Archives cannot write outside their folder


def archive(path: Path, *members: tuple[tarfile.TarInfo, bytes]) -> Path:
    with tarfile.open(path, "w:gz") as tar:
        for member, content in members:
            member.size = len(content)
            tar.addfile(member, io.BytesIO(content))
    return path


def member(name: str, kind: bytes = tarfile.REGTYPE, link: str = "") -> tarfile.TarInfo:
    made = tarfile.TarInfo(name)
    made.type, made.linkname = kind, link
    return made


HOSTILE = [
    pytest.param(member("../../escaped.json"), id="dots"),
    pytest.param(member("/tmp/escaped.json"), id="absolute"),
    pytest.param(member("package/chars.json", tarfile.SYMTYPE, "../../secret.json"), id="symbolic link"),
    pytest.param(member("package/chars.json", tarfile.SYMTYPE, "/etc/passwd"), id="absolute symbolic link"),
    pytest.param(member("package/chars.json", tarfile.LNKTYPE, "../../secret.json"), id="hard link"),
    pytest.param(member("package/chars.json", tarfile.LNKTYPE, "package/icons.json"), id="hard link within"),
    pytest.param(member("package/chars.json", tarfile.CHRTYPE), id="device"),
    pytest.param(member("package/chars.json", tarfile.FIFOTYPE), id="pipe"),
]


@pytest.mark.parametrize("hostile", HOSTILE)
def test_an_archive_writes_nothing_and_reads_nothing_else(hostile: tarfile.TarInfo, tmp_path: Path) -> None:
    (tmp_path / "secret.json").write_text('["secret"]')
    (tmp_path / "in" / "here").mkdir(parents=True)
    content = b'{"a": 1}' if hostile.isreg() else b""
    path = archive(tmp_path / "in" / "here" / "x.tgz", (member("package/icons.json"), b"{}"), (hostile, content))
    before = sorted(tmp_path.rglob("*"))
    with pytest.raises(BadInput, match=r"^x\.tgz(: chars\.json is no plain file in it: not read| has no chars\.json)$"):
        read_member(path, "chars.json")
    assert read_member(path, "icons.json") == {}
    assert sorted(tmp_path.rglob("*")) == before
    assert not Path("/tmp/escaped.json").exists()


def test_a_torn_archive_is_one_line(tmp_path: Path) -> None:
    path = archive(tmp_path / "x.tgz", (member("package/icons.json"), os.urandom(20_000)))
    path.write_bytes(path.read_bytes()[:5000])
    with pytest.raises(BadInput, match=r"^x\.tgz: icons\.json cannot be read \(.*\): fetch it again$"):
        read_member(path, "icons.json")


def test_an_archive_that_is_not_the_pinned_one_is_not_opened(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    archive(tmp_path / "x-1.tgz", (member("package/icons.json"), b"{}"))
    done = SimpleNamespace(returncode=0, stdout="x-1.tgz\n", stderr="")
    monkeypatch.setattr("shutil.which", lambda _: "npm")
    monkeypatch.setattr("subprocess.run", lambda *_, **__: done)
    with pytest.raises(BadInput, match=r"^x@1: the archive's SHA-512 is .*, expected AAAA: not unpacked$"):
        fetch(Package("x", "1", "AAAA", ""), tmp_path)


def test_code_points_of_an_archive_are_no_path(tmp_path: Path) -> None:
    row = {"hexcode": "../../../escaped", "label": "x", "group": 0}
    groups = {"groups": {"0": "smileys"}}
    base = archive(
        tmp_path / "base.tgz",
        (member("package/en/data.json"), json.dumps([row]).encode()),
        (member("package/meta/groups.json"), json.dumps(groups).encode()),
    )
    words = archive(tmp_path / "words.tgz", (member("package/dist/emoji-en-US.json"), b"{}"))
    with pytest.raises(BadInput, match=r"^base\.tgz: '\.\./\.\./\.\./escaped' is no emoji's code points: not drawn$"):
        read_emojis(base, words)


# 3. File names in captions cannot leave the data folder


@pytest.fixture
def pictures(tmp_path: Path) -> Path:
    """A folder with one picture, and a private one beside it."""
    folder = tmp_path / "data" / "images"
    folder.mkdir(parents=True)
    Image.new("RGB", (4, 4), "red").save(folder / "a.png")
    Image.new("RGB", (4, 4), "blue").save(tmp_path / "private.png")
    (folder / "link.png").symlink_to(tmp_path / "private.png")
    (folder / "up").symlink_to(tmp_path)
    (folder / "within.png").symlink_to("a.png")
    return folder


def taken(pictures: Path, file: str, **options: Any) -> list[str]:
    source = pictures.parent / "captions.jsonl"
    source.write_text(json.dumps({"image": file, "captions": ["x"], "split": "train"}))
    config = prepare_captions.Config(
        images=pictures, source=(source,), output=pictures.parent / "out" / "".join(options), workers=0, **options
    )
    prepare_captions.main(config)
    return [record.file for record in read_captions(config.output).records]


@pytest.mark.parametrize(
    ("file", "reason"),
    [
        ("../../private.png", "file outside --images"),
        ("../../../../../../../../etc/passwd", "file outside --images"),
        ("up/../../../private.png", "file outside --images"),
        ("/etc/passwd", "file outside --images"),
        ("{private}", "file outside --images"),
        ("a.png\0.jpg", "name with a NUL character, which no file can have"),
        ("link.png", "link that leads out of --images (--follow-links lets it)"),
        ("up/private.png", "link that leads out of --images (--follow-links lets it)"),
    ],
)
def test_a_caption_file_cannot_name_a_file_outside(file: str, reason: str, pictures: Path) -> None:
    file = file.format(private=pictures.parent.parent / "private.png")
    with pytest.raises(BadInput) as caught:
        taken(pictures, file)
    assert f"  1 × {reason}" in str(caught.value).splitlines()
    with pytest.raises(BadInput, match=r"^no usable picture"):
        taken(pictures, file, skip_bad=True)


def test_links_are_followed_where_that_is_said(pictures: Path) -> None:
    assert taken(pictures, "within.png") == ["within.png"]
    assert taken(pictures, "up/private.png", follow_links=True) == ["up/private.png"]


def test_a_bare_folder_is_not_left_either(pictures: Path) -> None:
    config = prepare_captions.Config(images=pictures, output=pictures.parent / "out", workers=0, skip_bad=True)
    prepare_captions.main(config)
    assert [record.file for record in read_captions(config.output).records] == ["a.png"]  # within.png is a link to it


def test_an_uploads_name_is_no_path() -> None:
    for name in ("../../etc/passwd", "/etc/passwd", "..\\..\\boot.ini", "a\0b", ".", "..", "", "\u202egnp.exe"):
        made = safe_name(name, ".png")
        assert "/" not in made
        assert "\\" not in made
        assert made.isprintable()
        assert made.endswith(".png")
        assert not made.startswith(".")


# 4. HTML output escapes captions and names


class Reader(html.parser.HTMLParser):
    """Tags, attributes and text of a page."""

    def __init__(self, page: str) -> None:
        super().__init__()
        self.tags: list[str] = []
        self.attributes: list[tuple[str, str | None]] = []
        self.seen = ""
        self.feed(page)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.attributes += attrs

    def handle_data(self, data: str) -> None:
        self.seen += data


HOSTILE_TEXTS = [
    "<script>alert(1)</script>",
    '"><img src=x onerror=alert(1)>',
    "' onmouseover='alert(1)",
    "</title></style></textarea><svg onload=alert(1)>",
    "&lt;script&gt;",
    "a\x00<b>\x1b",
]


@pytest.mark.parametrize("text", HOSTILE_TEXTS)
def test_a_report_shows_captions_and_names_as_text(text: str, tmp_path: Path) -> None:
    Image.new("RGB", (4, 4)).save(tmp_path / "a.png")
    page = report_page.Page(text, lead=report_page.paragraph(text))
    thumbnail = report_page.Thumbnails().image(tmp_path / "a.png", text)
    rows = [{text: report_page.Cell(text, strong=True), "picture": thumbnail}]
    parts = [report_page.heading(text), report_page.table(rows), report_page.details(text, report_page.paragraph(text))]
    page.add(report_page.Section("queries", text, parts))
    plain = report_page.Page("x", lead=report_page.paragraph("x"))
    rows = [
        {"x": report_page.Cell("x", strong=True), "picture": report_page.Thumbnails().image(tmp_path / "a.png", "x")}
    ]
    parts = [report_page.heading("x"), report_page.table(rows), report_page.details("x", report_page.paragraph("x"))]
    plain.add(report_page.Section("queries", "x", parts))
    read, expected = Reader(page.text()), Reader(plain.text())
    assert read.tags == expected.tags
    assert [name for name, _ in read.attributes] == [name for name, _ in expected.attributes]
    shown = text.replace("\x00", "\\x00").replace("\x1b", "\\x1b")
    assert read.seen.count(shown) == expected.seen.count("x") - len(re.findall("x", report_page.STYLE))
    assert ("alt", shown) in read.attributes


@pytest.mark.parametrize("text", ["a|b", "a\nb", "<img src=x onerror=alert(1)>", "<!-- -->"])
def test_a_markdown_table_keeps_its_cells(text: str) -> None:
    row = {
        "system": text, "dataset": "d", "split": "test", "pool": "test", "pool_size": 10, "level": "image",
        "setting": "inductive", "recall": {"1": 0.1, "5": 0.2, "10": 0.3}, "mrr": 0.2, "median_rank": 3,
        "queries_per_second": None,
    }  # fmt: skip
    lines = results.markdown([row]).splitlines()
    assert len(lines) == 3
    assert [len(re.findall(r"(?<!\\)\|", line)) for line in lines] == [12, 12, 12]
    assert "<" not in lines[2]


# 5. API keys never reach a log, a manifest or wandb

KEY = "sk-very-secret"  # what the endpoint of these tests repeats in its errors
KEYS = {"THE_KEY": KEY, "OPENAI_API_KEY": "sk-open", "WANDB_API_KEY": "wb-secret-key", "HF_TOKEN": "hf_secret_token"}


class FakeWandb:
    """A wandb that keeps everything that it is given."""

    def __init__(self) -> None:
        self.given: list[Any] = []
        self.summary = SimpleNamespace(update=self.take)

    def take(self, *args: Any, **options: Any) -> "FakeWandb":
        self.given.append((args, options))
        return self

    init = log = finish = Table = Image = take

    class Settings(SimpleNamespace):
        pass


@pytest.fixture
def keys(monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in KEYS.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")


@pytest.fixture
def endpoint(keys: None) -> Iterator[Endpoint]:
    running = Endpoint()
    yield running
    running.server.shutdown()
    running.server.server_close()


@pytest.fixture
def dataset(tmp_path: Path) -> Path:
    captions = folders.captions(tmp_path / "captions")
    features = folders.features(tmp_path / "features", captions)
    codes = folders.codes(tmp_path / "codes", features, folders.rqvae(tmp_path / "rqvae", features))
    prepare.main(prepare.Config(codes=codes, output=tmp_path / "dataset"))
    return tmp_path / "dataset"


class FewFeatures:
    """A text tower that says the same of all texts."""

    path: Path

    def __init__(self, *_: Any, **__: Any) -> None:
        pass

    def encode(self, texts: list[str]) -> torch.Tensor:
        return torch.from_numpy(np.array(read_array(self.path)[: len(texts)]))

    def overlong(self, texts: list[str]) -> list[bool]:
        return [False for _ in texts]


def without_keys(text: str) -> None:
    for value in KEYS.values():
        assert value not in text


def everything_below(folder: Path) -> str:
    return "\n".join(path.read_bytes().decode("latin-1") for path in sorted(folder.rglob("*")) if path.is_file())


@pytest.mark.parametrize("answer", ["a red circle", f"my key is {KEY}", 401, 400, 500, "no server"])
def test_a_key_is_sent_and_never_told(
    answer: int | str,
    dataset: Path,
    endpoint: Endpoint,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
    caplog: pytest.LogCaptureFixture,
) -> None:
    monkeypatch.setattr(generate_pseudo_query, "text_encoder", FewFeatures)
    FewFeatures.path = tmp_path / "features" / "texts.npy"
    url = endpoint.url
    if answer == "no server":
        url = "http://127.0.0.1:9/v1"
    else:
        endpoint.otherwise = answer
    config = generate_pseudo_query.Config(
        dataset=dataset, output=tmp_path / "run", source="endpoint", url=url, language_model="m", device="cpu",
        api_key_variable="THE_KEY", requests_per_minute=6e4, retries=0, candidates=5, parallel=1,
    )  # fmt: skip
    told = ""
    with caplog.at_level(logging.DEBUG):
        try:
            generate_pseudo_query.main(config)
        except BadInput as error:
            told = f"{error!r} {error.__context__!r} {error.__cause__!r}" if error.__cause__ else str(error)
    assert bool(told) == (answer in (401, 400, 500, "no server"))
    if answer != "no server":
        assert endpoint.keys == {f"Bearer {KEY}"}
    printed = capfd.readouterr()
    without_keys(told + printed.out + printed.err + everything_below(tmp_path / "run"))
    without_keys("\n".join(f"{record.getMessage()} {record.args!r}" for record in caplog.records))


@dataclass(frozen=True)
class Config:
    """A configuration as trainings have it."""

    output: Path
    api_key_variable: str = "THE_KEY"
    lr: float = 0.1
    overwrite: bool = False


def test_a_key_does_not_reach_wandb_or_a_manifest(
    keys: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    wandb = FakeWandb()
    monkeypatch.setitem(sys.modules, "wandb", wandb)
    monkeypatch.setenv("WANDB_MODE", "offline")
    run = runs.begin("tools.example", Config(tmp_path / "run"), inputs={})
    assert run is not None
    tracker = logs.Tracker(run.folder, job="train", config=run.started["config"])
    tracker.log({"loss": 1.0}, step=1)
    tracker.summary({"R@1": 0.5})
    tracker.table("results", [{"system": "x", "R@1": 0.5}])
    tracker.finish()
    started = (run.folder / "started.json").read_text()
    run.finish(facts={"levels": 4})
    assert len(wandb.given) >= 4
    assert wandb.given[0][1]["config"] == {"lr": 0.1}
    without_keys(repr(wandb.given) + started + everything_below(run.folder) + json.dumps(environment.describe()))
    printed = capfd.readouterr()
    without_keys(printed.out + printed.err)


@pytest.mark.parametrize(
    "flags",
    [
        ["--api-key", KEY],
        [f"--api-key={KEY}"],
        ["--api-key-variable", KEY],
        ["--api-key-variable", "abcdef0123456789abcdef0123456789"],
        ["--url", f"http://user:{KEY}@host/v1"],
        ["--url", f"http://host/v1?key={KEY}"],
    ],
)
def test_a_key_on_the_command_line_is_not_repeated(
    flags: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    from tools.command_line.commands import run_command

    line = ["x", "--dataset", "x", "--output", str(tmp_path / "y"), "--source", "endpoint", "--language-model", "m"]
    line += [] if "--url" in flags else ["--url", "http://host/v1"]
    monkeypatch.setattr(sys, "argv", [*line, *flags])
    with pytest.raises(SystemExit) as ended:
        run_command(generate_pseudo_query.main, generate_pseudo_query.Config)
    printed = capsys.readouterr()
    assert ended.value.code == 2
    assert printed.err.startswith("error: --")
    assert printed.err.count("\n") == 1
    assert KEY not in printed.err
    assert "abcdef" not in printed.err
    assert not (tmp_path / "y").exists()


def test_the_finder_of_misspelt_options_repeats_no_value() -> None:
    with pytest.raises(BadInput) as caught:
        arguments.check_arguments(Config, ["--api-kee", KEY])
    assert str(caught.value) == "--api-kee is not an option of this command; did you mean --api-key-variable?"
