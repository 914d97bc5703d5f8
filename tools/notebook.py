"""Run the code cells of a notebook and store what they print in it, so that it can be read without running it.

    python tools/notebook.py docs/from_csv_to_hub.ipynb           # writes the outputs
    python tools/notebook.py docs/from_csv_to_hub.ipynb --check   # runs it; exits with 1 if other words are printed

It runs in a copy of the repository, on a CPU and without network. Stored is what Jupyter shows of plain Python: text printed
and the value of a cell's last line as text or PNG. With --check numbers may differ, since machines round differently.
"""

from __future__ import annotations

import argparse
import ast
import base64
import contextlib
import io
import json
import os
import re
import shutil
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from genrec_llm.files import atomic_file

REPOSITORY = Path(__file__).resolve().parent.parent
COPIED = ("genrec_llm", "recipes", "accelerate_configs", "ds_configs", "tools", "tests", "Makefile", "pyproject.toml")


def copy_of_the_repository(folder: Path) -> Path:
    """Copy what commands need into a new folder, which then reads as a checkout where nothing was run yet."""
    folder.mkdir(parents=True)
    for name in COPIED:
        source = REPOSITORY / name
        if source.is_dir():
            shutil.copytree(source, folder / name, ignore=shutil.ignore_patterns("__pycache__"))
        else:
            shutil.copy(source, folder / name)
    return folder


@contextlib.contextmanager
def reader(folder: Path) -> Iterator[None]:
    """This process as that of somebody who sits in a copy of the repository, without GPU and network."""
    tools = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    os.environ.update(PYTHONPATH=str(folder), PATH=tools, CUDA_VISIBLE_DEVICES="", HF_HUB_OFFLINE="1", TQDM_DISABLE="1")
    with contextlib.chdir(folder):
        yield


def run(notebook: dict[str, Any]) -> dict[str, Any]:
    """The notebook with the outputs of its code cells, run in order in one namespace."""
    space: dict[str, Any] = {"__name__": "__main__"}
    cells, count = [], 0
    for cell in notebook["cells"]:
        if cell["cell_type"] == "code":
            count += 1
            cell = {**cell, "execution_count": count, "outputs": _outputs("".join(cell["source"]), space, count)}
        cells.append(cell)
    return {**notebook, "cells": cells}


def _outputs(source: str, space: dict[str, Any], count: int) -> list[dict[str, Any]]:
    """Run one cell, as Jupyter does: the value of an expression on its last line is shown."""
    tree = ast.parse(source)
    last = tree.body[-1] if tree.body else None
    shown = None
    if isinstance(last, ast.Expr):
        tree.body.pop()
        shown = ast.Expression(last.value)
    printed, value = io.StringIO(), None
    with contextlib.redirect_stdout(printed):
        exec(compile(tree, f"cell {count}", "exec"), space)
        if shown is not None:
            value = eval(compile(shown, f"cell {count}", "eval"), space)
    outputs: list[dict[str, Any]] = []
    if text := printed.getvalue():
        outputs.append({"name": "stdout", "output_type": "stream", "text": text.splitlines(keepends=True)})
    if value is not None:
        data: dict[str, Any] = {"text/plain": repr(value).splitlines(keepends=True)}
        if hasattr(value, "_repr_png_"):
            data = {"image/png": base64.b64encode(value._repr_png_()).decode(), "text/plain": ["<picture>"]}
        outputs.append({"data": data, "execution_count": count, "metadata": {}, "output_type": "execute_result"})
    return outputs


def _words(notebook: dict[str, Any]) -> list[str]:
    """What each code cell shows, without numbers, pictures and the widths of columns."""
    words = []
    for cell in notebook["cells"]:
        for output in cell.get("outputs", ()):
            text = "".join(output.get("text") or output["data"]["text/plain"])
            words.append(" ".join(re.sub(r"[-+]?\d[\d.,e+-]*", "#", text).split()))
    return words


def main() -> None:
    """Write the outputs, or compare them."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("notebook", type=Path)
    parser.add_argument("--check", action="store_true", help="write nothing; exit with 1 if other words are printed")
    args = parser.parse_args()
    path = args.notebook.resolve()
    stored = json.loads(path.read_text(encoding="utf-8"))
    with tempfile.TemporaryDirectory() as folder, reader(copy_of_the_repository(Path(folder, "genrec_llm"))):
        fresh = run(stored)
    if args.check:
        differing = [
            f"stored: {old}\nnow:    {new}"
            for old, new in zip(_words(stored), _words(fresh), strict=True)
            if old != new
        ]
        if differing:
            sys.exit(
                "\n".join([*differing, f"{path.name} prints something else: python tools/notebook.py {args.notebook}"])
            )
        return
    with atomic_file(path) as temporary:
        temporary.write_text(json.dumps(fresh, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
    print(f"outputs written to {args.notebook}")


if __name__ == "__main__":
    main()
