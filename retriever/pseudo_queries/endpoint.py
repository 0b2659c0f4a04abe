"""Captions of pictures from any OpenAI-compatible HTTP endpoint: paid services, vLLM, llama.cpp, Ollama, ...

One request a picture: the picture itself as a base64 data URL, the captions of a similar train picture as an example of
style. Each answer goes into a file at once, so that no request is made, or paid, twice.
"""

import base64
import json
import os
import re
import threading
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from io import BytesIO
from pathlib import Path
from typing import Any, NamedTuple

from PIL import Image

from tools import processes
from tools.blocks import Blocks
from tools.captions import mend_picture
from tools.errors import BadInput
from tools.files import write_json
from tools.logs import progress
from tools.picture_formats import format_of, identify
from tools.pictures import as_seen, is_turned, reading_again

STYLE_CAPTIONS = 5  # shown as an example, at most
ANSWER_SECONDS = 120.0  # to wait for an answer, before it counts as failed
FORMATS_SENT = ("JPEG", "PNG", "WEBP", "GIF")  # what endpoints read; others go as PNG
KEY_REFUSED, UNKNOWN, PICTURE_REFUSED = (401, 403), (404,), (400, 413, 422)  # HTTP statuses
SHOWN_CHARACTERS = 200  # of what an endpoint says about an error
NUMBERING = re.compile(r"(?:[-•–—]+|\*(?=\s)|\(?\d{1,3}[.):]\)?(?=\D))\s*")
QUOTES = {'"': '"', "'": "'", "“": "”", "‘": "’", "«": "»", "`": "`", "**": "**", "*": "*"}


class Endpoint(NamedTuple):
    """Where pictures are sent, and how fast."""

    url: str
    language_model: str
    api_key_variable: str
    """Environment variable with the key; the key itself is written nowhere."""
    requests_per_minute: float
    """Of all processes together."""
    parallel: int
    """Requests under way at a time, in each process."""
    retries: int
    skip_refused: bool
    """A picture that the endpoint refuses gets no captions; otherwise it ends the run."""


class Request(NamedTuple):
    """One picture to be captioned."""

    image: str
    file: Path
    prompt: str


class Pace:
    """Lets threads pass at even steps of time."""

    def __init__(self, per_minute: float) -> None:
        self.step = 60.0 / per_minute
        self.next = time.monotonic()
        self.lock = threading.Lock()

    def wait(self) -> None:
        """Sleep until it is this thread's turn."""
        with self.lock:
            turn = max(self.next, time.monotonic())
            self.next = turn + self.step
        time.sleep(max(0.0, turn - time.monotonic()))


def make_prompt(captions: int, style: Sequence[str]) -> str:
    """What the model is asked, with captions of another picture as an example of style."""
    lines = [
        f"Write {captions} captions for this picture, each a different one, as people would who search for it.",
        "One caption a line; no numbers, no quotation marks, nothing before or after them.",
    ]
    if style:
        lines += ["Another picture has the captions below. Write in their style, but only what this picture shows:"]
        lines += [f"- {' '.join(caption.split())}" for caption in style[:STYLE_CAPTIONS]]
    return "\n".join(lines)


def parse_captions(answer: str) -> list[str]:
    """The captions of an answer, one per line, however the model has decorated them.

    >>> parse_captions('Here you are:\\n\\n1. "A dog."\\n2) **3 cats**\\n- a cow,\\n')
    ['A dog.', '3 cats', 'a cow']
    >>> parse_captions('```json\\n["a dog", "a cat"]\\n```')
    ['a dog', 'a cat']
    """
    answer = re.sub(r"<think>.*?</think>", "", answer, flags=re.DOTALL).strip()
    answer = re.sub(r"^```\w*\n(.*?)\n?```$", r"\1", answer, flags=re.DOTALL).strip()
    if answer.startswith("["):
        try:
            listed = json.loads(answer)
        except ValueError:
            listed = None
        if isinstance(listed, list) and all(isinstance(text, str) for text in listed):
            return [text.strip() for text in listed if text.strip()]
    lines = (_undecorated(line) for line in answer.splitlines() if not line.rstrip().endswith(":"))
    return [line for line in lines if any(character.isalnum() for character in line)]


def _undecorated(line: str) -> str:
    """A line without its number or bullet, the comma of a list, and quotation marks or asterisks around it."""
    line, before = line.strip().rstrip(",").rstrip(), None
    while line != before:
        before = line
        if found := NUMBERING.match(line):
            line = line[found.end() :]
        for opening, closing in QUOTES.items():
            if line.startswith(opening) and line.endswith(closing) and len(line) > len(opening + closing):
                line = line[len(opening) : -len(closing)].strip()
    return line


