"""The search page's addresses: JSON under /api, described by /openapi.json, the pictures, and the page's own files."""

import asyncio
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any
from urllib.parse import quote

from fastapi import APIRouter, Depends, FastAPI, Header, Query, Request, Response, UploadFile
from fastapi import Path as PathParameter
from fastapi.exceptions import RequestValidationError
from fastapi.responses import FileResponse, JSONResponse
from fastapi.staticfiles import StaticFiles
from pydantic import BaseModel, Field
from starlette.exceptions import HTTPException

from tools.errors import BadInput

from ..gallery.answers import FOLD, Found, Voken
from ..gallery.api import BEAMS, RERANKED_BEAMS
from ..gallery.by_picture import Likeness
from .batching import Busy
from .guard import App, Guard
from .health import RETRY_SECONDS, life_of
from .health import router as health
from .life import LATE, Door, Life, Unready
from .service import Failed, Service, Unknown
from .uploads import MOST_BYTES, Upload

PAGE = Path(__file__).parent / "page"
MOST_PICTURES = 32  # of one upload
REQUEST_BYTES = 100 << 20  # of one upload
FORM_BYTES = 1 << 20  # of it that the form itself may take
MOST_SHOWN, MOST_BEAMS, MOST_VOKENS = 100, 100, 20
LONGEST_QUERY, LONGEST_ID = 1000, 4096  # characters


class Problem(BaseModel):
    """Why a request was refused."""

    detail: str


class ShownPicture(BaseModel):
    """One picture of an answer."""

    id: str
    score: float | None = Field(description="The higher the better; comparable within one answer.")
    codes: list[int] = Field(description="The vokens that stand for the picture.")
    url: str = Field(description="Where it can be seen, small.")
    similarity: float | None = Field(description="Cosine of its features with the query's, where it is known.")
    inserted: bool = Field(description="Whether it came through this server.")
    gone: bool = Field(description="Whether its file is not there any more.")
    folded: list["ShownPicture"] = Field(description="Its near-duplicates, where they are folded.")


class Timings(BaseModel):
    """Seconds; the calls' are those of all queries that were answered together."""

    waited: float = Field(description="In the queue.")
    encode: float = Field(description="Reading the queries.")
    beams: float = Field(description="Writing vokens.")
    rerank: float | None = Field(description="Reordering by features.")
    two_tower: float | None = Field(description="Encoding the queries and comparing them with all pictures.")
    total: float


class SearchAnswer(BaseModel):
    """What a search found."""

    query: str
    pictures: list[ShownPicture]
    two_tower: list[ShownPicture] | None = Field(description="Pictures of brute-force two-tower search, if asked for.")
    beams: int
    guided: bool = Field(description="Whether the guide steered the beams.")
    share: float = Field(description="Of the features in the order; 0: the retriever's own order.")
    pool: int = Field(description="Pictures that can be found.")
    unread: list[str] = Field(description="What of the query is longer than a model reads, as sentences.")
    together: int = Field(description="Queries that were answered by the same call.")
    timings: Timings


class AlikeAnswer(BaseModel):
    """Pictures like one of the index."""

    picture: ShownPicture
    pictures: list[ShownPicture]
    by: Likeness = Field(
        description="The score: cosines of features, or the number of leading vokens in common (vokens)."
    )


class LikeAnswer(BaseModel):
    """Pictures like one that was handed in."""

    name: str = Field(description="What the picture that was handed in is called.")
    pictures: list[ShownPicture]
    by: Likeness
    pool: int


class ShownVoken(BaseModel):
    """A voken that may be written at one step."""

    token: str
    code: int
    probability: float = Field(description="Among those that the index allows behind the same vokens.")


class ShownStep(BaseModel):
    """One voken of a picture."""

    written: ShownVoken
    log_probability: float = Field(description="Under the softmax of the search.")
    allowed: int = Field(description="Vokens that the index allows here.")
    alternatives: list[ShownVoken] = Field(description="The most probable, best first.")


class VokensAnswer(BaseModel):
    """How the model would write a picture for a query."""

    query: str
    id: str
    levels: list[ShownStep]


