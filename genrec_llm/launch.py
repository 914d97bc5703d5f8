"""Starting a recipe: where its file lies, the command, and the end of every process behind it.

Verbs whose work several processes may share run `python -m genrec_llm.launch`, which is `accelerate launch` but for its
end: the exit code is the recipe's, and no traceback of the launcher stands under the recipe's own error.
"""

from __future__ import annotations

import difflib
import os
import shlex
import signal
import subprocess
import sys
import time
from collections.abc import Iterable, Sequence
from contextlib import suppress
from pathlib import Path
from types import FrameType

from genrec_llm.errors import ConfigError

ONE_PROCESS = ("cpu", "single_gpu")
MULTI_NODE = "_multi_node"
_ENDS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
_GRACE = 10.0
"""Seconds that a launcher has to end beyond those that torchrun gives its workers after it was told to."""


def shipped(name: str) -> Path:
    """A file or folder of recipes/, accelerate_configs/ or ds_configs/, of the checkout or of an installed wheel."""
    package = Path(__file__).resolve().parent
    inside = package / name
    return inside if inside.exists() else package.parent / name


def shown(path: Path) -> str:
    """A path as it is best typed: relative to where we are, if it lies below."""
    here = Path.cwd()
    return str(path.relative_to(here) if path.is_relative_to(here) else path)


def did_you_mean(word: str, known: Iterable[str]) -> str:
    """The end of an error about an unknown name: the nearest one that there is, or all of them."""
    names = list(known)
    close = difflib.get_close_matches(word, names, n=1)
    return f": did you mean {close[0]}?" if close else f"; there are {', '.join(names)}"


def training_command(
    recipe: str, arguments: Sequence[str], *, strategy: str | None = None, processes: int | None = None
) -> list[str]:
    """`accelerate launch` of a recipe that several processes may share, as a user would type it.

    Args:
        recipe: "pretrain", "finetune" or "evaluate".
        arguments: of the recipe.
        strategy: a name of accelerate_configs/; by default cpu without a GPU, single_gpu with one, ddp with several
            (or for several `processes`).
        processes: by default one a GPU, or two on a CPU where the strategy is for several.

    Raises:
        ConfigError: there is no such strategy, or it does not go with the number of processes or GPUs.
    """
    import yaml

    on_cpu, gpus = _on_cpu(arguments), _gpus(arguments)
    if strategy is None:
        several = processes > 1 if processes else gpus > 1
        strategy = "ddp" if several else "single_gpu" if gpus else "cpu"
    file = _strategy_file(strategy)
    problems = []
    if strategy == "cpu":
        gpus = 0
    if strategy in ONE_PROCESS and processes not in (None, 1):
        problems.append(f"--processes {processes}: --strategy {strategy} is for one process; take --strategy ddp")
    if strategy.endswith(MULTI_NODE):
        one = strategy.removesuffix(MULTI_NODE)
        problems.append(
            f"--strategy {strategy}: is launched on every node by itself, as docs/multi_node.md says; "
            f"on this machine alone take --strategy {one}"
        )
    if strategy == "fsdp2" and not gpus:
        problems.append("--strategy fsdp2: needs GPUs; take --strategy zero3")
    if strategy == "single_gpu" and not gpus and not on_cpu:
        problems.append("--strategy single_gpu: this machine shows no GPU; take --strategy cpu")
    if strategy not in ONE_PROCESS and gpus and (processes or gpus) > gpus:
        problems.append(f"--processes {processes}: more than the {gpus} GPUs that this machine shows")
    if problems:
        raise ConfigError(problems)
    options = ["--config_file", shown(file)]
    content = yaml.safe_load(file.read_text(encoding="utf-8"))
    deepspeed = content.get("deepspeed_config", {}).get("deepspeed_config_file")
    if deepspeed:  # relative to the root of the checkout in the file; a launch happens anywhere
        options += ["--deepspeed_config_file", shown(shipped(deepspeed))]
    if strategy not in ONE_PROCESS:
        count, free_port = str(processes or gpus or 2), "0"
        options += ["--num_processes", count, "--main_process_port", free_port]
    device = [] if gpus or on_cpu else ["--use_cpu"]
    return ["accelerate", "launch", *options, shown(shipped(f"recipes/{recipe}.py")), *arguments, *device]


def several_gpus(arguments: Sequence[str]) -> bool:
    """Whether a recipe with these arguments finds more than one GPU."""
    return _gpus(arguments) > 1


