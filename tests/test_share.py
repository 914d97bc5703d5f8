"""From a log to strangers: train on MovieLens-100K, push, and use it where genrec_llm is and where it never was."""

from __future__ import annotations

import base64
import gzip
import json
import os
import re
import shlex
import shutil
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

import fake_hub
import numpy as np
import pandas as pd
import pyarrow.parquet as pq
import pytest
import tiny
from fake_hub import TOKEN, FakeHub
from safetensors.numpy import load, load_file

from genrec_llm.recommender import Recommender

pytestmark = pytest.mark.slow

SECRET = "planted-Secret-of-the-environment-77"
ADDRESSES = b"private.example"
"""Of every user of the log: where an id stands, this does."""
USERS, ITEMS, ASKED, K = 943, 1682, 200, 20
ROUNDING = 2e-5
"""Of scores up to 11, whose last bit is 1e-6: adapter and merged model sum in another order, and are 4e-6 apart."""
WITHOUT_GENREC = """
import ast, importlib, json, re, sys
from pathlib import Path

absent = {}
for name in ("genrec_llm", "pandas", "pyarrow", "sentencepiece"):
    try:
        importlib.import_module(name)
    except ModuleNotFoundError as error:
        absent[name] = error.name

import torch
from huggingface_hub import hf_hub_download
from peft import PeftModel
from safetensors.torch import load_file
from transformers import AutoModelForSeq2SeqLM

base = AutoModelForSeq2SeqLM.from_pretrained("org/base").eval()
before = {name: value.clone() for name, value in base.state_dict().items()}
ids, start = torch.tensor([[5, 6, 7, 1]]), torch.tensor([[0]])
with torch.no_grad():
    plain = base(input_ids=ids, decoder_input_ids=start).logits
    lora = PeftModel.from_pretrained(base, "org/adapter").eval()
    changed = lora(input_ids=ids, decoder_input_ids=start).logits
    with lora.disable_adapter():
        again = lora(input_ids=ids, decoder_input_ids=start).logits
file = load_file(hf_hub_download("org/adapter", "adapter_model.safetensors"))
loaded = {name.replace(".default", ""): value for name, value in lora.state_dict().items() if "lora_" in name}
answers = {
    "absent": absent,
    "the LoRA tensors are those of the file":
        file.keys() == loaded.keys() and all(torch.equal(file[name], loaded[name]) for name in file),
    "the adapter changes the base": not torch.equal(plain, changed),
    "without it the base is as it was": torch.equal(plain, again),
    "lora": {name: value.double().sum().item() for name, value in file.items()},
}

histories = json.loads(Path(sys.argv[1]).read_text())
for name in ("org/adapter", "org/merged"):
    card = Path(hf_hub_download(name, "README.md")).read_text(encoding="utf-8")
    blocks = re.findall("```python\\n(.*?)```", card, re.DOTALL)
    (block,) = [block for block in blocks if "genrec_llm" not in block and "pandas" not in block]
    exec(block, {})  # as it stands
    block, longer = re.subn(r"num_beams=10, num_return_sequences=10\\)|topk\\(10\\)",
                            lambda found: found[0].replace("10", "20"), block)
    steps = ast.parse(block).body
    (place,) = [place for place, step in enumerate(steps) if re.fullmatch(r"history = \\[[\\d, ]+\\]", ast.unparse(step))]
    assert longer == 1
    space, lists = {}, []
    exec(compile(ast.Module(steps[:place], []), "card", "exec"), space)
    rest = compile(ast.Module(steps[place + 1 :], []), "card", "exec")
    for history in histories:  # each in the place of the card's own
        space["history"] = history
        exec(rest, space)
        lists.append(space["best"])
    answers[name] = lists
Path(sys.argv[2]).write_text(json.dumps(answers))
"""


@dataclass(frozen=True)
class Shared:
    """What the way left behind.

    Attributes:
        folder: everything on this machine: `runs`, the log, `said`, caches.
        hub: holds org/base, org/adapter and org/merged.
        environment: of a shell that is logged in on the Hub, with a secret.
        said: what each command printed.
        histories: raw item ids of `ASKED` users, oldest first.
    """

    folder: Path
    hub: FakeHub
    environment: dict[str, str]
    said: dict[str, str]
    histories: list[list[str]]

    def run(self, name: str, *command: str, cwd: Path = tiny.REPOSITORY) -> None:
        """Run a command as that user, and keep what it printed under a name."""
        done = subprocess.run(
            command, cwd=cwd, env=self.environment, timeout=600, text=True, check=False,
            stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
        )  # fmt: skip
        self.said[name] = done.stdout
        assert done.returncode == 0, f"{name}: exit {done.returncode}\n{done.stdout[-6000:]}"


