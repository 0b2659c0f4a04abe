"""Whether a retriever has been trained on the pictures that it searches.

Transductive: it was trained on pseudo queries of pictures among them. Inductive: it has seen none of their val and test
pictures. A retriever that never saw a data set is inductive there, whatever it was trained on elsewhere.
"""

from tools.errors import BadInput
from tools.files import read_json_lines
from tools.runs import Manifest, read_manifest, unchanged_input

from .data import TRAINED_BY, RetrieverData
from .pseudo_queries import FILE_NAME

STARTS = ("start", "stage1")  # inputs that are trained retrievers, on which a training goes on


def setting_on(trained: Manifest, data: RetrieverData) -> str:
    """The setting of a search of `data` by a trained retriever.

    Where the folders of pseudo queries behind it are gone, nothing says whose pictures they were. Then the setting is
    that of the training.
    """
    try:
        seen = [speaks_of(folder, data) for folder in pseudo_queries_behind(trained)]
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
        found.append(read_manifest(unchanged_input(trained, "pseudo_queries"), "retriever.generate_pseudo_query"))
    for name in STARTS:
        if name in trained.inputs:
            found += pseudo_queries_behind(read_manifest(unchanged_input(trained, name), *TRAINED_BY))
    return found


def speaks_of(folder: Manifest, data: RetrieverData) -> bool:
    """Whether pseudo queries are of pictures of a dataset: made from the same captions, or for a picture of that id."""
    if folder.facts["captions_fingerprint"] == data.manifest.facts.get("captions_fingerprint"):
        return True
    known = set(data.images)
    return any(line["image"] in known for _, line in read_json_lines(folder.folder / FILE_NAME))
