"""Work that Ray Data spreads over worker processes: those of this machine, or those of a cluster.

Each job is one row of a data set, and one task: it goes to a worker that is free. Ray starts a worker that died again,
and gives what it was at to another one. This module alone knows Ray, which need not be installed for anything else.
"""

import json
import logging
import os
import socket
import warnings
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any, Protocol

from .errors import BadInput
from .picture_formats import install_command

ROOT = Path(__file__).parents[1]
PATIENCE = 20.0  # seconds until a cluster must answer
RETRIES = 3  # of a job whose worker died
STORE_BYTES = 128 << 20  # of shared memory on one machine: jobs and results are a few bytes
PINS = "-r requirements-cluster.txt"


class Worker(Protocol):
    """What does the jobs: made once in each process."""

    def __call__(self, job: dict[str, Any]) -> dict[str, Any]:
        """The result of a job; both are JSON values."""
        ...


@dataclass(frozen=True)
class Places:
    """Where the work is done."""

    address: str | None = None
    """Of a Ray cluster, or "auto" for the one that this machine belongs to; None for processes of this machine alone,
    which end with this one."""
    workers: int | None = None
    """Processes; None for one for each GPU, or else for each `threads` CPU cores."""
    threads: int | None = None
    """CPU cores of each worker; None for 1, or for an equal share where there are GPUs."""
    gpu: bool | None = None
    """Whether each worker has a GPU of its own; None where there are any."""


def spread(
    worker: type[Worker], arguments: dict[str, Any], jobs: Sequence[dict[str, Any]], places: Places
) -> Iterator[dict[str, Any]]:
    """The results of jobs, as they are done. A job whose worker died each time has none.

    Args:
        worker: is made of the arguments, `gpu` and `threads`, in the folder that is current here; on a cluster, all
            machines have this checkout and the files that the jobs name at the same places.

    Raises:
        BadInput: Ray is not installed, the cluster does not answer, or it has too little for one worker.
    """
    ray = _started(places)
    warnings.filterwarnings(
        "ignore", message=".*ray_remote_args.*"
    )  # no other argument says how often a job is retried
    try:
        count, threads, gpu = _sizes(places, ray.cluster_resources(), len(jobs))
        context = ray.data.DataContext.get_current()
        context.max_errored_blocks = -1  # what has no result is known by that
        context.enable_progress_bars = False
        context.print_on_execution_start = False
        # A job that waits at a worker would be charged with its death: so each worker has the one it does.
        rows = [{"job": json.dumps(job)} for job in jobs]
        done = ray.data.from_items(rows, override_num_blocks=len(rows)).map(
            _Doing,
            fn_constructor_args=[worker, {**arguments, "gpu": gpu, "threads": threads}, str(Path.cwd())],
            compute=ray.data.ActorPoolStrategy(size=count, max_tasks_in_flight_per_actor=1),
            num_cpus=threads,
            num_gpus=1 if gpu else 0,
            max_restarts=-1,
            max_task_retries=RETRIES,
        )
        for row in done.iter_rows():
            yield json.loads(row["result"])
    except ray.exceptions.RayError as error:
        said = str(error).strip().rpartition("\n")[2]
        raise BadInput(
            f"Ray's workers do not start, or the cluster has gone ({said}); the same command resumes"
        ) from None
    finally:
        ray.shutdown()


class _Doing:
    """A worker as Ray Data has it."""

    def __init__(self, worker: type[Worker], arguments: dict[str, Any], folder: str) -> None:
        os.chdir(folder)
        self.worker = worker(**arguments)

    def __call__(self, row: dict[str, Any]) -> dict[str, Any]:
        return {"result": json.dumps(self.worker(json.loads(row["job"])))}


def _started(places: Places) -> Any:
    """Ray, connected to its cluster, or started on this machine."""
    if find_spec("ray") is None:
        raise BadInput(
            f"Ray is not installed: {install_command(PINS)}; or set `workers` to 0 to work in this process alone"
        )
    if places.address is not None:
        _refuse_silent(places.address)
        os.environ.setdefault("RAY_AUTH_MODE", "token")  # else Ray shows the cluster no token, and is turned away
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    os.environ.setdefault("RAY_BACKEND_LOG_LEVEL", "fatal")  # else it warns at every start
    if places.address is None:
        os.environ.setdefault("RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER", "0")  # its servers then listen on 127.0.0.1 alone
    logging.getLogger("ray").setLevel(logging.ERROR)
    import ray
    import ray.data

    logging.getLogger("ray.data").setLevel(logging.CRITICAL)  # what it would say of a lost worker is said by its caller
    options: dict[str, Any] = {"log_to_driver": False, "logging_level": logging.ERROR}
    options["runtime_env"] = {"env_vars": {"PYTHONPATH": str(ROOT)}}
    if places.address is None:
        cores = len(os.sched_getaffinity(0))
        wanted = (places.workers or 1) * (places.threads or 1)
        options |= {"num_cpus": max(cores, wanted), "include_dashboard": False, "object_store_memory": STORE_BYTES}
    try:
        ray.init(places.address or "local", **options)
    except (ConnectionError, ValueError, RuntimeError) as error:
        said = str(error).partition("\n")[0]
        if places.address is None:
            raise BadInput(f"Ray does not start on this machine ({said}): set `workers` to 0 to do without") from None
        raise BadInput(
            f"`cluster` {places.address}: Ray cannot join it ({said}): put the cluster's token into ~/.ray/auth_token, "
            "or, where it asks for none, set RAY_AUTH_MODE=disabled"
        ) from None
    return ray


def _refuse_silent(address: str) -> None:
    """Refuse an address where nobody answers, which Ray would try for minutes.

    Raises:
        BadInput: it is one, or is neither "auto" nor a host with a port.
    """
    if address == "auto":
        return
    host, _, port = address.rpartition(":")
    if not host or not port.isdecimal() or "/" in host:
        raise BadInput(f"`cluster` {address} is no address of a Ray cluster: write HOST:PORT, or auto")
    try:
        socket.create_connection((host.strip("[]"), int(port)), timeout=PATIENCE).close()
    except OSError as error:
        raise BadInput(f"`cluster` {address}: no Ray cluster answers there ({error.strerror or error})") from None


def _sizes(places: Places, there: dict[str, float], jobs: int) -> tuple[int, int, bool]:
    """Workers, the threads of each, and whether each has a GPU.

    Args:
        there: cores and GPUs of all machines together.
        jobs: no more workers are of use.
    """
    cpus, gpus = int(there.get("CPU", 0)), int(there.get("GPU", 0))
    gpu = gpus > 0 if places.gpu is None else places.gpu
    most = gpus if gpu else cpus
    if most < 1:
        raise BadInput(f"`device`: there is no {'GPU' if gpu else 'CPU core'} for a worker")
    workers = places.workers or (gpus if gpu else max(1, cpus // (places.threads or 1)))
    threads = places.threads or (max(1, cpus // workers) if gpu else 1)
    if workers * threads > cpus or workers > most:
        raise BadInput(
            f"`workers` {workers} of `threads` {threads} need {workers * threads} CPU cores"
            f"{f' and {workers} GPUs' if gpu else ''}, there are {cpus}{f' and {gpus}' if gpu else ''}: lower one"
        )
    return max(1, min(workers, jobs)), threads, gpu
