"""The Hugging Face Hub: sharing an exported directory with one commit, and getting one back at the commit it had.

What is sent is a staged copy of the directory: without known users, with a card for others, and looked into file by
file before anything leaves. It arrives in one commit, so that whoever reads meanwhile gets the earlier model or this one.
"""

from __future__ import annotations

import fnmatch
import logging
import os
import re
import shlex
import shutil
import tempfile
import time
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import pandas as pd
from huggingface_hub import CommitOperationAdd, CommitOperationDelete, HfApi, hf_hub_download, snapshot_download
from huggingface_hub.errors import (
    HfHubHTTPError,
    HFValidationError,
    HTTPError,
    LocalEntryNotFoundError,
    LocalTokenNotFoundError,
    OfflineModeIsEnabled,
    RemoteEntryNotFoundError,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)
from huggingface_hub.hf_api import ModelInfo
from huggingface_hub.utils import validate_repo_id

from genrec_llm.card.figures import PLOTS
from genrec_llm.card.origins import from_nothing, is_hub_name
from genrec_llm.card.page import CARD_FILE, model_card
from genrec_llm.directory import ADAPTER, INFO_FILE, MERGED, ROWS_FILE, TRAINED, WEIGHTS_FILE, check_files, read_info
from genrec_llm.errors import ConfigError, ExportError, counted
from genrec_llm.export import write_without_users
from genrec_llm.files import atomic_directory, describe_files, read_json, write_json, writing
from genrec_llm.privacy import problems_inside
from genrec_llm.vocab import ITEMS_FILE, USERS_FILE

logger = logging.getLogger(__name__)

FILES = (
    INFO_FILE, ITEMS_FILE, CARD_FILE, f"{PLOTS}/*.png",
    "tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json", "spiece.model",
    "vocab.json", "merges.txt",
    ROWS_FILE, "adapter_config.json", "adapter_model.safetensors",
    WEIGHTS_FILE, "model-*-of-*.safetensors", f"{WEIGHTS_FILE}.index.json", "config.json", "generation_config.json",
)  # fmt: skip
"""Names (shell patterns) of all that is ever sent and fetched. No pickle, no code."""
_FOREIGN_BUT_HARMLESS = (".gitattributes", CARD_FILE, "LICENSE*")
_PAUSES = (2.0, 10.0)
"""Seconds before a broken upload is tried again, on top of huggingface_hub's own tries for each large file."""
_PATH = re.compile(r"(?<![\w.:/\\~])(?:~[\w-]*/|/(?=[\w.@+-]+/)|[A-Za-z]:[\\/])(?:[\w.@+-]+[\\/])*([\w.@+-]*)")
_Answer = TypeVar("_Answer")


@dataclass(frozen=True)
class Pushed:
    """What was sent.

    Attributes:
        files: size in bytes of every file, by name.
        url: where the model is (or will be).
        commit: its commit on the Hub; None for a dry run.
    """

    files: dict[str, int]
    url: str
    commit: str | None


@dataclass(frozen=True)
class Pulled:
    """What was fetched: the folder where it lies, and the commit that it was at."""

    folder: Path
    commit: str


# --- getting ----------------------------------------------------------------------------------------------------------


def local_directory(source: str | os.PathLike[str], *, revision: str | None = None) -> Path:
    """The folder of an exported model: `source` itself, or for `org/name` the Hub's cache, downloaded where it is not there.

    Args:
        revision: branch, tag or commit on the Hub. All files are of the one commit that it is at the first request.

    Raises:
        ConfigError: neither a folder nor a model that the Hub answers for, or a revision of a folder.
    """
    if not Path(source).is_dir():
        return _download(os.fspath(source), revision)
    if revision is not None:
        raise ConfigError(f"revision: {source} is a folder, which has none: leave it out")
    return Path(source)


