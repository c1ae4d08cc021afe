"""Files that are whole or not there: everything the project writes passes through here.

A file is written beside its place and renamed to it. So is a folder, in one of two ways:

  exchanged     written beside its place, which it then takes in one step: an older folder stays
                until then, and whoever opens the place finds the old one or the new one.
  filled        where the folder at the place must stay the same folder: a mount point, an empty
                folder, the working folder, or one beside which nothing can be written. The new
                files are written within it, hidden; in the end they are moved to their names, the
                one that makes them a whole last, so that nobody sees a manifest without its files.
"""

from __future__ import annotations

import contextlib
import errno
import hashlib
import os
import shutil
import sys
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path

from himix_edge.errors import OutputError

PARTIAL = ".partial"  # the ending of a file or folder that is still being written
_PREFIX = ".himix-edge-"
_LOST_AND_FOUND = "lost+found"  # stands in every fresh file system of Linux
_ATTEMPTS = 100  # at taking a place that others take at the same time
_AT_FDCWD, _RENAME_EXCHANGE = -100, 2
_OCCUPIED = (errno.ENOTEMPTY, errno.EEXIST, errno.ENOENT)  # taken, or gone, since we looked
_IS_A_FOLDER = (errno.EISDIR, os.strerror(errno.EISDIR))
_IS_NO_FILE = (errno.EINVAL, "a device or a pipe")
_IMMOVABLE = (errno.EBUSY, errno.EXDEV, errno.EPERM, errno.EACCES)  # a mount point, another's


def sha256_of(path: Path) -> str:
    """The sha256 of a file's bytes, in hexadecimal."""
    with path.open("rb") as file:
        digest = hashlib.sha256()
        while chunk := file.read(1 << 20):
            digest.update(chunk)
    return digest.hexdigest()


@contextlib.contextmanager
def whole_file(path: Path) -> Iterator[Path]:
    """A temporary path beside `path`, renamed to it when the block ends without an error.

    Where `path` is a link, the file that it names is replaced.

    Raises:
        OutputError: the folder can't be written, the disk is full, or no file can be there.
    """
    with _output_errors(path):
        target = path.resolve()
        _require_file(target)
        with _made(target.parent), _holder(target.parent) as holder:
            temporary = holder / target.name
            yield temporary
            temporary.replace(target)


@contextlib.contextmanager
def whole_folder(path: Path, *, keep: str | None = None, last: str | None = None) -> Iterator[Path]:
    """An empty temporary folder that takes the place of `path` when the block ends without error.

    A folder that already stands at `path` stays as it is until the new one is whole, and is then
    replaced. Whatever ends the block early, Ctrl-C too, leaves no debris.

    Args:
        keep: a folder within that outlives the replacement, unless the new one has its own.
        last: the file within without which nobody takes the folder for whole: a manifest.

    Raises:
        OutputError: neither the folder nor its parent can be written, or the disk is full.
    """
    with _output_errors(path):
        target = path.resolve()
        filled = _must_stay(target)
        with _made(target.parent), _holder(target if filled else target.parent) as holder:
            temporary = holder / (target.name or "new")
            temporary.mkdir()
            yield temporary
            if filled:
                _fill(target, temporary, keep, last)
            else:
                _take_place(target, temporary, keep, last)


def refuse_foreign_folder(path: Path, kind: str, is_ours: Callable[[Path], bool]) -> None:
    """Lets a folder be written only where it can be, and nothing of someone else's would be lost.

    Call it before the work: it makes a folder there, or as near as there is one, and removes it.

    Args:
        path: where a folder is to be written.
        kind: what it will be, for the error: "bundle".
        is_ours: whether a folder is of that kind, and may be replaced.

    Raises:
        OutputError: a file stands at `path`, or a folder that is neither empty nor of that kind;
            or nothing can be written there.
    """
    with _output_errors(path):
        free = not (path.exists() or path.is_symlink())
        free = free or (path.is_dir() and (_is_empty(path) or is_ours(path)))
        if free:
            _require_writable(path.resolve())
            return
    raise OutputError(
        f"will not replace {path}",
        expected=f"a {kind} there, or nothing yet",
        found="another folder" if path.is_dir() else "a file",
        fix="choose another place, or move it away",
    )


