"""Everything that only a GPU can show, part by part within a budget of seconds, and a table of what was found and asked for.

    export PYTHONPATH=.    # from a checkout that is not installed, in its folder
    python tools/gpu_check.py --data-dir ../shared/data --out try --shape tiny --steps 2 --batch 64 --users 50  # first
    python tools/gpu_check.py --data-dir ../shared/data --out gpu_results --parts imports ceiling train rank profile
    python tools/gpu_check.py --data-dir ../shared/data --out gpu_results --parts exact sync rivals
    python tools/gpu_check.py --data-dir ../shared/data --out gpu_results --parts rivals-at-size compile
    python tools/gpu_check.py --data-dir ../shared/data --out gpu_results --parts stages quantized auto-batch

The first line takes all parts, on a CPU too, in fp32: a quick try of the machine, whose figures say nothing. Without
--parts all run in this order, those that must be shown first; gpu_parts.py says what each is. A part is a process of its
own, which writes after each finding: `speed_gpu.json` in the form of bench_results.py, `gpu.json` with all else,
`profile.txt`. What earlier calls left in --out stays, and counts in the table. A part that fails is recorded with its
traceback, the others go on, and the exit status is 1. A part that is not done within --seconds of the whole call is
stopped with all it has started; those for which no time is left are named.

What a machine without network needs: docs/speed.md, "On a GPU". Where there is no git, GENREC_COMMIT says whose figures
these are.
"""

from __future__ import annotations

import argparse
import os
import signal
import subprocess
import sys
import threading
import time
import tomllib
from collections import deque
from collections.abc import Mapping, Sequence
from contextlib import suppress
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from bench_results import MEMORY, aligned, tables
from packaging.requirements import Requirement

from genrec_llm.errors import ConfigError, exits_cleanly
from genrec_llm.files import read_json, write_json

PARTS = (
    "imports", "ceiling", "train", "rank", "profile",
    "exact", "sync", "rivals",
    "rivals-at-size", "compile",
    "stages", "quantized", "auto-batch",
)  # fmt: skip
AT_SIZE = "flan-t5-xl"
SHAPES = (AT_SIZE, "flan-t5-small", "micro", "tiny")
REPOSITORY = Path(__file__).resolve().parent.parent
FINDINGS, ROWS = "gpu.json", "speed_gpu.json"
LEAST_SECONDS, MARGIN = 30, 5
"""With less left no part begins; a part is stopped so much before the budget ends."""
LAST_WORDS = 60
"""Lines of a process that ended without having written why."""


def packages() -> list[tuple[str, str, str, bool]]:
    """Name, bounds, version here and whether it is within them, of all that pyproject.toml asks for."""
    project = tomllib.loads((REPOSITORY / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    found = []
    for wanted in map(Requirement, [*project["dependencies"], *project["optional-dependencies"]["quant"]]):
        try:
            here = version(wanted.name)
        except PackageNotFoundError:
            here = "absent"
        fits = here != "absent" and wanted.specifier.contains(here, prereleases=True)
        found.append((wanted.name, str(wanted.specifier), here, fits))
    return found


# --- one part ---------------------------------------------------------------------------------------------------------


def add_flags(parser: argparse.ArgumentParser) -> None:
    """Those of a part, and of all of them."""
    parser.add_argument("--dataset", default="amazon-beauty", help="as --dataset of the recipes")
    parser.add_argument("--data-dir", help="folder of the Beauty files")
    parser.add_argument("--out", type=Path, required=True, help="folder of results, those of earlier calls among them")
    parser.add_argument("--shape", choices=SHAPES, default=AT_SIZE)
    parser.add_argument("--steps", type=int, default=10, help="micro-batches of a block")
    parser.add_argument("--batch", type=int, default=1024, help="examples a step")
    parser.add_argument("--users", type=int, default=0, help="validation users that are ranked, a fixed sample; 0: all")


def command_of(part: str, args: argparse.Namespace) -> list[str]:
    """What runs a part, as it can be typed here."""
    tool = os.path.relpath(Path(__file__).with_name("gpu_parts.py"))
    given = {
        name: value for name, value in vars(args).items() if name not in ("parts", "seconds") and value is not None
    }
    flags = [word for name, value in given.items() for word in (f"--{name.replace('_', '-')}", str(value))]
    return [sys.executable, "-u", tool, part, *flags]


def shown(command: Sequence[str], seconds: float) -> tuple[str | None, str]:
    """Run a command in a session of its own, show what it prints, and leave nothing that it has started.

    Returns:
        How it ended, None where that was well; its last words.
    """
    begun, words = time.monotonic(), deque[str](maxlen=LAST_WORDS)
    process = subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, errors="replace", start_new_session=True
    )

    def end() -> None:
        with suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)

    clock = threading.Timer(seconds, end)
    clock.start()
    try:
        assert process.stdout is not None
        for line in process.stdout:
            print(line, end="", flush=True)
            words.append(line)
        process.wait()
    finally:
        clock.cancel()
        end()
        process.wait()
    if process.returncode == 0:
        return None, "".join(words)
    late = time.monotonic() - begun >= seconds
    return f"stopped after {seconds:.0f} s" if late else f"its process ended ({process.returncode})", "".join(words)