def pull(repo_id: str, *, revision: str | None = None, output_dir: str | os.PathLike[str] | None = None) -> Pulled:
    """Fetch a model from the Hub and compare its files with what was exported.

    Args:
        revision: branch, tag or commit.
        output_dir: where a copy goes; without it the model lies in the Hub's cache alone.

    Raises:
        ConfigError: no such model, files that are not as they were exported, or `output_dir` holds something else.
        ExportError: the copy cannot be written; nothing is left of it.
    """
    out = None if output_dir is None else Path(output_dir)
    folder = _download(repo_id, revision)
    check_files(folder, read_info(folder, ADAPTER, MERGED))
    if out is None:
        return Pulled(folder, folder.name)
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        same = (out / INFO_FILE).is_file() and (out / INFO_FILE).read_bytes() == (folder / INFO_FILE).read_bytes()
        if not same:
            raise ConfigError(f"output_dir: {out} holds something else: choose another folder, or remove that")
        check_files(out, read_info(out, ADAPTER, MERGED))
        return Pulled(out, folder.name)
    with atomic_directory(out) as copy:
        shutil.copytree(folder, copy, dirs_exist_ok=True)  # follows the links into the cache
    return Pulled(out, folder.name)


def _download(name: str, revision: str | None) -> Path:
    """The folder of a Hub model in the Hub's cache, which is called as its commit."""
    if not re.fullmatch(r"[\w-][\w.-]*/[\w-][\w.-]*", name):
        raise ConfigError(f"{name}: no such folder, and no name of a model on the Hub (org/name)")
    with _hub_errors(name, revision):
        try:
            # Alone first: it says which commit, and whether the rest is worth fetching.
            commit = Path(hf_hub_download(name, INFO_FILE, revision=revision)).parent.name
        except RemoteEntryNotFoundError as error:
            raise ConfigError(
                f"{name}: holds no model of genrec_llm on the Hub (no {INFO_FILE}): give one that `genrec push` made"
            ) from error
        return Path(snapshot_download(name, revision=commit, allow_patterns=list(FILES)))


# --- sending ----------------------------------------------------------------------------------------------------------


def push(
    folder: Path,
    repo_id: str,
    *,
    revision: str | None = None,
    private: bool = False,
    with_users: bool = False,
    base_model: str | None = None,
    dry_run: bool = False,
    token: str | None = None,
) -> Pushed:
    """Share an adapter or merged directory on the Hub as `org/name`, in one commit that replaces an earlier model there.

    Args:
        folder: as exported; it is not changed.
        revision: branch that it goes to, made where it is not there; by default the main one.
        private: make the repository private where it is not there yet.
        with_users: send the rows and words of known users, too. Their raw ids stay home in any case.
        base_model: Hub name of the checkpoint that it was trained from, where that was a folder.
        dry_run: do all but asking and sending.
        token: of the Hub, in place of the one that `hf auth login` or HF_TOKEN gave.

    Raises:
        ConfigError: the folder was changed or is not for sharing, the base is on this machine alone, a file holds what may
            not be sent (see `privacy.problems_inside`), or the Hub refuses; nothing was sent.
        ExportError: the connection broke; the Hub shows what it showed before, or already the whole new model.
    """
    folder, api = Path(os.path.abspath(folder)), HfApi(token=token)
    info = read_info(folder, ADAPTER, MERGED, TRAINED)
    if info["kind"] == TRAINED:
        raise ConfigError(
            f"{folder}: is the state of full tuning, which only this project reads: merge the run "
            f"(genrec merge --run {shlex.quote(str(folder.parent))}) and push its {MERGED}/"
        )
    _check_name(repo_id)
    check_files(folder, info)
    _refuse_strangers(folder, info)
    base = _shared_base(folder, info, base_model)
    if not dry_run:
        named = None if from_nothing(info) else base
        check_remote(repo_id, revision=revision, private=private, base_model=named, token=token)
    # Beside the folder, since rewritten weights need as much space as it has.
    beside = folder.parent if os.access(folder.parent, os.W_OK) else None
    with writing(folder.parent), tempfile.TemporaryDirectory(dir=beside, prefix=".push-") as temporary:
        staged = Path(temporary)
        _stage(folder, staged, info, repo_id, base=base, with_users=with_users)
        _refuse_what_stays_home(folder, staged, token)
        files = {name: path.stat().st_size for name, path in _files_of(staged)}
        commit = (
            None if dry_run else _send(api, staged, repo_id, revision, private, message=f"genrec_llm: {info['kind']}")
        )
    return Pushed(files, f"{api.endpoint}/{repo_id}" + (f"/tree/{revision}" if revision else ""), commit)


