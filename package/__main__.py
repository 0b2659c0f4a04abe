"""The command `avg`: search with an exported retriever, or serve a search page."""

import sys
from importlib import metadata
from importlib.util import find_spec

from tools.texts import did_you_mean, shortened

SERVER = ("fastapi", "prometheus-client", "psutil", "python-multipart", "uvicorn")  # the extra `serve`
USAGE = """usage: avg COMMAND ...

  avg search FOLDER "a red circle"   search the pictures of an exported retriever with words, or with a picture
  avg serve FOLDER                   a search page at http://127.0.0.1:7860

FOLDER is an exported retriever, or its name on the Hugging Face Hub (owner/name).
`avg search --help` and `avg serve --help` list the options."""


def main() -> None:
    name = sys.argv[1] if len(sys.argv) > 1 else "--help"
    sys.argv[1:2] = []
    if name == "search":
        from . import search

        search.run()
    elif name == "serve":
        need_server()
        from . import serve

        serve.run()
    elif name in ("-h", "--help"):
        print(USAGE)
    elif name == "--version":
        print(metadata.version("avg-retrieval"))
    else:
        hint = did_you_mean(name, ["search", "serve"]) or ": avg --help lists the commands"
        print(f"error: {shortened(name)} is not a command of avg{hint}", file=sys.stderr)
        sys.exit(2)


def need_server() -> None:
    """End with a line where the packages of the extra `serve` are not installed."""
    if any(find_spec(name.replace("-", "_")) is None for name in SERVER):
        print(f"error: avg serve needs more: pip install {' '.join(SERVER)}", file=sys.stderr)
        sys.exit(2)


if __name__ == "__main__":
    main()
