"""Fixtures that several test modules share."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

REPOSITORY = Path(__file__).resolve().parent.parent
sys.path.append(str(REPOSITORY / "tools"))  # behind all packages: a tool may be called as one of them


@pytest.fixture(scope="session")
def shared_data() -> Path:
    """The folder of real data sets that lies beside the repository; tests are skipped where it does not."""
    folder = REPOSITORY.parent / "shared" / "data"
    if not folder.is_dir():
        pytest.skip(f"no data sets at {folder}: lay the folder of benchmark files beside the repository to run this")
    return folder
