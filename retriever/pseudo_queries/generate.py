"""Write pseudo queries: captions for pictures of the pool, made without their own captions, to train on.

In:  a `retriever.prepare` folder and the features it was made from, or these features alone, before there are codes;
     of the captions those of train pictures alone are used.
Out: `<output>/pseudo.jsonl` (retriever/data.py), grouped by picture, the best first; answers are kept as they
     come: a killed run goes on where it was.
Command: python -m retriever.pseudo_queries.generate --dataset DIR --source nearest --output DIR

Candidates come from the nearest train pictures, from an image-to-text model, or from an HTTP endpoint. The two-tower
model then decides: a picture keeps the candidates whose text features are nearest to its own.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from models.compute import pick_device, pick_dtype
from models.lengths import tell_overlong
from tools import processes, runs
from tools.blocks import Blocks
from tools.captions import Split, mend_picture, read_captions
from tools.command_line.commands import run_command
from tools.command_line.options import RunOptions
from tools.errors import BadInput
from tools.features import IMAGES, TEXTS, Floats, Rows, normalized, read_features
from tools.files import read_array, read_json, write_json, write_json_lines
from tools.logs import progress
from tools.pictures import read_again

from ..data import GENERATED_BY, PSEUDO_QUERIES, Queries, read_data
from .candidates import Candidates, Pool, TrainCaptions, with_features
from .endpoint import Endpoint, Request, ask_all, make_prompt
from .options import CaptionerOptions, EndpointOptions, NearestOptions, Source, check_source

if TYPE_CHECKING:
    from models.clip import TextEncoder

SELECT_BLOCK = 256  # pictures that are decided on at a time
EXAMPLES = 3  # pictures shown at the end


@dataclass(frozen=True, kw_only=True)
class Config(RunOptions, NearestOptions, CaptionerOptions, EndpointOptions):
    """Which pictures get pseudo queries, who writes them, and which are kept."""

    source: Source
    """nearest: captions of similar train pictures; model: an image-to-text model; endpoint: a model behind an
    OpenAI-compatible address."""
    dataset: Path | None = None
    """Run folder of retriever.prepare."""
    features: Path | None = None
    """Feature folder, in place of --dataset: a tokenizer can then be trained on the pseudo queries, as published."""
    splits: tuple[Split, ...] = ("val", "test")
    """Whose pictures get pseudo queries."""
    per_picture: int = 5
    """Pseudo queries kept of a picture, at most."""
    min_similarity: float | None = None
    """Candidates whose two-tower cosine to the picture is below this are dropped; by default none."""
    seed: int = 0
    """Seed of the words that are drawn."""

    def __post_init__(self) -> None:
        if (self.dataset is None) == (self.features is None):
            raise BadInput("give --dataset, or --features in its place")
        check_source(self, self.source)
        if self.per_picture < 1 or self.seed < 0:
            raise BadInput("--per-picture must be at least 1, --seed at least 0")
        if self.source != "nearest" and self.candidates < self.per_picture:
            raise BadInput(f"--candidates {self.candidates} cannot give --per-picture {self.per_picture}: raise it")
        if not self.splits or len(set(self.splits)) < len(self.splits):
            raise BadInput("--splits takes each of train, val, test at most once, and at least one of them")
        if self.min_similarity is not None and not -1 <= self.min_similarity <= 1:
            raise BadInput("--min-similarity is a cosine: between -1 and 1")


def read_pool(config: Config) -> Pool:
    """Read pictures, train captions and features.

    Raises:
        BadInput: a folder is not finished, they do not fit together, or there is nothing to do or to learn from.
    """
    pool = pool_of_dataset(config) if config.dataset is not None else pool_of_features(config)
    folder = config.dataset or config.features
    if not len(pool.chosen):
        raise BadInput(f"{folder} has no pictures in --splits {' '.join(config.splits)}")
    if not pool.train.texts and config.source == "nearest":
        raise BadInput(f"{folder} has no train captions, --source nearest lives on them: take another --source")
    return pool


def pool_of_dataset(config: Config) -> Pool:
    """What a dataset and its features hold; files with captions of val and test are not opened."""
    assert config.dataset is not None
    data = read_data(config.dataset)
    features = runs.read_manifest(Path(data.manifest.facts["features"]), "RQ-VAE.prepare_emb", "RQ-VAE.train_heads")
    if data.manifest.facts.get("captions_fingerprint") != features.facts["captions_fingerprint"]:
        raise BadInput(
            f"{data.folder} and {features.folder} were made from other captions, or the first by an earlier version: "
            "run scripts/07_prepare_retriever_dataset.sh --overwrite"
        )
    images, texts = (read_array(features.folder / name) for name in (IMAGES, TEXTS))
    files = [data.image_folder / file for file in data.files]
    return Pool(data.images, files, chosen_rows(data.splits, config), data.queries("train"), images, texts, features)


def pool_of_features(config: Config) -> Pool:
    """What a feature folder and the captions that it was made from hold."""
    assert config.features is not None
    features = read_features(config.features)
    captions, records = read_captions(Path(features.manifest.facts["captions"])), features.records
    rows = features.text_rows("train")
    texts = [text for record in records for text in record.captions]
    train = Queries([texts[row] for row in rows], features.owners[rows], rows)
    chosen = chosen_rows([record.split for record in records], config)
    files = [captions.images / record.file for record in records]
    ids = [record.image for record in records]
    return Pool(ids, files, chosen, train, features.images, features.texts, features.manifest)


def chosen_rows(splits: list[Split], config: Config) -> Rows:
    """Rows of the pictures that get pseudo queries."""
    return np.array([row for row, split in enumerate(splits) if split in config.splits], dtype=np.int64)


def make_requests(pool: Pool, config: Config) -> list[Request]:
    """What the endpoint is asked for each chosen picture."""
    train = TrainCaptions(pool)
    styles = ([text for row in near.tolist() for text in train.texts(row)] for near in train.nearest(pool.chosen, 1))
    return [
        Request(pool.ids[row], file, make_prompt(config.candidates, style))
        for row, file, style in zip(pool.chosen, pool.files, styles, strict=True)
    ]


def announce(pool: Pool, config: Config) -> None:
    """Print what a run would ask the endpoint for."""
    requests = make_requests(pool, config)
    folder = answers_folder(config.output)
    there = 0 if config.overwrite else len(list(folder.glob("*.json")))
    if missing := [request.file for request in requests if not request.file.is_file()]:
        raise BadInput(f"{missing[0]} does not exist ({len(missing)} of {len(requests)} pictures are missing)")
    size = sum(request.file.stat().st_size for request in requests)
    print(f"pictures: {len(requests):,} ({size:,} bytes; a third more as they are sent)")
    print(f"calls:    {len(requests) - there:,} to {config.url}, {there:,} answers are there already")
    print(f"prompt, beside the picture, of {requests[0].image}:\n{requests[0].prompt}")


def answers_folder(output: Path) -> Path:
    """Where the endpoint's answers are kept until the run has finished."""
    return output / runs.RESUME / "answers"


