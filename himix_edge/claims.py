"""One writer at a time: a hidden folder at an output, locked as long as its writer lives.

    PLACE/.himix-edge-0123456789abcdef.partial/lock     the lock (flock)
                                              /...      what is being written

The folder's name follows from the output's name. So two writers of one output meet there, and what
a killed writer left is found, and cleared, by the next one. The kernel releases the lock when the
process ends, however it ends: a folder whose lock is free has no writer.

On a file system without locks, each writer has a folder of its own, and clears only that.
"""

from __future__ import annotations

import contextlib
import errno
import hashlib
import os
import shutil
import stat
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from pathlib import Path

try:
    import fcntl
except ImportError:  # Windows
    fcntl = None  # type: ignore[assignment]

PARTIAL = ".partial"  # the ending of a folder that is still being written
PREFIX = ".himix-edge-"
SCRATCH = f"{PREFIX}scratch-"  # in the temporary folder: nothing that anyone could miss
LOCK = "lock"
JOURNALS = ("aside", "leaving", "left")  # of a replacement that has begun; see `replacing.py`
NEW = "new"  # the folder, or the file, that is being written: within this folder
NOTICE_SECONDS = 1.0
PAUSES = (0.005, 0.1)  # between attempts at a lock: the first, the longest
_NO_LOCKS = (errno.ENOSYS, errno.EOPNOTSUPP, errno.ENOLCK, errno.EINVAL, errno.EBADF)

_held: set[tuple[int, Path]] = set()  # (thread, holder)


@contextlib.contextmanager
def claim(folder: Path, name: str, output: Path | None) -> Iterator[Path]:
    """The hidden folder for the output `name` in `folder`; waits while another writer has it.

    A thread that has it already gets it again.

    Args:
        output: how the notice for a waiting user names the output; None does not wait.

    Raises:
        OSError: nothing can be written in `folder`, or the hidden folder is another user's.
        BlockingIOError: another writer has it, and `output` is None.
    """
    holder = folder / holder_name(name)
    key = threading.get_ident(), holder
    if key in _held:
        yield holder
        return
    try:
        lock = _waited_for(holder, output)
    except OSError as error:
        if error.errno not in _NO_LOCKS:
            raise
        _drop(holder)
        with _unshared(folder) as own:
            yield own
        return
    _held.add(key)
    try:
        yield holder
    finally:
        _held.discard(key)
        _release(holder, lock)


@contextlib.contextmanager
def scratch_folder() -> Iterator[Path]:
    """A temporary folder that goes at the end, with those that killed runs have left."""
    place = Path(tempfile.gettempdir())
    for left in place.glob(f"{SCRATCH}*{PARTIAL}"):
        with contextlib.suppress(OSError):  # another user's, or cleared by another at this moment
            if (lock := _locked(left)) is not None:
                _release(left, lock)
    with _unshared(place, SCRATCH) as own:
        yield own


def holder_name(name: str) -> str:
    """The hidden folder's name for an output's name."""
    return f"{PREFIX}{hashlib.sha256(os.fsencode(name)).hexdigest()[:16]}{PARTIAL}"


def clear(holder: Path) -> None:
    """Removes all that the writing left in it, but what is needed to put an old folder back."""
    journal = [name for name in JOURNALS if (holder / name).exists()]
    for entry in holder.iterdir():
        if entry.name == LOCK or entry.name in journal or (journal and entry.name == NEW):
            continue
        if entry.is_dir() and not entry.is_symlink():
            shutil.rmtree(entry, ignore_errors=True)
        else:
            entry.unlink(missing_ok=True)


def _waited_for(holder: Path, output: Path | None) -> int:
    """The open lock, once nobody else has it."""
    begun, pause, told = time.monotonic(), PAUSES[0], False
    while (lock := _locked(holder)) is None:
        if output is None:
            raise BlockingIOError(errno.EAGAIN, os.strerror(errno.EAGAIN), str(holder))
        if not told and time.monotonic() - begun > NOTICE_SECONDS:
            print(f"Waiting for another himix-edge that writes {output}", file=sys.stderr)
            told = True
        time.sleep(pause)
        pause = min(2 * pause, PAUSES[1])
    return lock


def _locked(holder: Path) -> int | None:
    """Makes the folder, unless it is there, and takes its lock; None while another has it.

    Raises:
        OSError: it can't be made, or is no folder of this user's.
    """
    try:
        holder.mkdir(mode=0o700)
    except FileExistsError:
        _require_own(holder)
    flags = os.O_RDWR | os.O_CREAT | getattr(os, "O_NOFOLLOW", 0)
    try:
        lock = os.open(holder / LOCK, flags, 0o600)
    except FileNotFoundError:  # cleared away at this moment
        return None
    except OSError:
        _drop(holder)
        raise
    try:
        if fcntl is None:
            raise OSError(errno.ENOSYS, os.strerror(errno.ENOSYS))
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        if os.path.samestat(os.fstat(lock), os.stat(holder / LOCK)):  # noqa: PTH116
            return lock
    except (BlockingIOError, FileNotFoundError):
        pass
    except BaseException:
        os.close(lock)
        raise
    os.close(lock)
    return None


def _require_own(holder: Path) -> None:
    """Whether it is safe to clear: in a folder that all may write to, another could plant it."""
    try:
        found = holder.lstat()
    except FileNotFoundError:
        return
    own = not hasattr(os, "geteuid") or found.st_uid == os.geteuid()
    if not stat.S_ISDIR(found.st_mode) or not own:
        raise PermissionError(errno.EACCES, f"{holder} is another user's", str(holder))


def _release(holder: Path, lock: int) -> None:
    """Clears and removes the folder while nobody else can have it."""
    try:
        with contextlib.suppress(OSError):
            clear(holder)
        _drop(holder)
    finally:
        os.close(lock)


def _drop(holder: Path) -> None:
    """Removes the folder, unless the next one has it at this moment, or a journal stays in it."""
    with contextlib.suppress(OSError):
        (holder / LOCK).unlink(missing_ok=True)
        holder.rmdir()


@contextlib.contextmanager
def _unshared(folder: Path, prefix: str = PREFIX) -> Iterator[Path]:
    """A fresh hidden folder, locked if the file system has locks; it is removed in the end."""
    while True:
        own = Path(tempfile.mkdtemp(prefix=prefix, suffix=PARTIAL, dir=folder))
        try:
            lock = _locked(own)
        except OSError as error:
            if error.errno not in _NO_LOCKS:
                raise
            lock = os.open(own / LOCK, os.O_RDWR)
        if lock is not None:
            break
    try:
        yield own
    finally:
        _release(own, lock)
