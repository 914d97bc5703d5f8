"""Checkpoints that count: whole or not there, and which of them a launch can go on from."""

from __future__ import annotations

import logging
import shutil
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from genrec_llm.errors import ConfigError, DataError
from genrec_llm.files import changed_files, describe_files, read_json, write_json

logger = logging.getLogger(__name__)
MANIFEST = "manifest.json"
UNIVERSAL = "_universal"
"""End of the folder's name in which DeepSpeed's partitions lie joined, for another number of processes."""


def write_manifest(folder: Path, launch: Mapping[str, Any]) -> None:
    """Record how a finished checkpoint was launched, and size and hash of every file of every process.

    Args:
        launch: from `describe_launch`.
    """
    write_json(folder / MANIFEST, {"launch": dict(launch), "files": describe_files(folder, without=[MANIFEST])})


def broken(folder: Path) -> str | None:
    """Why a checkpoint does not count: no manifest, or a file that is not as the manifest says; None if it does."""
    if not (folder / MANIFEST).is_file():
        return "stopped while it was written: it has no manifest"
    try:
        manifest = read_json(folder / MANIFEST)
        if not {"launch", "files"} <= manifest.keys():
            return "an earlier version wrote it"
        return next(iter(changed_files(folder, manifest["files"])), None)
    except (DataError, OSError) as error:  # cut short, or a disk that does not read
        return str(error)


def is_complete(folder: Path) -> bool:
    """Whether a checkpoint counts."""
    return broken(folder) is None


def checkpoints(run: Path) -> dict[int, Path]:
    """The checkpoints of a run by their steps, earliest first, whole or not."""
    found = {path.name.removeprefix("checkpoint-"): path for path in run.glob("checkpoint-*")}
    return {int(step): found[step] for step in sorted(filter(str.isdigit, found), key=int)}


def remove_later(run: Path, step: int) -> None:
    """Remove what a run that was stopped had begun to write beyond the step it is at now.

    Left there, it would count as the newest one.
    """
    for later, folder in checkpoints(run).items():
        if later > step and not is_complete(folder):
            shutil.rmtree(folder)


def any_written(run: Path) -> bool:
    """Whether a run has a checkpoint with a manifest; its files are not read."""
    return any((folder / MANIFEST).is_file() for folder in checkpoints(run).values())


def last_complete_checkpoint(run: Path) -> str | None:
    """The newest checkpoint of a run that is whole; broken ones are skipped with a warning that names the file."""
    for folder in reversed(checkpoints(run).values()):
        reason = broken(folder)
        if reason is None:
            return str(folder)
        logger.warning("%s is not whole and is skipped (%s)", folder, reason)
    return None


def family(launch: Mapping[str, Any]) -> str:
    """What two launches must share for one to read the other's optimizer: a ZeRO stage, FSDP, or whole copies."""
    if "zero_stage" in launch:
        return f"ZeRO-{launch['zero_stage']}"
    return "FSDP" if launch["strategy"] == "FSDP" else "whole copies (cpu, single_gpu, ddp)"


def needs_joining(checkpoint: Path, launch: Mapping[str, Any]) -> bool:
    """Whether DeepSpeed's partitions have to be joined first, because another number of processes goes on.

    Raises:
        ConfigError: this launch cannot go on from that checkpoint.
    """
    theirs = read_json(checkpoint / MANIFEST)["launch"]
    mend = f"launch {theirs['world_size']} processes with the same file as before, or choose another --output-dir"
    if family(theirs) != family(launch):
        raise ConfigError(
            f"{checkpoint}: was written under {family(theirs)}, whose optimizer state {family(launch)} cannot read: {mend}"
        )
    if theirs["world_size"] == launch["world_size"]:
        return False
    if family(launch) in ("FSDP", "ZeRO-3"):
        # DeepSpeed 0.19 reads a universal checkpoint under ZeRO-3 with the first group's learning rate for all groups
        # (load_hp_checkpoint_state_from_checkpoint_dir_stage3), so rows and adapters would go on with one rate.
        raise ConfigError(
            f"{checkpoint}: was written by {theirs['world_size']} processes under {family(launch)}, now there are "
            f"{launch['world_size']}; only ddp, zero1 and zero2 can change their number: {mend}"
        )
    return "zero_stage" in launch


def join_partitions(checkpoint: Path) -> None:
    """Turn DeepSpeed's partitions of a checkpoint into its universal form beside them (Lian et al., 2024).

    Nothing that the manifest lists is touched, and a conversion that was stopped is done anew.

    Raises:
        ConfigError: DeepSpeed could not read the partitions.
    """
    tag = (checkpoint / "latest").read_text(encoding="utf-8").strip()
    out = checkpoint / f"{tag}{UNIVERSAL}"
    shutil.rmtree(out, ignore_errors=True)
    command = [sys.executable, "-m", "deepspeed.checkpoint.ds_to_universal", "--inject_missing_state",
               "--input_folder", str(checkpoint / tag), "--output_folder", str(out)]  # fmt: skip
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        reason = (done.stderr.strip() or "no reason given").splitlines()[-1]
        raise ConfigError(
            f"{checkpoint}: DeepSpeed could not join its partitions for another number of processes ({reason}): launch as "
            "many processes as before, or choose another --output-dir"
        )
