"""Collect what a finished run reports into docs/results/: figures, learning curve, commands, commit, seed, hardware.

    python tools/publish_run.py --run runs/beauty_t5-micro/finetune --out docs/results/beauty_t5-micro

Every number on the page that this writes comes out of the files of the run.
"""

from __future__ import annotations

import argparse
import shutil
from pathlib import Path
from typing import Any

from genrec_llm.card.facts import test_openings
from genrec_llm.errors import ConfigError, counted, exits_cleanly
from genrec_llm.files import atomic_file, read_json, write_json
from genrec_llm.plots import PLOTS, draw_run
from genrec_llm.runs import RUN_FILE

KEPT = ("stage", "command", "commit", "versions", "hardware", "time", "launch", "data", "arguments",
        "trainable_parameters", "row_init", "finished")  # fmt: skip
METRICS = ("HR@5", "NDCG@5", "HR@10", "NDCG@10", "MRR")


def stages_of(run: Path) -> list[tuple[Path, dict[str, Any]]]:
    """The run and what it went on from, earliest first."""
    if not (run / RUN_FILE).is_file():
        raise ConfigError(f"{run}: no {RUN_FILE}: give a finished run directory")
    facts = read_json(run / RUN_FILE)
    if "finished" not in facts:
        raise ConfigError(f"{run}: its training has not finished: give the same command again")
    before = facts["arguments"]["training"]["from_run"]
    return [*(stages_of(Path(before)) if before else []), (run, facts)]


def page(name: str, stages: list[tuple[Path, dict[str, Any]]], reports: dict[str, dict[str, Any]]) -> str:
    """The markdown page."""
    run = stages[-1][0]
    opened = test_openings(run)
    lines = [
        f"# {name}",
        "",
        "Written by `tools/publish_run.py` from the files of the run.",
        "",
        "## Made by",
        "",
        "```bash",
    ]
    for _, facts in stages:
        alone = facts["launch"]["strategy"] == "NO"
        launched = "python" if alone else "accelerate launch …"
        lines.append(f"{launched} {facts['command']}")
    lines.append(f"python recipes/merge.py --run {run}")
    lines += [f"python {report['command']}" for report in reports.values()]
    lines += ["```", "", "What each stage was trained with is under `arguments` in [report.json](report.json)."]
    if opened:
        lines.append(f"The test split was opened {counted(opened, 'time')} with this run.")
    lines.append("")
    lines += ["| stage | commit | seed | launch | hardware | trainable | steps | seconds | best validation NDCG@10 |",
              "|---|---|---|---|---|---|---|---|---|"]  # fmt: skip
    for _, facts in stages:
        done, launch = facts["finished"], facts["launch"]
        best = "–" if done["best"] is None else f"{done['best']:.4f}"
        lines.append(
            f"| {facts['stage']} | {str(facts['commit'])[:10]} | {facts['arguments']['training']['seed']} | "
            f"{launch['strategy']} x {launch['world_size']}, {launch['precision']} | {facts['hardware']} | "
            f"{facts['trainable_parameters']:,} | {done['steps']} | {done['seconds']:.0f} | {best} |"
        )
    lines += ["", f"Item rows started from: {stages[0][1]['row_init']}.", "", "![learning curve](curve.png)", ""]
    for split, report in reports.items():
        protocol = report["reports"][0]["protocol"]
        seen = "removed" if protocol["exclude_seen"] else "kept"
        lines += [f"## {split}", "",
                  f"{protocol['users']:,} users, full ranking of {protocol['candidates']:,} items, seen items {seen}, "
                  f"history of {protocol['max_history']}; 95 % bootstrap intervals over users.", "",
                  "| | " + " | ".join(METRICS) + " |", "|---|" + "---|" * len(METRICS)]  # fmt: skip
        for entry in report["reports"]:
            cells = (entry["metrics"][metric] for metric in METRICS)
            lines.append(
                f"| {entry['name']} | "
                + " | ".join(f"{c['mean']:.4f} [{c['low']:.4f}, {c['high']:.4f}]" for c in cells)
                + " |"
            )
        lines.append("")
        for rival, both in report["differences"].items():
            d = both["NDCG@10"]
            lines.append(f"- against {rival}: NDCG@10 {d['mean']:+.4f} [{d['low']:+.4f}, {d['high']:+.4f}], paired")
        found = report["generate"]
        lines += [f"- `generate` gives the one-step top 20 for {found['agreement']:.2%} of {found['users']:,} users", "",
                  f"![metrics]({split}.png)", ""]  # fmt: skip
    return "\n".join(lines)


@exits_cleanly
def main() -> None:
    """Write the folder."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--run", type=Path, required=True, help="a finished, merged and evaluated run directory")
    parser.add_argument("--out", type=Path, required=True, help="folder under docs/results/")
    args = parser.parse_args()
    stages = stages_of(args.run)
    reports = {}
    for folder in sorted((args.run / "evaluation").glob("*"), key=lambda path: path.name, reverse=True):
        reports[folder.name] = read_json(folder / "report.json")
    if not reports:
        raise ConfigError(f"{args.run}: not evaluated yet: recipes/evaluate.py --run {args.run}")
    write_json(args.out / "report.json", {"stages": [{k: f[k] for k in KEPT} for _, f in stages], "splits": reports})
    draw_run(args.run)
    for split in reports:
        shutil.copy(args.run / PLOTS / f"metrics_{split}.png", args.out / f"{split}.png")
    shutil.copy(args.run / PLOTS / "curves.png", args.out / "curve.png")
    with atomic_file(args.out / "README.md") as temporary:
        temporary.write_text(page(args.out.name, stages, reports), encoding="utf-8")
    print(f"written to {args.out}")


if __name__ == "__main__":
    main()
