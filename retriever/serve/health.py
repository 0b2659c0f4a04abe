"""What machines ask a server: whether it lives, whether it is ready, and its metrics, at the addresses that are usual
with Kubernetes and Prometheus."""

from typing import Annotated

from fastapi import APIRouter, Depends, Request, Response
from prometheus_client import CONTENT_TYPE_LATEST
from pydantic import BaseModel, Field
from starlette.exceptions import HTTPException

from .life import Life

RETRY_SECONDS = 1

router = APIRouter()


class Health(BaseModel):
    """How a server does."""

    status: str = Field(description="ok")


def life_of(request: Request) -> Life:
    life: Life = request.app.state.life
    return life


Living = Annotated[Life, Depends(life_of)]


@router.get("/healthz")
@router.get("/livez", include_in_schema=False)
@router.get("/health/live", include_in_schema=False)
async def live(life: Living) -> Health:
    """Whether the process works, also while it loads: one that does not (503) should be started anew."""
    if not life.is_alive():
        raise HTTPException(503, "the thread that searches has ended: the server's output says more")
    return Health(status="ok")


@router.get("/readyz")
@router.get("/health/ready", include_in_schema=False)
async def ready(life: Living) -> Health:
    """Whether requests will be answered: not (503) while the server loads, and not when it stops."""
    if reason := life.not_ready():
        raise HTTPException(503, reason, {"retry-after": str(RETRY_SECONDS)})
    return Health(status="ok")


@router.get("/metrics", response_class=Response, responses={200: {"content": {"text/plain": {}}}})
def metrics(life: Living) -> Response:
    """Numbers for Prometheus: no query and no name of a file is among them."""
    if life.service is not None:
        life.metrics.look(life.service)
    return Response(life.metrics.text(), media_type=CONTENT_TYPE_LATEST)