def push_finished(
    folder: Path,
    repo_id: str,
    *,
    revision: str | None,
    private: bool,
    base_model: str | None = None,
    token: str | None = None,
) -> None:
    """`push` at the end of a recipe: prints where it went, or fails with the command that does it later.

    Raises:
        ConfigError, ExportError: as `push`; the folder is whole.
    """
    options = {"--revision": revision, "--base-model": base_model}
    command = ["genrec", "push", str(folder), repo_id, *(["--private"] if private else [])]
    command += [word for flag, value in options.items() if value for word in (flag, value)]
    try:
        pushed = push(folder, repo_id, revision=revision, private=private, base_model=base_model, token=token)
    except (ConfigError, ExportError) as error:
        again = f"{folder}: is whole, but was not pushed; do it later with: {shlex.join(command)}"
        raise type(error)([*error.problems, again]) from error
    size = sum(pushed.files.values()) / 1e6
    print(
        f"pushed {counted(len(pushed.files), 'file')}, {size:.1f} MB, to {pushed.url} (commit {pushed.commit})",
        flush=True,
    )


def check_push(trained: Path, repo_id: str, *, revision: str | None, private: bool, base_model: str | None) -> None:
    """Refuse before a merge what would be refused when the merged model is pushed.

    Args:
        trained: adapter (or full tuning's trained) directory that is to be merged.

    Raises:
        ConfigError: as `push` and `check_remote`.
    """
    info = read_info(trained, ADAPTER, TRAINED)
    base = _shared_base(trained, info, base_model)
    check_remote(repo_id, revision=revision, private=private, base_model=None if from_nothing(info) else base)


def check_remote(
    repo_id: str,
    *,
    revision: str | None = None,
    private: bool = False,
    base_model: str | None = None,
    token: str | None = None,
) -> None:
    """Refuse a push that the Hub would refuse at its end; only reads.

    Args:
        base_model: what the model was trained from, where there is one.
        token: of the Hub, in place of the one that `hf auth login` or HF_TOKEN gave.

    Raises:
        ConfigError: no `org/name`, nobody is logged in, the repository holds something else or is public and was to be
            private, or the base is not on the Hub.
    """
    _check_name(repo_id)
    api = HfApi(token=token)
    with _hub_errors(repo_id, revision):
        api.whoami()
        _remote(api, repo_id, revision, private)
    if base_model is not None:
        _check_base(api, base_model)


def _check_name(repo_id: str) -> None:
    try:
        validate_repo_id(repo_id)
        valid = "/" in repo_id
    except HFValidationError:
        valid = False
    if not valid:
        raise ConfigError(
            f"{repo_id}: no name for a model on the Hub: give org/name (your user name counts as one), of letters, digits, "
            "'-', '_' and '.'"
        )


def _check_base(api: HfApi, base: str) -> None:
    try:
        with _hub_errors(base):
            api.model_info(base)
    except ConfigError as error:
        raise ConfigError(
            f"base model: {error}. The card names it to others: give its name on the Hub with --base-model"
        ) from error


def _shared_base(folder: Path, info: dict[str, Any], base_model: str | None) -> str:
    """What the shared copy calls its base."""
    name = str(info["base_model"]["name"])
    none = from_nothing(info)
    if base_model is not None and none:
        raise ConfigError(f"base_model: {folder} was trained from random weights and has no base: leave it out")
    if base_model is not None and not is_hub_name(base_model):
        raise ConfigError(f"base_model: {base_model!r} is no name of a model on the Hub: give org/name")
    if base_model is None and not none and not is_hub_name(name):
        raise ConfigError(
            f"{folder}: its base model is {name!r}, a folder that nobody else has: name the same checkpoint on the Hub with "
            "--base-model org/name"
        )
    return base_model or (name if is_hub_name(name) else Path(name).name)


