"""Every shell line and Python block of README.md and docs/ does what it says; links lead somewhere; references are current.

How lines are marked, by a comment behind a command, or on a line of its own for the rest of its block:

    # needs a GPU, # needs GPUs …   not run here; its flags have to parse
    # needs the network …           run, against a Hub on loopback whose google/flan-t5-small is a tiny T5
    # takes minutes, # takes half an hour …
                                    run on a small log: the test appends `QUICK` to the command

All others run as they stand, in order, from a copy of the repository: bash blocks by bash, Python blocks of one document in
one process. `make` lines run dry, since they install. Pages below docs/results/ hold the commands that made the results,
which took hours: their flags have to parse.
"""

from __future__ import annotations

import json
import re
import runpy
import shlex
import shutil
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

import fake_hub
import pytest
import tiny
from fake_hub import FakeHub
from tiny import REPOSITORY

from genrec_llm.args import (
    DataArguments,
    EvaluateArguments,
    GenRecTrainingArguments,
    MergeArguments,
    ModelArguments,
    parse_args,
)

DOCS = REPOSITORY / "docs"
PAGES = [REPOSITORY / "README.md", *sorted(DOCS.glob("*.md"))]
RESULTS = sorted((DOCS / "results").rglob("*.md"))
NOTEBOOKS = sorted(DOCS.glob("*.ipynb"))
QUICK = "--dataset quick.csv --num-train-epochs 1 --disable-tqdm true"
"""What a command that takes long has behind it here."""
QUICK_RIVALS = "--dataset quick.csv --set epochs=1"
"""And one that trains rivals."""
MARK = re.compile(r"#\s*(needs|takes)\b.*")
TRAINING = (DataArguments, ModelArguments, GenRecTrainingArguments)
RECIPES: dict[str, tuple[type, ...]] = {
    "pretrain": TRAINING,
    "finetune": TRAINING,
    "merge": (MergeArguments,),
    "evaluate": (EvaluateArguments,),
}
LAUNCHER = ("--strategy", "--processes")

DRIVER = """
import json, subprocess, sys
space = {"__name__": "__main__"}
for language, code in json.load(open(sys.argv[1])):
    print(f"--- {language}\\n{code}", file=sys.stderr, flush=True)
    if language == "bash":
        subprocess.run(["bash", "-euo", "pipefail", "-c", code], check=True)
    else:
        exec(compile(code, "block", "exec"), space)
"""


@dataclass(frozen=True)
class Command:
    """A shell command, with the lines of its continuation and here-document, and its mark."""

    text: str
    mark: str | None

    @property
    def words(self) -> list[str]:
        return shlex.split(self.text.split("\n")[0].replace("\\\n", ""), comments=True)


def blocks(text: str, *languages: str) -> Iterator[tuple[str, str]]:
    """Language and content of each fenced block in one of `languages`."""
    for language, content in re.findall(r"^```(\w+)\n(.*?)^```$", text, re.MULTILINE | re.DOTALL):
        if language in languages:
            yield language, content


def commands(block: str) -> list[Command]:
    """The commands of a bash block."""
    found, lines, for_the_rest = [], iter(block.splitlines()), None
    for line in lines:
        if not line.strip():
            continue
        if line.startswith("#"):
            for_the_rest = line if MARK.search(line) else for_the_rest
            continue
        while line.endswith("\\"):
            line = line[:-1].rstrip() + " " + next(lines).strip()
        mark = MARK.search(line)
        text = line[: mark.start()].rstrip() if mark else line
        if here := re.search(r"<<'(\w+)'", line):
            while not text.endswith(f"\n{here[1]}"):
                text += "\n" + next(lines)
        found.append(Command(text, mark[0] if mark else for_the_rest))
    return found


def script(block: str) -> str:
    """A bash block as it is run here."""
    lines = []
    for command in commands(block):
        if command.mark and "GPU" in command.mark:
            continue
        if command.words[0] == "make":
            lines.append(shlex.join(["make", "--dry-run", *command.words[1:]]))
        elif command.mark and command.mark.startswith("# takes"):
            lines.append(f"{command.text} {QUICK_RIVALS if 'tools/rivals.py' in command.words else QUICK}")
        else:
            lines.append(command.text)
    return "\n".join(lines)


def recipe_of(words: list[str]) -> tuple[str, list[str]] | None:
    """The recipe that a command runs, and its arguments; None for other commands."""
    for place, word in enumerate(words):
        if match := re.fullmatch(r"(?:recipes/)?(\w+)\.py", word):
            return (match[1], words[place + 1 :]) if match[1] in RECIPES else None
    if words[0] != "genrec" or words[1] not in RECIPES:
        return None
    arguments = list(words[2:])
    for flag in LAUNCHER:
        if flag in arguments:
            place = arguments.index(flag)
            del arguments[place : place + 2]
    return words[1], arguments


# --- what can be seen without running anything ------------------------------------------------------------------------


def name_of(path: Path) -> str:
    return str(path.relative_to(REPOSITORY))