def without_places(text: str) -> str:
    """A traceback without the folders that things lie in, which are nobody's business."""
    for folder in (REPOSITORY, sys.prefix):
        text = text.replace(f"{folder}/", "")
    return text


def findings(out: Path) -> dict[str, Any]:
    """What the parts have written, by name."""
    found: dict[str, Any] = read_json(out / FINDINGS) if (out / FINDINGS).is_file() else {}
    return found


def run_part(part: str, args: argparse.Namespace, seconds: float) -> bool:
    """Run a part, with its failure written whatever it is; whether it went well."""
    write_json(args.out / FINDINGS, findings(args.out) | {part: {}})  # nothing of an earlier call
    ended, words = shown(command_of(part, args), seconds)
    if ended is None:
        return True
    print(f"{part}: FAILED: {ended}; what it had written stays", flush=True)
    parts = findings(args.out)
    if not parts[part].get("failed"):
        failed = f"{ended}; its last words:\n{without_places(words)}"
        write_json(args.out / FINDINGS, parts | {part: parts[part] | {"failed": failed}})
    return False


# --- what was found ---------------------------------------------------------------------------------------------------

NOTHING = "-"


def goal(measure: str, found: float | None, floor: float, aim: float | None, counts: bool) -> tuple[str, ...]:
    """A line of the table; where the aim is below the floor, less is better.

    Args:
        counts: whether this is the shape and the kind of machine that floor and aim are meant for.
    """
    met = NOTHING
    if counts and found is not None:
        sign = -1 if aim is not None and aim < floor else 1
        met = "floor" if sign * found >= sign * floor else "no"
        met = "aim" if aim is not None and sign * found >= sign * aim else met
    numbers = [NOTHING if value is None else f"{value:,.1f}" for value in (found, floor, aim)]
    return (measure, numbers[0], *(numbers[1:] if counts else (NOTHING, NOTHING)), met)


def finding(parts: Mapping[str, Any], part: str, **having: Any) -> dict[str, Any]:
    """The first finding of a part with these facts; nothing where there is none."""
    found = parts.get(part, {}).get("found", [])
    return next((one for one in found if having.items() <= one.items()), {})


