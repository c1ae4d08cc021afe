"""The key by which this user's engines are known: 32 random bytes that never leave the user.

    $HIMIX_EDGE_CONFIG/engine.key, or $XDG_CONFIG_HOME/himix-edge/engine.key,
    or ~/.config/himix-edge/engine.key

Whoever has it can make engines that this user's programs load and run. It is made by the first
build, with mode 0600, and is not read where others could have read or written it.
"""

from __future__ import annotations

import contextlib
import os
import secrets
import shlex
import stat
from pathlib import Path

from himix_edge.engines.folders import UnusualFileError, open_file, open_folder, write_small
from himix_edge.errors import EngineError, OutputError

KEY_FILE = "engine.key"
KEY_BYTES = 32


def config_folder() -> Path:
    """Where himix-edge keeps what is this user's alone.

    Raises:
        OutputError: the user has no home folder, and no variable names another place.
    """
    if own := os.environ.get("HIMIX_EDGE_CONFIG"):
        return Path(own)
    configs = Path(os.environ.get("XDG_CONFIG_HOME") or "")
    if configs.is_absolute():  # the XDG specification has a relative one ignored
        return configs / "himix-edge"
    try:
        return Path.home() / ".config" / "himix-edge"
    except RuntimeError as error:
        raise OutputError(
            "no place for the key of engines",
            expected="a home folder",
            found=str(error),
            fix="set HIMIX_EDGE_CONFIG to a folder of your own",
        ) from error


def user_key() -> bytes | None:
    """The key of this user; None where none was made yet.

    Raises:
        EngineError: one that others can read or have written, or that is no key.
        OutputError: no place for it.
    """
    folder = config_folder()
    try:
        with open_folder(folder) as descriptor:
            return _key_in(folder, descriptor)
    except FileNotFoundError:
        return None
    except OSError as error:
        raise _unusable(folder / KEY_FILE, error.strerror or str(error)) from error


def make_user_key() -> bytes:
    """The key of this user, made if there is none.

    Raises:
        EngineError: as `user_key`.
        OutputError: it can't be written.
    """
    folder = config_folder()
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        folder.mkdir(mode=0o700, exist_ok=True)
        with open_folder(folder) as descriptor:
            _lock(descriptor)  # of two first builds, one makes it
            with contextlib.suppress(FileNotFoundError):
                return _key_in(folder, descriptor)
            write_small(descriptor, KEY_FILE, secrets.token_bytes(KEY_BYTES), mode=0o600)
            return _key_in(folder, descriptor)
    except OSError as error:
        raise OutputError(
            f"cannot write {folder / KEY_FILE}, the key of this user's engines",
            expected="a folder of your own that can be written",
            found=error.strerror or str(error),
            fix="set HIMIX_EDGE_CONFIG to such a folder",
        ) from error


def _lock(descriptor: int) -> None:
    """Until the descriptor is closed, where the system and the file system have locks."""
    with contextlib.suppress(OSError, ImportError):
        import fcntl

        fcntl.flock(descriptor, fcntl.LOCK_EX)


def _key_in(folder: Path, descriptor: int) -> bytes:
    """The key of an open folder, whose path is for the errors.

    Raises:
        FileNotFoundError: none is there.
        EngineError: one that can't be relied on.
        OSError: it can't be read.
    """
    path = folder / KEY_FILE
    holder = os.fstat(descriptor)
    if holder.st_uid != os.geteuid():
        raise _unusable(folder, "another user's folder", "set HIMIX_EDGE_CONFIG to your own")
    if holder.st_mode & 0o022:
        fix = f"chmod 700 {shlex.quote(str(folder))}"
        raise _unusable(folder, "a folder that others can write", fix)
    try:
        file = open_file(descriptor, KEY_FILE)
    except UnusualFileError as error:
        raise _unusable(path, str(error)) from error
    with file:
        found = os.fstat(file.fileno())
        if found.st_uid != os.geteuid():
            raise _unusable(path, "another user's file")
        if found.st_mode & 0o077:
            fix = f"chmod 600 {shlex.quote(str(path))}, or remove it if others may have read it"
            raise _unusable(path, f"mode {stat.S_IMODE(found.st_mode):04o}", fix)
        data = file.read(KEY_BYTES + 1)
    if len(data) != KEY_BYTES:
        raise _unusable(path, f"{found.st_size} bytes")
    return data


def _unusable(path: Path, found: str, fix: str | None = None) -> EngineError:
    return EngineError(
        f"{path} can't be relied on to tell this user's engines",
        expected=f"your own file of {KEY_BYTES} bytes, with mode 0600",
        found=found,
        fix=fix or f"remove {shlex.quote(str(path))}, and build the engines again",
    )
