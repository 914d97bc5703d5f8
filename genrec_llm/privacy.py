"""What must not leave: secrets of the environment, raw user ids, e-mail addresses, places on this machine.

`problems_inside` looks into every file of a folder that is about to be sent; `redacted` writes a command line down
without its secrets. Neither ever shows what it found.
"""

from __future__ import annotations

import json
import os
import re
import shlex
from collections.abc import Collection, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from huggingface_hub import get_token
from safetensors import SafetensorError, safe_open

from genrec_llm.errors import counted

HIDDEN = "***"
Bytes = npt.NDArray[np.uint8]
TOKEN = re.compile(rb"hf_[A-Za-z0-9]{30,}")
"""A token of the Hub."""
EMAIL = re.compile(rb"[\w.+-]+@(?:[\w-]+\.)+(?!(?:png|json|jsonl|md|csv|parquet|py|yaml)\b)[A-Za-z]{2,}")
_SECRET_NAME = re.compile(r"TOKEN|SECRET|PASSWORD|API_KEY|ACCESS_KEY")
_SECRET_FLAG = re.compile(r"--.*(?:token|secret|password|api[-_]key|access[-_]key)$", re.IGNORECASE)
_SECRET_LENGTH, _SHORTEST, _SURE = 8, 6, 10
_CHUNK = 1 << 22
_PLAIN = re.compile(r"[^\W\d_]+|\d+")
_OWN = re.compile(rb"<(?:item|user)_(?:\d+|unknown)>")
_BASE_WORDS = ("model.vocab", "model.merges")
_MIXED_BYTES = (".safetensors", ".parquet", ".png", ".model")


def secrets(given: str | None = None) -> dict[str, str]:
    """What this process knows that nobody else may: by name, the Hub token, the `given` one, and secrets of the environment.

    Those are the values of 8 characters and more of variables whose names contain TOKEN, SECRET, PASSWORD, API_KEY or
    ACCESS_KEY.
    """
    found = {
        name: value
        for name, value in os.environ.items()
        if _SECRET_NAME.search(name.upper()) and len(value) >= _SECRET_LENGTH
    }
    for name, token in (("the Hub token", get_token()), ("the given token", given)):
        if token and token not in found.values():
            found[name] = token
    return found


def redacted(arguments: Sequence[str]) -> str:
    """A command as the shell takes it, with `***` for the values of `--hub-token` and the like, and for all `secrets`."""
    known, shown, hide = sorted(secrets().values(), key=len, reverse=True), [], False
    for argument in arguments:
        flag, equals, _ = argument.partition("=")
        if hide:
            argument = HIDDEN
        elif equals and _SECRET_FLAG.match(flag):
            argument = flag + equals + HIDDEN
        hide = not hide and not equals and bool(_SECRET_FLAG.match(flag))
        for secret in known:
            argument = argument.replace(secret, HIDDEN)
        shown.append(re.sub(TOKEN.pattern.decode(), HIDDEN, argument))
    return shlex.join(shown)


