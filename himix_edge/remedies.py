"""What helps when the system refuses: a remedy for each error number, and for too little memory."""

from __future__ import annotations

import contextlib
import errno
import re
from collections.abc import Iterator
from pathlib import Path

from himix_edge.errors import HimixError, OutputError

MEMORY = "close other programs, use --threads 1, or choose a smaller model, picture or batch"
_SPACE = "free some space on the disk, or choose another place"
_FILES = "close other programs, or allow more open files with: ulimit -n 4096"
_OTHER_PATH = "choose another path"
_RIGHTS = "choose a place that you may write to, or change its permissions"

# What is short, whatever was being done: these remedies come before any other.
_SHORTAGES = {
    errno.ENOSPC: _SPACE,
    errno.EDQUOT: "free some space of your quota, or choose another place",
    errno.EFBIG: "choose another disk, or raise the limit with: ulimit -f unlimited",
    errno.EMFILE: _FILES,
    errno.ENFILE: _FILES,
    errno.ENOMEM: MEMORY,
    errno.EAGAIN: "close other programs, or allow more processes with: ulimit -u",
    errno.EIO: "check the disk: the kernel's log (dmesg) says what failed",
}
_REMEDIES = {
    **_SHORTAGES,
    errno.EROFS: "choose a place that is not read-only",
    errno.EACCES: _RIGHTS,
    errno.EPERM: _RIGHTS,
    errno.EBUSY: "wait until nothing else uses it, and run the command again",
    errno.ENOTDIR: "choose another path: a part of this one is a file",
    errno.EISDIR: "choose another path: this one is a folder",
    errno.ENAMETOOLONG: "choose a shorter name",
    errno.ELOOP: _OTHER_PATH,
    errno.EINVAL: _OTHER_PATH,
    errno.ENOENT: "check the path",
    errno.ESTALE: "mount the network folder again, and run the command again",
}

_OUT_OF_MEMORY = re.compile(
    r"bad_alloc|bad allocation|(can't|cannot|could not|failed to|unable to) allocate|out of memory"
    r"|not enough memory",
    re.IGNORECASE,
)


def is_out_of_memory(error: BaseException) -> bool:
    """Whether Python, torch or ONNX Runtime says that there is not enough memory."""
    if isinstance(error, HimixError):
        return False
    if isinstance(error, MemoryError):
        return True
    return isinstance(error, Exception) and bool(_OUT_OF_MEMORY.search(str(error)))


def remedy_for(
    error: OSError, otherwise: str = "run it again with --debug, which says more"
) -> str:
    """What helps against an error of the system, or `otherwise` where that is not known."""
    if isinstance(error, (ConnectionError, TimeoutError)):
        return "check the network, and run the command again"
    return _REMEDIES.get(error.errno or 0, otherwise)


def reason_of(error: OSError) -> str:
    """What the system says of it, in words."""
    return error.strerror or str(error) or type(error).__name__


def output_error(failed: str, error: OSError) -> OutputError:
    """The error of ours for one of the system's."""
    return OutputError(
        failed,
        expected="a place that can be written, with room on the disk",
        found=reason_of(error),
        fix=remedy_for(error, "choose another place"),
    )


@contextlib.contextmanager
def output_errors(path: Path) -> Iterator[None]:
    """Makes an OutputError of what the system says against writing `path`."""
    try:
        yield
    except OSError as error:
        raise output_error(f"cannot write {path}", error) from error


def shortage(error: BaseException) -> tuple[str, str] | None:
    """What was found to be short, and what helps, where that is what an error comes from."""
    for cause in _causes(error):
        if is_out_of_memory(cause):
            return "not enough memory", MEMORY
        if isinstance(cause, OSError) and cause.errno in _SHORTAGES:
            return reason_of(cause), _SHORTAGES[cause.errno]
    return None


def _causes(error: BaseException) -> Iterator[BaseException]:
    """The error, what it was raised from, and so on."""
    seen: set[int] = set()
    cause: BaseException | None = error
    while cause is not None and id(cause) not in seen:
        seen.add(id(cause))
        yield cause
        cause = cause.__cause__
