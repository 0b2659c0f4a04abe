"""Pseudo queries: three sources, the choice by the two towers, what is never read, resuming, many processes."""

import base64
import gc
import json
import multiprocessing
import os
import shutil
import socket
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from models import captioner
from models.captioner import Sampling, load_captioner, write_captions
from models.clip import encode_tokens, load_clip
from retriever.data import read_data, read_pseudo_queries
from retriever.pseudo_queries import generate as generate_pseudo_query
from retriever.pseudo_queries.candidates import Candidates
from retriever.pseudo_queries.endpoint import data_url, parse_captions
from retriever.pseudo_queries.generate import Config, make_requests, read_pool, select
from tests.captioners import blip2_folder, blip_folder, encoder_decoder_folder, llava_folder
from tests.chain import Chain, files_of
from tests.test_pipeline import PowerCut, cut_power_at, interrupted
from tests.tiny import WORDS
from tools import runs
from tools.captions import read_captions
from tools.errors import BadInput
from tools.features import normalized, read_features
from tools.files import read_array, read_json, read_json_lines, write_array

ROOT = Path(__file__).parent.parent
KEY = "sk-very-secret"


def rows_of(folder: Path) -> list[dict[str, Any]]:
    return [row for _, row in read_json_lines(folder / "pseudo.jsonl")]


def model_config(chain: Chain, captioner: Path, output: Path, **options: Any) -> Config:
    settings = {"candidates": 6, "batch_size": 3, "max_new_tokens": 8, "precision": "fp32", "device": "cpu", **options}
    return Config(dataset=chain.dataset, output=output, source="model", captioner=str(captioner), **settings)


