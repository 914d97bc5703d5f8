"""The verb `genrec estimate`: from a recipe's arguments, or bare numbers, to the tables of `prediction`."""

from __future__ import annotations

import argparse
import json
import shlex
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

from genrec_llm.errors import ConfigError, counted
from genrec_llm.hardware import GIB, HARDWARE, USABLE, Hardware
from genrec_llm.launch import did_you_mean, shipped
from genrec_llm.memory import PARTS
from genrec_llm.prediction import (
    Estimate,
    by_strategy,
    estimate_run,
    largest_batch,
    predicted_scaling,
    read_geometry,
    recommended,
)
from genrec_llm.workload import ONE_DEVICE, STRATEGIES

if TYPE_CHECKING:
    from genrec_llm.args import DataArguments, GenRecTrainingArguments, ModelArguments

STAGES = ("pretrain", "finetune")


@dataclass(frozen=True)
class Counts:
    """What an estimate has to know of a data set.

    Args:
        items: of the catalogue.
        user_rows: rows of users, `<user_unknown>` included.
        examples: of an epoch; None where the log is not known.
        mean_length, longest: tokens of an input row.
    """

    items: int
    user_rows: int
    examples: int | None
    mean_length: float
    longest: int


def counts_given(args: argparse.Namespace, data: DataArguments) -> Counts:
    """From `--items` and its companions; histories as long as they can be where no mean is given."""
    special = int(data.users != "none") + 1 + int(args.stage == "finetune")  # user, end, the mask behind a history
    longest = data.max_history + special
    rows = {"none": 0, "hashed": data.user_buckets, "each": args.users or 0}[data.users]
    examples = None
    if args.interactions and args.users:
        # Two of each user's interactions are held out, and the first of the rest has no history.
        examples = args.users if args.stage == "pretrain" else max(1, args.interactions - 3 * args.users)
    mean = longest if args.mean_length is None else args.mean_length
    return Counts(args.items, rows + 1, examples, mean, longest)


def counts_of(args: argparse.Namespace, data: DataArguments, training: GenRecTrainingArguments) -> Counts:
    """From the data set, split and encoded as training does it."""
    import numpy as np

    from genrec_llm.encoded import load_data

    loaded = load_data(data)
    lengths = loaded.train.lengths()
    if args.stage == "pretrain":
        read = np.minimum(lengths[lengths >= 2], data.max_history)
    elif training.targets == "last":
        read = np.minimum(lengths[lengths >= 2] - 1, data.max_history)
    else:
        before = [np.minimum(np.arange(1, length), data.max_history) for length in lengths]
        read = np.concatenate(before) if before else np.zeros(0, dtype=np.int64)
    if not len(read):
        raise ConfigError(
            "dataset: no user has two items in the training part, so there is nothing to train: more data"
        )
    special = int(data.users != "none") + 1 + int(args.stage == "finetune")
    return Counts(
        loaded.vocab.num_items,
        loaded.vocab.num_user_rows,
        len(read),
        float(read.mean()) + special,
        int(read.max()) + special,
    )


def hardware_of(args: argparse.Namespace) -> Hardware | None:
    """The named hardware, with what was given in place of its data sheet; None on a CPU that nothing is known of.

    Raises:
        ConfigError: no such name.
    """
    if args.strategy == "cpu":
        if not (args.gpu_memory or args.tflops):
            return None
        return Hardware("CPU", int((args.gpu_memory or 0) * GIB) or 2**60, args.tflops or 0.0, utilisation=1.0)
    if args.hardware not in HARDWARE:
        raise ConfigError(f"--hardware {args.hardware}: not known{did_you_mean(args.hardware, HARDWARE)}")
    known = HARDWARE[args.hardware]
    if args.gpu_memory:
        known = replace(known, name=f"{args.gpu_memory:g} GiB", memory=int(args.gpu_memory * GIB))
    if args.tflops:
        known = replace(known, tflops=args.tflops, utilisation=1.0)
    if args.bandwidth:
        known = replace(known, node_bandwidth=args.bandwidth * 1e9)
    if args.network:
        known = replace(known, network_bandwidth=args.network * 1e9)
    return known


def launch_line(stage: str, strategy: str, processes: int, arguments: list[str]) -> str | None:
    """The command that trains so; None where no launch file of that strategy is shipped."""
    if not shipped(f"accelerate_configs/{strategy}.yaml").is_file():
        return None
    several = [] if strategy in ONE_DEVICE else ["--processes", str(processes)]
    return shlex.join(["genrec", stage, "--strategy", strategy, *several, *arguments])


