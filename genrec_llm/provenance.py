"""What made a number: command, commit, versions, hardware, time."""

from __future__ import annotations

import os
import platform
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import torch

from genrec_llm.errors import counted
from genrec_llm.export import versions
from genrec_llm.privacy import redacted


def git_commit() -> str | None:
    """Commit of the checkout that runs, with "+changes" where it has any.

    Outside git, or installed in another's, what the environment variable GENREC_COMMIT says, or None.
    """
    folder, here = Path(__file__).parent, Path(__file__).name
    try:
        subprocess.run(["git", "ls-files", "--error-unmatch", here], cwd=folder, capture_output=True, check=True)
        commit = subprocess.run(["git", "rev-parse", "HEAD"], cwd=folder, capture_output=True, text=True, check=True)
        dirty = subprocess.run(
            ["git", "status", "--porcelain", "-uno"], cwd=folder, capture_output=True, text=True, check=True
        )
    except (OSError, subprocess.CalledProcessError):
        return os.environ.get("GENREC_COMMIT")
    return commit.stdout.strip() + ("+changes" if dirty.stdout.strip() else "")


def hardware() -> str:
    """The machine in words."""
    if torch.cuda.is_available():
        return f"{torch.cuda.device_count()} x {torch.cuda.get_device_name()}"
    return f"CPU, {counted(torch.get_num_threads(), 'thread')}, {platform.machine()}"


def provenance() -> dict[str, Any]:
    """What made a number: command, commit, versions, hardware, time (UTC)."""
    return {
        "command": redacted(sys.argv),
        "commit": git_commit(),
        "versions": versions(),
        "hardware": hardware(),
        "time": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
    }
