from tools.commands import run_command

from .serve import Config, main

run_command(main, Config)
