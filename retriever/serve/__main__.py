"""`python -m retriever.serve`"""

from . import end, keep_caches_small

keep_caches_small()

from tools.command_line.commands import run_command  # noqa: E402

from .serve import Config, main  # noqa: E402

run_command(main, Config)
end()
