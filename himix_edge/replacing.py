"""Putting a whole new folder in an old one's place, so that a kill loses neither.

exchanged    the two folders' names are exchanged in one step (Linux's renameat2). Without that
             step: the old folder is moved to HOLDER/aside, and the new one to its place.
filled       the old files are moved to HOLDER/leaving; when all are out, that is renamed to
             HOLDER/left; then the new files are moved in. The file named by HOLDER/last is the
             first to leave and the last to come.

So the next writer, which finds the holder (`claims.py`), knows how far a killed one came. With
`aside` or `leaving` it puts the old files back. With `left` it moves the other new files in.
"""

from __future__ import annotations

import contextlib
import errno
import os
import shutil
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

from himix_edge.claims import NEW, PARTIAL, PREFIX, clear
from himix_edge.errors import OutputError

ASIDE, LEAVING, LEFT = "aside", "leaving", "left"  # the journals
GONE = "gone"  # what a journal is renamed to when the replacement is done
LAST = "last"
LOST_AND_FOUND = "lost+found"  # stands in every fresh file system of Linux
_ATTEMPTS = 100  # at taking a place that others take at the same time
_AT_FDCWD, _RENAME_EXCHANGE = -100, 2
_OCCUPIED = (errno.ENOTEMPTY, errno.EEXIST, errno.ENOENT)  # taken, or gone, since we looked
_IMMOVABLE = (errno.EBUSY, errno.EXDEV, errno.EPERM, errno.EACCES)  # a mount point, another's


def entries(folder: Path) -> Iterator[Path]:
    """What is in a folder, but for what an interrupted writer, or the file system, has left."""
    for entry in folder.iterdir():
        ours = entry.name.startswith(PREFIX) and entry.name.endswith(PARTIAL)
        if not ours and entry.name != LOST_AND_FOUND:
            yield entry


def recover(target: Path, holder: Path) -> None:
    """Ends what a killed writer began, and clears what it left.

    Raises:
        OutputError: files have been put there since, under the names of those to put back.
        OSError: a file can't be moved.
    """
    if (holder / ASIDE).exists():
        placed = not any((holder / NEW).iterdir()) if (holder / NEW).exists() else True
        if not placed:
            _require_free(target, holder / ASIDE)
        (holder / ASIDE).rename(holder / GONE if placed else target)
    if (holder / LEAVING).exists():
        _move_all(holder / LEAVING, target, _last(holder))
        (holder / LEAVING).rmdir()
    if (holder / LEFT).exists():
        for new in (holder / NEW).iterdir() if (holder / NEW).exists() else ():
            _move_all(new, target, _last(holder))
        (holder / LEFT).rename(holder / GONE)
    clear(holder)


def _last(holder: Path) -> str | None:
    with contextlib.suppress(OSError):
        return os.fsdecode((holder / LAST).read_bytes()) or None
    return None


def _move_all(source: Path, target: Path, last: str | None) -> None:
    """Moves what a folder holds, the last entry last; replaces nothing."""
    for entry in sorted(source.iterdir(), key=lambda entry: (entry.name == last, entry.name)):
        place = target / entry.name
        _require_free(place, entry)
        entry.rename(place)


def _require_free(place: Path, stored: Path) -> None:
    """Nothing is replaced by what is put back."""
    if os.path.lexists(place):
        raise OutputError(
            f"cannot put back {place}, which a stopped run had moved to {stored}",
            expected="nothing in its place",
            found="another one",
            fix="keep one of the two, and delete or move the other",
        )


def sync_all(folder: Path) -> None:
    """Has all that a folder holds on the disk, so that a power cut can't empty what has a name."""
    for place, _, names in os.walk(folder):
        for name in names:
            sync(Path(place) / name)
        sync(Path(place))


def sync(path: Path) -> None:
    """Has one file on the disk."""
    if path.is_symlink() or not (path.is_file() or path.is_dir()):
        return
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    except OSError as error:
        if error.errno not in (errno.EINVAL, errno.EBADF, errno.EACCES):  # not known there
            raise
    finally:
        os.close(descriptor)


# Exchanging.


def take_place(
    target: Path,
    new: Path,
    keep: str | None,
    last: str | None,
    check: Callable[[Path], None],
) -> None:
    """Puts a whole folder in its place.

    Args:
        keep: what of the old folder goes into the new one.
        check: raises an error for an old folder that must not be replaced.
    """
    holder = new.parent.parent
    for _ in range(_ATTEMPTS):
        copied = False
        try:
            if not target.exists():
                new.rename(target)  # to an empty folder too; not to a full one
                return
            check(target)
            shutil.copymode(target, new)
            copied = bool(keep) and _copied(target, new, keep or "")
            _exchange(target, new, holder, check)
            return
        except OSError as error:
            if copied:
                _remove(new / (keep or ""))
            if error.errno in _IMMOVABLE:
                fill(target, new, keep, last)
                return
            if error.errno not in _OCCUPIED:
                raise
    raise OSError(errno.EBUSY, os.strerror(errno.EBUSY))


