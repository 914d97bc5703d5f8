"""Writing that is whole or not there: a temporary name beside the target, then a rename."""

from __future__ import annotations

import hashlib
import json
import os
import re
import shutil
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from safetensors import SafetensorError

from genrec_llm.errors import DataError, ExportError


@contextmanager
def writing(path: str | os.PathLike[str]) -> Iterator[None]:
    """Turn what a full or forbidden disk raises in the block into an error that names `path` and the mend.

    Raises:
        ExportError: the operating system, safetensors or torch.save (whose errors are no OSError) could not write.
    """
    try:
        yield
    except (OSError, SafetensorError, RuntimeError) as error:
        # torch.save on a full disk (torch 2.13): "[enforce fail at inline_container.cc:672] unexpected pos"
        if isinstance(error, RuntimeError) and "inline_container" not in str(error):
            raise
        number = re.search(r"\(os error (\d+)\)", str(error))  # in safetensors' text
        reason = os.strerror(int(number[1])) if number else getattr(error, "strerror", None) or error
        raise ExportError(
            f"{path}: could not be written ({reason}); what was there before is untouched. "
            "Free some space or choose another place, then run the same command again."
        ) from error


@contextmanager
def atomic_file(path: str | os.PathLike[str]) -> Iterator[Path]:
    """Yield a temporary path that becomes `path` when the block ends without an error.

    Raises:
        ExportError: the file cannot be written (a full disk, no permission); `path` is as it was.
    """
    path = Path(path)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        with writing(path):
            path.parent.mkdir(parents=True, exist_ok=True)
            yield temporary
            os.replace(temporary, path)
    finally:
        with suppress(OSError):
            temporary.unlink()


@contextmanager
def atomic_directory(path: str | os.PathLike[str]) -> Iterator[Path]:
    """Yield a temporary directory that takes the place of `path` when the block ends without an error.

    Raises:
        ExportError: the directory cannot be written; what was at `path` is as it was.
    """
    path = Path(path)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    replaced = path.with_name(f".{path.name}.{os.getpid()}.old")
    try:
        with writing(path):
            shutil.rmtree(temporary, ignore_errors=True)  # of a killed process that had this number
            temporary.mkdir(parents=True)
            yield temporary
            if path.exists():
                os.replace(path, replaced)
            os.replace(temporary, path)
    finally:
        if replaced.exists() and not path.exists():
            os.replace(replaced, path)
        shutil.rmtree(temporary, ignore_errors=True)
        shutil.rmtree(replaced, ignore_errors=True)


def write_json(path: str | os.PathLike[str], value: Any) -> None:
    """Write `value` as indented json, whole or not at all."""
    with atomic_file(path) as temporary:
        temporary.write_text(json.dumps(value, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


def read_json(path: str | os.PathLike[str]) -> Any:
    """Read a json file.

    Raises:
        DataError: the file is absent or is not json.
    """
    try:
        return json.loads(Path(path).read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise DataError(f"{path}: no such file") from error
    except ValueError as error:
        raise DataError(f"{path}: not a json file ({error}); it may have been cut short") from error


def sha256_file(path: str | os.PathLike[str]) -> str:
    """Hex digest of a file's bytes."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def describe_files(folder: Path, *, without: Sequence[str] = ()) -> dict[str, dict[str, Any]]:
    """Size and hash of every file below a folder, by its path there: `{"bytes": …, "sha256": …}`.

    Args:
        without: paths that are left out.
    """
    paths = sorted(path for path in folder.rglob("*") if path.is_file())
    names = {str(path.relative_to(folder)): path for path in paths}
    return {
        name: {"bytes": path.stat().st_size, "sha256": sha256_file(path)}
        for name, path in names.items()
        if name not in without
    }


def changed_files(folder: Path, listed: Mapping[str, Mapping[str, Any]]) -> list[str]:
    """What is no longer as `describe_files` saw it, one sentence a file; empty if all is."""
    problems = []
    for name, entry in listed.items():
        path = folder / name
        if not path.is_file():
            problems.append(f"{path}: no such file")
        elif (size := path.stat().st_size) != entry["bytes"]:
            problems.append(f"{path}: has {size:,} bytes, {entry['bytes']:,} were written")
        elif (found := sha256_file(path)) != entry["sha256"]:
            problems.append(f"{path}: was changed (sha256 {found[:12]}, {entry['sha256'][:12]} was written)")
    return problems
