"""What the search page's server does, behind its endpoints: searches in batches, and changes of the pictures.

Two threads use the retriever. One answers: searches of the same setting that wait are answered together. The other
inserts and removes pictures; the retriever itself sees to it that they never change beneath a search.
"""

import asyncio
import logging
import os
import tempfile
import time
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

from tools.errors import BadInput
from tools.pictures import why_unreadable
from tools.runs import InUse

from ..gallery.answers import Found, Step
from ..gallery.api import BEAMS, RERANKED_BEAMS, Retriever
from ..gallery.by_picture import Likeness
from . import uploads
from .batching import Answer, Batcher, Busy
from .uploads import Upload

MOST_CHANGES = 32  # that wait for their turn
ANSWER_SECONDS = 30.0  # after which a search is given up
CHANGE_SECONDS = 600.0
TURN_SECONDS, TRY_SECONDS = 60.0, 0.1  # to wait for another process's change of the index, and between two tries
PREFIX = "uploads/"  # before the ids of inserted pictures, so that they are no others'


T = TypeVar("T")

log = logging.getLogger(__name__)


class Failed(Exception):
    """What nobody expected."""


class Unknown(Exception):
    """No picture of the index has that id."""


class Setting(NamedTuple):
    """How pictures are searched; searches of the same setting share a call."""

    k: int
    beams: int
    guided: bool
    share: float
    """Of the features; 0: nothing is re-ranked"""
    min_similarity: float | None = None
    fold: bool | float = False


class Searched(NamedTuple):
    """What a search found."""

    found: list[Found]
    seconds: dict[str, float]
    """Of the parts of the call; see `Retriever.search`"""
    unread: list[str]
    """What of the query is longer than a model reads"""


class Insertion(NamedTuple):
    """What has become of pictures that were handed in."""

    inserted: list[Found]
    refused: list[tuple[str, str]]
    """Name and reason"""