def problems_inside(folder: Path, *, user_ids: Collection[str], known: Collection[str], token: str | None) -> list[str]:
    """What in the files of a folder may not be sent, one sentence a finding; nothing that was found is repeated there.

    Every file is searched as it lies on the disk, and decoded: keys and texts of json (escapes undone), all columns and
    the metadata of parquet, tensor names and metadata of safetensors, the lines of text.

    Args:
        user_ids: raw user ids.
        known: texts that stand there rightly, such as the raw item ids: a user id that equals one is not looked for.
        token: of the Hub, where it is not the one that the environment or the login gives.

    What is found: `secrets` and `hf_…` tokens anywhere; e-mail addresses in json and text; the home folder in json and text;
    user ids of 6 bytes and more. Of these, ids of letters alone or of digits alone (`wonder`, `100234`) only where
    they are a whole cell, json text or line, and not in the base tokenizer's own vocabulary; other ids anywhere, below 10
    bytes where no letter or digit touches them. In the bytes of tensors and pictures ids of 10 bytes and more.

    What is not: shorter ids; ids that are split, encoded, compressed, or lower- or upper-cased; users that training did not
    keep by name (`--users hashed` or none).
    """
    ids, values = _Ids(set(user_ids) - set(known)), secrets(token)
    home = str(Path.home()) if len(Path.home().parts) > 1 else None
    problems = []
    for path in sorted(path for path in folder.rglob("*") if path.is_file()):
        found: dict[str, str] = {}  # what → the first place of it
        users: dict[bytes, str] = {}
        raw = np.memmap(path, np.uint8, "r") if path.stat().st_size else np.empty(0, np.uint8)
        try:
            decoded = _Decoded(path)
        except (ValueError, SafetensorError, OSError) as error:  # pyarrow's errors are one or the other
            found[f"something that is not a {path.suffix} file"] = type(error).__name__
            decoded = _Decoded(None)
        least = _SURE if path.suffix in _MIXED_BYTES else _SHORTEST
        for content, least_here, where in ((decoded.content, _SHORTEST, decoded.place), (raw, least, "byte {}".format)):
            found = {what: where(offset) for what, offset in _secrets_in(content, values)} | found
            users |= {user: where(offset) for user, offset in ids.in_bytes(content, least_here) if user not in users}
        users |= {user: place for user, place in ids.whole(decoded) if user not in users}
        if path.suffix in (".json", ".md", ".txt"):
            found |= {what: decoded.place(offset) for what, offset in _personal_in(decoded.content, home)}
        if users:
            found[f"raw ids of {counted(len(users), 'user')}"] = next(iter(users.values()))
        problems += [f"{path.relative_to(folder)}: holds {what} ({place})" for what, place in found.items()]
    return problems


class _Decoded:
    """All texts of a file, one after the other in `content` with a line break between, and where each stands.

    Raises:
        ValueError, SafetensorError, OSError: the file is not what its name says.
    """

    def __init__(self, path: Path | None) -> None:
        self.texts = [] if path is None else list(_texts(path))
        encoded = [text.encode("utf-8", "replace") for _, text in self.texts]
        self.content = np.frombuffer(b"\n".join(encoded), np.uint8)
        self.starts = np.cumsum([0, *(len(text) + 1 for text in encoded)])

    def place(self, offset: int) -> str:
        """Where the text at an offset of `content` stands in the file."""
        return self.texts[int(np.searchsorted(self.starts, offset, "right")) - 1][0]


def _secrets_in(content: Bytes, values: dict[str, str]) -> Iterator[tuple[str, int]]:
    """What was found, and its offset: each once."""
    buffer = content.data
    for name, value in values.items():
        if found := re.search(re.escape(value.encode()), buffer):
            yield f"the value of {name}", found.start()
    if found := TOKEN.search(buffer):
        yield "a token of the Hub", found.start()


def _personal_in(content: Bytes, home: str | None) -> Iterator[tuple[str, int]]:
    """An address and a path of this machine, and their offsets: the first of each."""
    text = content.tobytes()
    for sign in re.finditer(rb"@", text):
        start = max(0, sign.start() - 64)
        if EMAIL.search(text[start : sign.start() + 256]):
            yield "an e-mail address", sign.start()
            break
    if home and (found := re.search(re.escape(home.encode()) + rb"(?=[/\\\s\"']|$)", text)):
        yield "a path of this machine", found.start()