def print_estimate(args: argparse.Namespace) -> None:
    """Read the arguments, estimate, print tables or json.

    Raises:
        ConfigError: arguments that are missing or do not fit together, all at once where they can be seen at once.
    """
    problems = []
    if args.stage not in STAGES:
        problems.append(f"--stage {args.stage}: neither {' nor '.join(STAGES)}")
    if args.strategy is not None and args.strategy not in STRATEGIES:
        problems.append(f"--strategy {args.strategy}: no such strategy{did_you_mean(args.strategy, STRATEGIES)}")
    if args.items is None:
        companions = {
            "--users": args.users, "--interactions": args.interactions, "--mean-length": args.mean_length,
        }  # fmt: skip
        problems += [
            f"{flag}: goes with --items, in place of a data set" for flag, value in companions.items() if value
        ]
    if problems:
        raise ConfigError(problems)

    from genrec_llm.args import DataArguments, GenRecTrainingArguments, ModelArguments, parse_args

    # The arguments are a training's, elsewhere: here no GPU is looked for, which --bf16 would ask for.
    words = [*args.rest, "--use_cpu"]
    if args.items is not None:
        words += ["--dataset", "given by --items"]
    parsed: tuple[DataArguments, ModelArguments, GenRecTrainingArguments] = parse_args(
        DataArguments, ModelArguments, GenRecTrainingArguments, argv=words
    )
    data, model, training = parsed
    hardware = hardware_of(args)
    counts = counts_of(args, data, training) if args.items is None else counts_given(args, data)
    config, own_head = read_geometry(model.backbone, init=model.backbone_init, revision=model.backbone_revision)
    strategy = args.strategy or ("single_gpu" if args.processes == 1 else "ddp")
    asked = estimate_run(
        config, model, training, items=counts.items, user_rows=counts.user_rows, longest=counts.longest,
        mean_length=counts.mean_length, strategy=strategy, processes=args.processes, own_head=own_head,
        targets=training.masks_per_sequence if args.stage == "pretrain" else 1, hardware=hardware,
        examples=counts.examples,
    )  # fmt: skip
    others = by_strategy(asked.shape, asked.run, hardware, examples=counts.examples)
    best = recommended(others)
    shown = asked if args.strategy or best is None else others[best]
    given = shlex.split(shlex.join(args.rest))
    line = None if best is None else launch_line(args.stage, best, args.processes, given)
    if args.items is not None and line is not None:
        line += " --dataset LOG"
    facts = _facts(shown, others, best, line, args)
    if args.json:
        print(json.dumps(facts, indent=1))
    else:
        _print(model, counts, shown, others, best, line, facts)


def _facts(
    shown: Estimate, others: dict[str, Estimate], best: str | None, line: str | None, args: argparse.Namespace
) -> dict[str, Any]:
    facts = shown.to_dict()
    facts["largest_examples_per_device"] = _largest(shown)
    facts["strategies"] = {
        name: other.to_dict() | {"largest_examples_per_device": _largest(other)} for name, other in others.items()
    }
    facts["recommended"], facts["launch"], facts["mend"] = best, line, mend(others) if best is None else None
    hardware = shown.hardware
    facts["hardware"] = None if hardware is None else vars(hardware)
    facts["predicted_scaling"] = []
    if hardware is not None and not shown.run.cpu and (args.step_seconds or hardware.tflops):
        run = replace(shown.run, strategy="ddp") if shown.run.strategy in ONE_DEVICE else shown.run
        ways = {"sparse": run} if run.sparse_users else {"dense": run}
        if run.strategy == "ddp" and not run.sparse_users:
            ways["sparse, with --sparse-user-rows"] = replace(run, sparse_users=True)
        facts["predicted_scaling"] = [
            {"exchange_of_user_rows": way} | vars(found)
            for way, one in ways.items()
            for found in predicted_scaling(shown.shape, one, hardware, step_seconds=args.step_seconds)
        ]
    return facts


def _largest(one: Estimate) -> int | None:
    return None if one.capacity is None else largest_batch(one.shape, one.run, one.capacity)


def _gib(size: float) -> str:
    return f"{size / GIB:9.3f}"