def _stage(folder: Path, staged: Path, info: dict[str, Any], repo_id: str, *, base: str, with_users: bool) -> None:
    """Fill an empty folder with what is to be sent; files that stay as they are, are links."""
    listed = info["files"]
    if not with_users and info["prompt"]["num_user_rows"] > 1:
        info = write_without_users(folder, staged, info)
    if base != info["base_model"]["name"]:
        info = {**info, "base_model": {**info["base_model"], "name": base, "revision": None}}
    if info["kind"] == ADAPTER:
        config = read_json(folder / "adapter_config.json")
        named = {"base_model_name_or_path": base, "revision": info["base_model"]["revision"]}
        if config != config | named:
            write_json(staged / "adapter_config.json", config | named)
    pictures = [f"{PLOTS}/{path.name}" for path in sorted((folder / PLOTS).glob("*.png"))]
    linked = [name for name in listed if not (staged / name).exists()]
    for name in [*linked, *pictures]:
        (staged / name).parent.mkdir(exist_ok=True)
        (staged / name).symlink_to((folder / name).resolve())
    written = describe_files(staged, without=[*linked, *pictures])
    info = _without_paths(
        {**info, "files": {name: written.get(name, listed.get(name)) for name in sorted({*listed, *written})}}
    )
    write_json(staged / INFO_FILE, info)
    (staged / CARD_FILE).write_text(model_card(staged, info, repo_id=repo_id), encoding="utf-8")


def _without_paths(value: Any) -> Any:
    """A json value in whose texts absolute paths, which say how this machine is laid out, are cut to their last name."""
    if isinstance(value, str):
        return _PATH.sub(lambda path: path[1], value)
    if isinstance(value, list):
        return [_without_paths(inner) for inner in value]
    if isinstance(value, dict):
        return {key: _without_paths(inner) for key, inner in value.items()}
    return value


def _refuse_what_stays_home(folder: Path, staged: Path, token: str | None) -> None:
    """Look into every staged file.

    Raises:
        ConfigError: every finding of `privacy.problems_inside`.
    """
    users = folder.parent / USERS_FILE
    problems = problems_inside(
        staged,
        user_ids=pd.read_parquet(users, columns=["user"])["user"].tolist() if users.is_file() else [],
        known=pd.read_parquet(folder / ITEMS_FILE, columns=["item"])["item"].tolist(),
        token=token,
    )
    if problems:
        raise ConfigError([f"{folder}: {problem}; nothing was sent" for problem in problems])


def _refuse_strangers(folder: Path, info: dict[str, Any]) -> None:
    """Refuse files that no export wrote: they might be anything.

    Raises:
        ConfigError: every such file.
    """
    names = {str(path.relative_to(folder)) for path in folder.rglob("*") if not path.is_dir()}
    expected = {name for name in names if _matches(name, (INFO_FILE, CARD_FILE, f"{PLOTS}/*.png"))}
    strangers = [*(names - expected - {*info["files"]}), *(name for name in info["files"] if not _matches(name, FILES))]
    if strangers:
        raise ConfigError(
            [
                f"{folder / name}: is none of the files that genrec_llm shares: move it elsewhere"
                for name in sorted(strangers)
            ]
        )


def _files_of(folder: Path) -> list[tuple[str, Path]]:
    """Every file below a folder, behind its path there."""
    return [(str(path.relative_to(folder)), path) for path in sorted(folder.rglob("*")) if path.is_file()]


def _matches(name: str, patterns: tuple[str, ...]) -> bool:
    return any(fnmatch.fnmatchcase(name, pattern) for pattern in patterns)


def _send(api: HfApi, staged: Path, repo_id: str, revision: str | None, private: bool, *, message: str) -> str:
    """Send a staged folder; the commit."""
    # Not upload_folder: where hf_xet is installed (huggingface_hub 2.4) it makes several commits.
    additions = _files_of(staged)

    def attempt() -> str:
        there = _remote(api, repo_id, revision, private)
        if there is None:
            api.create_repo(repo_id, private=private or None, exist_ok=True)
        if revision is not None:
            api.create_branch(repo_id, branch=revision, exist_ok=True)
        head = api.model_info(repo_id, revision=revision)
        ours = {name for name, _ in additions}
        stale = [name for name in _names(head) if _matches(name, FILES) and name not in ours]
        operations = [
            *(CommitOperationDelete(name) for name in stale),
            *(CommitOperationAdd(name, str(path)) for name, path in additions),
        ]
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message=".*commit a data file")  # the items belong to the model
            # If someone else's commit comes between, the Hub refuses this one, and it is made anew.
            commit = api.create_commit(
                repo_id, operations, commit_message=message, revision=revision, parent_commit=head.sha
            )
        return str(commit.oid)

    with _hub_errors(repo_id, revision):
        return _persistently(attempt)


