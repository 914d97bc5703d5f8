"""Writing that is whole or not there."""

from __future__ import annotations

import errno
import hashlib
import os
from pathlib import Path

import pytest

from genrec_llm import files
from genrec_llm.errors import DataError, ExportError
from genrec_llm.files import atomic_directory, atomic_file, read_json, sha256_file, write_json

FULL = OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
FAULTS: list[BaseException] = [FULL, ValueError("no good"), KeyboardInterrupt()]


def contents(folder: Path) -> dict[str, str]:
    return {str(path.relative_to(folder)): path.read_text() for path in folder.rglob("*") if path.is_file()}


def raised_as(fault: BaseException) -> type[BaseException]:
    return ExportError if isinstance(fault, OSError) else type(fault)


def test_a_file_and_a_directory_replace_what_was_there(tmp_path: Path) -> None:
    for text in ("one", "two"):
        with atomic_file(tmp_path / "new" / "file") as temporary:
            temporary.write_text(text)
        with atomic_directory(tmp_path / "folder") as temporary:
            (temporary / text).write_text(text)
    assert contents(tmp_path) == {"new/file": "two", "folder/two": "two"}
    assert sorted(path.name for path in tmp_path.iterdir()) == ["folder", "new"]


def test_what_a_killed_process_of_the_same_number_left_is_not_taken_over(tmp_path: Path) -> None:
    left = tmp_path / f".folder.{os.getpid()}.tmp"
    left.mkdir()
    (left / "half").touch()
    with atomic_directory(tmp_path / "folder") as temporary:
        (temporary / "whole").write_text("whole")
    assert contents(tmp_path) == {"folder/whole": "whole"}


@pytest.mark.parametrize("existing", [True, False])
@pytest.mark.parametrize("fault", FAULTS, ids=lambda fault: type(fault).__name__)
def test_a_fault_while_writing_leaves_what_was_there(fault: BaseException, existing: bool, tmp_path: Path) -> None:
    file, folder = tmp_path / "file", tmp_path / "folder"
    if existing:
        file.write_text("old")
        folder.mkdir()
        (folder / "a").write_text("old")
    before, names = contents(tmp_path), sorted(os.listdir(tmp_path))
    with pytest.raises(raised_as(fault)), atomic_file(file) as temporary:
        temporary.write_text("half of the n")
        raise fault
    with pytest.raises(raised_as(fault)), atomic_directory(folder) as temporary:
        (temporary / "a").write_text("half of the n")
        (temporary / "deeper").mkdir()
        raise fault
    assert contents(tmp_path) == before
    assert sorted(os.listdir(tmp_path)) == names  # nothing temporary is left either


def test_a_full_disk_is_reported_with_the_place_and_the_mend(tmp_path: Path) -> None:
    for writer in (atomic_file, atomic_directory):
        with pytest.raises(ExportError) as caught, writer(tmp_path / "it"):
            raise FULL
        (problem,) = caught.value.problems
        assert problem.startswith(f"{tmp_path / 'it'}: could not be written (No space left on device)")
        assert "what was there before is untouched" in problem and "Free some space" in problem


@pytest.mark.parametrize("fault", [FULL, KeyboardInterrupt()], ids=["disk full", "interrupted"])
@pytest.mark.parametrize("failing", [1, 2])
def test_a_fault_while_a_directory_takes_its_place_leaves_the_old_one(
    failing: int, fault: BaseException, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = tmp_path / "folder"
    folder.mkdir()
    (folder / "a").write_text("old")
    calls, rename = [], os.replace

    def replace(source: Path, target: Path) -> None:
        calls.append(source)
        if len(calls) == failing:
            raise fault
        rename(source, target)

    monkeypatch.setattr(files.os, "replace", replace)
    with pytest.raises(raised_as(fault)), atomic_directory(folder) as temporary:
        (temporary / "a").write_text("new")
    assert contents(tmp_path) == {"folder/a": "old"}


def test_a_fault_while_a_file_takes_its_place_leaves_the_old_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "file").write_text("old")

    def replace(source: Path, target: Path) -> None:
        raise FULL

    monkeypatch.setattr(files.os, "replace", replace)
    with pytest.raises(ExportError), atomic_file(tmp_path / "file") as temporary:
        temporary.write_text("new")
    assert contents(tmp_path) == {"file": "old"}


def test_a_place_that_cannot_be_written_to_is_an_export_error(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("in the way")
    with pytest.raises(ExportError, match="could not be written"), atomic_file(tmp_path / "file" / "below"):
        pass
    with (
        pytest.raises(ExportError, match="could not be written"),
        atomic_directory(tmp_path / "file" / "below"),
    ):
        pass
    assert contents(tmp_path) == {"file": "in the way"}


def test_json_survives_the_way_there_and_back_and_is_not_replaced_by_what_is_no_json(tmp_path: Path) -> None:
    path = tmp_path / "value.json"
    value = {"größe": [1, 2.5, None], "🛒": {"a": True}}
    write_json(path, value)
    assert read_json(path) == value
    assert "größe" in path.read_text(encoding="utf-8")
    with pytest.raises(TypeError):
        write_json(path, {"set": {1}})
    assert read_json(path) == value


def test_json_that_is_absent_or_cut_short_is_a_data_error(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="no such file"):
        read_json(tmp_path / "absent.json")
    (tmp_path / "short.json").write_text('{"a": [1, 2')
    with pytest.raises(DataError, match="may have been cut short"):
        read_json(tmp_path / "short.json")


def test_the_hash_is_that_of_the_bytes(tmp_path: Path) -> None:
    (tmp_path / "bytes").write_bytes(b"\x00\xff" * 100_000)
    assert sha256_file(tmp_path / "bytes") == hashlib.sha256(b"\x00\xff" * 100_000).hexdigest()
