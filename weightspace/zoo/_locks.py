"""Who writes a folder of unfinished work: locks that the system frees when their holder is killed."""

from __future__ import annotations

import errno
import fcntl
import os
import socket
import time
import warnings
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import TextIO

from weightspace.errors import OutputError

_TRIES, _PAUSE = 5, 0.1  # who is refused looks at the locks of others for a moment
_NO_LOCKS = (errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP)


def own_name() -> str:
    """What other processes are told of this one."""
    return f"process {os.getpid()} on {socket.gethostname()}"


@contextmanager
def hold_lock(path: Path, me: str | None, *, shared: bool, wait: bool = False) -> Iterator[None]:
    """Hold the lock of a file, in which the holder leaves its name; a shared one leaves none.

    Args:
        path: of the file; its folder is made if there is none.
        me: the holder, for messages to others.
        shared: whether others may share it.
        wait: until it is free, instead of being refused.

    Raises:
        OutputError: another process holds it, or the folder cannot be written.
    """
    with _locked_file(path, shared=shared, wait=wait) as file:
        _sign(file, me or "")
        try:
            yield
        finally:
            if not shared:
                _sign(file, "")


def lock_holder(path: Path) -> str:
    """Who holds a lock; "" for nobody, even where a killed process left its name."""
    try:
        with path.open("r+") as file:
            return "" if _try_lock(file, path, shared=True) else file.read().strip() or "another process"
    except FileNotFoundError:
        return ""


def _locked_file(path: Path, *, shared: bool, wait: bool) -> TextIO:
    tries = 0
    while True:
        file = _opened(path)
        if file is None:
            continue
        if not _try_lock(file, path, shared=shared, wait=wait):
            file.close()
            tries += 1
            if tries == _TRIES:
                raise OutputError(
                    f"output: {path.parent} is being written by {_who(path)}; wait for it, or choose another name"
                )
            time.sleep(_PAUSE)
        # the holder before us may have finished and removed the folder since we opened the file
        elif _is_still(file, path):
            return file
        else:
            file.close()


def _try_lock(file: TextIO, path: Path, *, shared: bool, wait: bool = False) -> bool:
    mode = (fcntl.LOCK_SH if shared else fcntl.LOCK_EX) | (0 if wait else fcntl.LOCK_NB)
    try:
        fcntl.flock(file, mode)
    except BlockingIOError:
        return False
    except OSError as error:
        if error.errno not in _NO_LOCKS:
            raise OutputError(f"output: {path} cannot be locked ({error.strerror})") from None
        warnings.warn(
            f"the file system of {path.parent} has no locks: two processes that write the same zoo would not notice",
            stacklevel=2,
        )
    return True


def _is_still(file: TextIO, path: Path) -> bool:
    try:
        return os.fstat(file.fileno()).st_ino == path.stat().st_ino
    except FileNotFoundError:
        return False


def _opened(path: Path) -> TextIO | None:
    """The file of a lock; None when the folder has vanished under our hands."""
    try:
        path.parent.mkdir(exist_ok=True)
        return path.open("a+")
    except FileNotFoundError:
        if path.parent.parent.is_dir():
            return None
        raise OutputError(f"output: directory {path.parent.parent} does not exist") from None
    except OSError as error:
        raise OutputError(f"output: {path.parent} cannot be written ({error.strerror})") from None


def _sign(file: TextIO, name: str) -> None:
    with suppress(OSError):  # a full disk keeps nobody from holding the lock
        file.truncate(0)
        os.write(file.fileno(), name.encode())  # not through the buffer, which closing would flush once more


def _who(path: Path) -> str:
    """Who holds a lock: one process, or those that make parts."""
    names = [path.read_text().strip()] if path.exists() else []
    names += [lock_holder(entry) for entry in path.parent.glob("lock-*-of-*")]
    found = [name for name in dict.fromkeys(names) if name]
    others = f" and {len(found) - 1} more" if len(found) > 1 else ""
    return f"{found[0]}{others}" if found else "another process"