def write_movielens(source: Path, folder: Path) -> pd.DataFrame:
    """Write log.csv, whose users are e-mail addresses, and items.csv with titles; the log."""
    with gzip.open(source / "ml-100k.inter.gz", "rt") as file:
        log = pd.read_csv(file, sep="\t", dtype=str).set_axis(["user", "item", "rating", "timestamp"], axis=1)
    with gzip.open(source / "ml-100k.item.gz", "rt") as file:
        items = pd.read_csv(file, sep="\t", dtype=str, keep_default_na=False)
    log["user"] = [f"person{user}@{ADDRESSES.decode()}" for user in log["user"]]
    log.to_csv(folder / "log.csv", index=False)
    items = items.iloc[:, [0, 1, 3]].set_axis(["item", "title", "categories"], axis=1)
    items.to_csv(folder / "items.csv", index=False)
    assert (log["user"].nunique(), len(items)) == (USERS, ITEMS)
    return log


@pytest.fixture(scope="module")
def shared(shared_data: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Shared]:
    """Train both stages on a base of the Hub, merge, evaluate and push, all by commands; ask here, logged in, for more."""
    folder = tmp_path_factory.mktemp("share")
    log = write_movielens(shared_data / "ml-100k", folder)
    log["timestamp"] = log["timestamp"].astype(int)
    ordered = log.sort_values("timestamp", kind="stable").groupby("user", sort=False)["item"]
    users = np.random.default_rng(0).permutation(log["user"].unique())[:ASKED]
    with FakeHub() as hub, pytest.MonkeyPatch.context() as patch:
        hub.add_model("org/base", tiny.save_backbone("t5-untied", folder / "base"))
        environment = {**tiny.environment(), **fake_hub.environment(hub, folder / "hf"), "MY_SECRET_TOKEN": SECRET}
        made = Shared(folder, hub, environment, {}, [ordered.get_group(user).tolist() for user in users])
        runs, python = folder / "runs", sys.executable
        flags = [
            "--dataset", f"{folder}/log.csv", "--items-file", f"{folder}/items.csv", "--backbone", "org/base",
            "--max-history", "20", "--max-steps", "30", "--lora-r", "4", "--global-batch-size", "64",
            "--learning-rate", "5e-3", "--eval-strategy", "steps", "--eval-steps", "30", "--save-strategy", "steps",
            "--save-steps", "30", "--logging-steps", "10",
        ]  # fmt: skip
        made.run("pretrain", *tiny.launch_command("cpu", "pretrain", *flags, "--output-dir", f"{runs}/pretrain"))
        more = ["--output-dir", f"{runs}/finetune", "--from-run", f"{runs}/pretrain"]
        push = ["--push_to_hub", "--hub_model_id", "org/adapter"]
        made.run("finetune", *tiny.launch_command("cpu", "finetune", *flags, *more, *push))
        made.run("merge", python, "recipes/merge.py", "--run", f"{runs}/finetune")
        split = ["--split", "validation", "--generate-users", str(ASKED)]
        made.run("evaluate", python, "recipes/evaluate.py", "--run", f"{runs}/finetune", *split)
        made.run("push", python, "-m", "genrec_llm.cli", "push", f"{runs}/finetune/merged", "org/merged")
        fake_hub.use(patch, hub, folder / "hf")
        yield made


def item_numbers(shared: Shared, name: str) -> dict[str, int]:
    """Raw item id → number in a pushed model."""
    file = shared.folder / f"{name}-items.parquet"
    file.write_bytes(shared.hub.repositories[f"org/{name}"].files()["items.parquet"])
    items = pd.read_parquet(file)
    return dict(zip(items["item"], items["index"].tolist(), strict=True))


