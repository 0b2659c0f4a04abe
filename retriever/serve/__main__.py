"""`python -m retriever.serve`"""

import atexit
import os
import sys
from contextlib import suppress

# On a CPU, oneDNN and PyTorch's layer above it each keep a prepared operation for every shape of input, 1,024 of them.
# Batches of searches have ever new shapes, and the caches would grow by hundreds of megabytes. Both read these once.
for name in ("ONEDNN_PRIMITIVE_CACHE_CAPACITY", "LRU_CACHE_CAPACITY"):
    os.environ.setdefault(name, "64")

from tools.command_line.commands import run_command  # noqa: E402

from .serve import Config, main  # noqa: E402

run_command(main, Config)
atexit._run_exitfuncs()
with suppress(OSError):  # its reader has gone
    sys.stdout.flush()
os._exit(0)  # Python's own end takes seconds with PyTorch, and waits for a model that is still being loaded
