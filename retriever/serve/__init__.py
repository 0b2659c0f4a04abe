"""The search page and its JSON endpoint; `python -m retriever.serve` is its door."""

import atexit
import ctypes
import os
import sys
from contextlib import suppress


def keep_caches_small() -> None:
    """Limit what PyTorch keeps for each shape of input; it has to be called before PyTorch is imported.

    On a CPU, oneDNN and PyTorch's layer above it each keep a prepared operation for every shape, 1,024 of them.
    Batches of searches have ever new shapes, and the caches would grow by hundreds of megabytes. Both read these once.
    """
    for name in ("ONEDNN_PRIMITIVE_CACHE_CAPACITY", "LRU_CACHE_CAPACITY"):
        os.environ.setdefault(name, "64")


def return_free_memory() -> None:
    """Give the system back what the C library holds and nobody uses, where it can (glibc).

    Tensors of ever new sizes leave gaps, which later ones do not fill. So the process would grow, at first quickly.
    """
    with suppress(AttributeError, OSError):
        ctypes.CDLL(None).malloc_trim(0)


def end() -> None:
    """End the process now: Python's own end takes seconds with PyTorch, and waits for a model that is being loaded."""
    atexit._run_exitfuncs()
    with suppress(OSError):  # its reader has gone
        sys.stdout.flush()
    os._exit(0)