def refuse_unwritable_file(path: Path) -> None:
    """Before the work: whether `whole_file` can begin there.

    Raises:
        OutputError: it can't.
    """
    with _output_errors(path):
        target = path.resolve()
        _require_file(target)
        _require_writable(target.parent)


def refuse_overlap(output: Path, source: Path) -> None:
    """Before the work: an output must not be its own source, nor lie within it, nor around it.

    Raises:
        OutputError: it does.
    """
    new, old = output.resolve(), source.resolve()
    if new == old or new in old.parents or old in new.parents:
        where = "the same" if new == old else "one within the other"
        raise OutputError(
            f"will not write {output}",
            expected=f"a folder apart from {source}, which is read",
            found=where,
            fix="choose another --output",
        )


def refuse_too_large(path: Path, size: int) -> None:
    """Before the work: whether a disk has room for so many bytes at `path`, as far as it says.

    Raises:
        OutputError: it has not.
    """
    with _output_errors(path):
        free = shutil.disk_usage(_nearest_folder(path.resolve())).free
    if size > free:
        raise OutputError(
            f"cannot write {path}",
            expected=f"about {size / 1e6:,.0f} MB free on the disk",
            found=f"{free / 1e6:,.0f} MB",
            fix="choose another place, or free some space",
        )


def work_folder(path: Path, ending: str) -> Path:
    """Where a long run that will write `path` keeps what it can go on from.

    Beside it; within it, hidden, where that is the only place.
    """
    target = path.resolve()
    if target.is_dir() and _must_stay(target) and not _can_write(target.parent):
        return target / f"{_PREFIX}{ending.lstrip('.')}{PARTIAL}"
    return target.with_name(target.name + ending)


# Where.


def entries(folder: Path) -> Iterator[Path]:
    """What is in a folder, but for what an interrupted writer, or the file system, has left."""
    for entry in folder.iterdir():
        ours = entry.name.startswith(_PREFIX) and entry.name.endswith(PARTIAL)
        if not ours and entry.name != _LOST_AND_FOUND:
            yield entry


def _is_empty(folder: Path) -> bool:
    return not any(entries(folder))


def _require_file(target: Path) -> None:
    """Whether there is nothing yet, or a file: a device or a pipe must not be replaced by one."""
    if target.exists() and not target.is_file():
        raise OSError(*_IS_A_FOLDER if target.is_dir() else _IS_NO_FILE)


def _must_stay(target: Path) -> bool:
    """Whether a folder stands there that can't or should not be exchanged for another one."""
    if not target.is_dir():
        return False
    here = Path.cwd()
    used = target == here or target in here.parents
    return used or _is_empty(target) or _is_mount(target) or not _can_write(target.parent)


def _is_mount(target: Path) -> bool:
    """Of any kind: Python alone doesn't see one folder mounted on another of the same disk."""
    try:
        mounts = Path("/proc/self/mountinfo").read_bytes().splitlines()
    except OSError:
        return os.path.ismount(target)
    named = (mount.split()[4].replace(b"\\040", b" ") for mount in mounts)
    return os.path.ismount(target) or os.fsencode(target) in named


def _require_writable(target: Path) -> None:
    """Makes a folder in the nearest one there is, which is what writing `target` begins with."""
    with _holder(_nearest_folder(target)):
        pass


def _can_write(folder: Path) -> bool:
    try:
        _require_writable(folder)
    except OSError:
        return False
    return True


def _nearest_folder(path: Path) -> Path:
    """The path itself, or the nearest folder above that there is."""
    try:
        path.lstat()
    except FileNotFoundError:
        return _nearest_folder(path.parent)
    if not path.is_dir():
        raise NotADirectoryError(errno.ENOTDIR, os.strerror(errno.ENOTDIR))
    return path


