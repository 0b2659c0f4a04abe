from tools.command_line.commands import run_command

from .report import Config, main

run_command(main, Config)
