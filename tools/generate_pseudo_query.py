"""The published place of `retriever.pseudo_queries.generate`: the same command, the same flags.

Command: python -m tools.generate_pseudo_query --dataset DIR --source nearest --output DIR
"""

import runpy
import sys
from pathlib import Path

if __name__ == "__main__":
    sys.path[0] = str(Path(__file__).resolve().parent.parent)  # run as a file, the stages are not on it
    runpy.run_module("retriever.pseudo_queries.generate", run_name="__main__", alter_sys=True)
