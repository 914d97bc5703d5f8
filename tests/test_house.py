"""How the project is laid out and installed: what lies on the top level, what starts without torch."""

from __future__ import annotations

import json
import logging
import subprocess
import sys
import tomllib
from importlib.metadata import entry_points
from pathlib import Path

import pytest

REPOSITORY = Path(__file__).resolve().parent.parent
FOLDERS = {
    "genrec_llm",
    "recipes",
    "accelerate_configs",
    "ds_configs",
    "tests",
    "tools",
    "docs",
    ".ci",
    ".github",
}
FILES = {
    "pyproject.toml",
    "README.md",
    "Makefile",
    "LICENSE",
    "CHANGELOG.md",
    "SECURITY.md",
    "CONTRIBUTING.md",
    "CITATION.cff",
    ".gitignore",
    ".gitattributes",
    ".pre-commit-config.yaml",
    ".editorconfig",
    ".python-version",
}
LIGHT_MODULES = (
    "errors", "files", "tables", "data", "sources", "vocab", "metrics", "shape", "workload", "memory", "traffic",
    "hardware", "prediction", "estimate",
)  # fmt: skip
PRINT_HEAVY_MODULES = "import sys; print(sorted({'torch', 'transformers'} & sys.modules.keys()))"


def python(code: str, *arguments: str) -> str:
    """Run `code` in a fresh interpreter, far from the repository, and return what it printed."""
    command = [sys.executable, "-c", code, *arguments]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, cwd="/")
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_the_top_level_holds_only_what_belongs_there() -> None:
    listed = subprocess.run(["git", "ls-files", "-z"], cwd=REPOSITORY, capture_output=True, text=True)
    if listed.returncode != 0:
        pytest.skip("not a git checkout: there is no list of tracked files")
    tracked = {name.split("/")[0] for name in listed.stdout.split("\0") if name}
    assert tracked - FOLDERS - FILES == set()
    assert {"genrec_llm", "recipes", "pyproject.toml", "README.md", "Makefile", "LICENSE"} <= tracked


def test_genrec_help_starts_without_torch() -> None:
    (script,) = entry_points(group="console_scripts", name="genrec")
    assert script.value == "genrec_llm.cli:main"
    printed = python(
        "import sys\n"
        "from genrec_llm.cli import main\n"
        "sys.argv = ['genrec', '--help']\n"
        "try:\n"
        "    main()\n"
        "except SystemExit as ended:\n"
        "    assert not ended.code, ended.code\n" + PRINT_HEAVY_MODULES
    )
    assert "usage: genrec" in printed
    assert printed.splitlines()[-1] == "[]"


@pytest.mark.parametrize("module", LIGHT_MODULES)
def test_the_modules_of_the_data_verbs_start_without_torch(module: str) -> None:
    assert python(f"import genrec_llm.{module}\n" + PRINT_HEAVY_MODULES) == "[]\n"


SAY_HOW_LOUD_AT_PEFT = """
import logging, runpy, sys
class AtPeft:
    def find_spec(self, name, path=None, target=None):
        if name == "peft":
            print(logging.getLogger("bitsandbytes.backends.cpu.ops").level)
            sys.exit()
sys.meta_path.insert(0, AtPeft())
runpy.run_path(sys.argv[1], run_name="__main__")
"""


@pytest.mark.parametrize("recipe", sorted((REPOSITORY / "recipes").glob("*.py")), ids=lambda path: path.name)
def test_what_need_not_be_heard_is_silent_before_peft_loads_it(recipe: Path) -> None:
    assert python(SAY_HOW_LOUD_AT_PEFT, str(recipe)) == f"{logging.ERROR}\n"


COMMANDS = REPOSITORY / "tools" / "commands.py"  # what tools share; no program
TOOLS = sorted({*(REPOSITORY / "tools").glob("*.py")} - {COMMANDS})
ASK_EACH_FOR_HELP = """
import contextlib, io, json, runpy, sys, traceback
answers = {}
for tool in sys.argv[1:]:
    sys.argv, sys.path[0] = [tool, "--help"], tool.rpartition("/")[0]
    with contextlib.redirect_stdout(io.StringIO()) as said:
        try:
            answer = runpy.run_path(tool, run_name="__main__") and "it did not end"
        except SystemExit as ended:
            answer = ended.code
        except Exception:
            answer = traceback.format_exc()
    answers[tool] = [answer, said.getvalue()]
print(json.dumps(answers))
"""


@pytest.fixture(scope="module")
def help_of_tools() -> dict[str, tuple[object, str]]:
    """How each tool ended and what it said; one process asks all, since most of the time goes into importing torch."""
    return json.loads(python(ASK_EACH_FOR_HELP, *map(str, TOOLS)).splitlines()[-1])  # type: ignore[no-any-return]


@pytest.mark.parametrize("tool", TOOLS, ids=lambda path: path.stem)
def test_every_tool_tells_how_it_is_used(tool: Path, help_of_tools: dict[str, tuple[object, str]]) -> None:
    ended, said = help_of_tools[str(tool)]
    assert not ended, ended
    assert f"usage: {tool.name}" in said


def test_whoever_has_a_torch_that_fits_their_gpu_keeps_it() -> None:
    project = tomllib.loads((REPOSITORY / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    (torch,) = [dependency for dependency in project["dependencies"] if dependency.startswith("torch")]
    assert "<" not in torch and "==" not in torch
