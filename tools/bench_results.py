"""The figures of the benchmarks: what a row of docs/results/speed_*.json holds, the table of them, and their picture.

    python tools/bench_results.py docs/results/speed_cpu.json --plot docs/results/speed_cpu.png
    python tools/bench_results.py first/speed_gpu.json second/speed_gpu.json    # together

`bench_train.py` and `bench_topn.py` write the rows, each with the ratio to a rival that was measured in the same run.
Of a bench that several files have, the rows of the last are shown.
"""

from __future__ import annotations

import argparse
import resource
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from genrec_llm.errors import counted
from genrec_llm.files import atomic_file, read_json, write_json

GIB = 2**30
MEMORY = "GiB"
"""The unit whose ratio is a share of the rival's; that of all others says how many times less than the rival."""


@dataclass(frozen=True)
class Row:
    """One figure.

    Attributes:
        bench: what is measured, at which shape and with how many threads; a new run replaces its rows.
        arm: who was measured, with the settings that were not left at their defaults.
        rival: whom `ratio` compares with; None where the arm is a rival itself.
        ratio: the rival's value over this one, of memory this one over the rival's; both of this run.
        value: the best of `values`, in `unit`; less is better.
        values: one for each measured block.
        shape: geometry, data and batch.
        command, commit, hardware, versions, time: see `genrec_llm.provenance.provenance`.
    """

    bench: str
    arm: str
    rival: str | None
    ratio: float | None
    value: float
    unit: str
    values: list[float]
    shape: str
    command: Any
    commit: str | None
    hardware: str
    versions: dict[str, str]
    time: str


Measured = Mapping[str, Mapping[str, Sequence[float]]]
"""Arm → unit → one value for each block."""


def compare(bench: str, shape: str, measured: Measured, rivals: Sequence[str], made: Mapping[str, Any]) -> list[Row]:
    """Rows of one run: each rival by itself, every other arm beside each of the rivals.

    Args:
        rivals: those of the arms that the others are compared with.
        made: from `genrec_llm.provenance.provenance`.

    Raises:
        ValueError: an arm lacks a unit or a value, so that nothing may be compared.
    """
    units = list(next(iter(measured.values())))
    lacking = [arm for arm, values in measured.items() if [*values] != units or not all(values.values())]
    if lacking:
        raise ValueError(f"{bench}: {', '.join(lacking)}: not measured in all of {', '.join(units)}")
    rows = []
    for arm, values in measured.items():
        for rival in [None] if arm in rivals else rivals:
            for unit in units:
                value, ratio = min(values[unit]), None
                if rival is not None:
                    theirs = min(measured[rival][unit])
                    ratio = value / theirs if unit == MEMORY else theirs / value
                rows.append(Row(bench, arm, rival, ratio, value, unit, list(values[unit]), shape, **made))
    return rows


def merged(rows: Sequence[Mapping[str, Any]], newer: Sequence[Mapping[str, Any]]) -> list[Mapping[str, Any]]:
    """Rows with newer ones in place of those of the same benches; rows of others stay."""
    benches = {row["bench"] for row in newer}
    return [*(row for row in rows if row["bench"] not in benches), *newer]


def record(path: Path, rows: Sequence[Row]) -> None:
    """Write rows to a json file in place of those of the same benches; rows of others stay."""
    write_json(path, merged(read_json(path) if path.is_file() else [], list(map(asdict, rows))))


def aligned(lines: Sequence[Sequence[str]]) -> str:
    """Columns as text, for a terminal."""
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    return "\n".join("  ".join(map(str.ljust, line, widths)).rstrip() for line in lines)


def table(rows: Sequence[Mapping[str, Any]]) -> str:
    """Rows as text, for a terminal."""
    lines: list[tuple[str, ...]] = [("arm", "compared with", "value", "unit", "ratio")]
    for row in rows:
        ratio = "" if row["ratio"] is None else f"{row['ratio']:.2f}" + ("x" if row["unit"] != MEMORY else "")
        lines.append((row["arm"], row["rival"] or "", f"{row['value']:.4g}", row["unit"], ratio))
    return aligned(lines)


