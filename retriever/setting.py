"""Whether a retriever has been trained on the pictures that it searches.

Transductive: it was trained on pseudo queries of pictures among them. Inductive: it has seen none of their val and test
pictures. A retriever that never saw a data set is inductive there, whatever it was trained on elsewhere.
"""

from tools.errors import BadInput
from tools.files import read_json_lines
from tools.runs import Manifest, read_manifest, unchanged_input

from .data import GENERATED_BY, PSEUDO_QUERIES, TRAINED_BY, RetrieverData

STARTS = ("start", "stage1")  # inputs that are trained retrievers, on which a training goes on


def setting_on(trained: Manifest, data: RetrieverData) -> str:
    """The setting of a search of `data` by a trained retriever.

    Pseudo queries of its pictures count wherever they were trained on: for the retriever, or for its tokenizer.
    Where the folders of pseudo queries behind it are gone, nothing says whose pictures they were. Then the setting is
    that of the training.
    """
    if data.manifest.facts.get("setting") == "transductive":
        return "transductive"
    captions = data.manifest.facts.get("captions_fingerprint")
    try:
        seen = [speaks_of(folder, data.images, captions) for folder in pseudo_queries_behind(trained)]
    except BadInput:
        seen = []
    if not seen:
        return str(trained.facts["setting"])
    return "transductive" if any(seen) else "inductive"


def pseudo_queries_behind(trained: Manifest) -> list[Manifest]:
    """The finished folders of pseudo queries that a retriever was trained on, and those that it started from.

    Raises:
        BadInput: one is gone, or is no longer what it was.
    """
    if trained.facts["setting"] == "inductive":
        return []
    found = []
    if "pseudo_queries" in trained.inputs:
        found.append(read_manifest(unchanged_input(trained, "pseudo_queries"), GENERATED_BY))
    for name in STARTS:
        if name in trained.inputs:
            found += pseudo_queries_behind(read_manifest(unchanged_input(trained, name), *TRAINED_BY))
    return found


def setting_of_codes(codes: Manifest, images: list[str]) -> str:
    """The setting of the codes of pictures: whether their tokenizer was trained on pseudo queries of them.

    Args:
        codes: a `RQ-VAE.generate_codes` folder.
    """
    setting = str(codes.facts.get("setting", "inductive"))
    if setting == "inductive":
        return setting
    try:
        tokenizer = read_manifest(unchanged_input(codes, "rqvae"), "RQ-VAE.train")
        folder = read_manifest(unchanged_input(tokenizer, "pseudo_queries"), GENERATED_BY)
    except (BadInput, KeyError):  # it is gone: nothing says whose pictures they were
        return setting
    return "transductive" if speaks_of(folder, images, codes.facts["captions_fingerprint"]) else "inductive"


def speaks_of(folder: Manifest, images: list[str], captions: str | None) -> bool:
    """Whether pseudo queries are of these pictures: made from the same captions, or for a picture of such an id."""
    if folder.facts["captions_fingerprint"] == captions:
        return True
    known = set(images)
    return any(line["image"] in known for _, line in read_json_lines(folder.folder / PSEUDO_QUERIES))