def _copied(target: Path, new: Path, keep: str) -> bool:
    """Gives the new folder what it keeps of the old one, which stays whole until it is replaced.

    A copy, not a link: readers refuse a file that has two names.

    Raises:
        OSError: another writer has replaced the old one meanwhile, or there is no room.
    """
    if not (target / keep).is_dir() or os.path.lexists(new / keep):
        return False
    if (target / keep).is_symlink():
        (new / keep).symlink_to((target / keep).readlink())
        return True
    before, failure = _identity(target), None
    partial = shutil.ignore_patterns(f".*{PARTIAL}")
    try:
        shutil.copytree(target / keep, new / keep, symlinks=True, ignore=partial)
        sync_all(new / keep)
    except shutil.Error as error:  # of several files
        failure = OSError(errno.EIO, str(error.args[0][0][2]))
    except OSError as error:
        failure = error
    if _identity(target) != before:
        failure = OSError(errno.ENOENT, os.strerror(errno.ENOENT))
    if failure:
        shutil.rmtree(new / keep, ignore_errors=True)
        raise failure
    return True


def _remove(kept: Path) -> None:
    if kept.is_symlink():
        kept.unlink()
    else:
        shutil.rmtree(kept)


def _identity(folder: Path) -> tuple[int, int]:
    """The same as long as it is the same folder, by its number and when that got its name."""
    found = folder.stat()
    return found.st_ino, found.st_ctime_ns


def _exchange(target: Path, new: Path, holder: Path, check: Callable[[Path], None]) -> None:
    """Two folders' names, in one step where the system has one."""
    if _exchanged(target, new):
        try:
            check(new)  # the old one, where nobody else finds it: what has come in since we looked?
        except BaseException:
            _exchanged(target, new)
            raise
        return
    old = holder / ASIDE
    try:
        target.rename(old)
        check(old)
        new.rename(target)
    except BaseException:  # Ctrl-C too: the old one must not go with its holder
        if old.exists() and not target.exists():
            old.rename(target)
        raise
    old.rename(holder / GONE)


def _exchanged(one: Path, other: Path) -> bool:
    """Linux's renameat2; False where there is none, or the file system doesn't know it."""
    if not sys.platform.startswith("linux"):
        return False
    import ctypes

    rename = getattr(ctypes.CDLL(None, use_errno=True), "renameat2", None)
    if rename is None:
        return False
    names = os.fsencode(one), os.fsencode(other)
    if rename(_AT_FDCWD, names[0], _AT_FDCWD, names[1], _RENAME_EXCHANGE) == 0:
        return True
    number = ctypes.get_errno()
    if number in (errno.ENOSYS, errno.EINVAL, errno.EOPNOTSUPP):
        return False
    raise OSError(number, os.strerror(number))


# Filling.


def fill(target: Path, new: Path, keep: str | None, last: str | None) -> None:
    """Moves what the new folder holds into its place; what stood there goes, or all comes back."""
    holder = new.parent.parent
    leaving, left = holder / LEAVING, holder / LEFT
    (holder / LAST).write_bytes(os.fsencode(last or ""))
    out: list[Path] = []
    come: list[Path] = []

    def order(entry: Path) -> tuple[bool, str]:
        return entry.name == last, entry.name

    try:
        leaving.mkdir()
        for entry in sorted(entries(target), key=order, reverse=True):
            if entry.name != keep or os.path.lexists(new / entry.name):
                out.append(entry)  # before it is done: Ctrl-C may come between
                entry.rename(leaving / entry.name)
        leaving.rename(left)
        for entry in sorted(new.iterdir(), key=order):
            come.append(entry)
            entry.rename(target / entry.name)
        left.rename(holder / GONE)
    except BaseException:
        _undo(target, holder, out, come)
        raise


def _undo(target: Path, holder: Path, out: list[Path], come: list[Path]) -> None:
    """Backwards, in an order that `recover` understands at every step."""
    leaving, left, gone = holder / LEAVING, holder / LEFT, holder / GONE
    if gone.exists():  # it was done
        return
    if left.exists():
        for entry in reversed(come):
            with contextlib.suppress(FileNotFoundError):  # this one had not moved
                (target / entry.name).rename(entry)
        left.rename(leaving)
    for entry in reversed(out):
        with contextlib.suppress(FileNotFoundError):
            (leaving / entry.name).rename(entry)
    with contextlib.suppress(FileNotFoundError):
        leaving.rmdir()