@pytest.mark.parametrize("path", [*PAGES, *RESULTS], ids=name_of)
def test_the_flags_of_every_recipe_parse(path: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "recipes").symlink_to(REPOSITORY / "recipes")
    for _, block in blocks(path.read_text(encoding="utf-8"), "bash"):
        for command in commands(block):
            if "<<" in command.text:  # files that later commands name
                subprocess.run(["bash", "-c", command.text], check=True)
            elif called := recipe_of(command.words):
                name, arguments = called
                if path in RESULTS and "--config" in arguments:  # of the commit that the page names
                    place = arguments.index("--config")
                    arguments[place : place + 2] = ["--dataset", "movielens-100k"]
                # bf16 asks for a GPU of those who have none.
                parse_args(*RECIPES[name], argv=[*arguments, *(["--use_cpu"] if RECIPES[name] == TRAINING else [])])


def test_a_flag_that_is_not_there_is_found() -> None:
    (command,) = commands(
        "genrec finetune --strategy ddp --processes 8 --dataset x.csv \\\n    --lora-rank 4  # needs GPUs\n"
    )
    name, arguments = recipe_of(command.words) or ("", [])
    assert (name, command.mark) == ("finetune", "# needs GPUs")
    with pytest.raises(Exception, match="--lora-rank: unknown flag"):
        parse_args(*RECIPES[name], argv=[*arguments, "--use_cpu"])


def test_blocks_are_read_as_a_reader_does() -> None:
    block = "a 1  # why\n# needs the network\ncat > x <<'END'\n# b\nEND\nc \\\n  2    # takes hours\nmake demo\n"
    assert [(command.text, command.mark) for command in commands(block)] == [
        ("a 1  # why", None),
        ("cat > x <<'END'\n# b\nEND", "# needs the network"),
        ("c 2", "# takes hours"),
        ("make demo", "# needs the network"),
    ]
    assert script(block) == f"a 1  # why\ncat > x <<'END'\n# b\nEND\nc 2 {QUICK}\nmake --dry-run demo"
    assert script("genrec x  # needs a GPU\n") == ""


def slug(heading: str) -> str:
    """The anchor that a heading gets where markdown is shown."""
    return re.sub(r"[^\w\- ]", "", heading.strip().lower()).replace(" ", "-")


def prose(path: Path) -> str:
    """The markdown of a page or notebook, without its code blocks."""
    text = path.read_text(encoding="utf-8")
    if path.suffix == ".ipynb":
        text = "\n\n".join(
            "".join(cell["source"]) for cell in json.loads(text)["cells"] if cell["cell_type"] == "markdown"
        )
    return re.sub(r"^```.*?^```$", "", text, flags=re.MULTILINE | re.DOTALL)


@pytest.mark.parametrize("path", [*PAGES, *RESULTS, *NOTEBOOKS], ids=name_of)
def test_links_lead_somewhere(path: Path) -> None:
    lost = []
    for target in re.findall(r"\]\(([^)\s]+)\)", prose(path)):
        if re.match(r"\w+:", target):
            continue
        place, _, anchor = target.partition("#")
        page = (path.parent / place).resolve() if place else path
        headings = re.findall(r"^#+ (.+)$", prose(page), re.MULTILINE) if anchor and page.is_file() else []
        if not page.exists() or (anchor and anchor not in map(slug, headings)):
            lost.append(target)
    assert not lost


def tool(name: str) -> dict[str, Any]:
    """What a program of tools/ defines."""
    return runpy.run_path(str(REPOSITORY / "tools" / f"{name}.py"))


def test_the_reference_of_configuration_keys_is_what_the_dataclasses_say() -> None:
    page = (DOCS / "configuration.md").read_text(encoding="utf-8")
    assert page == tool("reference")["page"](), "python tools/reference.py"
    rows = dict(re.findall(r"^\| `(\w+)` \|(.+)\|$", page, re.MULTILINE))
    assert "`0.001` | `5e-05`" in rows["learning_rate"] and "has to be given" in rows["dataset"]
    ours = {
        entry.name
        for cls in (DataArguments, ModelArguments, MergeArguments, EvaluateArguments)
        for entry in fields(cls)
    }
    assert {*ours, *GenRecTrainingArguments.__annotations__} <= rows.keys()