def _persistently(attempt: Callable[[], _Answer]) -> _Answer:
    """Try again after a pause when the connection breaks, a few times."""
    for pause in _PAUSES:
        try:
            return attempt()
        except Exception as error:
            if not _passing(error):
                raise
            logger.warning("the connection to the Hub broke (%s); trying again in %g s", type(error).__name__, pause)
            time.sleep(pause)
    return attempt()


def _passing(error: BaseException) -> bool:
    """Whether the same request may succeed later: a broken connection, a busy Hub, another's commit in between."""
    if isinstance(error, OfflineModeIsEnabled | LocalTokenNotFoundError):
        return False
    if isinstance(error, HfHubHTTPError):
        return error.response.status_code in (408, 412, 429) or error.response.status_code >= 500
    if isinstance(error, RuntimeError) and error.__cause__ is not None:  # of huggingface_hub's upload threads
        return _passing(error.__cause__)
    # hf_xet says RuntimeError or ConnectionError when it cannot reach its storage.
    return isinstance(error, HTTPError | RuntimeError | ConnectionError | TimeoutError)


def _remote(api: HfApi, repo_id: str, revision: str | None, private: bool) -> ModelInfo | None:
    """What a repository is now, None where there is none.

    Raises:
        ConfigError: it holds something that `genrec push` did not make, or is public and was to be private.
    """
    try:
        there = api.model_info(repo_id, revision=revision)
    except RevisionNotFoundError:
        there = api.model_info(repo_id)
    except RepositoryNotFoundError:
        return None
    problems = []
    names = _names(there)
    foreign = [name for name in names if not _matches(name, _FOREIGN_BUT_HARMLESS)]
    if INFO_FILE not in names and foreign:
        problems.append(
            f"{repo_id}: holds something that is no model of genrec_llm ({foreign[0]}): choose another name for this one"
        )
    if private and not there.private:
        problems.append(
            f"{repo_id}: is public already: make it private in its settings on the Hub, or choose another name"
        )
    if problems:
        raise ConfigError(problems)
    return there


def _names(info: ModelInfo) -> list[str]:
    return [sibling.rfilename for sibling in info.siblings or []]


# --- errors -----------------------------------------------------------------------------------------------------------


@contextmanager
def _hub_errors(name: str, revision: str | None = None) -> Iterator[None]:
    """Turn what huggingface_hub raises in the block into one error of ours that says how to go on."""
    try:
        yield
    except (HfHubHTTPError, HTTPError, OSError, RuntimeError, ValueError) as error:
        if isinstance(error, OSError) and error.errno is not None and not _passing(error):
            raise ExportError(
                f"{name}: a file here could not be read or written ({error}): mend that and try again"
            ) from error
        kind, told = _told(error, revision)
        raise kind(f"{name}: {told}") from error


def _told(error: Exception, revision: str | None) -> tuple[type[ConfigError] | type[ExportError], str]:
    login = "log in with `hf auth login`, or set HF_TOKEN"
    status = error.response.status_code if isinstance(error, HfHubHTTPError) else None
    if isinstance(error, HFValidationError):
        return ConfigError, "no name for a model on the Hub: give org/name"
    if isinstance(error, OfflineModeIsEnabled) or isinstance(error.__cause__, OfflineModeIsEnabled):
        return ConfigError, "no such folder, not in the Hub's cache, and HF_HUB_OFFLINE keeps from asking: unset it"
    if isinstance(error, LocalEntryNotFoundError):
        return ConfigError, "no such folder, not in the Hub's cache, and the Hub cannot be reached: mend the connection"
    if isinstance(error, RevisionNotFoundError):
        return ConfigError, f"has no revision {revision!r} on the Hub: give a branch, tag or commit that is there"
    if isinstance(error, RepositoryNotFoundError):
        return (
            ConfigError,
            f"no such folder, and no model on the Hub that you may read: check the name; if it is private, {login}",
        )
    if isinstance(error, LocalTokenNotFoundError) or status == 401:
        return ConfigError, f"the Hub does not know you: {login} (a token with write permission, to push)"
    if status == 403:
        return ConfigError, "your token may not write there: take one with write permission, or another org/name"
    if _passing(error) or type(error) is OSError:  # of a download whose size is not what was announced
        return ExportError, (
            f"the connection to the Hub broke ({type(error).__name__}). Run the same command again: large files that "
            "arrived whole are kept, and the Hub never shows half of a model"
        )
    return ConfigError, f"the Hub refuses: {str(error).splitlines()[0]}"