def _duration(seconds: float | None) -> str:
    if seconds is None:
        return "not known"
    if seconds < 1:
        return f"{1000 * seconds:.0f} ms"
    return (
        f"{seconds:.1f} s"
        if seconds < 120
        else f"{seconds / 60:.1f} min"
        if seconds < 7200
        else f"{seconds / 3600:.1f} h"
    )


def _batch(largest: int | None) -> str:
    return (
        "memory not known"
        if largest is None
        else "not even one example"
        if largest == 0
        else counted(largest, "example")
    )


def _print(
    model: ModelArguments,
    counts: Counts,
    shown: Estimate,
    others: dict[str, Estimate],
    best: str | None,
    line: str | None,
    facts: dict[str, Any],
) -> None:
    run, hardware = shown.run, shown.hardware
    trained = f"{facts['trained_parameters']:,} of {facts['parameters']:,} weights trained"
    print(f"{model.backbone}, {run.tuning}, {'bf16' if run.bf16 else 'fp32'}; {trained}")
    rows = f"{counted(counts.items, 'item')}, {counted(counts.user_rows, 'user row')}"
    print(f"{rows}; {counts.mean_length:.1f} tokens an input row, at most {counts.longest}")
    shares = f"{run.processes} x {run.examples} examples x {run.accumulation} accumulated"
    print(f"{run.strategy}, {shares} = {run.global_batch} a step\n")
    print(f"{'GiB on each device':20}{'largest':>9}  {'at the peak':>11}")
    for part in PARTS:
        if shown.largest[part]:
            print(f"{part:20}{_gib(shown.largest[part])}  {_gib(shown.parts[part]):>11}")
    print(f"{'sum':20}{'':9}  {_gib(shown.total):>11}  (moment: {shown.moment})")
    if hardware is not None and shown.capacity is not None:
        verdict = "fits" if shown.fits else "DOES NOT FIT"
        print(f"{verdict}: {shown.capacity / GIB:.1f} GiB can be filled, {USABLE:.0%} of {hardware.name}")
        print(f"largest batch that fits: {_batch(facts['largest_examples_per_device'])} a device at once")
    print(f"\nsent by each device:    {shown.sent / 1e6:,.1f} MB a step")
    if hardware is not None and hardware.tflops:
        communication = _duration(shown.communication_seconds)
        steps = f", {shown.epoch_steps:,} steps" if shown.epoch_steps else ""
        print(f"predicted step:         {_duration(shown.step_seconds)} ({communication} of it communication)")
        print(f"predicted epoch:        {_duration(shown.epoch_seconds)}{steps}")
        print(
            f"  at {hardware.tflops * hardware.utilisation:,.0f} TFLOP/s, {hardware.node_bandwidth / 1e9:.0f} GB/s within "
            f"and {hardware.network_bandwidth / 1e9:.0f} GB/s between nodes: assumed unless you gave them"
        )
    print(f"\n{'strategy':15}{'GiB':>9}  {'fits':5}{'MB sent':>10}{'step':>10}   largest batch")
    for name, other in others.items():
        fits = {True: "yes", False: "no", None: "?"}[other.fits]
        print(
            f"{name:15}{_gib(other.total)}  {fits:5}{other.sent / 1e6:10,.1f}{_duration(other.step_seconds):>10}   "
            f"{_batch(facts['strategies'][name]['largest_examples_per_device'])}"
        )
    for found in facts["predicted_scaling"] if run.processes > 1 else []:
        print(
            f"predicted scaling to {found['processes']:>2} devices, user rows exchanged {found['exchange_of_user_rows']}: "
            f"{found['efficiency']:.3f}"
        )
    if best is None:
        print(f"\nNothing fits. {facts['mend']}")
    else:
        print(
            f"\nRecommended: {best}, the simplest that fits" + ("." if line else "; no launch file is shipped for it.")
        )
        if line:
            print(f"Next: {line}")


def mend(estimates: Mapping[str, Estimate]) -> str:
    """What to do where nothing fits: the fewest accumulation steps that let the simplest strategy hold the batch."""
    for name, one in estimates.items():
        if one.capacity is None:
            continue
        at_once = largest_batch(one.shape, replace(one.run, accumulation=2), one.capacity)
        if at_once:
            steps = -(-one.run.global_batch // (at_once * one.run.processes))
            return f"{name} holds this batch with --gradient-accumulation-steps {steps}."
    return "Not even one example does: more GPUs, a smaller --max-history, or a smaller backbone."