def test_a_reference_that_has_drifted_is_found(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    reference, page = tool("reference"), tmp_path / "docs" / "configuration.md"
    monkeypatch.setitem(reference["page"].__globals__, "PAGE", page)
    monkeypatch.setattr(sys, "argv", ["reference.py"])
    reference["main"]()
    monkeypatch.setattr(sys, "argv", ["reference.py", "--check"])
    reference["main"]()
    page.write_text(page.read_text(encoding="utf-8").replace("`0.001`", "`0.002`"), encoding="utf-8")
    with pytest.raises(SystemExit, match=r"configuration\.md is not what"):
        reference["main"]()


@pytest.mark.parametrize("path", NOTEBOOKS, ids=name_of)
def test_a_notebook_holds_what_it_printed_and_nothing_of_this_machine(path: Path) -> None:
    text = path.read_text(encoding="utf-8")
    notebook = json.loads(text)
    assert notebook["nbformat"] == 4
    cells = [cell for cell in notebook["cells"] if cell["cell_type"] == "code"]
    assert [cell["execution_count"] for cell in cells] == list(range(1, len(cells) + 1))
    assert sum(bool(cell["outputs"]) for cell in cells) > len(cells) / 2
    assert not re.search(r"(?<![\w.:/])/(?:home|root|Users|work|tmp|usr|opt|var)/|/\.venv/|\bTraceback\b", text)


# --- running ----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Place:
    """A copy of the repository, and the environment of its commands."""

    folder: Path
    environment: dict[str, str]

    def follow(self, page: Path, *more: str) -> str:
        """Do what a page says, then the Python code `more`; what all of it printed."""
        steps = [
            (language, script(content) if language == "bash" else content)
            for language, content in blocks(page.read_text(encoding="utf-8"), "bash", "python")
        ]
        written = self.folder / "steps.json"
        written.write_text(json.dumps([*steps, *(("python", code) for code in more)]))
        done = subprocess.run(
            [sys.executable, "-c", DRIVER, str(written)], cwd=self.folder, env=self.environment, timeout=600, text=True,
            stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
        )  # fmt: skip
        assert done.returncode == 0, done.stdout[-6000:]
        return done.stdout


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Place]:
    """A reader's machine: a checkout, no GPU, a login at the Hub on loopback."""
    home = tmp_path_factory.mktemp("docs")
    folder = Path(tool("notebook")["copy_of_the_repository"](home / "genrec_llm"))
    shutil.copytree(DOCS / "results" / "ranks", folder / "docs" / "results" / "ranks")
    tiny.save_log(folder / "quick.csv")
    with FakeHub() as hub:
        hub.add_model("google/flan-t5-small", tiny.save_backbone("t5-untied", home / "flan"))
        hub.add_model("sentence-transformers/all-MiniLM-L6-v2", tiny.save_encoder(["tea", "cream"], home / "encoder"))
        environment = {**tiny.environment(), **fake_hub.environment(hub, home / "hf")}
        yield Place(folder, environment | {"PYTHONPATH": str(folder), "CUDA_VISIBLE_DEVICES": ""})


@pytest.mark.slow
def test_the_readme(place: Place) -> None:
    printed = place.follow(REPOSITORY / "README.md")
    assert "genrec demo" in printed  # what `make demo` would run
    assert (place.folder / "runs/shop/finetune/evaluation/validation/report.md").is_file()


@pytest.fixture(scope="module")
def shop(place: Place) -> Place:
    """After the quick start for ML engineers."""
    place.follow(DOCS / "ml_engineer.md")
    return place


@pytest.mark.slow
def test_the_quick_start_for_ml_engineers(shop: Place) -> None:
    lines = [json.loads(line) for line in (shop.folder / "lists.jsonl").read_text().splitlines()]
    assert [line.get("order") for line in lines] == [17, None] and [len(line["items"]) for line in lines] == [5, 5]
    assert not (shop.folder / "models/shop/users.parquet").exists()


@pytest.mark.slow
def test_the_quick_start_for_app_developers(shop: Place) -> None:
    seen_too = 'recommender.recommend(["tea-red", "tea-blue"], k=5, exclude_seen=False)'
    compare = (
        f"print([best, [found.item for found in {seen_too}], len(commit)])".replace("print(", "print(json.dumps(") + ")"
    )
    printed = shop.follow(DOCS / "app_developer.md", f"import json\n{compare}")
    by_transformers, by_us, length = json.loads(printed.splitlines()[-1])
    assert by_transformers == by_us and len(by_us) == 5
    assert length == 40


@pytest.mark.slow
def test_the_quick_start_for_researchers(place: Place, shared_data: Path) -> None:
    (place.folder.parent / "shared").symlink_to(shared_data.parent)
    printed = place.follow(DOCS / "researcher.md")
    assert "popular among the last items" in printed
    assert (place.folder / "runs/beauty_page/README.md").is_file()
    assert len((place.folder / "runs/beauty_t5-micro/finetune/test_openings.jsonl").read_text().splitlines()) == 1


FOLLOWED = ("README.md", "ml_engineer.md", "app_developer.md", "researcher.md")


@pytest.mark.slow
@pytest.mark.parametrize("path", [path for path in PAGES if path.name not in FOLLOWED], ids=name_of)
def test_other_pages(path: Path, place: Place) -> None:
    place.follow(path)


@pytest.mark.slow
@pytest.mark.parametrize("path", NOTEBOOKS, ids=name_of)
def test_a_notebook_prints_what_it_holds(path: Path) -> None:
    done = subprocess.run(
        [sys.executable, "tools/notebook.py", str(path), "--check"], cwd=REPOSITORY, env=tiny.environment(), timeout=600,
        capture_output=True, text=True,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-6000:]
