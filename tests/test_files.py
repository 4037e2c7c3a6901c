"""Files are written whole or not at all."""

from __future__ import annotations

import pytest

from danlu.files import replacing_folder, write_whole


def test_a_failed_write_leaves_the_old_file_and_no_part(tmp_path, monkeypatch):
    path = tmp_path / "deep" / "file.json"
    write_whole(path, "old")

    def refuse(self, target):
        raise OSError("disk full")

    monkeypatch.setattr(type(path), "replace", refuse)
    with pytest.raises(OSError, match="disk full"):
        write_whole(path, "new")
    assert path.read_text() == "old"
    assert list(path.parent.iterdir()) == [path]


def test_write_whole_leaves_the_old_file_when_writing_fails(tmp_path):
    path = write_whole(tmp_path / "file", "old")
    with pytest.raises(UnicodeEncodeError):
        write_whole(path, "\ud800")
    assert path.read_text() == "old" and list(tmp_path.iterdir()) == [path]


def test_a_folder_is_replaced_whole_or_not_at_all(tmp_path, monkeypatch):
    path = tmp_path / "deep" / "model"
    with replacing_folder(path) as folder:
        (folder / "a").write_text("old")
    with pytest.raises(RuntimeError, match="midway"), replacing_folder(path) as folder:
        (folder / "a").write_text("new")
        raise RuntimeError("midway")
    assert (path / "a").read_text() == "old" and list(path.parent.iterdir()) == [path]
    move = type(path).replace

    def refuse(self, target):
        if self.name == "new":
            raise OSError("disk full")
        return move(self, target)

    monkeypatch.setattr(type(path), "replace", refuse)
    with pytest.raises(OSError, match="disk full"), replacing_folder(path) as folder:
        (folder / "b").write_text("new")
    assert (path / "a").read_text() == "old" and list(path.parent.iterdir()) == [path]
    monkeypatch.undo()
    with replacing_folder(path) as folder:
        (folder / "b").write_text("new")
    assert [item.name for item in path.iterdir()] == ["b"] and list(path.parent.iterdir()) == [path]
