"""Options of each source of pseudo queries; those of one mean nothing to another."""

import os
import re
from dataclasses import dataclass, fields
from typing import Any, Literal
from urllib.parse import urlsplit

from models.compute import Precision
from models.options import DeviceOptions
from tools.command_line.place import NameOrPath
from tools.errors import BadInput

Source = Literal["nearest", "model", "endpoint"]

ENVIRONMENT_NAME = re.compile(r"[A-Za-z_][A-Za-z0-9_]*")
NAMES_A_KEY = re.compile(r"(?i)(.*_)?(key|token|secret)")


@dataclass(frozen=True, kw_only=True)
class NearestOptions:
    """Captions of similar train pictures (`nearest`)."""

    neighbours: int = 5
    """Train pictures whose captions are a picture's candidates (nearest)."""

    def check(self) -> None:
        if self.neighbours < 1:
            raise BadInput("--neighbours must be at least 1")


@dataclass(frozen=True, kw_only=True)
class WrittenOptions(DeviceOptions):
    """Captions that a model writes (`model`, `endpoint`)."""

    candidates: int = 10
    """Captions written of a picture, to choose from (model, endpoint)."""
    precision: Precision = "auto"
    """Arithmetic of the models that run here; auto: bf16 or fp16 on a GPU and on CPUs with bf16 units, else fp32
    (model, endpoint)."""

    def check(self) -> None:
        if self.candidates < 1:
            raise BadInput("--candidates must be at least 1")


@dataclass(frozen=True, kw_only=True)
class CaptionerOptions(WrittenOptions):
    """An image-to-text model that runs here (`model`)."""

    captioner: NameOrPath | None = None
    """Name or folder of a Hugging Face image-to-text model: BLIP, BLIP-2, or any other (model)."""
    prompt: str | None = None
    """What a caption goes on from, or what a chat model is asked; by default what the model needs (model)."""
    temperature: float = 1.0
    """Above 1 the words that are drawn are more various, below 1 less (model)."""
    top_p: float = 0.9
    """Words are drawn from the likeliest that have this probability together (model)."""
    max_new_tokens: int = 30
    """Length of a caption, at most (model)."""
    batch_size: int = 16
    """Pictures per batch (model)."""

    def check(self) -> None:
        WrittenOptions.check(self)
        if self.captioner is None:
            raise BadInput("--source model needs --captioner, for example Salesforce/blip2-opt-2.7b")
        if min(self.max_new_tokens, self.batch_size) < 1:
            raise BadInput("--max-new-tokens and --batch-size must be at least 1")
        if not (self.temperature > 0 and 0 < self.top_p <= 1):
            raise BadInput("--temperature must be above 0, --top-p above 0 and at most 1")


@dataclass(frozen=True, kw_only=True)
class EndpointOptions(WrittenOptions):
    """A model behind an OpenAI-compatible address (`endpoint`)."""

    url: str | None = None
    """Address of the endpoint, usually ending in /v1 (endpoint)."""
    language_model: str | None = None
    """Name of a model there that reads pictures (endpoint)."""
    api_key_variable: str = "OPENAI_API_KEY"
    """Name of the environment variable that holds the key; the key itself is written nowhere (endpoint)."""
    requests_per_minute: float = 60.0
    """At most, of all processes together; requests made again are not counted (endpoint)."""
    parallel: int = 4
    """Requests under way at a time, in each process (endpoint)."""
    retries: int = 5
    """Times a request is made again, with growing pauses, after HTTP 408, 409, 429, 5xx or no answer (endpoint)."""
    skip_refused: bool = False
    """Go on without captions of pictures that the endpoint refuses (endpoint)."""
    dry_run: bool = False
    """Count the requests, show one prompt, ask nothing and write nothing (endpoint)."""

    def check(self) -> None:
        WrittenOptions.check(self)
        if self.url is None or self.language_model is None:
            raise BadInput(f"--source endpoint needs {'--url' if self.url is None else '--language-model'}")
        if self.parallel < 1 or not self.requests_per_minute > 0 or self.retries < 0:
            raise BadInput("--parallel must be at least 1, --requests-per-minute above 0, --retries at least 0")
        address = urlsplit(self.url)
        if address.scheme not in ("http", "https") or not address.hostname:
            raise BadInput("--url must begin with http:// or https:// and name a host")
        if address.username or address.password or address.query:  # the manifest would tell
            raise BadInput("--url takes no user, password or query: export the key, --api-key-variable names it")
        name = self.api_key_variable
        if not ENVIRONMENT_NAME.fullmatch(name) or (name not in os.environ and not NAMES_A_KEY.fullmatch(name)):
            # perhaps the key itself: neither to be shown nor to be written into a manifest
            raise BadInput("--api-key-variable takes the name of an environment variable that is set, not the key")


OPTIONS: dict[Source, type[NearestOptions | CaptionerOptions | EndpointOptions]] = {
    "nearest": NearestOptions,
    "model": CaptionerOptions,
    "endpoint": EndpointOptions,
}


def check_source(config: Any, source: Source) -> None:
    """Whether the options fit the source.

    Args:
        config: derived from the options of all sources.

    Raises:
        BadInput: an option of another source is given, or one of this source is wrong or missing.
    """
    shared = {field.name for field in fields(DeviceOptions)}
    sources: dict[str, list[str]] = {}
    for name, options in OPTIONS.items():
        for field in fields(options):
            if field.name not in shared:
                sources.setdefault(field.name, []).append(name)
    for field in fields(config):
        of = sources.get(field.name, [source])
        if source not in of and getattr(config, field.name) != field.default:
            flag = "--" + field.name.replace("_", "-")
            raise BadInput(f"{flag} is for --source {' or '.join(of)}, not --source {source}")
    OPTIONS[source].check(config)
