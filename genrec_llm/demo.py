"""The whole way on MovieLens-100K, on a CPU: what `genrec demo` and `make demo` run.

Every step is shown as the command that a user would type.
"""

from __future__ import annotations

import os
import shlex
import sys
import time
from collections.abc import Sequence
from pathlib import Path

from genrec_llm.files import read_json
from genrec_llm.launch import recipe_command, run, shipped, shown, training_command

CONFIGS = "recipes/configs/movielens_t5-micro"


def run_demo(out: Path, *, seed: int = 0) -> None:
    """Pretrain, finetune, merge, evaluate, recommend; exits where a step fails.

    Args:
        out: folder of the two runs.
        seed: of weights, draws and dropout.
    """
    start = time.monotonic()
    run_dir = out / "finetune"
    _train("pretrain", out, seed)
    _train("finetune", out, seed, "--from-run", str(out / "pretrain"))
    _step("merge", recipe_command("merge", ["--run", str(run_dir)]))
    for split in ("validation", "test"):
        _step(f"evaluate on {split}", recipe_command("evaluate", ["--run", str(run_dir), "--split", split]))

    print("\n=== recommend")
    show_recommendations(run_dir)

    ours = read_json(run_dir / "evaluation" / "test" / "report.json")["reports"][0]["metrics"]
    place = shlex.quote(str(run_dir))
    print(f"\nTest: HR@10 {ours['HR@10']['mean']:.4f}, NDCG@10 {ours['NDCG@10']['mean']:.4f}")
    print(f"Table: {place}/evaluation/test/report.md   pictures: {place}/plots/")
    print(f"Done in {time.monotonic() - start:.0f} s. Next:")
    print(f"  genrec recommend {place}/merged 'star wars' 'return of the jedi' 174    # ids, or parts of titles")
    print("  genrec data info your_log.csv    # then the same verbs on data of your own: README.md")


def _train(stage: str, out: Path, seed: int, *more: str) -> None:
    """One training stage, on up to two processes."""
    config = shown(shipped(f"{CONFIGS}/{stage}.yaml"))
    flags = ["--config", config, "--output-dir", str(out / stage), "--seed", str(seed), *more, "--use_cpu"]
    processes = min(2, os.cpu_count() or 1)
    _step(stage, training_command(stage, flags, strategy="ddp" if processes > 1 else "cpu", processes=processes))


def _step(title: str, command: Sequence[str]) -> None:
    print(f"\n=== {title}", flush=True)
    start = time.monotonic()
    if code := run(command):
        sys.exit(code)
    print(f"({time.monotonic() - start:.0f} s)", flush=True)


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
        last = "; ".join(titles[item] for item in history[-3:])
        print(f"\nUser {user + 1} watched {len(history)} films, last: {last}")
        print(f"   and went on to: {titles[held_out.targets[user]]}")
        found = recommender.recommend([data.vocab.item_id(int(item)) for item in history], k=10)
        for place, recommendation in enumerate(found, start=1):
            print(f"   {place:2}. {recommendation.title}")