def summary(parts: Mapping[str, Any], rows: Sequence[Mapping[str, Any]]) -> str:
    """What was found beside what was asked for: measure, found, floor, aim, met.

    Args:
        parts: as gpu.json has them.
        rows: as speed_gpu.json has them.
    """

    def counts(part: str) -> bool:
        about = parts.get(part, {})
        return about.get("shape") == AT_SIZE and about.get("cuda") is True

    trained = counts("train")
    real, long = (
        finding(parts, "train", arm="ours", lengths=lengths) for lengths in ("real lengths", "long histories")
    )
    short_name, long_name = (
        f"mean of {one.get('mean_tokens', usual):.1f} tokens" for one, usual in ((real, 10.3), (long, 64))
    )
    lines: list[tuple[str, ...]] = [
        ("measure", "found", "floor", "aim", "met"),
        goal(f"examples/s, {short_name}", real.get("examples_per_second"), 6_400, 8_300, trained),
        goal(f"peak GiB, {short_name}", real.get("peak_gib"), 45, 36, trained),
        goal(f"examples/s, {long_name}", long.get("examples_per_second"), 1_100, None, trained),
    ]
    for one in parts.get("rank", {}).get("found") or [{"arm": "ours"}]:
        lines.append(goal(f"users/s, {one['arm']}", one.get("users_per_second"), 12_500, 16_000, counts("rank")))

    def tell(measure: str, found: str) -> None:
        lines.append((measure, found, NOTHING, NOTHING, NOTHING))

    for name, one in ((short_name, real), (long_name, long)):
        if one:
            tell(
                f"useful operations, {name}", f"{100 * one['mfu']:.1f} % of a product's {one['product_tflops']} TFLOP/s"
            )
    for row in rows:
        if (row["rival"] or "").startswith("(") and row["unit"].startswith(("GPU ms", "CPU ms")):
            memory = row | {"unit": MEMORY}
            shares = [
                f", {other['ratio']:.2f} of its memory"
                for other in rows
                if all(other[name] == memory[name] for name in ("bench", "arm", "rival", "unit"))
            ]
            text = f"{row['ratio']:.2f}x as fast as {row['rival']}{''.join(shares)}"
            tell(f"{row['bench']}: {row['arm']}", text)
    for one in parts.get("profile", {}).get("found", [])[:1]:
        idle = NOTHING if one["idle"] is None else f"{100 * one['idle']:.1f} %"
        tell(f"idle, {one['launches_a_step']:,} launches a step of {one['step_ms']:,.0f} ms", idle)
        tell(
            "time by kind of kernel",
            ", ".join(f"{name} {100 * share:.0f} %" for name, share in list(one["shares"].items())[:5]),
        )
    failed = [name for name, part in parts.items() if part.get("failed")]
    about = " and ".join(dict.fromkeys(part["hardware"] for part in parts.values() if "hardware" in part))
    return f"{about}\n{aligned(lines)}\nfailed: {', '.join(failed) or 'nothing'}"


@exits_cleanly
def main() -> None:
    """Run the parts; what each found is on disk when it ends."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_flags(parser)
    parser.add_argument("--parts", nargs="+", choices=PARTS, default=PARTS, help="some of them, in this order")
    parser.add_argument("--seconds", type=float, default=570, help="that the whole call may take")
    args = parser.parse_args()
    problems = [f"--{name}: at least 1" for name in ("steps", "batch") if getattr(args, name) < 1]
    if args.users < 0:
        problems.append("--users: at least 0")
    if problems:
        raise ConfigError(problems)
    ends = time.monotonic() + args.seconds
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))  # by way of what ends the part
    args.out.mkdir(parents=True, exist_ok=True)
    lines = [(name, bounds, here, "" if fits else "NOT WITHIN") for name, bounds, here, fits in packages()]
    print(aligned([("package", "bounds", "here", ""), *lines]), flush=True)
    failed, late, rows = [], [], []
    for part in dict.fromkeys(args.parts):
        left = ends - time.monotonic() - MARGIN
        if left < LEAST_SECONDS:
            late.append(part)
            continue
        if not run_part(part, args, left):
            failed.append(part)
        rows = read_json(args.out / ROWS) if (args.out / ROWS).is_file() else []
        print(f"\n{summary(findings(args.out), rows)}\n", flush=True)
    print(f"{tables(rows)}\n\n{summary(findings(args.out), rows)}\n\nwritten to {args.out}")
    if late:
        print(f"no time was left for: {' '.join(late)}; call again with --parts {' '.join(late)}")
    if failed:
        print(f"failed: {', '.join(failed)}; {FINDINGS} says why")
        sys.exit(1)


if __name__ == "__main__":
    main()
