"""Folders that appear whole."""

import os

from saelens_lite.files import new_folder


def test_a_new_folder_is_on_the_disk_before_it_has_its_name(tmp_path, monkeypatch):
    """Or a power cut leaves a folder of that name with files that are empty."""
    synced, at_renaming = set(), []
    fsync, replace = os.fsync, os.replace

    def noting(descriptor: int) -> None:
        synced.add(os.fstat(descriptor).st_ino)
        fsync(descriptor)

    def checking(source, target) -> None:
        at_renaming.append({path.name for path in source.rglob("*") if path.stat().st_ino not in synced})
        replace(source, target)

    monkeypatch.setattr(os, "fsync", noting)
    monkeypatch.setattr(os, "replace", checking)
    with new_folder(tmp_path / "out") as new:
        (new / "inner").mkdir()
        for name in ("a", "inner/b"):
            (new / name).write_text("content")
    assert at_renaming == [set()]
    assert sorted(path.name for path in (tmp_path / "out").rglob("*")) == ["a", "b", "inner"]
