"""Several processes rank what one ranks: every user once, equal to the last digit, and no process waits for a failed one."""

from __future__ import annotations

import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tiny
import torch

from genrec_llm.baselines import ItemKNN
from genrec_llm.errors import ConfigError, DataError, GenRecError
from genrec_llm.evaluation import EvalData, fitted_item_knn, rank_recommender, user_batches
from genrec_llm.launch import training_command
from genrec_llm.loading import load_trained
from genrec_llm.processes import ALONE, Processes, _own_folder, launched
from genrec_llm.recommender import Recommender
from genrec_llm.runs import load_run_data

USERS, ITEMS = 61, 23


@dataclass
class Meeting:
    """Where the threads that play processes in this module meet to exchange values."""

    count: int
    values: list[Any] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.values = [None] * self.count
        self.barrier = threading.Barrier(self.count, timeout=20)

    def gather(self, index: int, value: Any) -> list[Any]:
        self.values[index] = value
        self.barrier.wait()
        gathered = list(self.values)
        self.barrier.wait()
        return gathered


@dataclass(frozen=True)
class Played(Processes):
    """A process of a launch, played by a thread."""

    meeting: Meeting = field(default_factory=lambda: Meeting(1))

    def gather(self, value: Any) -> list[Any]:
        return self.meeting.gather(self.index, value)


def play(count: int, work: Callable[[Processes], Any]) -> list[Any]:
    """What `work` gives, or the error that it raises, in each of `count` processes."""
    meeting = Meeting(count)

    def tried(index: int) -> Any:
        try:
            return work(Played(index, count, meeting=meeting))
        except Exception as error:
            return error

    with ThreadPoolExecutor(count) as threads:
        return list(threads.map(tried, range(count)))


@pytest.fixture
def data() -> EvalData:
    return tiny.eval_data(users=USERS, items=ITEMS, longest=30, split="validation")


class Touchy:
    """Its scores change with the company that a user is in, as rounding does, but more; it notes whom it was asked about."""

    name = "touchy"

    def __init__(self) -> None:
        self.asked: list[int] = []

    def scores(self, histories, users: np.ndarray) -> np.ndarray:
        self.asked += users.tolist()
        return np.random.default_rng(users).normal(size=(len(users), ITEMS)).astype(np.float32)


# --- sharing ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("count", [1, 2, 3, 4])
@pytest.mark.parametrize("parts", [0, 1, 4, 17])
def test_each_part_is_done_once_and_every_process_has_all_results_in_order(count: int, parts: int) -> None:
    done: list[int] = []

    def work(part: int) -> int:
        done.append(part)
        return part**2

    results = play(count, lambda processes: processes.map(work, range(parts), name="squares"))
    assert results == [[part**2 for part in range(parts)]] * count
    assert sorted(done) == list(range(parts))


@pytest.mark.parametrize("count", [1, 2, 3, 5])
def test_ranks_and_lists_do_not_depend_on_the_number_of_processes(data: EvalData, count: int) -> None:
    alone = rank_recommender(Touchy(), data, exclude_seen=True, batch_size=4)
    shared = Touchy()
    for ranked in play(count, lambda p: rank_recommender(shared, data, exclude_seen=True, batch_size=4, processes=p)):
        np.testing.assert_array_equal(ranked.ranks.better, alone.ranks.better)
        np.testing.assert_array_equal(ranked.ranks.tied, alone.ranks.tied)
        np.testing.assert_array_equal(ranked.top, alone.top)
    assert sorted(shared.asked) == sorted(data.users.tolist())


def test_users_of_like_history_length_are_ranked_together_and_processes_get_like_amounts(data: EvalData) -> None:
    shown = np.minimum([len(history) for history in data.histories], 20)
    batches = user_batches(data, np.arange(USERS), 4)
    assert sorted(np.concatenate(batches)) == list(range(USERS))
    assert max(map(len, batches)) == 4 and min(map(len, batches)) >= 3
    assert (np.diff(shown[np.concatenate(batches)]) <= 0).all()
    work = [sum(shown[user].sum() for user in found) for found in play(3, lambda p: mine(p, batches))]
    assert max(work) - min(work) <= shown[batches[0]].sum()