def tables(rows: Sequence[Mapping[str, Any]]) -> str:
    """A table for each bench, under its name and where it was measured."""
    shown = []
    for bench in dict.fromkeys(row["bench"] for row in rows):
        of_bench = [row for row in rows if row["bench"] == bench]
        first = of_bench[0]
        shown.append(f"{bench} ({first['shape']}; {first['hardware']}, commit {first['commit']})\n{table(of_bench)}")
    return "\n\n".join(shown)


@dataclass
class Meter:
    """What one block of work takes: CPU time of this process on a CPU, the time between two events on a GPU.

    Attributes:
        cuda: whether the work runs on a GPU.
    """

    cuda: bool
    begun: tuple[float, float] = (0.0, 0.0)
    events: list[Any] = field(default_factory=list)

    def start(self) -> None:
        """Before the block."""
        if self.cuda:
            import torch

            torch.cuda.synchronize()
            self.events = [torch.cuda.Event(enable_timing=True) for _ in range(2)]
            self.events[0].record()
        self.begun = time.process_time(), time.perf_counter()

    def stop(self) -> dict[str, float]:
        """After the block: seconds by clock, `CPU` or `GPU` and `wall`."""
        if self.cuda:
            self.events[1].record()
            self.events[1].synchronize()
            return {
                "GPU": self.events[0].elapsed_time(self.events[1]) / 1000,
                "wall": time.perf_counter() - self.begun[1],
            }
        return {"CPU": time.process_time() - self.begun[0], "wall": time.perf_counter() - self.begun[1]}


def processor(threads: int) -> str:
    """What a bench runs on, for its name."""
    import torch

    return "GPU" if torch.cuda.is_available() else counted(threads, "thread")


def peak_bytes(cuda: bool) -> int:
    """Most memory that this process has held: resident on a CPU, allocated by torch on a GPU."""
    if cuda:
        import torch

        return torch.cuda.max_memory_allocated()
    status = Path("/proc/self/status")
    if status.exists():  # ru_maxrss of a process is never below that of the one that started it (Linux)
        (line,) = [line for line in status.read_text().splitlines() if line.startswith("VmHWM:")]
        return int(line.split()[1]) * 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


def draw(rows: Sequence[Mapping[str, Any]], path: Path) -> None:
    """Bars of all ratios but those of waiting, next to nothing in all arms; one panel a bench, written as a picture."""
    from matplotlib.figure import Figure

    from genrec_llm.plots import COLOURS, DPI

    compared = [row for row in rows if row["ratio"] is not None and not row["unit"].startswith("waiting")]
    benches = list(dict.fromkeys(row["bench"] for row in compared))
    counts = [sum(row["bench"] == bench for row in compared) for bench in benches]
    figure = Figure(figsize=(9, 1.2 + 0.28 * sum(counts) + 0.5 * len(benches)), dpi=DPI, layout="constrained")
    panels = figure.subplots(len(benches), squeeze=False, height_ratios=counts)[:, 0]
    units = list(dict.fromkeys(row["unit"] for row in compared))
    for bench, panel in zip(benches, panels, strict=True):
        shown = [row for row in compared if row["bench"] == bench]
        colours = [COLOURS[units.index(row["unit"]) % len(COLOURS)] for row in shown]
        bars = panel.barh([f"{row['arm']} / {row['rival']}: {row['unit']}" for row in shown],
                          [row["ratio"] for row in shown], color=colours)  # fmt: skip
        panel.bar_label(bars, fmt="%.2f", padding=2, fontsize=7)
        panel.axvline(1, color="black", linewidth=0.8)
        panel.margins(x=0.15, y=0.02)
        panel.tick_params(labelsize=7)
        panel.set_title(bench, fontsize=8, loc="left")
        panel.invert_yaxis()
    panels[-1].set_xlabel("times less than the rival (GiB: share of the rival's)", fontsize=8)
    with atomic_file(path) as temporary:
        figure.savefig(temporary, format="png")


def main() -> None:
    """Print the tables of files of results; draw them if asked to."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("results", type=Path, nargs="+", help="json files that the benchmarks have written")
    parser.add_argument("--plot", type=Path, help="picture to write (needs matplotlib)")
    args = parser.parse_args()
    rows: list[Mapping[str, Any]] = []
    for path in args.results:
        rows = merged(rows, read_json(path))
    print(tables(rows), end="\n\n")
    if args.plot:
        draw(rows, args.plot)
        print(f"written to {args.plot}")


if __name__ == "__main__":
    main()
