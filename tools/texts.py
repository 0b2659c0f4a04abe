"""Text that comes from outside: made clean where it is used, and harmless where it is shown."""

import difflib
import html
import unicodedata
from collections.abc import Iterable

SHOWN_CHARACTERS = 100  # of a long text in a line for people
REPLACEMENT = "\ufffd"
BYTE_ORDER_MARK = "\ufeff"


def is_unicode(text: str) -> bool:
    """Whether a text can be written as UTF-8: it holds no lone surrogate, half of a character.

    >>> is_unicode("café"), is_unicode("caf\\udce9")
    (True, False)
    """
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True


def clean(text: str) -> str:
    """A text on one line: control characters and white space become single spaces, byte order marks go, lone
    surrogates become U+FFFD.

    >>> clean("a\\x00 red\\r\\ncar\\t")
    'a red car'
    """
    if not text.isprintable():  # most texts are
        text = "".join(" " if unicodedata.category(c) == "Cc" else c for c in text if c != BYTE_ORDER_MARK)
        text = text.encode("utf-16", errors="surrogatepass").decode("utf-16", errors="replace")
    return " ".join(text.split())


def printable(text: str) -> str:
    """A name or text as every terminal takes it, on one line: control characters are escaped, and bytes that are not
    UTF-8 stand as \\udcXX.

    >>> printable("two\\nlines\\x1b[31m")
    'two\\\\nlines\\\\x1b[31m'
    """
    escaped = "".join(repr(c)[1:-1] if unicodedata.category(c) == "Cc" else c for c in text)
    return escaped.encode(errors="backslashreplace").decode()


def plural(count: int, word: str) -> str:
    """A number of things.

    >>> plural(1, "picture"), plural(2000, "picture")
    ('1 picture', '2,000 pictures')
    """
    return f"{count:,} {word}{'' if count == 1 else 's'}"


def shortened(text: str) -> str:
    """A printable text, cut for a line where it is long.

    >>> shortened("word " * 1000)[-22:]
    '... (5,000 characters)'
    """
    cut = printable(text[:SHOWN_CHARACTERS])
    return cut if len(text) <= SHOWN_CHARACTERS else f"{cut.rstrip()}... ({len(text):,} characters)"


def as_html(text: object) -> str:
    """A text as HTML shows it, in an element or inside quotation marks: it can open no tag and end no attribute.

    >>> as_html('<b title="x">')
    '&lt;b title=&quot;x&quot;&gt;'
    """
    return html.escape(printable(str(text)), quote=True)


def as_markdown_cell(text: object) -> str:
    """A text in a cell of a Markdown table: it can end neither cell nor line, and opens no tag.

    >>> as_markdown_cell("a|b")
    'a\\\\|b'
    """
    return html.escape(printable(str(text)), quote=False).replace("|", "\\|")


def did_you_mean(word: str, known: Iterable[str]) -> str:
    """The end of a message about an unknown word: the known one that it resembles, or nothing.

    >>> did_you_mean("emojy", ["emoji", "folder"])
    '; did you mean emoji?'
    """
    near = difflib.get_close_matches(word, list(known), n=1, cutoff=0.6)
    return f"; did you mean {near[0]}?" if near else ""
