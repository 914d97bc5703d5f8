"""`tools/gpu_check.py` on a CPU, so that the first GPU that it meets finds it in order."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
from tiny import REPOSITORY

from genrec_llm.files import read_json

PARTS = ("ceiling", "sync", "stages", "auto-batch")


@pytest.mark.slow  # about 45 s
def test_parts_write_what_they_found(shared_data: Path, tmp_path: Path) -> None:
    command = [
        sys.executable, str(REPOSITORY / "tools" / "gpu_check.py"), "--data-dir", str(shared_data), "--out", str(tmp_path),
        "--shape", "tiny", "--steps", "2", "--batch", "64", "--users", "50", "--parts", *PARTS,
    ]  # fmt: skip
    done = subprocess.run(command, check=False, capture_output=True, text=True, timeout=500)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-2000:]
    parts = read_json(tmp_path / "gpu.json")
    assert tuple(parts) == PARTS and not any(part["failed"] for part in parts.values())
    assert parts["sync"]["found"][0]["waits"] == 0
    losses = {fact["stage"]: fact["losses"] for fact in parts["stages"]["found"]}
    assert losses.keys() == {"pretrain", "finetune"} and all(8 < loss < 11 for each in losses.values() for loss in each)