@contextlib.contextmanager
def _made(folder: Path) -> Iterator[None]:
    """A folder, made with its parents; those made here go again if the block fails."""
    missing = [parent for parent in (folder, *folder.parents) if not parent.exists()]
    try:
        folder.mkdir(parents=True, exist_ok=True)
        yield
    except BaseException:
        with contextlib.suppress(OSError):  # not empty: something else is there by now
            for parent in missing:
                parent.rmdir()
        raise


@contextlib.contextmanager
def _holder(folder: Path) -> Iterator[Path]:
    """A fresh hidden folder within; whatever it holds afterwards is removed with it."""
    holder = Path(tempfile.mkdtemp(prefix=_PREFIX, suffix=PARTIAL, dir=folder))
    try:
        yield holder
    finally:
        shutil.rmtree(holder, ignore_errors=True)


# Exchanging.


def _take_place(target: Path, new: Path, keep: str | None, last: str | None) -> None:
    """Puts a whole folder in its place, against others who do the same at the same time."""
    for _ in range(_ATTEMPTS):
        linked = False
        try:
            if not target.exists():
                new.rename(target)  # to an empty folder too; not to a full one
                return
            shutil.copymode(target, new)
            linked = bool(keep) and _linked(target, new, keep or "")
            _exchange(target, new)
            return
        except OSError as error:
            if linked:
                shutil.rmtree(new / (keep or ""))
            if error.errno in _IMMOVABLE:
                _fill(target, new, keep, last)
                return
            if error.errno not in _OCCUPIED:
                raise
    raise OSError(errno.EBUSY, os.strerror(errno.EBUSY))


def _linked(target: Path, new: Path, keep: str) -> bool:
    """Gives the new folder what it keeps of the old one, which stays whole until it is replaced.

    Raises:
        OSError: another writer has replaced the old one meanwhile, or the file system can't link.
    """
    before, failure = _identity(target), None
    there = (target / keep).is_dir() and not (new / keep).exists()
    if there:
        partial = shutil.ignore_patterns(f".*{PARTIAL}")
        try:
            shutil.copytree(
                target / keep, new / keep, symlinks=True, copy_function=os.link, ignore=partial
            )
        except (OSError, shutil.Error) as error:
            failure = error
    replaced = _identity(target) != before
    if failure or replaced:
        if there:
            shutil.rmtree(new / keep, ignore_errors=True)
        why = errno.ENOENT if replaced else errno.EXDEV
        raise OSError(why, os.strerror(why)) from failure
    return there


def _identity(folder: Path) -> tuple[int, int]:
    """The same as long as it is the same folder, by its number and when that got its name."""
    found = folder.stat()
    return found.st_ino, found.st_ctime_ns


def _exchange(target: Path, new: Path) -> None:
    """Two folders' names, in one step where the system has one."""
    if _exchanged(target, new):
        return
    old = new.with_name("old")
    try:
        target.rename(old)
        new.rename(target)
    except BaseException:  # Ctrl-C too: the old one must not go with its holder
        if not target.exists():
            old.rename(target)
        raise


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


def _fill(target: Path, new: Path, keep: str | None, last: str | None) -> None:
    """Moves what the new folder holds into its place; what stood there goes, or all comes back."""
    old = new.with_name(f"{new.name}-before")
    old.mkdir()
    moved: list[tuple[Path, Path]] = []

    def order(entry: Path) -> tuple[bool, str]:
        return entry.name == last, entry.name

    def move(source: Path, place: Path) -> None:
        moved.append((source, place))  # before it is done: Ctrl-C may come between
        source.rename(place)

    try:
        for entry in sorted(entries(target), key=order, reverse=True):
            if entry.name != keep or (new / entry.name).exists():
                move(entry, old / entry.name)
        for entry in sorted(new.iterdir(), key=order):
            move(entry, target / entry.name)
    except BaseException:
        for source, place in reversed(moved):
            with contextlib.suppress(FileNotFoundError):  # this one had not moved
                place.rename(source)
        raise


@contextlib.contextmanager
def _output_errors(path: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        reason = error.strerror or str(error)
        raise OutputError(
            f"cannot write {path}",
            expected="a folder that can be written, with room on the disk",
            found=reason,
            fix="choose another place, or free some space",
        ) from error