class Refused(BaseModel):
    """A file that was not inserted."""

    name: str
    reason: str


class InsertAnswer(BaseModel):
    """What has become of an upload."""

    inserted: list[ShownPicture]
    refused: list[Refused]
    pool: int


class RemoveAnswer(BaseModel):
    """A picture has gone."""

    removed: str
    pool: int


class Limits(BaseModel):
    """Of an upload."""

    pictures: int
    bytes: int = Field(description="Of one picture.")
    request_bytes: int


class Beams(BaseModel):
    """Beam widths by default."""

    plain: int
    rerank: int


class Status(BaseModel):
    """What is served, and how it goes."""

    pool: int
    version: str = Field(description="Of the index.")
    features: bool = Field(description="Whether it keeps the features that re-ranking and two-tower search need.")
    guide: float = Field(description="Weight of the retriever's guide; 0: it has none.")
    share: float = Field(description="Of the features by default.")
    beams: Beams
    limits: Limits
    waiting: int = Field(description="Searches in the queue.")
    answered: int = Field(description="Since the start.")
    calls: int = Field(description="That answered them.")


def service_of(request: Request) -> Service:
    """The service; raises Unready."""
    return life_of(request).serving(late=request.scope[LATE])


Served = Annotated[Service, Depends(service_of)]
Words = Annotated[str, Query(min_length=1, max_length=LONGEST_QUERY, description="What the picture shows.")]
Count = Annotated[int, Query(ge=1, le=MOST_SHOWN, description="Pictures of the answer at most.")]
Fold = Annotated[bool, Query(description="Fold near-duplicates under the best of them.")]
FoldAt = Annotated[float, Query(ge=-1, le=1, description="Cosine from which pictures are near-duplicates.")]
LeastSimilarity = Annotated[
    float | None, Query(ge=-1, le=1, description="Leave out pictures whose cosine with the query is below this.")
]
InPath = Annotated[str, PathParameter(description="A picture's id, percent-encoded, slashes too.")]
Id = Annotated[str, Query(min_length=1, max_length=LONGEST_ID, description="A picture's id.")]

PROBLEMS: dict[int | str, dict[str, Any]] = {"4XX": {"model": Problem}, "5XX": {"model": Problem}}
router = APIRouter(responses=PROBLEMS)
BUSY: dict[int | str, dict[str, Any]] = {503: {"model": Problem, "description": "Too much waits: see Retry-After."}}


@router.get("/api/search", responses=BUSY)
async def search(
    service: Served,
    q: Words,
    k: Count = 10,
    beams: Annotated[
        int | None, Query(ge=1, le=MOST_BEAMS, description="By default 50, or 10 if not re-ranked.")
    ] = None,
    guided: Annotated[bool, Query(description="Let the retriever's guide steer the beams, where it has one.")] = True,
    rerank: Annotated[bool, Query(description="Reorder what the beams find by features.")] = True,
    share: Annotated[float | None, Query(ge=0, le=1, description="Of the features; by default what val chose.")] = None,
    two_tower: Annotated[bool, Query(description="Also search by features alone, through all pictures.")] = False,
    min_similarity: LeastSimilarity = None,
    fold: Fold = False,
    fold_at: FoldAt = FOLD,
) -> SearchAnswer:
    """Pictures for a query, best first."""
    query = q.strip()
    if not query:
        raise BadInput("an empty query finds nothing: write some words")
    setting = service.setting(
        k=k,
        beams=beams,
        guided=guided,
        rerank=rerank,
        share=share,
        min_similarity=min_similarity,
        fold=fold and fold_at,
    )
    began = asyncio.get_running_loop().time()
    asked = [service.search(query, setting)] + ([service.two_tower(query, setting)] if two_tower else [])
    found, *beside = await asyncio.gather(*asked)
    return SearchAnswer(
        query=query,
        pictures=shown(service, found.value.found),
        two_tower=shown(service, beside[0].value.found) if beside else None,
        beams=setting.beams,
        guided=setting.guided,
        share=setting.share,
        pool=len(service.retriever),
        unread=list(dict.fromkeys(note for each in (found, *beside) for note in each.value.unread)),
        together=found.shared,
        timings=Timings(
            waited=found.waited,
            encode=found.value.seconds["encode"],
            beams=found.value.seconds["beams"],
            rerank=found.value.seconds.get("rerank"),
            two_tower=beside[0].took if beside else None,
            total=asyncio.get_running_loop().time() - began,
        ),
    )


