"""An exported directory: what genrec.json says of it, and the problems where its files do not fit together.

Every file is compared with what was exported before a library reads it: a lost, cut or changed one is named, and never
replaced in silence. Nothing is unpickled, and no code comes with a model.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any, get_args

from safetensors import SafetensorError, safe_open
from transformers import AutoTokenizer, PreTrainedTokenizerBase

from genrec_llm.errors import ConfigError, DataError
from genrec_llm.files import changed_files, read_json
from genrec_llm.tasks import LAST_ITEMS, DecoderPrompt, PromptLayout
from genrec_llm.tokenizer import mask_ids
from genrec_llm.vocab import ITEMS_FILE, UNKNOWN_USER_TOKEN, USERS_FILE, IdVocab, UserMode, read_users

FORMAT_VERSION = 1
INFO_FILE = "genrec.json"
ROWS_FILE = "id_tokens.safetensors"
WEIGHTS_FILE = "model.safetensors"
ADAPTER_FILE, ADAPTER_CONFIG = "adapter_model.safetensors", "adapter_config.json"
ADAPTER, TRAINED, MERGED = "adapter", "trained", "merged"
"""Directory names in a run, and the `kind` in their genrec.json. "trained" is full tuning's state, not for sharing."""

LOADABLE = (
    ".safetensors", ".bin", ".pt", ".pth", ".pkl", ".pickle", ".ckpt", ".h5", ".msgpack", ".gguf", ".py",
    ".json", ".model", ".jinja", ".parquet", "vocab.txt", "merges.txt",
)  # fmt: skip
"""Endings of files that a library might load in place of those that were exported, or beside them."""
NEEDED = {
    ADAPTER: (ADAPTER_CONFIG, ADAPTER_FILE, ROWS_FILE, ITEMS_FILE, "tokenizer.json"),
    TRAINED: ("config.json", WEIGHTS_FILE, ROWS_FILE, ITEMS_FILE, "tokenizer.json"),
    MERGED: ("config.json", "generation_config.json", ITEMS_FILE, "tokenizer.json"),
}
"""Files of each kind that have to be in the list of genrec.json, so that none is read that was not compared."""
CONFIGS = ("config.json", "tokenizer_config.json", "generation_config.json")
"""Files in which `transformers` looks for the names of code to run."""
FACTS: dict[str, tuple[type, ...]] = {
    "kind": (str,),
    "base_model": (dict,), "base_model.name": (str,), "base_model.revision": (str, type(None)), "base_model.type": (str,),
    "data": (dict,), "data.name": (str,), "data.fingerprint": (str,), "data.vocabulary": (str,),
    "prompt": (dict,), "user_mode": (str,), "user_buckets": (int,), "id_seed": (int,),
}  # fmt: skip
"""What genrec.json has to say, and as which types."""
_PROMPT = PromptLayout(base=1, num_items=1, num_user_rows=1, mask_ids=(0,), eos_id=0, pad_id=0).to_dict()
_LATER: dict[str, Any] = {"last_items_weights": []}
"""What earlier releases did not write into a prompt."""


def trained_directory(run: Path) -> Path:
    """The adapter (or full tuning's trained) directory of a finished run.

    Raises:
        ConfigError: the run has none.
    """
    for kind in (ADAPTER, TRAINED):
        if (run / kind).is_dir():
            return run / kind
    raise ConfigError(f"{run}: holds no finished model ({ADAPTER}/ or {TRAINED}/): finish its training first")


def read_info(folder: Path, *kinds: str) -> dict[str, Any]:
    """genrec.json of a directory.

    Raises:
        ConfigError: not a directory of one of `kinds`, or of another format version.
    """
    if not (folder / INFO_FILE).is_file():
        raise ConfigError(
            f"{folder}: no {INFO_FILE}: not a directory that genrec_llm exported, or the file was lost: "
            f"give one that has it ({', '.join(f'{kind}/' for kind in kinds)} of a run)"
        )
    try:
        info = read_json(folder / INFO_FILE)
    except DataError as error:
        raise ConfigError(mended(folder, error)) from error
    if not isinstance(info, dict):
        raise ConfigError(mended(folder, f"{folder / INFO_FILE}: is no json object"))
    if info.get("format_version") != FORMAT_VERSION:
        raise ConfigError(
            f"{folder}: format version {info.get('format_version')}, this genrec_llm reads {FORMAT_VERSION}"
        )
    if problems := _wrong_facts(info):
        raise ConfigError([mended(folder, f"{folder / INFO_FILE}: {problem}") for problem in problems])
    if info["kind"] not in kinds:
        raise ConfigError(
            f"{folder}: holds a model of kind {info['kind']!r}, expected {' or '.join(kinds)}: give such a one"
        )
    return info