@pytest.fixture(scope="module")
def fresh_python(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """The interpreter of a new virtual environment with torch, transformers, peft and safetensors, as they are here."""
    folder = tmp_path_factory.mktemp("fresh") / "venv"
    subprocess.run([sys.executable, "-m", "venv", folder], check=True)
    names = ("torch", "transformers", "peft", "safetensors")
    wanted = [f"{name}=={version(name).partition('+')[0]}" for name in names]
    pip = [folder / "bin" / "python", "-m", "pip", "install", "--quiet", "--retries", "1", "--timeout", "15"]
    done = subprocess.run([*pip, *wanted], capture_output=True, text=True, timeout=1800, check=False)
    if done.returncode:
        pytest.skip(f"pip cannot install {' '.join(wanted)} here: {done.stderr.strip().splitlines()[-1]}")
    yield folder / "bin" / "python"
    shutil.rmtree(folder)  # 1.2 GB, which pytest would keep


@pytest.fixture(scope="module")
def elsewhere(shared: Shared, fresh_python: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """What a stranger without genrec_llm or a token gets: facts of the LoRA part, and lists by the cards' blocks."""
    folder = tmp_path_factory.mktemp("elsewhere")
    numbers = item_numbers(shared, "merged")
    assert numbers == item_numbers(shared, "adapter")
    (folder / "histories.json").write_text(json.dumps([[numbers[item] for item in one] for one in shared.histories]))
    environment = {name: value for name, value in os.environ.items() if name not in ("PYTHONPATH", "HF_TOKEN")}
    done = subprocess.run(
        [fresh_python, "-c", WITHOUT_GENREC, "histories.json", "answers.json"], cwd=folder, timeout=900, text=True,
        env={**environment, **fake_hub.environment(shared.hub, folder / "hf", token=None), "OMP_NUM_THREADS": "1"},
        capture_output=True, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-6000:]
    return dict(json.loads((folder / "answers.json").read_text()))


@pytest.fixture(scope="module")
def lists(shared: Shared) -> dict[str, list[dict[int, float]]]:
    """What `Recommender` gives here from the Hub: item number → score, best first, items of the history included.

    A few more than `K`, so that a tie at the end of the others' lists can be told.
    """
    found = {}
    for name in ("adapter", "merged"):
        recommender, numbers = Recommender.from_pretrained(f"org/{name}", device="cpu"), item_numbers(shared, name)
        answers = recommender.recommend(shared.histories, k=K + 5, exclude_seen=False)
        found[name] = [{numbers[one.item]: one.score for one in answer} for answer in answers]
    return found


def assert_same(theirs: list[list[int]], ours: list[dict[int, float]]) -> None:
    """Equal lists, but that items whose scores are apart by rounding alone may have changed places."""
    assert len(theirs) == ASKED and all(len({*one}) == K for one in theirs)
    for place, (their, our) in enumerate(zip(theirs, ours, strict=True)):
        apart = [abs(our.get(item, np.inf) - score) for item, score in zip(their, our.values(), strict=False)]
        assert max(apart) <= ROUNDING, f"user {place}: {their} is not {[*our][:K]}"
    assert sum(their == [*our][:K] for their, our in zip(theirs, ours, strict=True)) > 0.9 * ASKED


# --- the same model everywhere ----------------------------------------------------------------------------------------


def test_the_lora_part_loads_on_its_base_without_genrec_llm(shared: Shared, elsewhere: dict[str, Any]) -> None:
    assert elsewhere["absent"] == {name: name for name in ("genrec_llm", "pandas", "pyarrow", "sentencepiece")}
    assert elsewhere["the LoRA tensors are those of the file"]
    assert elsewhere["the adapter changes the base"] and elsewhere["without it the base is as it was"]
    trained = load_file(shared.folder / "runs" / "finetune" / "adapter" / "adapter_model.safetensors")
    assert elsewhere["lora"] == pytest.approx({name: value.sum(dtype=float) for name, value in trained.items()})


@pytest.mark.parametrize("name", ["adapter", "merged"])
def test_the_block_of_the_card_ranks_as_recommender_does(
    elsewhere: dict[str, Any], lists: dict[str, list[dict[int, float]]], name: str
) -> None:
    assert len({tuple(one) for one in elsewhere[f"org/{name}"]}) > ASKED / 2, "the lists follow the history"
    assert_same(elsewhere[f"org/{name}"], lists[name])


def test_adapter_and_merged_agree(lists: dict[str, list[dict[int, float]]]) -> None:
    assert_same([[*one][:K] for one in lists["adapter"]], lists["merged"])
    for one, other in zip(lists["adapter"], lists["merged"], strict=True):
        assert all(abs(one[item] - other[item]) <= ROUNDING for item in one.keys() & other.keys())


@pytest.mark.parametrize("card", ["there", "here"])
def test_the_commands_of_the_adapters_card_merge_it(shared: Shared, tmp_path: Path, card: str) -> None:
    run, pushed = shared.folder / "runs" / "finetune", shared.hub.repositories["org/adapter"].files()
    shutil.copytree(run / "adapter", tmp_path / "run" / "adapter")
    text, cwd = ((run / "adapter" / "README.md").read_text(), tmp_path / "run" / "adapter")
    expected = load_file(run / "merged" / "model.safetensors")
    if card == "there":
        text, cwd = pushed["README.md"].decode(), tmp_path
        expected = load(shared.hub.repositories["org/merged"].files()["model.safetensors"])
    (block,) = re.findall("```bash\n(.*?)```", text, re.DOTALL)
    for line in block.splitlines():
        word, *rest = shlex.split(line)
        assert word == "genrec"
        shared.run(f"{card}: {line}", sys.executable, "-m", "genrec_llm.cli", *rest, cwd=cwd)
    place = cwd / re.search(r"lies in `(.+?)`", text)[1]
    found = load_file(place / "model.safetensors")
    assert found.keys() == expected.keys()
    for name in found:
        np.testing.assert_allclose(found[name], expected[name], rtol=1e-6, atol=1e-7)


# --- what stays home --------------------------------------------------------------------------------------------------


def decoded(content: bytes, scratch: Path) -> bytes:
    """Bytes, and behind them the texts of a parquet file or the file contents of a commit."""
    if content.startswith(b"PAR1"):
        scratch.write_bytes(content)
        table = pq.read_table(scratch)
        return content + repr((table.schema.metadata, table.to_pydict())).encode()
    if content.startswith(b'{"key":'):
        values = [json.loads(line)["value"] for line in content.splitlines()]
        files = [base64.b64decode(value["content"]) for value in values if value.get("encoding") == "base64"]
        return b"\n".join([content, *files])
    return content


def holding(contents: dict[str, bytes], word: bytes, scratch: Path) -> set[str]:
    """Names of the contents in which a word stands."""
    return {name for name, content in contents.items() if word in decoded(content, scratch)}


def test_neither_secret_nor_user_id_is_sent_written_or_said(shared: Shared, tmp_path: Path) -> None:
    scratch, runs = tmp_path / "scratch", tiny.contents(shared.folder / "runs")
    sent = {f"request {number}": body for number, body in enumerate(shared.hub.bodies)}
    for name in ("org/adapter", "org/merged"):
        repository = shared.hub.repositories[name]
        sent |= {f"{name} {oid}": content for oid, content in repository.objects.items()}
        for sha in repository.history:
            sent |= {f"{name} {sha} {file}": content for file, content in repository.files(sha).items()}
    said = {name: text.encode() for name, text in shared.said.items()}
    logs = [name for name in runs if name.endswith("run.json")]
    assert len(logs) == 2 and all(runs[f"{stage}/users.parquet"] for stage in ("pretrain", "finetune"))

    for secret in (TOKEN.encode(), SECRET.encode()):
        assert holding(sent | runs | said, secret, scratch) == set()
    assert holding(sent | said, ADDRESSES, scratch) == set()
    assert holding(runs, ADDRESSES, scratch) == {"pretrain/users.parquet", "finetune/users.parquet"}
    # The same search finds what was pushed, in a commit and in a parquet file.
    assert any(name.startswith("request") for name in holding(sent, b'"format_version"', scratch))
    assert any(name.startswith("request") for name in holding(sent, b"Toy Story", scratch))


def test_the_repositories_hold_what_a_stranger_needs_and_nothing_else(shared: Shared) -> None:
    for name in ("adapter", "merged"):
        files = {*shared.hub.repositories[f"org/{name}"].files()} - {".gitattributes"}
        home = {*tiny.contents(shared.folder / "runs" / "finetune" / name)}
        assert files == {file for file in home if name == "merged" or not file.startswith("plots/")}
        assert f"{shared.hub.url}/org/{name}" in shared.said["finetune" if name == "adapter" else "push"]
