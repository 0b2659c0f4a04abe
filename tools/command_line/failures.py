"""What the machine or its user can do to a command: errors told in one line, with the way out.

Only errors that a full disk, a limit, a permission, too little memory or a killed process explain: all others are bugs,
and keep their traceback.
"""

import errno
import os
import re
from collections.abc import Iterator

REASONS = {
    errno.ENOSPC: "no space is left on the disk: free some",
    errno.EDQUOT: "the disk quota is used up: free some space",
    errno.EFBIG: "the file would be larger than is allowed here: raise the limit (ulimit -f) or write to another disk",
    errno.EACCES: "permission denied: change its permissions",
    errno.EPERM: "the system does not permit it: is it read-only or somebody else's?",
    errno.EROFS: "the file system is read-only: mount it writable or write to another disk",
    errno.EIO: "the disk reports an error: check it (dmesg)",
    errno.EMFILE: "too many files are open: raise the limit (ulimit -n)",
    errno.ENFILE: "too many files are open on this machine",
    errno.ESTALE: "the network file system has lost it: mount it again",
}
NOT_WRITTEN = "it could not be written whole: is the disk full?"  # where a library does not tell why
AGAIN = "then start the same command again, it resumes"

_NUMBERS = re.compile(r"\[Errno (\d+)\]|\(os error (\d+)\)")
_WORDS = re.compile(r"strerror: (.+)")  # torch's
_INCOMPLETE = ("requested and", "PytorchStreamWriter failed writing", "file write failed", "iostream error")
_MEMORY = ("can't allocate memory", "CUDA out of memory", "Cannot allocate memory")
_WORKER = ("DataLoader worker (pid",)
_SHARED = ("</torch_", "insufficient shared memory")


def why_not_written(error: BaseException) -> str | None:
    """Why the disk refused a file, and what to do; None for any other error."""
    found = next(filter(None, map(_disk, _chain(error))), None)
    return None if found is None else f"{found}, {AGAIN}"


def explain(error: BaseException, *, place: str, options: str) -> str | None:
    """The line for an error that the machine or its user caused; None for what looks like a bug.

    Args:
        place: what the command writes, for errors that name no file.
        options: what to lower when the memory is too small.
    """
    for each in _chain(error):
        if _says(each, _SHARED):
            return (
                "the processes that read pictures cannot share memory: enlarge /dev/shm, raise the limit of file sizes "
                f"(ulimit -f) or set --workers 0, {AGAIN}"
            )
        if reason := _disk(each):
            return f"{_file(each) or f'something below {place}'}: {reason}, {AGAIN}"
        if isinstance(each, MemoryError) or type(each).__name__ == "OutOfMemoryError" or _says(each, _MEMORY):
            return f"there is not enough memory: lower {options}, or close other programs, {AGAIN}"
        if type(each).__name__ == "BrokenProcessPool" or _says(each, _WORKER):
            return f"a process that read pictures was killed (out of memory?): {AGAIN}, with fewer --workers if need be"
    return None


def _chain(error: BaseException) -> Iterator[BaseException]:
    """An error and what it came from."""
    seen: set[int] = set()
    each: BaseException | None = error
    while each is not None and id(each) not in seen:
        seen.add(id(each))
        yield each
        each = each.__cause__ or (None if each.__suppress_context__ else each.__context__)


def _disk(error: BaseException) -> str | None:
    number = error.errno if isinstance(error, OSError) else None
    if number is None and (found := _NUMBERS.search(str(error))) is not None:
        number = int(found[1] or found[2])
    if number is None and (found := _WORDS.search(str(error))) is not None:
        number = next((each for each in REASONS if os.strerror(each) == found[1]), None)
    if number in REASONS:
        return REASONS[number]
    return NOT_WRITTEN if number is None and _says(error, _INCOMPLETE) else None


def _file(error: BaseException) -> str | None:
    """The file that an error speaks of; of two, the one that was to be made."""
    if not isinstance(error, OSError):
        return None
    listed = error.args[0] if error.args else None
    if isinstance(listed, list) and listed:  # shutil.Error: (from, to, why) of each file
        return str(listed[0][1])
    name = error.filename2 or error.filename
    return None if name is None else str(name)


def _says(error: BaseException, words: tuple[str, ...]) -> bool:
    return isinstance(error, (RuntimeError, OSError)) and any(word in str(error) for word in words)