def _on_cpu(arguments: Sequence[str]) -> bool:
    return "--use_cpu" in arguments or "--use-cpu" in arguments


def _gpus(arguments: Sequence[str]) -> int:
    import torch

    return 0 if _on_cpu(arguments) else torch.cuda.device_count()


def recipe_command(recipe: str, arguments: Sequence[str]) -> list[str]:
    """A recipe in one process without a launcher, as a user would type it."""
    return ["python", shown(shipped(f"recipes/{recipe}.py")), *arguments]


def run(command: Sequence[str]) -> int:
    """Show a command of `training_command` or `recipe_command`, run it, and return its exit code.

    Whatever ends this process before (Ctrl-C, a hang-up, a scheduler's TERM) ends all processes of the command first.
    """
    environment = _threads(command)
    print("$ " + " ".join([*(f"{key}={value}" for key, value in environment.items()), shlex.join(command)]), flush=True)
    words = ["-P", "-m", "genrec_llm.launch", *command[2:]] if command[0] == "accelerate" else list(command[1:])
    told = [number for number in _ENDS if signal.getsignal(number) != signal.SIG_IGN]
    before = {number: signal.signal(number, _stop) for number in told}
    process = None
    try:
        # A session of its own: signals come by way of this process alone, and to all of the group at once. (Workers of
        # torchrun are in sessions of their own again: it ends them when it is told to.)
        process = subprocess.Popen([sys.executable, *words], env={**os.environ, **environment}, start_new_session=True)
        return _exit_code(process.wait())
    except _Stopped as stopped:
        for number in told:
            signal.signal(number, signal.SIG_IGN)
        if process is not None:
            _end_group(process)
        trains = any(Path(word).name in ("pretrain.py", "finetune.py") for word in command)
        mend = "; the same command, given again, goes on from the last checkpoint" if trains else ""
        print(f"\nstopped by {stopped.signal.name}{mend}", file=sys.stderr)
        return 128 + stopped.signal
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


class _Stopped(BaseException):
    """A signal asked for the end; no Exception, so that nothing on the way takes it for an error."""

    def __init__(self, number: int) -> None:
        self.signal = signal.Signals(number)


def _stop(number: int, frame: FrameType | None) -> None:
    raise _Stopped(number)


def _end_group(process: subprocess.Popen[bytes]) -> None:
    """Tell all of a group to end, and see that it has: a recipe saves meanwhile, and a launcher may be gone before it."""
    patience = float(os.environ.get("TORCH_ELASTIC_SHUTDOWN_TIMEOUT", "30")) + _GRACE
    for number in (signal.SIGTERM, signal.SIGKILL):
        with suppress(ProcessLookupError):  # nobody is left
            os.killpg(process.pid, number)
            deadline = time.monotonic() + patience
            while time.monotonic() < deadline:
                process.poll()
                os.killpg(process.pid, 0)
                time.sleep(0.05)


def _threads(command: Sequence[str]) -> dict[str, str]:
    """The cores shared out where several processes work on a CPU; the launcher would give each of them one thread."""
    if "--num_processes" not in command or "--use_cpu" not in command or "OMP_NUM_THREADS" in os.environ:
        return {}
    processes = int(command[command.index("--num_processes") + 1])
    return {"OMP_NUM_THREADS": str(max(1, (os.cpu_count() or 1) // processes))}


def _strategy_file(strategy: str) -> Path:
    files = {path.stem: path for path in sorted(shipped("accelerate_configs").glob("*.yaml"))}
    if strategy not in files:
        raise ConfigError(f"--strategy {strategy}: no such strategy{did_you_mean(strategy, files)}")
    return files[strategy]


def _exit_code(number: int) -> int:
    """As a shell says it: 128 and the signal for a process that a signal ended."""
    return number if number >= 0 else 128 - number


def main() -> None:
    """`accelerate launch` with the exit code of the recipe."""
    from accelerate.commands.launch import launch_command, launch_command_parser
    from torch.distributed.elastic.multiprocessing.api import SignalException
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError

    try:
        launch_command(launch_command_parser().parse_args())
    except subprocess.CalledProcessError as failed:
        sys.exit(_exit_code(failed.returncode))
    except ChildFailedError as failed:
        _, first = failed.get_first_failure()
        sys.exit(_exit_code(first.exitcode))
    except SignalException as stopped:
        sys.exit(128 + stopped.sigval)


if __name__ == "__main__":
    main()
