from tools.command_line.commands import run_command

from .serve import Config, main

run_command(main, Config)
