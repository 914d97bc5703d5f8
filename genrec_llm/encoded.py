"""A data set with its ids encoded: what training and ranking read, shared by the processes of a node."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa

from genrec_llm.args import DataArguments
from genrec_llm.data import Interactions, leave_last_two_out
from genrec_llm.evaluation import EvalData
from genrec_llm.processes import ALONE, Processes
from genrec_llm.sources import SOURCES, load_interactions
from genrec_llm.tasks import Sequences
from genrec_llm.vocab import ITEMS_FILE, USERS_FILE, IdVocab

SEQUENCES_FILE = "sequences.arrow"
HELD_OUT = ("validation", "test")


@dataclass(frozen=True)
class Data:
    """A data set with its ids encoded."""

    name: str
    fingerprint: str
    vocab: IdVocab
    train: Sequences
    splits: dict[str, Sequences]
    targets: dict[str, np.ndarray]
    max_history: int

    @property
    def vocabulary(self) -> str:
        """Fingerprint of the ids."""
        return self.vocab.fingerprint

    def held_out(self, split: str, *, sample: int = 0) -> EvalData:
        """Users, histories and targets of "validation" or "test"; a fixed random sample of users if asked for."""
        sequences, targets = self.splits[split], self.targets[split]
        chosen = np.arange(len(sequences))
        if 0 < sample < len(chosen):
            chosen = np.sort(np.random.default_rng(0).permutation(len(chosen))[:sample])
        histories = [sequences[int(user)] for user in chosen]
        return EvalData(
            users=sequences.users[chosen],
            histories=histories,
            seen=histories,
            targets=targets[chosen],
            num_items=self.vocab.num_items,
            item_counts=np.bincount(self.train.items, minlength=self.vocab.num_items),
            split=split,
            dataset=self.name,
            fingerprint=self.fingerprint,
            max_history=self.max_history,
        )

    def save(self, folder: Path) -> None:
        """Write it into a folder, for `open`. Raw user ids are among it: the folder has to stay home."""
        columns = {"user": pa.array(self.train.users)}
        for name, part in {"train": self.train, **self.splits}.items():
            columns[name] = pa.LargeListArray.from_arrays(part.offsets, part.items)
        columns |= {f"{name} target": pa.array(targets) for name, targets in self.targets.items()}
        facts = {"name": self.name, "fingerprint": self.fingerprint, "max_history": self.max_history}
        # Neither compressed nor in several batches: what is read is what is mapped.
        batch = pa.record_batch(columns).replace_schema_metadata({b"genrec": json.dumps(facts).encode()})
        with pa.ipc.new_file(str(folder / SEQUENCES_FILE), batch.schema) as file:
            file.write_batch(batch)
        self.vocab.save_items(folder / ITEMS_FILE)
        self.vocab.save_users(folder / USERS_FILE)

    @classmethod
    def open(cls, folder: Path) -> Data:
        """Map what `save` wrote: arrays are read-only views of the file's pages, which all processes share.

        The folder may go; the pages stay until the last process that maps them ends (on a POSIX system).
        """
        batch = pa.ipc.open_file(pa.memory_map(str(folder / SEQUENCES_FILE))).get_batch(0)
        users = batch["user"].to_numpy()

        def sequences(name: str) -> Sequences:
            lists = batch[name]
            return Sequences(lists.values.to_numpy(), lists.offsets.to_numpy(), users)

        return cls(
            **json.loads(batch.schema.metadata[b"genrec"]),
            vocab=IdVocab.load(folder),
            train=sequences("train"),
            splits={name: sequences(name) for name in HELD_OUT},
            targets={name: batch[f"{name} target"].to_numpy() for name in HELD_OUT},
        )


def load_data(args: DataArguments, processes: Processes = ALONE) -> Data:
    """Read, split and encode the interactions that the arguments name; the same arguments give the same ids.

    Args:
        processes: all of which call this. One a node reads; the others map what it has found.
    """
    return processes.once_a_node(lambda: read_data(args), Data.save, Data.open)


def read_data(args: DataArguments) -> Data:
    """As `load_data`, in this process alone."""
    interactions = load_interactions(
        args.dataset,
        data_dir=args.data_dir,
        user_column=args.user_column,
        item_column=args.item_column,
        time_column=args.time_column,
        items_path=args.items_file,
        k_core=args.k_core,
        drop_duplicates=args.drop_duplicates,
        shuffle_ties=args.shuffle_ties,
        without_last=args.without_last,
    )
    return encode_data(interactions, args)


def encode_data(interactions: Interactions, args: DataArguments) -> Data:
    """Split interactions and encode their ids, as the arguments say.

    Raises:
        DataError: users have fewer than 3 interactions.
    """
    splits = leave_last_two_out(interactions)
    vocab = IdVocab.build(
        interactions.catalogue,
        splits["train"]["user"],
        seed=args.id_seed,
        user_mode=args.users,  # type: ignore[arg-type]  # its __post_init__ has checked it
        user_buckets=args.user_buckets,
    )
    return Data(
        name=interactions.name,
        fingerprint=interactions.fingerprint(),
        vocab=vocab,
        train=Sequences.encode(splits["train"], vocab, "items"),
        splits={name: Sequences.encode(splits[name], vocab, "history") for name in HELD_OUT},
        targets={name: vocab.encode_items(splits[name]["target"]) for name in HELD_OUT},
        max_history=args.max_history,
    )


def describe_data(data: Data, args: DataArguments) -> dict[str, Any]:
    """Facts about a data set that go with every model of it: its size and protocol; no path, no user id."""
    held_out = sum(len(targets) for targets in data.targets.values())
    return {
        "name": data.name,
        "fingerprint": data.fingerprint,
        "vocabulary": data.vocabulary,
        "public": args.dataset in SOURCES,
        "users": len(data.train),
        "items": data.vocab.num_items,
        "items_without_training_interactions": int(data.vocab.num_items - len(np.unique(data.train.items))),
        "interactions": len(data.train.items) + held_out,
        "k_core": args.k_core,
        "split": "leave-last-two-out",
        "max_history": data.max_history,
        "text_columns": [name for name in data.vocab.items if name not in ("index", "item")],
    }