@pytest.fixture(scope="module")
def blip(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return blip_folder(tmp_path_factory.mktemp("captioner") / "blip")


def test_the_dataset_names_each_captions_row(chain: Chain) -> None:
    features, captions = read_features(chain.features), read_captions(chain.captions)
    texts = [text for record in captions.records for text in record.captions]
    seen = []
    for split in ("train", "val", "test"):
        queries = read_data(chain.dataset).queries(split)
        assert [texts[row] for row in queries.captions] == queries.texts
        assert features.owners[queries.captions].tolist() == queries.pictures.tolist()
        seen += queries.captions.tolist()
    assert sorted(seen) == list(range(len(texts)))


def test_nearest_takes_the_captions_of_the_most_similar_train_pictures(
    chain: Chain, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    config = Config(dataset=chain.dataset, output=tmp_path / "run", source="nearest", per_picture=4, neighbours=3)
    generate_pseudo_query.main(config)
    assert files_of(config.output) == ["manifest.json", "pseudo.jsonl"]
    data, features = read_data(chain.dataset), read_features(chain.features)
    train = features.image_rows("train")
    expected = []
    for row, split in enumerate(data.splits):
        if split == "train":
            continue
        cosines = normalized(features.images[train]) @ normalized(features.images[row : row + 1])[0]
        near = train[np.argsort(-cosines)[:3]]
        chosen = [index for index, owner in enumerate(features.owners) if owner in near]
        found = normalized(features.texts[chosen]) @ normalized(features.images[row : row + 1])[0]
        texts = [text for picture in sorted(near) for text in features.records[picture].captions]
        expected += [(data.images[row], texts[best], found[best]) for best in np.argsort(-found)[:4]]
    rows = rows_of(config.output)
    assert [(row["image"], row["query"]) for row in rows] == [(image, text) for image, text, _ in expected]
    assert [row["similarity"] for row in rows] == pytest.approx([cosine for *_, cosine in expected], abs=1e-4)
    manifest = runs.read_manifest(config.output, "retriever.pseudo_queries.generate")
    assert manifest.facts == {
        "source": "nearest", "splits": ["val", "test"], "pictures": 16, "queries": 64,
        "captions_fingerprint": data.manifest.facts["captions_fingerprint"],
    }  # fmt: skip
    assert manifest.metrics["candidates"] == 16 * 9
    assert manifest.metrics["pictures_with_fewer"] == manifest.metrics["pictures_with_none"] == 0
    read = read_pseudo_queries(config.output, data)
    assert [data.images[row] for row in read.pictures] == [row["image"] for row in rows]
    shown = capsys.readouterr().out.splitlines()
    assert shown[0].startswith("64 pseudo queries of 144 candidates for 16 pictures")
    assert len(shown) == 4
    assert f'{rows[0]["image"]}: "{rows[0]["query"]}"' in shown[1]


def test_a_train_picture_is_no_neighbour_of_its_own(chain: Chain, tmp_path: Path) -> None:
    config = Config(dataset=chain.dataset, output=tmp_path / "run", source="nearest", splits=("train",), neighbours=1)
    generate_pseudo_query.main(config)
    own = {record.image: record.captions for record in read_captions(chain.captions).records}
    assert all(row["query"] not in own[row["image"]] for row in rows_of(config.output))


def test_candidates_are_chosen_by_cosine_and_no_text_twice() -> None:
    features = np.array([[1, 0], [0.6, 0.8], [2, 0.1], [-1, 0], [3, 0], [0, 1]], np.float32)
    texts = ["a dog", "a cat", "A  Dog", "a cow", " ", "a fox\n"]
    settings: dict[str, Any] = {"dataset": Path("x"), "output": Path("y"), "source": "nearest"}
    image = np.array([2, 0], np.float32)
    found = select(Candidates(texts, features), image, Config(**settings))
    assert found == [("a dog", 1.0), ("a cat", 0.6), ("a fox", 0.0), ("a cow", -1.0)]
    assert len(select(Candidates(texts, features), image, Config(**settings, per_picture=2))) == 2
    assert len(select(Candidates(texts, features), image, Config(**settings, min_similarity=0.5))) == 2
    assert select(Candidates([], features[:0]), image, Config(**settings)) == []


def without_other_captions(chain: Chain, folder: Path) -> Chain:
    """A copy of the dataset, features and captions without anything of the captions of val and test pictures."""
    copy = chain._replace(dataset=folder / "dataset", features=folder / "features", captions=folder / "captions")
    for name in ("dataset", "features", "captions"):
        shutil.copytree(getattr(chain, name), getattr(copy, name))
    texts = np.array(read_array(copy.features / "texts.npy"))
    data = read_data(chain.dataset)
    for split in ("val", "test"):
        texts[data.queries(split).captions] = np.nan
        (copy.dataset / f"{split}.jsonl").write_bytes(b"\xff garbage")
    write_array(copy.features / "texts.npy", texts)
    (copy.captions / "captions.jsonl").write_bytes(b"\xff garbage")
    for path, fact, value in ((copy.dataset, "features", copy.features), (copy.features, "captions", copy.captions)):
        manifest = read_json(path / "manifest.json")
        manifest["facts"][fact] = str(value)
        runs.write_manifest(path, manifest)
    return copy


def test_captions_of_val_and_test_are_never_read(
    chain: Chain, blip: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(runs.VERIFY_VARIABLE, "off")  # the garbage is not what was written
    copy = without_other_captions(chain, tmp_path)
    for name, folders in (("whole", chain), ("blind", copy)):
        generate_pseudo_query.main(Config(dataset=folders.dataset, output=tmp_path / name, source="nearest"))
        generate_pseudo_query.main(model_config(folders, blip, tmp_path / f"{name}-model"))
    for kind in ("", "-model"):
        first, second = ((tmp_path / f"{name}{kind}" / "pseudo.jsonl").read_bytes() for name in ("whole", "blind"))
        assert first == second
        assert len(first) > 0
    asked = [
        make_requests(read_pool(config), config)
        for config in (endpoint_config(folders, "http://x/v1", tmp_path / "none") for folders in (chain, copy))
    ]
    assert asked[0] == asked[1]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"source": "nearest", "captioner": "x"}, "--captioner is for --source model, not --source nearest"),
        (
            {"source": "model", "captioner": "x", "url": "http://x"},
            "--url is for --source endpoint, not --source model",
        ),
        ({"source": "nearest", "dry_run": True}, "--dry-run is for --source endpoint, not --source nearest"),
        ({"source": "nearest", "precision": "bf16"}, "--precision is for --source model or endpoint, not"),
        ({"source": "endpoint", "neighbours": 3}, "--neighbours is for --source nearest, not --source endpoint"),
        ({"source": "model"}, "--source model needs --captioner"),
        ({"source": "endpoint", "language_model": "x"}, "--source endpoint needs --url"),
        ({"source": "endpoint", "url": "http://x"}, "--source endpoint needs --language-model"),
        ({"source": "model", "captioner": "x", "candidates": 3}, "--candidates 3 cannot give --per-picture 5"),
        ({"source": "nearest", "splits": ()}, "--splits takes"),
        ({"source": "nearest", "min_similarity": 2.0}, "--min-similarity is a cosine"),
        ({"source": "model", "captioner": "x", "top_p": 0.0}, "--top-p above 0"),
        ({"source": "nearest", "per_picture": 0}, "--per-picture must be at least 1"),
        ({"source": "endpoint", "url": "x.org", "language_model": "x"}, "--url must begin with http"),
        ({"source": "endpoint", "url": f"http://me:{KEY}@x", "language_model": "x"}, "--url takes no user"),
        ({"source": "endpoint", "url": "http://x", "language_model": "x", "api_key_variable": KEY}, "not the key"),
    ],
)
def test_flags_that_do_not_go_together(options: dict[str, Any], message: str) -> None:
    with pytest.raises(BadInput, match=message) as caught:
        Config(dataset=Path("nowhere"), output=Path("nowhere"), **options)
    assert KEY not in str(caught.value)


