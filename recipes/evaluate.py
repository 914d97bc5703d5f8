"""Rank all users of a split with the merged model of a run, beside baselines that need no training.

    python recipes/evaluate.py --run runs/movielens_t5-micro/finetune --split validation

`--split test` opens the test split and records that it did; tune on validation.
"""

from pathlib import Path

import numpy as np

from genrec_llm.args import EvaluateArguments, parse_args
from genrec_llm.baselines import ItemKNN, Popularity, RecentRepeat
from genrec_llm.card import describe_measured, refresh_cards
from genrec_llm.errors import exits_cleanly
from genrec_llm.evaluation import (
    GeneratedLists,
    build_report,
    rank_recommender,
    record_opening,
    write_summary,
)
from genrec_llm.loading import MERGED
from genrec_llm.plots import can_draw, draw_run
from genrec_llm.recommender import Recommender, WithoutUsers
from genrec_llm.runs import check_merged, load_run_data, provenance


@exits_cleanly
def main() -> None:
    (args,) = parse_args(EvaluateArguments)
    run, facts = Path(args.run), provenance()
    out = run / "evaluation" / (args.split + ("_seen-kept" if args.keep_seen else ""))

    # Model and data; the test split is opened here and nowhere else
    recommender = Recommender.from_pretrained(run / MERGED)
    data = load_run_data(run, data_dir=args.data_dir)
    check_merged(run, recommender.loaded.info, data)
    held_out = data.held_out(args.split)
    if args.split == "test":
        times = record_opening(run / "test_openings.jsonl", facts)
        print(f"test split opened, time {times} for this run (recorded in {run / 'test_openings.jsonl'})")

    # Full ranking, every user once
    exclude_seen = not args.keep_seen
    train = [data.train[user] for user in range(len(data.train))]
    rivals = [Popularity.fit(train, data.vocab.num_items), ItemKNN.fit(train, data.vocab.num_items)]
    if args.keep_seen:
        rivals.append(RecentRepeat.fit(train, data.vocab.num_items))
    if recommender.layout.user_token:
        rivals.append(WithoutUsers(recommender))
    ranked = rank_recommender(recommender, held_out, exclude_seen=exclude_seen, batch_size=args.batch_size)
    ours = build_report(recommender.name, ranked, held_out, exclude_seen=exclude_seen)
    baselines = [
        build_report(
            rival.name,
            rank_recommender(rival, held_out, exclude_seen=exclude_seen, batch_size=args.batch_size),
            held_out,
            exclude_seen=exclude_seen,
        )
        for rival in rivals
    ]

    # The same lists from `generate`
    asked = np.arange(len(held_out.targets))
    if 0 < args.generate_users < len(asked):
        asked = np.sort(np.random.default_rng(0).permutation(asked)[: args.generate_users])
    lists, scores = recommender.generate_lists(
        held_out, asked, k=20, exclude_seen=exclude_seen, batch_size=args.batch_size
    )
    generated = GeneratedLists.compare(lists, ranked.top[asked], scores, held_out.targets[asked])

    # Report
    print(write_summary(out, ours, baselines, generated, facts | {"model": describe_measured(run)}))
    if can_draw():
        draw_run(run)
    else:
        print("no pictures: pip install 'genrec-llm[plots]', then genrec plot", run)
    refresh_cards(run)
    print(f"written to {out}: report.json, report.md, ranks of each user; to {run / 'plots'}: pictures; cards renewed")
    print(f"Next: genrec push {run / MERGED} org/name --dry-run")


if __name__ == "__main__":
    main()
