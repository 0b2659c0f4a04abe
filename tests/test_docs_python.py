"""Every block of docs/python.md and docs/interchange.md, and every cell of the notebook, runs on the tiny chain."""

import importlib
import re
import shlex
import shutil
import subprocess
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
import tyro

from reranker import test as reorder
from retriever import rank_splits, retrieve
from tests.chain import Chain
from tests.test_interchange import GOOD, write_shard
from tests.tiny import draw_picture
from tools.captions import read_captions

ROOT = Path(__file__).parent.parent
SYSTEM = "retriever+stage2"
VARIABLES = {
    "RETRIEVER": "retriever/output/emoji", "RERANKER": "reranker/output/emoji", "SYSTEM": SYSTEM,
    "TRAINED": f"retriever/output/emoji/10_stage2/{SYSTEM}", "SUMMARY": "retriever/output/emoji/summary.json",
}  # fmt: skip


@pytest.fixture
def repository(chain: Chain, retriever: Path, index: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Finished runs under the names of the sample's, and what the snippets add."""
    fixed: dict[str, Any] = {"dataset": chain.dataset, "retriever": retriever, "precision": "fp32", "device": "cpu"}
    output, reranked = tmp_path / "retriever/output/emoji", tmp_path / "reranker/output/emoji"
    retrieve.main(retrieve.Config(output=output / "12_retrieve" / SYSTEM, **fixed))
    rank_splits.main(rank_splits.Config(output=reranked / "16_lists" / SYSTEM, train_per_picture=0, beams=12, **fixed))
    tested = reranked / "18_test" / SYSTEM
    reorder.main(
        reorder.Config(
            lists=reranked / "16_lists" / SYSTEM, output=tested, summary=output / "summary.json", name="emoji",
            system=SYSTEM, device="cpu",
        )
    )  # fmt: skip
    for place, run in (
        (output / "14_index", index),
        (output / "10_stage2" / SYSTEM, retriever),
        (tmp_path / "RQ-VAE/output/emoji/04_train_heads", chain.features),
        (tmp_path / "RQ-VAE/data/emoji/01_prepare_captions", chain.captions),
    ):
        place.parent.mkdir(parents=True, exist_ok=True)
        place.symlink_to(run)
    draw_picture(tmp_path / "new_photos" / "one.png", "red", "circle", 1)
    draw_picture(tmp_path / "holiday.png", "blue", "circle", 2)
    for name, members in zip(("00000", "00001"), GOOD.values(), strict=True):
        write_shard(tmp_path / "shards" / f"{name}.tar", members)
    monkeypatch.chdir(tmp_path)
    return tmp_path


def run_script(name: str, arguments: list[str]) -> None:
    """What a script's last line runs, with the sample's settings."""
    settings = "; ".join(f"{name}={shlex.quote(value)}" for name, value in VARIABLES.items())
    last = (ROOT / "scripts" / name).read_text().splitlines()[-1]
    program = f"run() {{ printf '%s\\0' \"$@\"; }}; {settings}; set -- {shlex.join(arguments)}; {last}"
    words = subprocess.run(["bash", "-uc", program], capture_output=True, text=True, check=True).stdout.split("\0")
    run_module(words[0], words[1:-1])


def run_module(name: str, arguments: list[str]) -> None:
    module = importlib.import_module(name)
    module.main(tyro.cli(module.Config, args=arguments))


def run_page(name: str) -> dict[str, Any]:
    """Run every block of a page, but for those with MTEB where it is not installed. Returns the names of Python."""
    blocks = re.findall(r"^```(\w+)\n(.*?)^```", (ROOT / "docs" / name).read_text(), re.DOTALL | re.MULTILINE)
    assert {kind for kind, _ in blocks} == {"bash", "python"}
    names: dict[str, Any] = {}
    for kind, block in blocks:
        if re.search("retriever.gallery.benchmark", block) and find_spec("mteb") is None:
            continue
        if kind == "python":
            exec(compile(block, f"docs/{name}", "exec"), names)
            continue
        for line in block.splitlines():
            words = shlex.split(line)
            if words[0] == "bash":
                run_script(Path(words[1]).name, words[2:])
            else:
                assert words[:2] == ["python", "-m"]
                run_module(words[2], words[3:])
    return names


def test_every_block_of_the_page_about_python_runs(repository: Path, capsys: pytest.CaptureFixture[str]) -> None:
    names = run_page("python.md")
    said = capsys.readouterr().out
    assert "48 pictures can be found" in said
    assert "Success@10" in said
    assert "(144, 24)" in said
    assert names["images"] == ["one.png", "holiday.png"]
    assert len(read_captions(Path("RQ-VAE/data/mine/01_prepare_captions")).records) == 4
    assert "| retriever+stage2+features |" in (repository / "avg-emoji" / "README.md").read_text()
    shutil.rmtree(repository / "avg-emoji")


def test_the_notebook_runs(repository: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    nbformat, nbclient = pytest.importorskip("nbformat"), pytest.importorskip("nbclient")
    pytest.importorskip("ipykernel")
    notebook = nbformat.read(ROOT / "docs" / "notebook.ipynb", as_version=4)
    assert not any(cell.get("outputs") or cell.get("execution_count") for cell in notebook.cells)  # they are large
    before = sorted(path.name for path in (repository / "retriever/output/emoji/14_index").iterdir())
    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    monkeypatch.setenv("TMPDIR", str(repository))
    nbclient.NotebookClient(notebook, timeout=120, resources={"metadata": {"path": str(repository)}}).execute()
    outputs = [output for cell in notebook.cells for output in cell.get("outputs", ())]
    assert sum("image/png" in output.get("data", {}) for output in outputs) == 6
    values = [output["data"]["text/plain"] for output in outputs if output["output_type"] == "execute_result"]
    assert values == ["48", "True", "True"]
    assert sorted(path.name for path in (repository / "retriever/output/emoji/14_index").iterdir()) == before


def test_every_block_of_the_page_about_interchange_runs(
    repository: Path, index: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    place = repository / VARIABLES["RETRIEVER"] / "14_index"
    place.unlink()
    shutil.copytree(index, place)  # as pictures are added to it
    names = run_page("interchange.md")
    said = capsys.readouterr().out
    assert "test+guide" in said or "test: 24 lists -> beir-emoji/runs/test.json" in said
    assert "48 pictures added in the place of 48, 48 can be found" in said
    assert "48 pictures with 3 codes each -> semantic-ids.parquet" in said
    assert len(names["catalogue"].images) == 48
    assert "median cosine 1.000" in said
    if find_spec("mteb") is not None:
        assert "beir-emoji: 8 pictures, 8 of them in the retriever's own index; inductive" in said
