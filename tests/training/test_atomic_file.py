"""Files are written completely or not at all, also by several processes and without support for links."""

from __future__ import annotations

import errno
import os

import pytest

from cpc_ext.training.atomic_file import atomic_file, replace_with_link


def test_two_writers_of_one_path(tmp_path):
    path = tmp_path / "file"
    with atomic_file(path) as first:
        first.write(b"first")
        with atomic_file(path) as second:
            second.write(b"second")
        assert path.read_bytes() == b"second"
    assert path.read_bytes() == b"first"
    assert os.listdir(tmp_path) == ["file"]


def test_what_killed_processes_left_is_removed_and_what_is_in_use_is_not(tmp_path):
    path = tmp_path / "file[1].pt"
    for name in (".file[1].pt.tmp", ".file[1].pt.4711-0a1b2c3d.tmp"):  # The first of an earlier version.
        (tmp_path / name).write_bytes(b"half of i")
    (tmp_path / ".file2.pt.1-00000000.tmp").write_bytes(b"another's")
    with atomic_file(path) as file:
        file.write(b"whole")
        with atomic_file(path):
            pass
        assert len(list(tmp_path.glob(".*.tmp"))) == 2
    assert path.read_bytes() == b"whole"
    assert sorted(os.listdir(tmp_path)) == [".file2.pt.1-00000000.tmp", "file[1].pt"]


def test_a_failure_leaves_what_was_there(tmp_path):
    path = tmp_path / "file"
    path.write_bytes(b"before")

    def fail():
        with atomic_file(path) as file:
            file.write(b"after")
            raise ValueError("stop")

    with pytest.raises(ValueError, match="stop"):
        fail()
    assert path.read_bytes() == b"before"
    assert os.listdir(tmp_path) == ["file"]


def test_permissions_are_those_of_any_new_file(tmp_path):
    (tmp_path / "plain").touch()
    with atomic_file(tmp_path / "file"):
        pass
    assert (tmp_path / "file").stat().st_mode == (tmp_path / "plain").stat().st_mode


def test_link_shares_the_content(tmp_path):
    source, target = tmp_path / "source", tmp_path / "target"
    source.write_bytes(b"content")
    target.write_bytes(b"before")
    replace_with_link(source, target)
    replace_with_link(source, target)  # Both are one file now.
    assert target.samefile(source)
    assert sorted(os.listdir(tmp_path)) == ["source", "target"]


@pytest.mark.parametrize("code", [errno.EPERM, errno.ENOTSUP, errno.EMLINK, errno.EXDEV, errno.ENOSYS, errno.EACCES])
def test_copy_where_there_are_no_links(tmp_path, monkeypatch, code):
    def refuse(*arguments, **options):
        raise OSError(code, os.strerror(code))

    monkeypatch.setattr(os, "link", refuse)
    source, target = tmp_path / "source", tmp_path / "target"
    source.write_bytes(b"content")
    target.write_bytes(b"before")
    replace_with_link(source, target)
    assert target.read_bytes() == b"content"
    assert not target.samefile(source)
    assert sorted(os.listdir(tmp_path)) == ["source", "target"]


def test_folder_that_cannot_be_forced_to_the_disk(tmp_path, monkeypatch):
    original = os.fsync

    def fsync(descriptor):
        if os.path.isdir(f"/proc/self/fd/{descriptor}"):
            raise OSError(errno.EINVAL, os.strerror(errno.EINVAL))
        original(descriptor)

    monkeypatch.setattr(os, "fsync", fsync)
    with atomic_file(tmp_path / "file") as file:
        file.write(b"content")
    assert (tmp_path / "file").read_bytes() == b"content"