@router.get("/api/similar/{image:path}", responses=BUSY)
async def similar(
    service: Served,
    image: InPath,
    k: Count = 10,
    by: Annotated[Likeness, Query(description="By leading vokens in common, or by cosines of features.")] = "vokens",
    min_similarity: LeastSimilarity = None,
    fold: Fold = False,
    fold_at: FoldAt = FOLD,
) -> AlikeAnswer:
    """Pictures like one of the index: its codes' neighbours, or its features'."""
    picture, found = await service.similar(image, k=k, by=by, min_similarity=min_similarity, fold=fold and fold_at)
    [own] = shown(service, [picture], scored=False)
    return AlikeAnswer(picture=own, pictures=shown(service, found), by=by)


@router.post("/api/similar", responses=BUSY)
async def like(
    service: Served,
    picture: UploadFile,
    k: Count = 10,
    by: Annotated[Likeness | None, Query(description="By default features, where the index keeps them.")] = None,
    min_similarity: LeastSimilarity = None,
    fold: Fold = False,
    fold_at: FoldAt = FOLD,
) -> LikeAnswer:
    """Pictures like one that is handed in, which is not kept: JPEG, PNG, WebP, GIF, BMP or TIFF."""
    upload = Upload(picture.filename or "picture", await picture.read())
    found = await service.like(upload, k=k, by=by, min_similarity=min_similarity, fold=fold and fold_at)
    kept = service.retriever.gallery.keeps_features
    return LikeAnswer(
        name=upload.name,
        pictures=shown(service, found),
        by=by or ("features" if kept else "vokens"),
        pool=len(service.retriever),
    )


@router.get("/api/vokens", responses=BUSY)
async def vokens(
    service: Served,
    q: Words,
    id: Id,
    top: Annotated[int, Query(ge=1, le=MOST_VOKENS, description="Alternatives at each level.")] = 5,
) -> VokensAnswer:
    """How probable the model finds each voken of a picture, given a query and the vokens before."""
    steps = await service.vokens(q, id, top=top)
    levels = [
        ShownStep(
            written=voken(step.written),
            log_probability=step.log_probability,
            allowed=step.allowed,
            alternatives=[voken(other) for other in step.alternatives],
        )
        for step in steps
    ]
    return VokensAnswer(query=q, id=id, levels=levels)


@router.post("/api/pictures", status_code=201, responses=BUSY)
async def insert(service: Served, pictures: list[UploadFile]) -> InsertAnswer:
    """Insert pictures into the index, of the formats that folders of pictures may have. Some may be refused and others
    inserted."""
    if len(pictures) > MOST_PICTURES:
        raise BadInput(f"{len(pictures)} pictures at once are too many: send {MOST_PICTURES} at most")
    uploads = [Upload(picture.filename or "picture", await picture.read()) for picture in pictures]
    result = await service.insert(uploads)
    if not result.inserted:
        raise BadInput("; ".join(reason for _, reason in result.refused) or "no picture was sent")
    return InsertAnswer(
        inserted=shown(service, result.inserted, scored=False),
        refused=[Refused(name=name, reason=reason) for name, reason in result.refused],
        pool=len(service.retriever),
    )


@router.delete("/api/pictures/{image:path}", responses=BUSY)
async def remove(service: Served, image: InPath) -> RemoveAnswer:
    """Take a picture from the index. Of the files, only those that came through this server are deleted."""
    await service.remove(image)
    return RemoveAnswer(removed=image, pool=len(service.retriever))


@router.get("/api/status")
async def status(service: Served) -> Status:
    """What is served, and how it goes."""
    gallery, answers = service.retriever.gallery, service.answers
    return Status(
        pool=len(gallery),
        version=gallery.facts["version"],
        features=gallery.keeps_features,
        guide=service.retriever.guide.weight if service.retriever.guide is not None else 0.0,
        share=service.retriever.source.share,
        beams=Beams(plain=BEAMS, rerank=RERANKED_BEAMS),
        limits=Limits(pictures=MOST_PICTURES, bytes=MOST_BYTES, request_bytes=REQUEST_BYTES - FORM_BYTES),
        waiting=len(answers),
        answered=answers.answered,
        calls=answers.calls,
    )


