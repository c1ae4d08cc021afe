"""Files and folders that are whole or not there: everything the project writes passes through here.

A file is written beside its place and renamed to it. So is a folder, in one of two ways:

  exchanged     written beside its place, which it then takes in one step: an older folder stays
                until then, and whoever opens the place finds the old one or the new one.
  filled        where the folder at the place must stay the same folder: a mount point, an empty
                folder, the working folder, or one beside which nothing can be written. The new
                files are written within it, hidden; in the end they are moved to their names, the
                one that makes them a whole last, so that nobody sees a manifest without its files.

One writer at a time has an output; others wait (`claims.py`). What a killed one left is put back or
cleared by the next one at the same place (`replacing.py`). Bytes are on the disk before a name is.
"""

from __future__ import annotations

import contextlib
import errno
import hashlib
import os
import shutil
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path

from himix_edge.claims import NEW, PARTIAL, PREFIX, claim, clear, holder_name
from himix_edge.errors import OutputError
from himix_edge.remedies import output_errors
from himix_edge.replacing import entries, fill, recover, sync, sync_all, take_place

PNG = b"\x89PNG"  # how such a file begins
_IS_A_FOLDER = (errno.EISDIR, os.strerror(errno.EISDIR))
_IS_NO_FILE = (errno.EINVAL, "a device or a pipe")


@dataclass(frozen=True)
class Kind:
    """What a folder is that we write, and may replace.

    Attributes:
        name: for people: "bundle".
        stranger: what a folder holds that is not of this kind, in words; None where all of it is.
    """

    name: str
    stranger: Callable[[Path], str | None]


def sha256_of(path: Path) -> str:
    """The sha256 of a file's bytes, in hexadecimal."""
    with path.open("rb") as file:
        digest = hashlib.sha256()
        while chunk := file.read(1 << 20):
            digest.update(chunk)
    return digest.hexdigest()


@contextlib.contextmanager
def whole_file(path: Path, *, begins: bytes | None = None) -> Iterator[Path]:
    """A temporary path beside `path`, renamed to it when the block ends without an error.

    Where `path` is a link, the file that it names is replaced.

    Args:
        begins: how all files of this format begin: a file that doesn't is not replaced.

    Raises:
        OutputError: the folder can't be written, the disk is full, or no file can be there.
    """
    with output_errors(path):
        target = path.resolve()
        _require_file(target, begins)
        with _made(target.parent), claim(target.parent, target.name, path) as holder:
            clear(holder)
            temporary = holder / NEW / target.name
            temporary.parent.mkdir()
            yield temporary
            sync(temporary)
            _require_file(target, begins)
            temporary.replace(target)


@contextlib.contextmanager
def whole_folder(
    path: Path, *, kind: Kind | None = None, keep: str | None = None, last: str | None = None
) -> Iterator[Path]:
    """An empty temporary folder that takes the place of `path` when the block ends without error.

    A folder that already stands at `path` stays as it is until the new one is whole, and is then
    replaced. Whatever ends the block early, Ctrl-C too, leaves no debris; a kill leaves a hidden
    folder that the next writer clears.

    Args:
        kind: what may be replaced; None is any folder.
        keep: a folder within that outlives the replacement, unless the new one has its own.
        last: the file within without which nobody takes the folder for whole: a manifest.

    Raises:
        OutputError: neither the folder nor its parent can be written, the disk is full, or what
            stands there by then is not of that kind.
    """

    def check(folder: Path) -> None:
        if kind and not _is_empty(folder):
            _refuse_stranger(path, folder, kind)

    with output_errors(path):
        target = path.resolve()
        with _made(target.parent), _claimed(target, path) as (holder, filled):
            temporary = holder / NEW / (target.name or NEW)
            temporary.mkdir(parents=True)
            yield temporary
            sync_all(temporary)
            if filled:
                check(target)
                fill(target, temporary, keep, last)
            else:
                take_place(target, temporary, keep, last, check)


@contextlib.contextmanager
def sole_writer(path: Path) -> Iterator[None]:
    """Keeps other runs from writing `path` while this one, in several steps, does.

    They wait. What a killed one left of it is put back or cleared first.

    Raises:
        OutputError: nothing can be written there.
    """
    with output_errors(path), ExitStack() as stack:
        target = path.resolve()
        stack.enter_context(_made(target.parent))
        stack.enter_context(_claimed(target, path))
        yield


def put_back(path: Path) -> None:
    """Where a killed run has left a folder in parts, and no other is at work: makes it whole.

    Whoever only reads may call it: what can't be mended is left as it is.
    """
    target = path.resolve()
    places = ((target.parent, target.name), (target, target.name))
    if any((folder / holder_name(name)).exists() for folder, name in places):
        with contextlib.suppress(OSError, OutputError), _claimed(target, None):
            pass


