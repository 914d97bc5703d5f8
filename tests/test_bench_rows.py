"""The benchmark of very many items, on few."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest
import tiny


@pytest.mark.slow
def test_the_arms_are_measured_beside_their_rival_and_rows_of_other_benches_stay(tmp_path: Path) -> None:
    out = tmp_path / "speed.json"
    out.write_text(json.dumps([{"bench": "another", "arm": "kept"}]))
    command = [
        sys.executable, "tools/bench_rows.py", "--items", "400", "--user-buckets", "50", "--steps", "2", "--users", "5",
        "--batch", "16", "--out", str(out),
    ]  # fmt: skip
    for _ in range(2):  # the second run replaces the rows of the first
        assert "compared with" in tiny.run(command)
        command[command.index("--users") + 1] = "4"
    other, *rows = json.loads(out.read_text())
    assert other == {"bench": "another", "arm": "kept"}
    assert len(rows) == 9 and {row["arm"] for row in rows} == {"full", "lora", "whole scores"}
    assert all(row["value"] > 0 and "4 users ranked" in row["shape"] for row in rows)
    compared = [row for row in rows if row["rival"]]
    assert [row["arm"] for row in compared] == ["full"] * 3 + ["lora"] * 3  # memory, training, ranking
    shares = [row["ratio"] for row in compared if row["unit"] == "GiB"]
    assert all(0.5 < share < 2 for share in shares), "few items: no arm holds more than another"
