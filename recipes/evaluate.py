"""Rank all users of a split with the merged model of a run, beside baselines that need no training.

    python recipes/evaluate.py --run runs/movielens_t5-micro/finetune --split validation

On several GPUs, each of which ranks a share of the users; the report is the same, to the last digit:

    accelerate launch --config_file accelerate_configs/ddp.yaml --num_processes 4 recipes/evaluate.py \\
        --run runs/movielens_t5-micro/finetune --split validation

`--split test` opens the test split and records that it did; tune on validation.
"""

from dataclasses import replace
from pathlib import Path

import numpy as np

from genrec_llm.args import EvaluateArguments, parse_args
from genrec_llm.baselines import Popularity, RecentRepeat
from genrec_llm.baselines.neural import LastItemsToo, user_order
from genrec_llm.card.facts import OPENINGS_FILE, describe_measured
from genrec_llm.card.page import refresh_cards
from genrec_llm.errors import exits_cleanly
from genrec_llm.evaluation import (
    GeneratedLists,
    build_report,
    fitted_item_knn,
    rank_recommender,
    record_opening,
    write_summary,
)
from genrec_llm.plots import can_draw, draw_run
from genrec_llm.processes import launched
from genrec_llm.provenance import provenance
from genrec_llm.recommender import HistoryAlone, Recommender, WithoutUsers
from genrec_llm.runs import check_merged, load_run_data, merged_directory, open_rivals


@exits_cleanly
def main() -> None:
    (args,) = parse_args(EvaluateArguments)
    processes = launched(use_cpu=args.use_cpu)
    run, facts = Path(args.run), provenance() | {"processes": processes.count}
    out = run / "evaluation" / (args.split + ("_seen-kept" if args.keep_seen else ""))

    # Model and data, in every process; one a node reads the data
    with processes.step():
        merged = merged_directory(run)
        recommender = Recommender.from_pretrained(merged, device=processes.device)
    data = load_run_data(run, data_dir=args.data_dir, processes=processes)
    with processes.step():
        check_merged(run, recommender.loaded.info, data)
        trained, made = open_rivals(args.rivals, data)

    # The test split is opened here and nowhere else
    with processes.step():
        held_out = data.held_out(args.split)
        if args.split == "test" and processes.first:
            times = record_opening(run / OPENINGS_FILE, facts)
            print(f"test split opened, time {times} for this run (recorded in {run / OPENINGS_FILE})")

    # Full ranking, every user once; the processes share the users
    how = {"exclude_seen": not args.keep_seen, "batch_size": args.batch_size, "processes": processes}
    ranked = {recommender.name: rank_recommender(recommender, held_out, **how)}
    with fitted_item_knn(data.train, data.vocab.num_items, run, processes) as item_knn:
        rivals = [Popularity(held_out.item_counts), item_knn]
        if args.keep_seen:
            rivals.append(RecentRepeat(data.vocab.num_items))
        if recommender.layout.user_token:
            rivals.append(WithoutUsers(recommender))
        if recommender.layout.last_items_weights:
            rivals.append(HistoryAlone(recommender))
        ranked |= {rival.name: rank_recommender(rival, held_out, **how) for rival in rivals}

    # Trained rivals, each also with a share of its last items, where ours has one; validation chooses theirs
    in_order = replace(held_out, users=user_order(len(held_out.users)))
    ranked |= {rival.name: rank_recommender(rival, in_order, **how) for rival in trained}
    if trained and recommender.layout.last_items_weights:
        validation = replace(data.held_out("validation"), users=in_order.users)
        for rival in trained:
            too = LastItemsToo.by_validation(rival, recommender.layout, validation, **how)
            made[rival.name]["last_items_share"] = too.share
            ranked[too.name] = rank_recommender(too, in_order, **how)

    # The same lists from `generate`
    asked = np.arange(len(held_out.targets))
    if 0 < args.generate_users < len(asked):
        asked = np.sort(np.random.default_rng(0).permutation(asked)[: args.generate_users])
    lists, scores = recommender.generate_lists(held_out, asked, k=20, **how)
    if not processes.first:
        return

    # Report, by the first process; only our model reads no more than its last items
    whole = replace(held_out, max_history=None)
    ours, *others = (
        build_report(
            name, each, held_out if name.startswith(recommender.name) else whole, exclude_seen=not args.keep_seen
        )
        for name, each in ranked.items()
    )
    generated = GeneratedLists.compare(lists, ranked[ours.name].top[asked], scores, held_out.targets[asked])
    print(write_summary(out, ours, others, generated, facts | {"model": describe_measured(run), "rivals": made}))
    if can_draw():
        draw_run(run)
    else:
        print("no pictures: pip install 'genrec-llm[plots]', then genrec plot", run)
    refresh_cards(run)
    print(f"written to {out}: report.json, report.md, ranks of each user; to {run / 'plots'}: pictures; cards renewed")
    print(f"Next: genrec push {merged} org/name --dry-run")


if __name__ == "__main__":
    main()
