"""Files are whole or not there."""

from __future__ import annotations

import os
import stat
from pathlib import Path
from typing import Any

import pytest

from sdeblend.shell.files import write_atomically


def test_writes_text_and_bytes_and_makes_folders(tmp_path: Path) -> None:
    target = tmp_path / "a" / "b" / "result.json"
    write_atomically(target, "α = 1\n")
    assert target.read_bytes() == "α = 1\n".encode()
    write_atomically(str(target), b"\x00\r\n")
    assert target.read_bytes() == b"\x00\r\n"
    assert os.listdir(target.parent) == ["result.json"]


@pytest.mark.parametrize("failing", ["fsync", "replace"])
def test_keeps_the_old_file_when_writing_fails(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, failing: str
) -> None:
    target = tmp_path / "result.json"
    write_atomically(target, "old")

    def full(*args: Any) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr({"fsync": "os.fsync", "replace": "pathlib.Path.replace"}[failing], full)
    with pytest.raises(OSError, match="No space"):
        write_atomically(target, "new")
    assert target.read_text() == "old"
    assert os.listdir(tmp_path) == ["result.json"]


def test_keeps_permissions_and_follows_links(tmp_path: Path) -> None:
    target = tmp_path / "result.json"
    write_atomically(target, "old")
    mask = os.umask(0)
    os.umask(mask)
    assert stat.S_IMODE(target.stat().st_mode) == 0o666 & ~mask
    target.chmod(0o640)
    link = tmp_path / "link"
    link.symlink_to(target)
    write_atomically(link, "new")
    assert link.is_symlink()
    assert target.read_text() == "new"
    assert stat.S_IMODE(target.stat().st_mode) == 0o640


def test_writes_to_a_pipe_without_replacing_it(tmp_path: Path) -> None:
    pipe = tmp_path / "pipe"
    os.mkfifo(pipe)
    reader = os.open(pipe, os.O_RDONLY | os.O_NONBLOCK)
    try:
        write_atomically(pipe, "through")
        assert os.read(reader, 100) == b"through"
    finally:
        os.close(reader)
    assert pipe.is_fifo()
    write_atomically(os.devnull, "nowhere")
    assert stat.S_ISCHR(os.stat(os.devnull).st_mode)


def test_refuses_a_folder_and_other_types(tmp_path: Path) -> None:
    with pytest.raises(IsADirectoryError, match="is a folder; name a file"):
        write_atomically(tmp_path, "text")
    with pytest.raises(TypeError, match="must be str or bytes, got dict"):
        write_atomically(tmp_path / "a", {"a": 1})  # type: ignore[arg-type]
    assert os.listdir(tmp_path) == []
