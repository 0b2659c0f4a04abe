"""A stand-in for the Hugging Face Hub on this machine: the part of its HTTP interface that the client library uses.

It keeps one version of each repository in memory. Binary files are sent as the hub wants them, through Git LFS; the
newer way, Xet, is switched off in the client.
"""

import base64
import hashlib
import json
import re
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import unquote, urlsplit

import huggingface_hub
import pytest
from huggingface_hub.utils.tqdm import disable_progress_bars

BINARY = (".safetensors", ".npy", ".bin", ".png", ".whl", ".jpg")


class Hub:
    """What was put on it, and what was asked of it."""

    def __init__(self) -> None:
        self.address = ""
        self.repositories: dict[str, dict[str, bytes]] = {}
        self.private: dict[str, bool] = {}
        self.objects: dict[str, bytes] = {}
        self.asked: list[str] = []

    def commit_of(self, name: str) -> str:
        """Of a repository: a hash of its content."""
        files = sorted((path, hashlib.sha1(content).hexdigest()) for path, content in self.repositories[name].items())
        return hashlib.sha1(json.dumps(files).encode()).hexdigest()

    def create(self, wanted: dict[str, Any]) -> dict[str, Any]:
        name = "/".join(filter(None, [wanted.get("organization"), wanted["name"]]))
        self.repositories.setdefault(name, {})
        self.private[name] = wanted.get("visibility") == "private" or bool(wanted.get("private"))
        return {"url": f"{self.address}/{name}", "name": name}

    def commit(self, name: str, lines: list[dict[str, Any]]) -> dict[str, Any]:
        files = self.repositories[name]
        for line in lines:
            value = line["value"]
            if line["key"] == "file":
                files[value["path"]] = base64.b64decode(value["content"])
            elif line["key"] == "lfsFile":
                files[value["path"]] = self.objects[value["oid"]]
            elif line["key"] == "deletedFile":
                del files[value["path"]]
        return {"commitOid": self.commit_of(name), "commitUrl": f"{self.address}/{name}/commit/{self.commit_of(name)}"}

    def tree(self, name: str) -> list[dict[str, Any]]:
        return [
            {"type": "file", "path": path, "size": len(content), "oid": hashlib.sha1(content).hexdigest()}
            for path, content in sorted(self.repositories[name].items())
        ]


class Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    hub: Hub

    def log_message(self, *_: Any) -> None:
        """Print nothing."""

    def answer(self, content: bytes, *, status: int = 200, **headers: str) -> None:
        self.send_response(status)
        for name, value in headers.items():
            self.send_header(name.replace("_", "-"), value)
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        if self.command != "HEAD":  # what it does not expect a client takes for the next answer
            self.wfile.write(content)

    def json(self, value: Any) -> None:
        self.answer(json.dumps(value).encode(), Content_Type="application/json")

    def missing(self, code: str) -> None:
        self.answer(b"{}", status=404, X_Error_Code=code, X_Error_Message=code)

    def begin(self) -> tuple[str, bytes]:
        path = unquote(urlsplit(self.path).path)
        self.hub.asked.append(f"{self.command} {path}")
        return path, self.rfile.read(int(self.headers.get("Content-Length") or 0))

    def do_HEAD(self) -> None:
        self.do_GET()

    def do_GET(self) -> None:
        path, _ = self.begin()
        hub = self.hub
        if found := re.fullmatch(r"/(.+?/.+?)/resolve/[^/]+/(.+)", path):
            name, file = found.groups()
            content = hub.repositories.get(name, {}).get(file)
            if content is None:
                self.missing("EntryNotFound" if name in hub.repositories else "RepoNotFound")
            else:
                tag = f'"{hashlib.sha256(content).hexdigest()}"'
                self.answer(content, ETag=tag, X_Repo_Commit=hub.commit_of(name))
        elif (found := re.match(r"/api/models/(.+?/[^/]+)", path)) and found[1] in hub.repositories:
            if "/tree/" in path:
                self.json(hub.tree(found[1]))
            else:
                siblings = [{"rfilename": file} for file in hub.repositories[found[1]]]
                self.json({"id": found[1], "sha": hub.commit_of(found[1]), "siblings": siblings})
        else:
            self.missing("RepoNotFound")

    def do_POST(self) -> None:
        path, body = self.begin()
        if path == "/api/validate-yaml":
            wanted = huggingface_hub.ModelCard(json.loads(body)["content"]).data.to_dict()
            self.json({"errors": [], "warnings": [] if wanted else [{"message": "no metadata"}]})
        elif path == "/api/repos/create":
            self.json(self.hub.create(json.loads(body)))
        elif "/preupload/" in path:
            files = [file["path"] for file in json.loads(body)["files"]]
            modes = ["lfs" if file.endswith(BINARY) else "regular" for file in files]
            self.json(
                {
                    "files": [
                        {"path": file, "uploadMode": mode, "shouldIgnore": False}
                        for file, mode in zip(files, modes, strict=True)
                    ]
                }
            )
        elif path.endswith(".git/info/lfs/objects/batch"):
            objects = json.loads(body)["objects"]
            for each in objects:
                each["actions"] = {"upload": {"href": f"{self.hub.address}/lfs/{each['oid']}", "header": {}}}
            self.json({"transfer": "basic", "objects": objects})
        elif found := re.match(r"/api/models/(.+?/.+?)/commit/", path):
            self.json(self.hub.commit(found[1], [json.loads(line) for line in body.splitlines() if line]))
        else:
            self.missing("NotFound")

    def do_PUT(self) -> None:
        path, body = self.begin()
        oid = path.removeprefix("/lfs/")
        assert hashlib.sha256(body).hexdigest() == oid
        self.hub.objects[oid] = body
        self.answer(b"")


@contextmanager
def stand_in() -> Iterator[Hub]:
    """A hub on a free port of this machine."""
    hub = Hub()
    server = ThreadingHTTPServer(("127.0.0.1", 0), type("OneHub", (Handler,), {"hub": hub}))
    server.daemon_threads = True
    hub.address = f"http://127.0.0.1:{server.server_address[1]}"
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    try:
        yield hub
    finally:
        server.shutdown()
        thread.join()
        server.server_close()


def use(hub: Hub, cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Let the client of this process use a hub, with a cache of its own."""
    constants = huggingface_hub.constants
    for name, value in (
        ("ENDPOINT", hub.address),
        ("HUGGINGFACE_CO_URL_TEMPLATE", hub.address + "/{repo_id}/resolve/{revision}/{filename}"),
        ("HF_HUB_OFFLINE", False),
        ("HF_HUB_DISABLE_XET", True),
        ("HF_HUB_CACHE", str(cache)),
        ("HF_TOKEN_PATH", str(cache / "no-token")),
    ):
        monkeypatch.setattr(constants, name, value)
    monkeypatch.setenv("HF_TOKEN", "hf_of_a_test")
    disable_progress_bars()


def variables(hub: Hub, cache: Path) -> dict[str, str]:
    """The same for another process."""
    return {
        "HF_ENDPOINT": hub.address,
        "HF_HUB_OFFLINE": "0",
        "HF_HUB_DISABLE_XET": "1",
        "HF_HUB_CACHE": str(cache),
        "HF_TOKEN_PATH": str(cache / "no-token"),
        "HF_HUB_DISABLE_TELEMETRY": "1",
    }