def ask_endpoint(run: runs.Run, pool: Pool, config: Config) -> list[list[str]]:
    """Captions of each chosen picture by the endpoint, those of this run that was killed included."""
    assert config.url is not None
    assert config.language_model is not None
    endpoint = Endpoint(
        url=config.url,
        language_model=config.language_model,
        api_key_variable=config.api_key_variable,
        requests_per_minute=config.requests_per_minute,
        parallel=config.parallel,
        retries=config.retries,
        skip_refused=config.skip_refused,
    )
    work = Blocks(answers_folder(run.folder), len(pool.chosen), suffix=".json")
    ask_all(endpoint, make_requests(pool, config), work, captions=config.candidates)
    return [read_json(path) for path in work.gather()]


def ask_model(run: runs.Run, pool: Pool, config: Config) -> list[list[str]]:
    """Captions of each chosen picture by the image-to-text model: a batch is a block, drawn from a seed of its own."""
    from models.captioner import Sampling, load_captioner, write_captions  # slow to load, no other source needs it

    assert config.captioner is not None
    work = Blocks(run.resume_folder / "written", -(-len(pool.chosen) // config.batch_size), suffix=".json")
    if work.left:
        device = pick_device(config.device)
        captioner = load_captioner(config.captioner, device=device, dtype=pick_dtype(config.precision, device))
        sampling = Sampling(config.candidates, config.temperature, config.top_p, config.max_new_tokens, config.prompt)
        files = pool.files
        for number in progress(work.left, "captioning"):
            batch = slice(number * config.batch_size, (number + 1) * config.batch_size)
            pictures = [read_again(file, mend_picture()) for file in files[batch]]
            seed = int(np.random.SeedSequence([config.seed, number]).generate_state(1)[0])
            write_json(work.path(number), write_captions(captioner, pictures, sampling, seed=seed))
    return [texts for path in work.gather() for texts in read_json(path)]


def find_candidates(run: runs.Run, pool: Pool, config: Config) -> Callable[[slice], Iterator[Candidates]]:
    """A function from a slice of the chosen pictures to their candidates."""
    if config.source == "nearest":
        train = TrainCaptions(pool)
        return lambda block: train.candidates(pool.chosen[block], config.neighbours)
    written = ask_model(run, pool, config) if config.source == "model" else ask_endpoint(run, pool, config)
    encoder = text_encoder(pool, config)
    tell_overlong(encoder, [text for texts in written for text in texts], "candidates")
    return lambda block: with_features(written[block], encoder)


def text_encoder(pool: Pool, config: Config) -> "TextEncoder":
    """The text tower of the model that made the pictures' features."""
    from models.clip import TextEncoder  # slow to load, the nearest captions have features already

    device = pick_device(config.device)
    return TextEncoder.recorded(pool.features.facts, device, pick_dtype(config.precision, device))


def select(candidates: Candidates, image: Floats, config: Config) -> list[tuple[str, float]]:
    """The candidates nearest to a picture's features (width,), best first, with their cosines; no text twice."""
    if not candidates.texts:
        return []
    similarities = normalized(candidates.features) @ normalized(image[None])[0]
    lowest = -np.inf if config.min_similarity is None else config.min_similarity
    kept: dict[str, tuple[str, float]] = {}
    for index in np.argsort(-similarities, kind="stable"):
        text, similarity = " ".join(candidates.texts[index].split()), float(similarities[index])
        if text and similarity >= lowest and len(kept) < config.per_picture:
            kept.setdefault(text.casefold(), (text, round(similarity, 4)))
    return list(kept.values())


def select_all(run: runs.Run, pool: Pool, config: Config) -> list[dict[str, Any]]:
    """For each chosen picture {"image", "candidates": how many there were, "kept": (query, similarity) pairs}."""
    source = find_candidates(run, pool, config)
    work = Blocks(run.resume_folder / "selected", -(-len(pool.chosen) // SELECT_BLOCK), suffix=".json")
    for number in progress(work.left, "selecting"):
        block = slice(number * SELECT_BLOCK, (number + 1) * SELECT_BLOCK)
        rows = [
            {
                "image": pool.ids[row],
                "candidates": len(candidates.texts),
                "kept": select(candidates, pool.images[row], config),
            }
            for row, candidates in zip(pool.chosen[block], source(block), strict=True)
        ]
        write_json(work.path(number), rows)
    return [row for path in work.gather() for row in read_json(path)]


def figures(selected: list[dict[str, Any]], per_picture: int) -> dict[str, Any]:
    """Counts and the mean similarity."""
    similarities = [similarity for row in selected for _, similarity in row["kept"]]
    return {
        "pictures": len(selected),
        "candidates": sum(row["candidates"] for row in selected),
        "queries": len(similarities),
        "mean_similarity": round(float(np.mean(similarities)), 4) if similarities else None,
        "pictures_with_fewer": sum(len(row["kept"]) < per_picture for row in selected),
        "pictures_with_none": sum(not row["kept"] for row in selected),
    }


def show(selected: list[dict[str, Any]], found: dict[str, Any], config: Config) -> None:
    """Print the figures and a few pictures with their pseudo queries."""
    print(
        f"{found['queries']:,} pseudo queries of {found['candidates']:,} candidates for {found['pictures']:,} "
        f"pictures, mean cosine {found['mean_similarity']}; {found['pictures_with_fewer']:,} pictures have fewer than "
        f"{config.per_picture}, {found['pictures_with_none']:,} of them none -> {config.output}"
    )
    for row in selected[:: max(1, len(selected) // EXAMPLES)][:EXAMPLES]:
        print(f"{row['image']}: " + "; ".join(f'"{query}" ({cosine:.3f})' for query, cosine in row["kept"]))


def main(config: Config) -> None:
    pool = read_pool(config)
    if config.dry_run:
        announce(pool, config)
        return
    inputs = {"features": pool.features.folder}
    if config.dataset is not None:
        inputs["dataset"] = config.dataset
    if config.captioner is not None and Path(config.captioner).is_dir():
        inputs["captioner"] = Path(config.captioner)
    run = runs.begin(GENERATED_BY, config, inputs=inputs)
    if run is None:
        return
    selected = select_all(run, pool, config)
    found = figures(selected, config.per_picture)
    if processes.is_main():
        write_json_lines(
            run.folder / PSEUDO_QUERIES,
            (
                {"image": row["image"], "query": query, "source": config.source, "similarity": similarity}
                for row in selected
                for query, similarity in row["kept"]
            ),
        )
    run.finish(
        facts={
            "source": config.source,
            "splits": list(config.splits),
            "captions_fingerprint": pool.features.facts["captions_fingerprint"],
            "pictures": found["pictures"],
            "queries": found["queries"],
        },
        metrics=found,
    )
    show(selected, found, config)


if __name__ == "__main__":
    run_command(main, Config, shares_work=True)