def test_a_dataset_of_an_earlier_version_is_refused(chain: Chain, tmp_path: Path) -> None:
    shutil.copytree(chain.dataset, tmp_path / "dataset")
    manifest = read_json(tmp_path / "dataset" / "manifest.json")
    del manifest["facts"]["captions_fingerprint"]
    runs.write_manifest(tmp_path / "dataset", manifest)
    with pytest.raises(BadInput, match=r"run scripts/07_prepare_retriever_dataset\.sh --overwrite"):
        generate_pseudo_query.main(Config(dataset=tmp_path / "dataset", output=tmp_path / "x", source="nearest"))
    assert not (tmp_path / "x").exists()


@pytest.mark.parametrize("make", [blip_folder, blip2_folder, encoder_decoder_folder, llava_folder])
def test_any_image_to_text_model_writes_captions(make: Callable[[Path], Path], tmp_path: Path) -> None:
    for dtype in (torch.float32, torch.bfloat16):
        folder = tmp_path / "captioner"
        if not folder.exists():
            make(folder)
        model = load_captioner(str(folder), device=torch.device("cpu"), dtype=dtype)
        pictures = [Image.new("RGB", (40, 32), colour) for colour in ("red", "blue", "green")]
        sampling = Sampling(captions=4, temperature=1.0, top_p=1.0, max_new_tokens=6, prompt=None)
        texts = write_captions(model, pictures, sampling, seed=1)
        assert [len(of_picture) for of_picture in texts] == [4, 4, 4]
        assert {word for of_picture in texts for text in of_picture for word in text.split()} <= set(WORDS)
        assert texts == write_captions(model, pictures, sampling, seed=1)
        assert texts != write_captions(model, pictures, sampling, seed=2)
        asked = sampling._replace(prompt="a picture of")
        if make is encoder_decoder_folder:
            with pytest.raises(BadInput, match="leave `prompt` out"):
                write_captions(model, pictures, asked, seed=1)
        else:
            texts = write_captions(model, pictures, asked, seed=1)
            assert all(0 < len(text.split()) <= 6 for of_picture in texts for text in of_picture if text)


