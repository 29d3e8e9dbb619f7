"""Files that are either whole or not there: write beside the target, sync, then rename over it.

A rename within one folder is atomic on POSIX systems, so a reader, or a run that was killed, sees the old
file or the new one and never a part of it.

Source: POSIX.1-2017, rename().
"""

from __future__ import annotations

import errno
import os
import secrets
from pathlib import Path


def write_atomically(path: str | os.PathLike[str], content: str | bytes) -> None:
    """Write ``content`` to ``path`` whole or not at all, making parent folders as needed.

    A link is followed, an existing file keeps its permissions, and a device or pipe (``/dev/stdout``) is
    written to as it is, since renaming over it would replace it.

    Args:
        path: The file to write or replace.
        content: Text (written as UTF-8, newlines as given) or bytes.

    Raises:
        TypeError: If ``content`` is neither text nor bytes.
        OSError: If the file cannot be written; what was there before is then still there.
    """
    if not isinstance(content, str | bytes):
        raise TypeError(f"content must be str or bytes, got {type(content).__name__}; encode it first")
    data = content.encode() if isinstance(content, str) else content
    target = Path(path)
    if target.is_dir():
        raise IsADirectoryError(errno.EISDIR, "is a folder; name a file to write", str(path))
    if target.is_relative_to("/dev") or (target.exists() and not target.is_file()):
        with target.open("ab") as stream:
            stream.write(data)
        return
    target = target.resolve()
    target.parent.mkdir(parents=True, exist_ok=True)
    partial = target.with_name(f".{secrets.token_hex(8)}.part")
    mode = target.stat().st_mode & 0o7777 if target.exists() else None
    try:
        with partial.open("xb") as stream:
            stream.write(data)
            stream.flush()
            os.fsync(stream.fileno())
        if mode is not None:
            partial.chmod(mode)
        partial.replace(target)
    except BaseException:
        partial.unlink(missing_ok=True)
        raise
