"""The whole way on MovieLens-100K, on a CPU: pretrain, finetune, merge, evaluate, recommend. `make demo` runs it.

    python tools/demo.py [--seed 0] [--output-dir runs/demo]

Every step is printed as the command that a user would type.
"""

from __future__ import annotations

import argparse
import json
import os
import shlex
import subprocess
import sys
import time
from pathlib import Path

REPOSITORY = Path(__file__).resolve().parent.parent
CONFIGS = "recipes/configs/movielens_t5-mini"


def step(title: str, *command: str, processes: int = 1) -> None:
    """Print a command, run it from the repository's root, and stop the demo where it fails."""
    shown = ["python", *command[1:]] if command[0] == sys.executable else list(command)
    print(f"\n=== {title}\n$ {shlex.join(shown)}", flush=True)
    start = time.monotonic()
    threads = max(1, (os.cpu_count() or 1) // processes)
    done = subprocess.run(command, cwd=REPOSITORY, env={**os.environ, "OMP_NUM_THREADS": str(threads)}, check=False)
    if done.returncode:
        sys.exit(done.returncode)
    print(f"({time.monotonic() - start:.0f} s)", flush=True)


def launch(stage: str, out: Path, seed: int, *arguments: str) -> None:
    """One training stage under `accelerate launch`, on up to two processes."""
    processes = min(2, os.cpu_count() or 1)
    strategy = "ddp" if processes > 1 else "cpu"
    step(
        f"{stage}",
        str(Path(sys.executable).with_name("accelerate")), "launch",
        "--config_file", f"accelerate_configs/{strategy}.yaml",
        f"recipes/{stage}.py", "--config", f"{CONFIGS}/{stage}.yaml", "--output-dir", str(out / stage),
        "--seed", str(seed), "--use_cpu", *arguments,
        processes=processes,
    )  # fmt: skip


def show_recommendations(run: Path, users: int = 3) -> None:
    """Ten titles for a few users, beside what they watched and what they watched next."""
    from genrec_llm.recommender import Recommender
    from genrec_llm.runs import load_run_data

    data = load_run_data(run)
    recommender = Recommender.from_pretrained(run / "merged")
    titles = data.vocab.items["title"]
    held_out = data.held_out("test")
    for user in range(users):
        history = held_out.histories[user]
        print(
            f"\nUser {user + 1} watched {len(history)} films, last: " + "; ".join(titles[item] for item in history[-3:])
        )
        print(f"   and went on to: {titles[held_out.targets[user]]}")
        found = recommender.recommend([data.vocab.item_id(int(item)) for item in history], k=10)
        for place, recommendation in enumerate(found, start=1):
            print(f"   {place:2}. {recommendation.title}")


def main() -> None:
    """Run the demo."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seed", type=int, default=0, help="of weights, draws and dropout")
    parser.add_argument("--output-dir", type=Path, default=Path("runs/demo"), help="where the runs go")
    args = parser.parse_args()
    out: Path = args.output_dir
    start = time.monotonic()

    launch("pretrain", out, args.seed)
    launch("finetune", out, args.seed, "--from_run", str(out / "pretrain"))
    run = out / "finetune"
    step("merge", sys.executable, "recipes/merge.py", "--run", str(run))
    step("evaluate on validation", sys.executable, "recipes/evaluate.py", "--run", str(run), "--split", "validation")
    step("evaluate on test", sys.executable, "recipes/evaluate.py", "--run", str(run), "--split", "test")

    print("\n=== recommend")
    os.chdir(REPOSITORY)
    show_recommendations(run)

    report = json.loads((run / "evaluation" / "test" / "report.json").read_text())
    ours = report["reports"][0]["metrics"]
    print(f"\nTest: HR@10 {ours['HR@10']['mean']:.4f}, NDCG@10 {ours['NDCG@10']['mean']:.4f}")
    print(f"Table: {run}/evaluation/test/report.md   plot: {run}/evaluation/test/metrics.png")
    print(f"Done in {time.monotonic() - start:.0f} s. Next:")
    print(f"  genrec recommend {run}/merged 50 181 174    # Star Wars, Return of the Jedi, Raiders of the Lost Ark")
    print("  genrec data info your_log.csv               # then the same recipes on data of your own: README.md")


if __name__ == "__main__":
    main()