def test_a_model_writes_and_the_towers_choose(chain: Chain, blip: Path, tmp_path: Path) -> None:
    config = model_config(chain, blip, tmp_path / "run", splits=("test",), per_picture=2)
    generate_pseudo_query.main(config)
    rows = rows_of(config.output)
    data = read_data(chain.dataset)
    assert [row["image"] for row in rows] == sorted((row["image"] for row in rows), key=data.images.index)
    assert {row["image"] for row in rows} == {data.images[row] for row in data.rows("test")}
    clip = load_clip(str(chain.features / "clip"))
    with torch.inference_mode():
        texts = encode_tokens(clip, clip.tokenizer([row["query"] for row in rows])).numpy()
    images = read_array(chain.features / "images.npy")[[data.images.index(row["image"]) for row in rows]]
    cosines = (normalized(texts) * normalized(images)).sum(axis=1)
    assert [row["similarity"] for row in rows] == pytest.approx(cosines.tolist(), abs=2e-4)
    again = model_config(chain, blip, tmp_path / "seed", splits=("test",), per_picture=2, seed=1)
    generate_pseudo_query.main(again)
    assert rows_of(again.output) != rows


def test_a_killed_model_run_ends_with_the_same_queries(
    chain: Chain, blip: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole, cut = (model_config(chain, blip, tmp_path / name) for name in ("whole", "cut"))
    generate_pseudo_query.main(whole)
    interrupted(monkeypatch, generate_pseudo_query.main, cut, captioner, "write_captions", 4)
    assert rows_of(whole.output) == rows_of(cut.output)


def run_as(number: int, port: int, config: Config) -> None:
    """Run the command as one of two processes."""
    os.environ |= {"RANK": str(number), "WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    generate_pseudo_query.main(config)


def test_two_processes_write_what_one_does(
    chain: Chain, blip: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(generate_pseudo_query, "SELECT_BLOCK", 5)
    one, two = (model_config(chain, blip, tmp_path / name) for name in ("one", "two"))
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    fork = multiprocessing.get_context("fork")  # with everything loaded already
    started = [fork.Process(target=run_as, args=(number, port, two)) for number in range(2)]
    for process in started:
        process.start()
    for process in started:
        process.join()
    assert [process.exitcode for process in started] == [0, 0]
    generate_pseudo_query.main(one)
    assert rows_of(two.output) == rows_of(one.output)


def test_no_captioner_is_one_line(chain: Chain, tmp_path: Path) -> None:
    with pytest.raises(BadInput, match=r"cannot load .* as an image-to-text model"):
        generate_pseudo_query.main(model_config(chain, chain.features / "clip", tmp_path / "run"))


@pytest.mark.parametrize("command", [["-m", "tools.generate_pseudo_query"], ["tools/generate_psudo_query.py"]])
def test_the_published_names_lead_to_the_command(command: list[str], tmp_path: Path) -> None:
    flags = ["--dataset", str(tmp_path / "none"), "--source", "nearest", "--output", str(tmp_path / "x")]
    done = subprocess.run([sys.executable, *command, *flags], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 2
    assert done.stderr.endswith("has no manifest.json: run bash scripts/07_prepare_retriever_dataset.sh first\n")


class Endpoint:
    """An OpenAI-compatible server: `script` is what the next calls get, a status or an answer; then `otherwise`."""

    def __init__(self) -> None:
        self.script: list[int | str] = []
        self.otherwise: int | str = "1. a red circle\n2. drawing of a blue ring\n\n- 'small green square'"
        self.calls: list[dict[str, Any]] = []
        self.keys: set[str] = set()
        self.lock = threading.Lock()
        self.server = ThreadingHTTPServer(("127.0.0.1", 0), self.handler())
        self.url = f"http://127.0.0.1:{self.server.server_address[1]}/v1"
        threading.Thread(target=self.server.serve_forever, daemon=True).start()

    def handler(self) -> type[BaseHTTPRequestHandler]:
        endpoint = self

        class Handler(BaseHTTPRequestHandler):
            def do_POST(self) -> None:
                body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
                with endpoint.lock:
                    endpoint.calls.append(body)
                    endpoint.keys.add(self.headers["Authorization"])
                    answer = endpoint.script.pop(0) if endpoint.script else endpoint.otherwise
                status = answer if isinstance(answer, int) else 200
                message = {"role": "assistant", "content": answer}
                error = {"message": f"status {status} for {KEY}", "type": "x", "code": None}
                choice = {"index": 0, "finish_reason": "stop", "message": message}
                values = {"id": "x", "object": "chat.completion", "created": 0, "model": "m", "choices": [choice]}
                content = json.dumps(values if status == 200 else {"error": error}).encode()
                self.send_response(status)
                self.send_header("Content-Type", "application/json")
                self.send_header("Content-Length", str(len(content)))
                if status in (429, 500):
                    self.send_header("Retry-After", "0.02")
                self.end_headers()
                self.wfile.write(content)

            def log_message(self, *_: Any) -> None:
                pass

        return Handler

    def pictures(self) -> list[bytes]:
        """Pictures that arrived, in the order of the calls."""
        urls = [call["messages"][0]["content"][1]["image_url"]["url"] for call in self.calls]
        assert all(url.startswith("data:image/png;base64,") for url in urls)
        return [base64.b64decode(url.partition(",")[2]) for url in urls]


@pytest.fixture
def endpoint(monkeypatch: pytest.MonkeyPatch) -> Iterator[Endpoint]:
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    monkeypatch.setenv("THE_KEY", KEY)
    running = Endpoint()
    yield running
    running.server.shutdown()
    running.server.server_close()


def endpoint_config(chain: Chain, url: str, output: Path, **options: Any) -> Config:
    settings = {
        "candidates": 6, "per_picture": 2, "api_key_variable": "THE_KEY", "requests_per_minute": 60_000.0,
        "parallel": 2, "retries": 2, "precision": "fp32", "device": "cpu", **options,
    }  # fmt: skip
    return Config(dataset=chain.dataset, output=output, source="endpoint", url=url, language_model="seer", **settings)


def test_an_endpoint_is_sent_every_picture_once_and_asked_again_after_failures(
    chain: Chain, endpoint: Endpoint, tmp_path: Path
) -> None:
    endpoint.script = [429, 500]
    config = endpoint_config(chain, endpoint.url, tmp_path / "run")
    generate_pseudo_query.main(config)
    data = read_data(chain.dataset)
    files = {
        (data.image_folder / data.files[row]).read_bytes() for row, split in enumerate(data.splits) if split != "train"
    }
    assert len(endpoint.calls) == 16 + 2
    assert set(endpoint.pictures()) == files
    assert endpoint.keys == {f"Bearer {KEY}"}
    assert {call["model"] for call in endpoint.calls} == {"seer"}
    rows = rows_of(config.output)
    assert len(rows) == 16 * 2
    assert {row["query"] for row in rows} <= {"a red circle", "drawing of a blue ring", "small green square"}
    assert runs.read_manifest(config.output, "retriever.pseudo_queries.generate").metrics["candidates"] == 16 * 3
    assert not any(KEY in path.read_text() for path in config.output.rglob("*") if path.is_file())
    generate_pseudo_query.main(endpoint_config(chain, endpoint.url, tmp_path / "run", parallel=1))  # finished
    assert len(endpoint.calls) == 16 + 2


def test_the_style_of_the_prompt_is_that_of_the_most_similar_train_picture(chain: Chain, tmp_path: Path) -> None:
    config = endpoint_config(chain, "http://x/v1", tmp_path / "none")
    features = read_features(chain.features)
    train = features.image_rows("train")
    for request in make_requests(read_pool(config), config):
        row = [record.image for record in features.records].index(request.image)
        near = train[np.argmax(normalized(features.images[train]) @ features.images[row])]
        assert request.prompt.startswith("Write 6 captions ")
        assert [line[2:] for line in request.prompt.splitlines() if line.startswith("- ")] == list(
            features.records[near].captions
        )


def test_answers_are_kept_when_the_endpoint_stops_answering(chain: Chain, endpoint: Endpoint, tmp_path: Path) -> None:
    config = endpoint_config(chain, endpoint.url, tmp_path / "run", parallel=1, retries=1)
    endpoint.script, endpoint.otherwise = ["a red ring"] * 5, 500
    with pytest.raises(BadInput, match=r"fails with HTTP 500, tried 2 times .*; 5 of 16 answers are there and kept"):
        generate_pseudo_query.main(config)
    gc.collect()  # a run that failed holds no lock
    assert len(endpoint.pictures()) == 5 + 2
    done = set(endpoint.pictures()[:5])
    assert not any(KEY in path.read_text() for path in config.output.rglob("*") if path.is_file())
    endpoint.calls.clear()
    endpoint.otherwise = "a blue ring"
    again = endpoint_config(chain, endpoint.url, tmp_path / "run", parallel=3, retries=4, requests_per_minute=6e5)
    generate_pseudo_query.main(again)  # another pace is no other run
    assert len(endpoint.calls) == 11
    assert not done & set(endpoint.pictures())
    assert [row["query"] for row in rows_of(config.output)].count("a red ring") == 5


def test_a_killed_endpoint_run_asks_for_the_rest_alone(
    chain: Chain, endpoint: Endpoint, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = endpoint_config(chain, endpoint.url, tmp_path / "run")
    with monkeypatch.context() as patch:
        cut_power_at(patch, generate_pseudo_query, "text_encoder", 1)
        with pytest.raises(PowerCut):
            generate_pseudo_query.main(config)
    assert len(endpoint.calls) == 16
    monkeypatch.delenv("THE_KEY")  # nothing is left to ask
    generate_pseudo_query.main(config)
    assert len(endpoint.calls) == 16
    assert len(rows_of(config.output)) == 32


@pytest.mark.parametrize(
    ("status", "message", "calls"),
    [
        (401, "refuses the key in THE_KEY .HTTP 401.; 0 of 16 answers are there and kept", 1),
        (404, "knows no --language-model seer, or the --url is wrong", 1),
        (400, r"refuses black-circle\.png .*--skip-refused", 1),
        (429, "fails with HTTP 429, tried 3 times", 3),
    ],
)
def test_what_an_endpoint_refuses_is_one_line(
    status: int, message: str, calls: int, chain: Chain, endpoint: Endpoint, tmp_path: Path
) -> None:
    endpoint.otherwise = status
    first = read_pool(endpoint_config(chain, endpoint.url, tmp_path / "run")).chosen[0]
    message = message.replace(r"black-circle\.png", read_data(chain.dataset).images[first])
    with pytest.raises(BadInput, match=message) as caught:
        generate_pseudo_query.main(endpoint_config(chain, endpoint.url, tmp_path / "run", parallel=1))
    assert len(endpoint.calls) == calls
    assert KEY not in str(caught.value)
    assert "\n" not in str(caught.value)


def test_refused_pictures_may_be_skipped(chain: Chain, endpoint: Endpoint, tmp_path: Path) -> None:
    endpoint.script = [400, ""]
    config = endpoint_config(chain, endpoint.url, tmp_path / "run", skip_refused=True)
    generate_pseudo_query.main(config)
    metrics = runs.read_manifest(config.output, "retriever.pseudo_queries.generate").metrics
    assert (metrics["queries"], metrics["pictures_with_none"]) == (28, 2)


def test_no_server_no_endpoint_and_no_key(
    chain: Chain, endpoint: Endpoint, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(BadInput, match="does not answer, tried once"):
        generate_pseudo_query.main(endpoint_config(chain, "http://127.0.0.1:9/v1", tmp_path / "a", retries=0))
    endpoint.server.RequestHandlerClass = WebPage
    with pytest.raises(BadInput, match="not as an OpenAI-compatible endpoint does"):
        generate_pseudo_query.main(endpoint_config(chain, endpoint.url, tmp_path / "b"))
    monkeypatch.delenv("THE_KEY")
    with pytest.raises(BadInput, match="--api-key-variable THE_KEY: this environment variable holds no key"):
        generate_pseudo_query.main(endpoint_config(chain, endpoint.url, tmp_path / "c"))


class WebPage(BaseHTTPRequestHandler):
    """A web server that is no endpoint."""

    def do_POST(self) -> None:
        self.rfile.read(int(self.headers["Content-Length"]))
        self.send_response(200)
        self.send_header("Content-Type", "text/html")
        self.end_headers()
        self.wfile.write(b"<html>hello</html>")

    def log_message(self, *_: Any) -> None:
        pass


def test_a_dry_run_counts_and_leaves_nothing(
    chain: Chain, endpoint: Endpoint, tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    monkeypatch.delenv("THE_KEY")
    generate_pseudo_query.main(endpoint_config(chain, endpoint.url, tmp_path / "run", dry_run=True))
    assert not endpoint.calls
    assert not (tmp_path / "run").exists()
    data = read_data(chain.dataset)
    size = sum(
        (data.image_folder / data.files[row]).stat().st_size
        for row, split in enumerate(data.splits)
        if split != "train"
    )
    shown = capsys.readouterr().out
    assert shown.startswith(
        f"pictures: 16 ({size:,} bytes; a third more as they are sent)\ncalls:    16 to {endpoint.url}"
    )
    assert "Write 6 captions for this picture" in shown


@pytest.mark.parametrize(
    ("answer", "captions"),
    [
        ("a dog\n\n  a cat  \n", ["a dog", "a cat"]),
        ("1. a dog\n2) a cat\n(3) a cow\n4: a fox", ["a dog", "a cat", "a cow", "a fox"]),
        ("- a dog\n* a cat\n• a cow\n–  a fox", ["a dog", "a cat", "a cow", "a fox"]),
        ('"a dog"\n1. “a cat”\n- \'a cow\'\n"a fox",', ["a dog", "a cat", "a cow", "a fox"]),
        ("Sure! Here they are:\n**A dog**\n---\n", ["A dog"]),
        ("1. 3 dogs\n2 cats\n1.5 metres of snow", ["3 dogs", "2 cats", "1.5 metres of snow"]),
        ("<think>\nhm: a cow?\n</think>\na dog", ["a dog"]),
        ('```json\n["a dog", "a cat"]\n```', ["a dog", "a cat"]),
        ("[a dog]\na cat", ["[a dog]", "a cat"]),
        ("the dog's bone", ["the dog's bone"]),
        ("", []),
    ],
)
def test_answers_are_read_however_they_are_decorated(answer: str, captions: list[str]) -> None:
    assert parse_captions(answer) == captions


def test_pictures_are_sent_in_formats_that_endpoints_read(tmp_path: Path) -> None:
    picture = Image.new("RGB", (4, 4), "red")
    for name, start in (("x.jpg", "data:image/jpeg;"), ("y.bmp", "data:image/png;")):
        picture.save(tmp_path / name)
        assert data_url(tmp_path / name).startswith(start)
    (tmp_path / "x.jpg").rename(tmp_path / "x.png")  # the content counts
    assert data_url(tmp_path / "x.png").startswith("data:image/jpeg;")
    with pytest.raises(BadInput, match="cannot be read any more"):
        data_url(tmp_path / "gone.png")