def mine(processes: Processes, batches: list[np.ndarray]) -> list[np.ndarray]:
    """The batches that a process works on."""
    worked: list[np.ndarray] = []
    processes.map(worked.append, batches, name="mine")
    return worked


def test_one_process_fits_the_item_knn_and_all_score_with_it(
    data: EvalData, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    fit, fitted = ItemKNN.fit, []

    def counted(train, num_items: int) -> ItemKNN:
        fitted.append(num_items)
        return fit(train, num_items)

    monkeypatch.setattr(ItemKNN, "fit", counted)

    def scores(processes: Processes) -> np.ndarray:
        with fitted_item_knn(data.histories, ITEMS, tmp_path, processes) as item_knn:
            found = item_knn.scores(data.histories, data.users)
            processes.gather(None)  # as ranking does: nobody leaves while another one scores
        return found

    expected = fit(data.histories, ITEMS).scores(data.histories, data.users)
    for found in play(3, scores):
        np.testing.assert_array_equal(found, expected)
    assert fitted == [ITEMS] and not list(tmp_path.iterdir())


# --- errors -----------------------------------------------------------------------------------------------------------


def test_an_error_of_one_process_is_told_by_all() -> None:
    def work(part: int) -> int:
        if part == 1:  # dealt to the second process
            raise DataError(["a column is missing", "a row is cut short"])
        return part

    errors = play(3, lambda processes: processes.map(work, range(6), name="failing"))
    assert [error.problems for error in errors] == [["a column is missing", "a row is cut short"]] * 3
    with pytest.raises(DataError):
        ALONE.map(work, range(6), name="failing")


def test_an_error_that_nobody_foresaw_keeps_its_own_traceback_and_is_named_by_the_others() -> None:
    def fail(processes: Processes) -> None:
        with processes.step():
            if processes.index == 1:
                raise RuntimeError("out of memory")

    first, second = play(2, fail)
    assert isinstance(first, GenRecError) and first.problems == ["process 1 of 2 failed: RuntimeError: out of memory"]
    assert isinstance(second, RuntimeError)


def test_what_all_processes_complain_of_is_said_once() -> None:
    def fail(processes: Processes) -> None:
        with processes.step():
            raise ConfigError("no such directory")

    assert [error.problems for error in play(3, fail)] == [["no such directory"]] * 3


# --- threads of a CPU -------------------------------------------------------------------------------------------------


@pytest.fixture
def four_threads() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(4)
    yield
    torch.set_num_threads(before)


def test_on_a_cpu_a_part_is_computed_by_one_thread_and_several_parts_at_once(four_threads: None) -> None:
    together = threading.Barrier(3, timeout=20)

    def work(part: int) -> int:
        together.wait()  # breaks unless three are at work
        return torch.get_num_threads()

    assert Processes(threads=4).map(work, range(6), name="threads", at_once=3) == [1] * 6
    assert torch.get_num_threads() == 4


def test_after_an_error_no_more_parts_are_begun_and_the_threads_are_as_before(four_threads: None) -> None:
    begun: list[int] = []

    def work(part: int) -> None:
        begun.append(part)
        time.sleep(0.01)
        raise DataError("broken")

    with pytest.raises(DataError, match="broken"):
        Processes(threads=2).map(work, range(500), name="failing")
    assert len(begun) < 100 and torch.get_num_threads() == 4


def test_intervals_do_not_depend_on_the_threads_of_the_matrix_library() -> None:
    code = (
        "import numpy as np; from genrec_llm.metrics import bootstrap_interval\n"
        "print(bootstrap_interval(np.random.default_rng(0).random((12, 200_000)).ravel(), resamples=3))"
    )
    found = {
        subprocess.run(
            [sys.executable, "-c", code], env={**tiny.environment(), "OMP_NUM_THREADS": threads},
            capture_output=True, text=True, timeout=120, check=True,
        ).stdout
        for threads in ("1", "2", "3")
    }  # fmt: skip
    assert len(found) == 1


# --- once a node ------------------------------------------------------------------------------------------------------


NODES = """
import json, os, sys
from genrec_llm.errors import GenRecError
from genrec_llm.processes import launched

processes, how = launched(use_cpu=True), sys.argv[1]

def save(made, folder):
    (folder / "made").write_text(made)
    assert folder.stat().st_mode & 0o077 == 0, "others can read it"

def open(folder):
    if how == "kill" and processes.index == 1:
        os._exit(7)
    return (folder / "made").read_text()

def make():
    return f"by process {processes.index}"

try:
    said = processes.once_a_node(make, save, open)
except GenRecError as error:
    said = error.problems[0]
print(said, os.listdir(os.environ["TMPDIR"]) if how == "kill" or not any(processes.gather(None)) else None)
"""


def start(code: str, *words: object, ranks: list[int], folder: Path) -> list[subprocess.CompletedProcess[str]]:
    """Run a program in several processes with one group; `ranks` are their numbers on their nodes, node by node."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    (folder / "tmp").mkdir()
    shared = tiny.environment() | {
        "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "WORLD_SIZE": str(len(ranks)), "TMPDIR": str(folder / "tmp")
    }  # fmt: skip
    pipes: Any = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    begun = [
        subprocess.Popen(
            [sys.executable, "-c", code, *map(str, words)],
            env=shared | {"RANK": str(rank), "LOCAL_RANK": str(local)}, **pipes,
        )
        for rank, local in enumerate(ranks)
    ]  # fmt: skip
    try:
        ended = [(process, *process.communicate(timeout=60)) for process in begun]
    finally:
        for process in begun:
            process.kill()
    return [subprocess.CompletedProcess(process.args, process.returncode, *said) for process, *said in ended]


def test_every_node_has_a_maker_and_all_processes_of_a_node_have_what_it_made(tmp_path: Path) -> None:
    done = start(NODES, "live", ranks=[0, 1, 0], folder=tmp_path)
    assert [each.returncode for each in done] == [0] * 3, [each.stderr for each in done]
    assert [each.stdout for each in done] == [f"by process {maker} []\n" for maker in (0, 0, 2)]


@pytest.mark.slow
def test_a_process_that_is_killed_while_it_opens_leaves_nothing_behind_and_nobody_waiting(tmp_path: Path) -> None:
    maker, killed = start(NODES, "kill", ranks=[0, 1], folder=tmp_path)
    assert killed.returncode == 7
    assert maker.stdout.startswith("launch: another process was ended from outside") and maker.stdout.endswith("[]\n")


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_takes_the_folder_away(number: signal.Signals) -> None:
    interrupting = signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell's background jobs ignore it
    before = signal.getsignal(signal.SIGTERM)
    try:
        with pytest.raises((SystemExit, KeyboardInterrupt)), _own_folder() as folder:
            (folder / "users").touch()
            os.kill(os.getpid(), number)
    finally:
        signal.signal(signal.SIGINT, interrupting)
    assert not folder.exists() and signal.getsignal(signal.SIGTERM) is before


DATA = """
import os, sys
import numpy as np
from pandas.testing import assert_frame_equal
from genrec_llm import encoded
from genrec_llm.args import DataArguments
from genrec_llm.errors import GenRecError
from genrec_llm.processes import launched

processes, (log, items, broken) = launched(use_cpu=True), sys.argv[1:]
read, load = [], encoded.load_interactions

def counted(name, **options):
    read.append(name)
    return load(name, **options)

encoded.load_interactions = counted
args = DataArguments(dataset=log, items_file=items, max_history=7)
shared = encoded.load_data(args, processes)
assert read == ([log] if processes.first else []), read
alone = encoded.load_data(args)
names = ("name", "fingerprint", "vocabulary", "max_history")
assert [getattr(shared, name) for name in names] == [getattr(alone, name) for name in names]
assert_frame_equal(shared.vocab.items, alone.vocab.items)
assert shared.vocab.users == alone.vocab.users and shared.vocab.user_mode == alone.vocab.user_mode
pairs = list(zip([shared.train, *shared.splits.values()], [alone.train, *alone.splits.values()], strict=True))
arrays = [(getattr(ours, name), getattr(theirs, name)) for ours, theirs in pairs for name in ("items", "offsets", "users")]
arrays += [(shared.targets[name], alone.targets[name]) for name in alone.targets]
assert shared.targets.keys() == alone.targets.keys() and shared.splits.keys() == alone.splits.keys()
for ours, theirs in arrays:
    assert ours.dtype == theirs.dtype and np.array_equal(ours, theirs) and not ours.flags.writeable
mapped = sum("sequences.arrow (deleted)" in line for line in open("/proc/self/maps"))
print(f"process {processes.index}: {len(shared.train)} users, {mapped} mapping", flush=True)
processes.gather(None)
try:
    encoded.load_data(DataArguments(dataset=broken, items_file=items), processes)
except GenRecError as error:
    print(error, flush=True)
"""


@pytest.mark.skipif(sys.platform != "linux", reason="/proc tells what is mapped")
def test_one_process_reads_the_data_or_says_what_is_wrong_with_them_and_all_have_them(tmp_path: Path) -> None:
    log, items, broken = (
        tiny.save_log(tmp_path / "log.csv"),
        tiny.save_items(tmp_path / "items.csv"),
        tmp_path / "b.csv",
    )
    broken.write_text("user,item,timestamp\nann,i1,noon\n,i1,3\n")
    done = start(DATA, log, items, broken, ranks=[0, 1], folder=tmp_path)
    for rank, each in enumerate(done):
        assert each.returncode == 0, each.stderr
        first, *told = each.stdout.splitlines()
        assert first == f"process {rank}: 40 users, 1 mapping"
        assert len(told) == 2 and all(str(broken) in line for line in told), told
    assert not list((tmp_path / "tmp").iterdir())


# --- joining a launch -------------------------------------------------------------------------------------------------


def test_a_process_without_a_gpu_of_its_own_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("torch.cuda.device_count", lambda: 2)
    for name in ("WORLD_SIZE", "LOCAL_WORLD_SIZE"):
        monkeypatch.setenv(name, "3")
    with pytest.raises(ConfigError, match=r"3 processes were started on the 2 GPUs .*--num_processes 2"):
        launched()


def test_without_a_launcher_there_is_one_process(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("torch.cuda.device_count", lambda: 2)
    processes = launched(use_cpu=True)
    assert (processes.index, processes.count, processes.device.type) == (0, 1, "cpu")
    assert processes.threads == torch.get_num_threads()


FAILING = """
import os, signal, sys
from genrec_llm.errors import DataError, exits_cleanly
from genrec_llm.processes import launched

def work(part):
    if part == 1 and sys.argv[1] == "raise":
        raise DataError("the second process has no data")
    if part == 1:
        os.kill(os.getpid(), signal.SIGKILL)

@exits_cleanly
def main():
    launched(use_cpu=True).map(work, range(4), name="failing")

main()
"""


@pytest.mark.parametrize(
    ("how", "code", "message"),
    [
        ("raise", 2, "the second process has no data"),
        ("kill", 137, "launch: another process was ended from outside, perhaps for want of memory"),
    ],
)
def test_a_launch_in_which_one_process_fails_ends_with_one_message(
    how: str, code: int, message: str, tmp_path: Path
) -> None:
    (tmp_path / "failing.py").write_text(FAILING)
    done = subprocess.run(
        [
            sys.executable, "-m", "genrec_llm.launch", "--config_file", "accelerate_configs/ddp.yaml",
            "--main_process_port", "0", str(tmp_path / "failing.py"), how,
        ],
        cwd=tiny.REPOSITORY, env=tiny.environment(), capture_output=True, text=True, timeout=120,
    )  # fmt: skip
    assert done.returncode == code, done.stderr[-3000:]
    (told,) = [line for line in done.stderr.splitlines() if "rror" in line]
    assert told.startswith(f"error: {message}")


# --- the real commands ------------------------------------------------------------------------------------------------


OWN = {"command", "commit", "time", "hardware", "processes"}
"""What a report tells of the command that made it."""


def evaluation(run: Path, *arguments: str, processes: int) -> dict[str, bytes]:
    """All files of an evaluation by the real command, but for `OWN`."""
    shutil.rmtree(run / "evaluation", ignore_errors=True)
    words = ["--run", str(run), "--batch-size", "3", "--use_cpu", *arguments]
    alone = [sys.executable, "recipes/evaluate.py", *words]
    output = tiny.run(alone if processes == 1 else training_command("evaluate", words, processes=processes))
    files = tiny.contents(run / "evaluation")
    (name,) = [name for name in files if name.endswith("/report.json") and name.count("/") == 1]
    report = json.loads(files[name])
    assert report["processes"] == processes and output.count("written to") == 1
    for fact in OWN:
        del report[fact]
    return files | {name: json.dumps(report).encode()}


def test_two_processes_write_the_report_of_one_and_open_the_test_split_once(tmp_path: Path) -> None:
    run = tiny.train(tiny.save_backbone("t5-untied", tmp_path / "base"), tmp_path, tmp_path / "run")
    tiny.recipe("merge", "--run", run)
    on_test = ("--split", "test", "--keep-seen", "--generate-users", "25")
    tiny.recipe("evaluate", "--run", run, "--batch-size", 3, "--use_cpu", *on_test)
    report = json.loads((run / "evaluation/test_seen-kept/report.json").read_text())
    alone = tiny.contents(run / "evaluation")
    shared = evaluation(run, *on_test, processes=2)
    assert shared.keys() == alone.keys()
    assert all(shared[name] == alone[name] for name in alone if name != "test_seen-kept/report.json")
    again = json.loads(shared["test_seen-kept/report.json"])
    assert again == {name: value for name, value in report.items() if name not in OWN}
    assert len(again["reports"]) == 5 and again["generate"]["users"] == 25
    openings = [json.loads(line) for line in (run / "test_openings.jsonl").read_text().splitlines()]
    assert [opening["processes"] for opening in openings] == [1, 2]


@pytest.mark.slow
@pytest.mark.parametrize("strategy", ["zero3", "zero2", "ddp"])
def test_a_run_of_several_processes_is_merged_and_evaluated_by_any_number(strategy: str, tmp_path: Path) -> None:
    run, base = tmp_path / "run", tiny.save_backbone("t5-untied", tmp_path / "base")
    log = tiny.save_log(tmp_path / "log.csv", users=120)
    tiny.run(
        tiny.launch_command(
            strategy, "finetune", "--dataset", str(log), "--backbone", str(base), "--output-dir", str(run),
            "--num-train-epochs", "2", "--global-batch-size", "16", "--lora-r", "2", "--rows-learning-rate", "3e-3",
        )
    )  # fmt: skip
    assert json.loads((run / "run.json").read_text())["launch"]["world_size"] == 2
    assert "top-20 agreement 100.0%" in tiny.run([sys.executable, "recipes/merge.py", "--run", str(run)])

    one, two, four = (evaluation(run, processes=processes) for processes in (1, 2, 4))
    assert one == two and one == four

    # What was measured while training is what the merged model reaches, and the adapter ranks as the merged model does.
    (ours, *_) = json.loads(one["validation/report.json"])["reports"]
    assert ours["metrics"]["NDCG@10"]["mean"] == load_trained(run / "adapter").info["metrics"]["validation_ndcg@10"]
    held_out = load_run_data(run).held_out("validation")
    adapter, merged = (
        rank_recommender(Recommender.from_pretrained(run / kind), held_out, exclude_seen=True, batch_size=3)
        for kind in ("adapter", "merged")
    )
    np.testing.assert_array_equal(adapter.ranks.better, merged.ranks.better)
    np.testing.assert_array_equal(adapter.top, merged.top)