def _wrong_facts(info: dict[str, Any]) -> list[str]:
    """What genrec.json lacks or says in another type than the one that this module reads."""
    problems = []
    for fact, types in FACTS.items():
        value: Any = info
        for key in fact.split("."):
            value = value.get(key, ...) if isinstance(value, dict) else ...
        if type(value) not in types:
            said = "is not there" if value is ... else f"is {value!r}"
            problems.append(f"{fact} {said}, expected {' or '.join(kind.__name__ for kind in types)}")
    mode, buckets = info.get("user_mode"), info.get("user_buckets")
    right = mode in get_args(UserMode) and type(buckets) is int and (buckets > 0 if mode == "hashed" else buckets == 0)
    if not right:
        problems.append(f"user_mode {mode!r} and user_buckets {buckets!r} do not go together")
    prompt = info.get("prompt")
    if isinstance(prompt, dict):
        prompt = _LATER | prompt
        if {key: type(value) for key, value in prompt.items()} != {key: type(value) for key, value in _PROMPT.items()}:
            problems.append(f"prompt is {prompt}, expected values such as {_PROMPT}")
        elif prompt["max_history"] < 1 or prompt["decoder_prompt"] not in get_args(DecoderPrompt):
            problems.append(
                f"prompt has max_history {prompt['max_history']} and decoder_prompt {prompt['decoder_prompt']!r}, expected "
                f"at least 1 and one of {', '.join(get_args(DecoderPrompt))}"
            )
        elif not _are_weights(prompt["last_items_weights"]):
            problems.append(
                f"prompt has last_items_weights {prompt['last_items_weights']}, expected at most {LAST_ITEMS} numbers "
                "above 0 with a sum below 1"
            )
    return problems


def _are_weights(values: list[Any]) -> bool:
    right = all(type(value) is float and value > 0 for value in values)
    return right and sum(values) < 1 and len(values) <= LAST_ITEMS


def check_files(folder: Path, info: Mapping[str, Any]) -> None:
    """Refuse a directory that is not as it was exported: files lost, cut short, changed, or weights and code put there.

    Args:
        info: its genrec.json.

    Raises:
        ConfigError: every such file.
    """
    listed = info.get("files", {})
    if not listed:
        raise ConfigError(mended(folder, f"{folder / INFO_FILE}: does not list its files"))
    if problems := _wrong_list(folder, info):
        raise ConfigError([mended(folder, problem) for problem in problems])
    problems = changed_files(folder, listed)
    for path in sorted(path for path in folder.rglob("*") if not path.is_dir()):
        name = path.relative_to(folder)
        if str(name) not in {*listed, INFO_FILE} and name.parts[0] != ".cache" and name.name.endswith(LOADABLE):
            problems.append(f"{path}: is none of the exported files")
    if not problems:
        problems = [
            f"{folder / name}: has auto_map, the name of code to run, which no exported model has"
            for name in CONFIGS
            if name in listed and "auto_map" in read_json(folder / name)
        ]
    if problems:
        raise ConfigError([mended(folder, problem) for problem in problems])


def _wrong_list(folder: Path, info: Mapping[str, Any]) -> list[str]:
    """Where the list of files in genrec.json is not as an export writes it."""
    place, listed = folder / INFO_FILE, info["files"]
    if not isinstance(listed, dict):
        return [f"{place}: files is {listed!r}, expected the size and hash of each file"]
    problems = [
        f"{place}: files has {name!r}, which is no path inside the directory"
        for name in listed
        if Path(name).is_absolute() or ".." in Path(name).parts
    ]
    problems += [
        f"{place}: files says {entry!r} of {name!r}, expected bytes and sha256"
        for name, entry in listed.items()
        if not isinstance(entry, dict) or (type(entry.get("bytes")), type(entry.get("sha256"))) != (int, str)
    ]
    problems += [f"{place}: does not list {name}" for name in NEEDED.get(info["kind"], ()) if name not in listed]
    if info["kind"] != ADAPTER and ADAPTER_CONFIG in listed:  # transformers would load the base that it names instead
        problems.append(f"{place}: lists {ADAPTER_CONFIG}, which only an adapter has")
    return problems


@contextmanager
def readable(path: Path) -> Iterator[None]:
    """Turn what a library raises about a file that is as it was listed, but not what its name says, into a ConfigError."""
    try:
        yield
    except (SafetensorError, OSError, ValueError, KeyError, TypeError, AttributeError, RuntimeError) as error:
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise ConfigError(mended(path, f"{path}: cannot be loaded ({reason})")) from error