def data_url(file: Path) -> str:
    """A picture as text that a request can hold.

    Raises:
        BadInput: the file cannot be read.
    """
    with reading_again(file, mend_picture()), identify(file) as picture:
        kind, content = format_of(picture), BytesIO()
        if kind in FORMATS_SENT and not is_turned(picture):
            content.write(file.read_bytes())
        else:
            kind = "PNG"
            as_seen(picture).save(content, kind)
    return f"data:{Image.MIME[kind]};base64,{base64.b64encode(content.getvalue()).decode()}"


def ask_all(endpoint: Endpoint, requests: Sequence[Request], work: Blocks, *, captions: int) -> None:
    """Ask for the captions of every picture that has no answer yet, block n for request n: a JSON list of texts.

    Raises:
        BadInput: the endpoint refuses the key, the model or a picture, or fails more often than it is asked again.
    """
    if not work.left:
        return
    client = _client(endpoint)
    pace = Pace(endpoint.requests_per_minute / processes.count())
    failed = threading.Event()

    def answer(number: int) -> None:
        pace.wait()
        if failed.is_set():
            return
        try:
            found = parse_captions(_ask(client, endpoint, requests[number]))
        except BadInput:
            failed.set()  # before this thread takes the next picture
            raise
        write_json(work.path(number), found[:captions])

    threads = ThreadPoolExecutor(endpoint.parallel)
    jobs = [threads.submit(answer, number) for number in work.left]
    try:
        for job in progress(as_completed(jobs), "asking", total=len(jobs), unit="picture"):
            job.result()
    except BadInput as error:
        threads.shutdown(cancel_futures=True)
        kept = sum(work.path(number).exists() for number in range(work.count))
        raise BadInput(
            f"{error}; {kept} of {work.count} answers are there and kept, the same command asks for the rest alone"
        ) from None
    finally:
        failed.set()  # on Ctrl-C too
        threads.shutdown(cancel_futures=True)


def _client(endpoint: Endpoint) -> Any:
    key = os.environ.get(endpoint.api_key_variable, "").strip()
    if not key or not key.isascii() or not key.isprintable():
        raise BadInput(
            f"--api-key-variable {endpoint.api_key_variable}: this environment variable holds no key: "
            f"export {endpoint.api_key_variable}=KEY (any word will do for an endpoint that asks for none)"
        )
    import openai  # here, and not above: no other source needs it

    return openai.OpenAI(base_url=endpoint.url, api_key=key, max_retries=endpoint.retries, timeout=ANSWER_SECONDS)


def _ask(client: Any, endpoint: Endpoint, request: Request) -> str:
    """The model's answer to one request; an empty one where the picture is refused and may be."""
    import openai

    content = [
        {"type": "text", "text": request.prompt},
        {"type": "image_url", "image_url": {"url": data_url(request.file)}},
    ]
    try:
        response = client.chat.completions.create(
            model=endpoint.language_model, messages=[{"role": "user", "content": content}]
        )
        return str(response.choices[0].message.content or "").replace(client.api_key, "...")
    except openai.APIStatusError as error:
        if endpoint.skip_refused and error.status_code in PICTURE_REFUSED:
            return ""
        raise BadInput(_refusal(error, endpoint, request, key=client.api_key)) from None
    except openai.APIConnectionError as error:
        why = str(error.__cause__ or error).replace(client.api_key, "...") or type(error).__name__
        raise BadInput(f"{endpoint.url} does not answer, {_tries(endpoint)} ({why})") from None
    except (openai.OpenAIError, ValueError, AttributeError, IndexError, TypeError):
        raise BadInput(
            f"{endpoint.url} answers, but not as an OpenAI-compatible endpoint does: most of them have a --url that "
            "ends in /v1"
        ) from None


def _refusal(error: Any, endpoint: Endpoint, request: Request, *, key: str) -> str:
    """What a failed request means for the user, in one line and without the key."""
    url, status = endpoint.url, error.status_code
    body = error.body if isinstance(error.body, dict) else {}
    said = " ".join(str(body.get("message") or error.message).replace(key, "...").split())[:SHOWN_CHARACTERS]
    if status in KEY_REFUSED:
        return f"{url} refuses the key in {endpoint.api_key_variable} (HTTP {status})"
    if status in UNKNOWN:
        return (
            f"{url} knows no --language-model {endpoint.language_model}, or the --url is wrong (HTTP {status}: {said})"
        )
    if status in PICTURE_REFUSED:
        return (
            f"{url} refuses {request.image} (HTTP {status}: {said}): where it is the model that reads no pictures name "
            "another --language-model, where it is this picture go on without its captions with --skip-refused"
        )
    return (
        f"{url} fails with HTTP {status}, {_tries(endpoint)} ({said}): wait, lower --requests-per-minute or "
        "--parallel, or raise --retries"
    )


def _tries(endpoint: Endpoint) -> str:
    return f"tried {1 + endpoint.retries} times" if endpoint.retries else "tried once"
