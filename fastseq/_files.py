"""Writing files so that a reader, or an interruption, never sees half of one."""

from __future__ import annotations

import os
import secrets
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

__all__ = ["atomic_write", "check_writable"]


@contextmanager
def atomic_write(path: str | os.PathLike[str]) -> Iterator[Path]:
    """Give a temporary name beside ``path`` to write to; move it into place if the body succeeds.

    Args:
        path: the file to create or replace; missing folders are created. The temporary name has
            the same suffix, for writers that choose a format by it. A device or pipe has nothing
            to replace and is handed out itself.

    Raises:
        OSError: from the file system. On this and every other exception ``path`` is as it was.
    """
    target = Path(os.path.realpath(path))
    if target.exists() and not target.is_file():
        yield target
        return
    target.parent.mkdir(parents=True, exist_ok=True)
    temporary = target.with_name(f".{target.stem}.{secrets.token_hex(4)}{target.suffix}")
    try:
        yield temporary
        # Without this a power cut could leave the new name pointing at an empty file.
        with open(temporary, "rb") as file:
            os.fsync(file.fileno())
        os.replace(temporary, target)
    except BaseException:
        with suppress(FileNotFoundError):
            temporary.unlink()
        raise


def check_writable(directory: str | os.PathLike[str]) -> None:
    """Raise OSError if files could not be written to ``directory``; create nothing.

    Args:
        directory: a folder that may not exist yet; then its nearest existing parent counts.

    Raises:
        NotADirectoryError: a part of the path is a file.
        PermissionError: the folder, or the parent it would be created in, is not writable.
    """
    nearest = Path(directory).absolute()
    while not os.path.lexists(nearest) and nearest != nearest.parent:
        nearest = nearest.parent
    if not nearest.is_dir():
        raise NotADirectoryError(
            f"fastseq.files: expected a directory to write to, got {directory}: "
            f"{nearest} is not a directory"
        )
    if not os.access(nearest, os.W_OK | os.X_OK):
        raise PermissionError(
            f"fastseq.files: expected a directory to write to, got {directory}: "
            f"no permission to write in {nearest}"
        )
