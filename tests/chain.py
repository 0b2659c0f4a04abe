"""The whole chain on small pictures, run once for all tests that read its folders."""

from pathlib import Path
from typing import Any, NamedTuple

from retriever import prepare, train
from tests.tiny import bert_folder, clip_folder, generate_codes, picture_set, prepare_emb, rqvae_train, train_heads
from tools import prepare_captions


class Chain(NamedTuple):
    """Folders of a finished chain up to the retriever's dataset."""

    root: Path
    captions: Path
    towers: Path
    features: Path
    rqvae: Path
    codes: Path
    dataset: Path


RQVAE: dict[str, Any] = {
    "width": 16, "hidden": (24,), "levels": 3, "codebook_size": 8, "epochs": 12, "batch_size": 16, "lr": 1e-3,
    "validate_every": 4, "kmeans_iterations": 10, "revive_every": 5, "device": "cpu",
}  # fmt: skip
TRAIN: dict[str, Any] = {
    "epochs": 6, "batch_size": 16, "lr": 3e-3, "dropout": 0.1, "beams": 4, "validate_every": 2, "precision": "fp32",
    "device": "cpu",
}  # fmt: skip


def run_chain(root: Path) -> Chain:
    """Every command up to the retriever's dataset."""
    names = ("captions", "towers", "heads", "rqvae", "codes", "dataset")
    folders = Chain(root, *(root / name for name in names))
    picture_set(root)
    prepare_captions.main(
        prepare_captions.Config(
            images=root / "images", source=(root / "captions.jsonl",), output=folders.captions, workers=1
        )
    )
    model = str(clip_folder(root / "clip"))
    prepare_emb.main(encode_config(folders.captions, model, folders.towers, layer="tower"))
    train_heads.main(train_heads.Config(features=folders.towers, output=folders.features, epochs=30, device="cpu"))
    rqvae_train.main(rqvae_train.Config(features=folders.features, output=folders.rqvae, **RQVAE))
    generate_codes.main(
        generate_codes.Config(features=folders.features, rqvae=folders.rqvae, output=folders.codes, device="cpu")
    )
    prepare.main(prepare.Config(codes=folders.codes, output=folders.dataset))
    return folders


def encode_config(captions: Path, model: str, output: Path, **options: Any) -> Any:
    return prepare_emb.Config(
        captions=captions,
        model=model,
        output=output,
        precision="fp32",
        device="cpu",
        workers=0,
        batch_size=8,
        **options,
    )


def encoder_decoder_config(chain: Chain, output: Path, **options: Any) -> train.Config:
    encoder = chain.root / "bert"
    if not encoder.is_dir():
        bert_folder(encoder)
    settings = {**TRAIN, "label_temperature": 0.05, "decoder_heads": 2, "train_end": False, **options}
    return train.Config(
        dataset=chain.dataset, language_model=str(encoder), kind="encoder-decoder", output=output, **settings
    )


def files_of(folder: Path) -> list[str]:
    return sorted(
        str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file() and path.name != ".lock"
    )