def refuse_foreign_folder(path: Path, kind: Kind) -> None:
    """Lets a folder be written only where it can be, and nothing of someone else's would be lost.

    Call it before the work: it makes a folder there, or as near as there is one, and removes it.

    Args:
        path: where a folder is to be written.
        kind: what it will be, and may replace.

    Raises:
        OutputError: a file stands at `path`, or a folder that is neither empty nor of that kind;
            or nothing can be written there.
    """
    with output_errors(path):
        target = path.resolve()
        with _probed(target, path):
            if target.is_dir() and not _is_empty(target):
                _refuse_stranger(path, target, kind)
            elif (path.exists() or path.is_symlink()) and not target.is_dir():
                raise _not_replaced(path, kind, "a file")


def _refuse_stranger(path: Path, folder: Path, kind: Kind) -> None:
    if stranger := kind.stranger(folder):
        raise _not_replaced(path, kind, f"another folder: {stranger}")


def _not_replaced(path: Path, kind: Kind, found: str) -> OutputError:
    return OutputError(
        f"will not replace {path}",
        expected=f"a {kind.name} there, or nothing yet",
        found=found,
        fix="choose another place, or move it away",
    )


def refuse_unwritable_file(path: Path, *, begins: bytes | None = None) -> None:
    """Before the work: whether `whole_file` can begin there.

    Raises:
        OutputError: it can't.
    """
    with output_errors(path):
        target = path.resolve()
        _require_file(target, begins)
        with _probed(target, path):
            pass


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
    with output_errors(path):
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
    if target.is_dir() and not _can_write(target.parent, target.name):
        return target / f"{PREFIX}{ending.lstrip('.')}{PARTIAL}"
    return target.with_name(target.name + ending)


# Where.


def _is_empty(folder: Path) -> bool:
    return not any(entries(folder))


def _require_file(target: Path, begins: bytes | None) -> None:
    """Whether there is nothing yet, or a file that may be replaced: no device, no pipe."""
    if not target.exists():
        return
    if not target.is_file():
        raise OSError(*_IS_A_FOLDER if target.is_dir() else _IS_NO_FILE)
    if begins and target.stat().st_size:
        with target.open("rb") as file:
            if file.read(len(begins)) != begins:
                raise OutputError(
                    f"will not replace {target}",
                    expected=f"a {target.suffix or 'picture'} file there, or nothing yet",
                    found="a file of another format",
                    fix="choose another place, or move it away",
                )


@contextlib.contextmanager
def _claimed(target: Path, output: Path | None) -> Iterator[tuple[Path, bool]]:
    """The hidden folder to write in, and whether `target` is to be filled.

    The claim is on the folder beside `target` wherever it can be, and on one within besides where
    that is to be filled: all writers meet in one of them.
    """
    with ExitStack() as stack:
        try:
            holder = stack.enter_context(claim(target.parent, target.name, output))
        except BlockingIOError:
            raise
        except OSError:
            if not target.is_dir():
                raise
            filled = True
        else:
            recover(target, holder)
            if (target / holder_name(target.name)).exists():  # a killed writer was filling it
                with claim(target, target.name, output) as left:
                    recover(target, left)
            filled = _must_stay(target)
        if filled:
            holder = stack.enter_context(claim(target, target.name, output))
            recover(target, holder)
        yield holder, filled


def _must_stay(target: Path) -> bool:
    """Whether a folder stands there that can't or should not be exchanged for another one."""
    if not target.is_dir():
        return False
    here = Path.cwd()
    return target == here or target in here.parents or _is_empty(target) or _is_mount(target)


def _is_mount(target: Path) -> bool:
    """Of any kind: Python alone doesn't see one folder mounted on another of the same disk."""
    try:
        mounts = Path("/proc/self/mountinfo").read_bytes().splitlines()
    except OSError:
        return os.path.ismount(target)
    named = (mount.split()[4].replace(b"\\040", b" ") for mount in mounts)
    return os.path.ismount(target) or os.fsencode(target) in named


@contextlib.contextmanager
def _probed(target: Path, output: Path) -> Iterator[None]:
    """Claims a place, or as near as there is a folder, which is what writing it begins with."""
    nearest = _nearest_folder(target.parent)
    with ExitStack() as stack:
        if nearest == target.parent:
            stack.enter_context(_claimed(target, output))
        else:
            name = str(target.relative_to(nearest))
            stack.enter_context(claim(nearest, name, output))
        yield


def _can_write(folder: Path, name: str) -> bool:
    try:
        with claim(folder, name, None):
            return True
    except BlockingIOError:
        return True
    except OSError:
        return False


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