def mended(folder: Path, problem: object) -> str:
    """A problem of a directory's file with its mend."""
    return f"{problem}; copy it again, or make {folder} anew"


def tensor_shapes(path: Path) -> tuple[dict[str, list[int]], dict[str, str]]:
    """Shapes of a file's tensors and its metadata; no tensor is read."""
    with readable(path), safe_open(path, framework="pt") as file:
        return {name: file.get_slice(name).get_shape() for name in file.keys()}, file.metadata() or {}  # noqa: SIM118


def _check_together(
    folder: Path, info: Mapping[str, Any], tokenizer: PreTrainedTokenizerBase, vocab: IdVocab, layout: PromptLayout
) -> None:
    """Refuse files that are whole, but of another catalogue than genrec.json."""
    problems, known = [], tokenizer.get_vocab()
    if vocab.num_items != layout.num_items:
        problems.append(f"{ITEMS_FILE} has {vocab.num_items} items, {INFO_FILE} says {layout.num_items}")
    if len(tokenizer) != layout.vocab_size:
        problems.append(f"its tokenizer has {len(tokenizer)} tokens, {INFO_FILE} says {layout.vocab_size}")
    words = ["<item_0>", f"<item_{layout.num_items - 1}>", UNKNOWN_USER_TOKEN]
    ids = [layout.base, layout.first_user_id - 1, layout.first_user_id]
    if [known.get(word) for word in words] != ids:
        problems.append(f"its tokenizer has other ids for {', '.join(words)} than {ids}, which {INFO_FILE} says")
    special = (mask_ids(tokenizer), tokenizer.eos_token_id, tokenizer.pad_token_id)
    if special != (layout.mask_ids, layout.eos_id, layout.pad_id):
        problems.append(f"its tokenizer has other ids for the mask, end or padding tokens than {INFO_FILE} says")
    if info["user_mode"] != "each" and _with_users(info, vocab, ()).fingerprint != info["data"]["vocabulary"]:
        problems.append(f"{ITEMS_FILE} has other items than those that data.vocabulary of {INFO_FILE} stands for")
    if info["kind"] != MERGED:
        shapes, _ = tensor_shapes(folder / ROWS_FILE)
        width = shapes.get("item_in", [0, 0])[-1]
        rows = {"item_in": layout.num_items, "item_out": layout.num_items, "user_in": layout.num_user_rows}
        problems += [
            f"{name} in {ROWS_FILE} is {shapes.get(name, 'absent')}, by {INFO_FILE} it is {[count, width]}"
            for name, count in rows.items()
            if shapes.get(name) != [count, width]
        ]
    if problems:
        raise ConfigError(
            [f"{folder}: {problem}: its files come from several models; copy it again" for problem in problems]
        )


def open_directory(folder: Path, *kinds: str) -> tuple[dict[str, Any], PreTrainedTokenizerBase, IdVocab, PromptLayout]:
    """Everything of a directory but its weights: genrec.json, tokenizer, items and prompt, all checked.

    Raises:
        ConfigError: not a directory of one of `kinds`, or files are lost, cut short or do not fit together.
    """
    info = read_info(folder, *kinds)
    check_files(folder, info)
    with readable(folder / "tokenizer.json"):
        tokenizer = AutoTokenizer.from_pretrained(folder, trust_remote_code=False)
    vocab, layout = IdVocab.load(folder), PromptLayout.from_dict(info["prompt"])
    _check_together(folder, info, tokenizer, vocab, layout)
    return info, tokenizer, vocab, layout


def _with_users(info: Mapping[str, Any], vocab: IdVocab, users: tuple[str, ...]) -> IdVocab:
    mode, buckets, seed = info["user_mode"], info["user_buckets"], info["id_seed"]
    return replace(vocab, users=users, user_mode=mode, user_buckets=buckets, seed=seed)


def vocabulary_with_users(folder: Path, info: Mapping[str, Any], vocab: IdVocab) -> IdVocab | None:
    """The vocabulary that a model was trained with, which knows the rows of raw user ids.

    Where each user has a row, their list is users.parquet of the run directory that the model lies in.

    Args:
        info, vocab: of the directory.

    Returns:
        None where that list stayed elsewhere.

    Raises:
        ConfigError: the list is that of another model.
    """
    if info["user_mode"] != "each":
        return _with_users(info, vocab, ())
    path = folder.resolve().parent / USERS_FILE
    if not path.is_file():
        return None
    whole = _with_users(info, vocab, read_users(path))
    if whole.fingerprint != info["data"]["vocabulary"]:
        raise ConfigError(
            f"{path}: its users are not those that {folder} was trained on: bring the run's own file back"
        )
    return whole