def _texts(path: Path) -> Iterator[tuple[str, str]]:
    """Every text of a file behind its place there."""
    if path.suffix == ".json":
        yield from _json_texts(json.loads(path.read_text(encoding="utf-8")), "")
    elif path.suffix == ".parquet":
        import pyarrow.parquet as pq

        with pq.ParquetFile(path) as table:
            for key, value in (table.schema_arrow.metadata or {}).items():
                yield "metadata", f"{key.decode()} {value.decode(errors='replace')}"
            for name in table.schema_arrow.names:
                yield "column names", name
                cells = table.read([name]).column(0).to_pylist()
                # Not a cell that holds its own row: the index of items would be taken for users called by numbers.
                yield from ((f"column {name}, row {row}", str(cell)) for row, cell in enumerate(cells) if cell != row)
    elif path.suffix == ".safetensors":
        with safe_open(path, framework="np") as file:
            yield from (("tensor names", name) for name in file.keys())  # noqa: SIM118
            yield from (("metadata", f"{key} {value}") for key, value in (file.metadata() or {}).items())
    elif path.suffix == ".png":
        with open(path, "rb") as file:
            if file.read(8) != b"\x89PNG\r\n\x1a\n":
                raise ValueError("no PNG signature")
    elif path.suffix not in _MIXED_BYTES:
        lines = path.read_text(encoding="utf-8").splitlines()
        yield from ((f"line {number}", line) for number, line in enumerate(lines, start=1))


def _json_texts(value: object, place: str) -> Iterator[tuple[str, str]]:
    if isinstance(value, str):
        yield place, value
    elif isinstance(value, dict):
        for key, inner in value.items():
            yield place, key
            yield from _json_texts(inner, f"{place}.{key}" if place else key)
    elif isinstance(value, list):
        for inner in value:
            yield from _json_texts(inner, place)


class _Ids:
    """Raw user ids that files are searched for; see `problems_inside`."""

    def __init__(self, raw: Collection[str]) -> None:
        ids = {text for text in raw if len(text) >= _SHORTEST}
        self.plain = {text for text in ids if _PLAIN.fullmatch(text)}
        self.mixed = {text.encode() for text in ids - self.plain}
        self.lengths: dict[bytes, set[int]] = {}
        for code in self.mixed:
            self.lengths.setdefault(code[:_SHORTEST], set()).add(len(code))
        # Which three bytes an id can begin with, and which can follow them: little else has to be looked at.
        starts = np.frombuffer(b"".join(self.lengths), np.uint8).reshape(-1, _SHORTEST)
        self.first, self.second = np.zeros(2**24, bool), np.zeros(2**24, bool)
        self.first[_threes(starts[:, :3].ravel())[::3]] = True
        self.second[_threes(starts[:, 3:].ravel())[::3]] = True

    def whole(self, decoded: _Decoded) -> Iterator[tuple[bytes, str]]:
        """Plain ids that are a whole text."""
        for place, text in decoded.texts:
            if text in self.plain and not place.startswith(_BASE_WORDS):
                yield text.encode(), place

    def in_bytes(self, content: Bytes, least: int) -> Iterator[tuple[bytes, int]]:
        """Other ids of at least so many bytes, and their offsets."""
        if not self.mixed:
            return
        for begin in range(0, len(content) - _SHORTEST + 1, _CHUNK):
            codes = _threes(content[begin : begin + _CHUNK + _SHORTEST - 1])
            for start in (begin + np.flatnonzero(self.first[codes[:-3]] & self.second[codes[3:]])).tolist():
                for length in self.lengths.get(content[start : start + _SHORTEST].tobytes(), ()):
                    code = content[start : start + length].tobytes()
                    before = content[max(start - 1, 0) : start].tobytes()
                    after = content[start + length : start + length + 1].tobytes()
                    known = code in self.mixed and not _OWN.fullmatch(before + code + after)
                    alone = not re.search(rb"\w", before + after)
                    if known and length >= least and (alone or length >= _SURE):
                        yield code, start


def _threes(content: Bytes) -> npt.NDArray[np.integer[Any]]:
    """Each three bytes in a row as one number."""
    wide = content.astype(np.uint32)
    return (wide[:-2] << 16) | (wide[1:-1] << 8) | wide[2:]