class Service:
    """A retriever for many people at once."""

    def __init__(self, retriever: Retriever, *, uploads: Path, batch: int, waiting: int) -> None:
        """
        Args:
            uploads: folder for the pictures that are inserted.
            batch: searches that are answered together at most.
            waiting: searches that wait at most; others are told to come back.
        """
        self.retriever, self.uploads = retriever, uploads.resolve()
        self.answers = Batcher(most=batch, waiting=waiting)
        self.changes = Batcher(most=1, waiting=MOST_CHANGES)
        self.usable = True
        """Whether the index could be read when it was last looked at."""
        self._decoding = asyncio.Semaphore(2)  # a large picture takes a lot of memory while it is decoded

    def close(self, *, seconds: float | None = None) -> None:
        """Stop when what is under way has ended, or after so many seconds."""
        until = None if seconds is None else time.monotonic() + seconds
        for batcher in (self.answers, self.changes):
            batcher.close(seconds=None if until is None else max(until - time.monotonic(), 0))

    def is_alive(self) -> bool:
        """Whether both threads still work."""
        return self.answers.is_alive() and self.changes.is_alive()

    def refresh(self) -> None:
        """See what other processes changed in the index, and whether it can still be searched."""
        try:
            self.retriever.refresh()
        except Exception as error:
            if self.usable:
                log.warning("the index cannot be searched any more: %s", error)
            self.usable = False
        else:
            self.usable = True

    def setting(
        self,
        *,
        k: int,
        beams: int | None,
        guided: bool,
        rerank: bool,
        share: float | None,
        min_similarity: float | None = None,
        fold: bool | float = False,
    ) -> Setting:
        """What `Retriever.search` makes of these arguments.

        Raises:
            BadInput: features are asked for, and the index keeps none.
        """
        share = self.retriever.share_of_features(rerank=rerank, share=share)
        guided = guided and self.retriever.guide is not None
        beams = beams or max(k, RERANKED_BEAMS if share else BEAMS)
        return Setting(k, beams, guided, share, min_similarity, fold)

    async def search(self, query: str, setting: Setting) -> Answer:
        """The best pictures for a query: a `Searched`.

        Raises:
            Busy: too many searches wait.
            TimeoutError: the answer took too long.
            BadInput: as `Retriever.search`.
        """
        return await self._answered(partial(self._search, setting), query, kind=setting)

    async def two_tower(self, query: str, setting: Setting) -> Answer:
        """The pictures of the nearest features: a `Searched`; raises as `search`."""
        kind = ("two-tower", setting.k, setting.min_similarity, setting.fold)
        return await self._answered(partial(self._two_tower, setting), query, kind=kind)

    async def vokens(self, query: str, image: str, *, top: int) -> list[Step]:
        """How the model would write a picture's vokens; raises as `search`, and Unknown."""

        def call() -> list[Step]:
            return self.retriever.vokens(query, self._find(image).codes, top=top, unread=[])  # the search has said it

        return (await within(ANSWER_SECONDS, self.answers.alone(call))).value

    async def similar(
        self, image: str, *, k: int, by: Likeness, min_similarity: float | None = None, fold: bool | float = False
    ) -> tuple[Found, list[Found]]:
        """A picture and those most similar to it; raises as `search`, and Unknown."""

        def call() -> tuple[Found, list[Found]]:
            self.retriever.refresh()
            options: dict[str, Any] = {"by": by, "min_similarity": min_similarity, "fold": fold}
            return self._find(image), self.retriever.similar(image, k=k, **options)

        return (await within(ANSWER_SECONDS, self.answers.alone(call))).value

    async def like(self, picture: Upload, **options: Any) -> list[Found]:
        """The pictures most similar to one that is handed in, and not kept; raises as `search`.

        Args:
            options: of `Retriever.search_image`.
        """
        async with self._decoding:
            ending = await asyncio.to_thread(uploads.check, picture)

        def call() -> list[Found]:
            self.retriever.refresh()
            with tempfile.TemporaryDirectory() as folder:
                return self.retriever.search_image(uploads.store(Path(folder), picture, ending), **options)

        return (await within(ANSWER_SECONDS, self.answers.alone(call))).value

    async def insert(self, pictures: Sequence[Upload]) -> Insertion:
        """Check and store pictures and add them to the index; those that are no pictures are named, the others go in.

        Raises:
            Busy, TimeoutError: as `search`.
            BadInput: the index cannot be changed; nothing was inserted.
        """
        good: list[tuple[Upload, str]] = []
        refused: list[tuple[str, str]] = []
        for picture in pictures:
            try:
                async with self._decoding:
                    good.append((picture, await asyncio.to_thread(uploads.check, picture)))
            except BadInput as error:
                refused.append((picture.name, str(error)))
        found: list[Found] = []
        if good:
            found = (await within(CHANGE_SECONDS, self.changes.alone(partial(self._insert, good)))).value
        return Insertion(found, refused)

    async def remove(self, image: str) -> None:
        """Take a picture from the index, and its file from the folder of inserted ones; other files stay.

        Raises:
            Busy, TimeoutError: as `search`.
            Unknown: it is not in the index.
            BadInput: it is the last one, or the index cannot be changed.
        """
        await within(CHANGE_SECONDS, self.changes.alone(partial(self._remove, image)))

    async def thumbnail(self, image: str) -> tuple[bytes, str]:
        """A picture drawn small, and a name for this state of its file.

        Raises:
            Unknown: no picture of the index has that id, or its file is gone or damaged.
        """
        async with self._decoding:
            return await asyncio.to_thread(self._thumbnail, image)

    def is_inserted(self, found: Found) -> bool:
        """Whether a picture came from the page."""
        return Path(os.path.abspath(found.file)).is_relative_to(self.uploads)  # noqa: PTH100, links stay

    async def _answered(self, call: Callable[[list[Any]], list[Any]], query: str, *, kind: Any) -> Answer:
        return await within(ANSWER_SECONDS, self.answers.ask(call, query, kind=kind))

    def _search(self, setting: Setting, queries: list[str]) -> list[Searched]:
        self.retriever.refresh()
        seconds: dict[str, float] = {}
        unread: list[list[str]] = []
        answers = self.retriever.search(queries, **setting._asdict(), seconds=seconds, unread=unread)
        return [Searched(found, seconds, notes) for found, notes in zip(answers, unread, strict=True)]

    def _two_tower(self, setting: Setting, queries: list[str]) -> list[Searched]:
        unread: list[list[str]] = []
        options: dict[str, Any] = {"k": setting.k, "min_similarity": setting.min_similarity, "fold": setting.fold}
        answers = self.retriever.two_tower(queries, **options, unread=unread)
        return [Searched(found, {}, notes) for found, notes in zip(answers, unread, strict=True)]

    def _find(self, image: str) -> Found:
        gallery = self.retriever.gallery
        row = gallery.row(image)
        if row is None and self.retriever.refresh():  # another process may have inserted it
            gallery = self.retriever.gallery
            row = gallery.row(image)
        if row is None:
            raise Unknown(f"no picture of the index is called {image}")
        file = gallery.files_below / gallery.picture(row).file
        return Found(image, file, 0.0, gallery.code(row))

    def _insert(self, pictures: list[tuple[Upload, str]]) -> list[Found]:
        files: list[Path] = []
        try:
            for picture, ending in pictures:
                files.append(uploads.store(self.uploads, picture, ending))
            added = in_turn(lambda: self.retriever.add(files, prefix=PREFIX, replace=True))
            return [self._find(image) for image in added]
        except BaseException:
            for file in files:
                file.unlink(missing_ok=True)
            raise

    def _remove(self, image: str) -> None:
        self.retriever.refresh()
        found = self._find(image)
        in_turn(lambda: self.retriever.remove([image]))
        if self.is_inserted(found):
            found.file.unlink(missing_ok=True)

    def _thumbnail(self, image: str) -> tuple[bytes, str]:
        file = self._find(image).file
        try:
            changed = file.stat().st_mtime_ns
            return uploads.thumbnail(file, changed), f"{changed:x}"
        except Exception as error:  # Pillow raises many kinds for damaged files
            raise Unknown(f"the file of {image} is gone or damaged ({why_unreadable(error)})") from None


def in_turn(change: Callable[[], T]) -> T:
    """Change the index when no other process does: another server process, or a command.

    Raises:
        BadInput: another process has not finished for as long as a change is waited for.
    """
    until = time.monotonic() + TURN_SECONDS
    while True:
        try:
            return change()
        except InUse:
            if time.monotonic() > until:
                raise
        time.sleep(TRY_SECONDS)


async def within(seconds: float, answer: "Future[Answer]") -> Answer:
    """Wait for an answer; one that is given up before its turn is not computed.

    Raises:
        TimeoutError: it took longer.
        Failed: something is wrong with the code or the machine; the log has its traceback.
    """
    try:
        return await asyncio.wait_for(asyncio.wrap_future(answer), seconds)
    except (BadInput, Busy, Unknown, asyncio.TimeoutError):
        raise
    except Exception as error:
        log.error("a request failed", exc_info=error)
        raise Failed(type(error).__name__) from error