@router.get("/pictures/{image:path}", response_class=Response, responses={200: {"content": {"image/webp": {}}}})
async def picture(
    service: Served, image: InPath, if_none_match: Annotated[str | None, Header(include_in_schema=False)] = None
) -> Response:
    """A picture of the index, small."""
    content, state = await service.thumbnail(image)
    headers = {"etag": f'"{state}"', "cache-control": "private, no-cache"}
    if if_none_match == headers["etag"]:
        return Response(status_code=304, headers=headers)
    return Response(content, media_type="image/webp", headers=headers)


@router.get("/", include_in_schema=False)
async def page() -> FileResponse:
    return FileResponse(PAGE / "index.html")


@router.get("/docs", include_in_schema=False)
async def docs() -> FileResponse:
    return FileResponse(PAGE / "docs.html")


def shown(service: Service, found: Sequence[Found], *, scored: bool = True) -> list[ShownPicture]:
    """Pictures as JSON has them."""
    return [
        ShownPicture(
            id=each.image,
            score=each.score if scored else None,
            codes=list(each.codes),
            url=f"pictures/{quote(each.image, safe='')}",
            similarity=each.similarity,
            inserted=service.is_inserted(each),
            gone=each.gone,
            folded=shown(service, each.folded, scored=scored),
        )
        for each in found
    ]


def voken(written: Voken) -> ShownVoken:
    return ShownVoken(**written._asdict())


def problem(status: int, reason: str, headers: dict[str, str] | None = None) -> JSONResponse:
    return JSONResponse({"detail": reason}, status, headers)


async def as_problem(_: Request, error: Exception) -> JSONResponse:
    """One plain line for everything that goes wrong."""
    if isinstance(error, BadInput):
        return problem(422, str(error))
    if isinstance(error, RequestValidationError):
        first = error.errors()[0]
        return problem(422, f"{first['loc'][-1]}: {first['msg'][:1].lower()}{first['msg'][1:]}")
    if isinstance(error, Unknown):
        return problem(404, str(error))
    if isinstance(error, Busy):
        return problem(503, "too many requests wait: try again in a moment", {"retry-after": str(RETRY_SECONDS)})
    if isinstance(error, Unready):
        return problem(503, str(error), {"retry-after": str(RETRY_SECONDS)})
    if isinstance(error, asyncio.TimeoutError):
        return problem(504, "the answer took too long: try again later, or with fewer beams")
    if isinstance(error, HTTPException):
        return problem(error.status_code, str(error.detail), dict(error.headers or {}))
    reason = str(error) if isinstance(error, Failed) else type(error).__name__
    return problem(500, f"the server failed at this ({reason}): its output says more")


def make_app(served: Life | Service, *, names: frozenset[str] = frozenset(), any_address: bool = False) -> App:
    """The server's application behind its guard; closes the service when it ends.

    Args:
        served: a service, or the life of a process that loads one.
        names: host names that requests may ask for, besides this machine's own.
        any_address: whether they may ask for any numeric address, too.
    """
    life = served if isinstance(served, Life) else Life.of(served)
    app = FastAPI(
        title="Picture search",
        version="1",
        description=__doc__,
        docs_url=None,  # these load scripts from other sites
        redoc_url=None,
        lifespan=lambda _: life.run(),
    )
    app.state.life = life
    app.include_router(router)
    app.include_router(health, responses=PROBLEMS)
    app.mount("/page", StaticFiles(directory=PAGE), name="page")
    for kind in (
        BadInput,
        Unknown,
        Unready,
        Busy,
        Failed,
        asyncio.TimeoutError,
        RequestValidationError,
        HTTPException,
        Exception,
    ):
        app.add_exception_handler(kind, as_problem)
    return Door(Guard(app, names=names, any_address=any_address, most_bytes=REQUEST_BYTES), life)
