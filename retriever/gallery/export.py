"""Write a trained retriever with its pictures into one folder that can be copied or put on a model hub.

In:  a `retriever.gallery.build` folder, a trained retriever, and the figures of the results.
Out: the folder (retriever/gallery/exported.py), which `Retriever.from_pretrained` reads.
Command: python -m retriever.gallery.export FOLDER --index DIR --retriever DIR --weights DIR --summary FILE
"""

from dataclasses import dataclass
from pathlib import Path

import tyro

from tools.command_line.commands import run_command
from tools.errors import BadInput
from tools.results import read_rows

from .api import read_runs
from .exported import HUB_NAME, Results, push_folder, write_exported
from .options import RetrieverOptions
from .package import PACKAGE


@dataclass(frozen=True, kw_only=True)
class Config(RetrieverOptions):
    """What is exported, and where to."""

    folder: tyro.conf.Positional[Path]
    """Folder to write."""
    summary: Path | None = None
    """JSON file of the dataset's results, for the model card; passed over while there is none."""
    system: str | None = None
    """The retriever's name in the results; by default all rows are shown."""
    include_pictures: bool = False
    """Copy the picture files too."""
    push: str | None = None
    """Put the folder on the Hugging Face Hub, too, under this name: owner/name."""
    private: bool = False
    """Let nobody else see it there."""
    overwrite: bool = False
    """Replace a folder that was exported before, pictures added to it since included."""

    def __post_init__(self) -> None:
        if self.push is not None and not HUB_NAME.fullmatch(self.push):
            raise BadInput(f"--push {self.push!r} is no name on the Hugging Face Hub: write owner/name")


def main(config: Config) -> None:
    rows = [] if config.summary is None or not config.summary.is_file() else read_rows(config.summary)
    gallery, source = read_runs(config.index, config.retriever, config.weights)
    folder = write_exported(
        config.folder,
        gallery,
        source,
        include_pictures=config.include_pictures,
        overwrite=config.overwrite,
        results=Results(rows, config.system),
        hub_name=config.push,
    )
    size = sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())
    print(f"{len(gallery):,} pictures can be found, {size / 1e6:,.1f} MB -> {folder}")
    if not (folder / PACKAGE).is_dir():
        print("note: setuptools could not build the package, so the folder has none, and its card leads to a clone")
    if config.push is not None:
        print(f"on the hub: {push_folder(folder, config.push, private=config.private)}")


if __name__ == "__main__":
    run_command(main, Config)
