"""Several nodes: two hosts, each a network namespace of this machine with its own name, follow docs/multi_node.md."""

from __future__ import annotations

import os
import re
import shlex
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

import pytest
import tiny
import torch
import yaml
from check_distributed import environment_of
from test_docs import blocks, commands
from test_resume import difference, end_of, read_until, step_line

from genrec_llm.checkpoints import is_complete

PAGE = tiny.REPOSITORY / "docs" / "multi_node.md"
ADDRESSES = ("10.0.0.1", "10.0.0.2")
"""Of the hosts; the page's node 0 has the first."""
AS_HOST = 'mount --bind "$0" /etc/hosts && hostname "$1" && shift && exec "$@"'
"""Of a shell in namespaces of its own for mounts and names: become the host, then the command."""
FOREVER = (
    "--max-steps",
    "100000",
    "--eval-strategy",
    "no",
    "--load-best-model-at-end",
    "false",
    "--save-steps",
    "100000",
)
PATIENCE = 6
"""Seconds without a sign of life where --ddp-timeout is ten times as much."""

with_hosts = pytest.mark.skipif(
    sys.platform != "linux" or os.geteuid() != 0 or not all(map(shutil.which, ("ip", "unshare", "mount", "hostname"))),
    reason="two hosts on one machine are network namespaces: root on Linux, ip and unshare",
)


@dataclass(frozen=True)
class Host:
    """A machine as far as network, name and processes go; its disk is this machine's.

    Args:
        namespace: of the network.
        name: host name.
        hosts: what stands for /etc/hosts there.
    """

    namespace: str
    name: str
    hosts: Path

    def __call__(self, *line: str) -> list[str]:
        """The command, to be run there; the process that is started becomes the command's."""
        become = ["ip", "netns", "exec", self.namespace, "unshare", "--uts", "--mount", "sh", "-c", AS_HOST]
        return [*become, str(self.hosts), self.name, *line]

    def pids(self) -> list[int]:
        listed = subprocess.run(["ip", "netns", "pids", self.namespace], capture_output=True, text=True, check=True)
        return [int(pid) for pid in listed.stdout.split()]

    def kill(self) -> None:
        """SIGKILL to all processes; the machine still answers for them."""
        for pid in self.pids():
            with suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)

    def cable(self, state: str) -> None:
        """ "down": from here on nothing arrives, and nothing says so."""
        ip("-n", self.namespace, "link", "set", "eth0", state)


def ip(*words: str) -> None:
    subprocess.run(["ip", *words], check=True, capture_output=True, text=True)


@pytest.fixture
def hosts(tmp_path: Path) -> Iterator[tuple[Host, Host]]:
    """node-0 and node-1, a cable between them."""
    table = tmp_path / "hosts"
    names = [f"node-{rank}" for rank in range(2)]
    rows = zip(ADDRESSES, names, strict=True)
    table.write_text("\n".join(["127.0.0.1 localhost", *(f"{address} {name}" for address, name in rows), ""]))
    pair = [Host(f"genrec-{os.getpid()}-{name}", name, table) for name in names]
    try:
        for host in pair:
            ip("netns", "add", host.namespace)
        ip(
            "link",
            "add",
            "eth0",
            "netns",
            pair[0].namespace,
            "type",
            "veth",
            "peer",
            "eth0",
            "netns",
            pair[1].namespace,
        )
        for host, address in zip(pair, ADDRESSES, strict=True):
            ip("-n", host.namespace, "address", "add", f"{address}/24", "dev", "eth0")
            ip("-n", host.namespace, "link", "set", "lo", "up")
            host.cable("up")
        yield pair[0], pair[1]
    finally:
        for host in pair:
            if Path("/run/netns", host.namespace).exists():
                host.kill()
                ip("netns", "delete", host.namespace)


@pytest.fixture(scope="module")
def ground(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkout with the page's store.yaml, for a tiny backbone: a checkpoint every third of 24 steps."""
    folder = tmp_path_factory.mktemp("nodes")
    for name in ("recipes", "accelerate_configs", "ds_configs"):
        (folder / name).symlink_to(tiny.REPOSITORY / name)
    tiny.save_backbone("t5-untied", folder / "base")
    tiny.save_log(folder / "log.csv", users=60)
    settings = {
        "dataset": "log.csv", "backbone": "base", "max_steps": 24, "global_batch_size": 16, "lora_r": 2,
        "rows_learning_rate": 3e-3, "logging_steps": 1, "eval_strategy": "steps", "eval_steps": 3,
        "save_strategy": "steps", "save_steps": 3, "disable_tqdm": True,
    }  # fmt: skip
    (folder / "store.yaml").write_text(yaml.safe_dump(settings))
    return folder


def lines(part: str) -> list[list[str]]:
    """The commands of the bash blocks under a heading of the page, those of here-documents left out."""
    section = PAGE.read_text(encoding="utf-8").split(f"\n## {part}\n")[1].split("\n## ")[0]
    found = [command for _, block in blocks(section, "bash") for command in commands(block)]
    return [command.words for command in found if "<<" not in command.text]


def adapted(line: list[str], run: Path, *extra: str, strategy: str = "ddp", processes: int = 2) -> list[str]:
    """A launch line of the page, on CPUs and fewer of them."""
    line = [word.replace("ddp_multi_node", f"{strategy}_multi_node") for word in line]
    line[line.index("--num_processes") + 1] = str(processes)
    line[line.index("--output-dir") + 1] = str(run)
    return ["env", "PYTHONUNBUFFERED=1", "GLOO_SOCKET_IFNAME=eth0", *line, "--use_cpu", *extra]


def started(hosts: tuple[Host, Host], ground: Path, launch: list[list[str]]) -> list[subprocess.Popen[str]]:
    """The launch lines of both nodes, that of node 1 first."""
    pairs = list(zip(hosts, launch, strict=True))
    return [begun(host, ground, line) for host, line in reversed(pairs)][::-1]


def begun(host: Host, ground: Path, line: list[str]) -> subprocess.Popen[str]:
    return subprocess.Popen(
        host(*line), cwd=ground, env=tiny.environment(), text=True, start_new_session=True,
        stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
    )  # fmt: skip


def done(hosts: tuple[Host, Host], ground: Path, launch: list[list[str]]) -> list[str]:
    """What each node printed of a run that went well."""
    ends = [end_of(process, timeout=300) for process in started(hosts, ground, launch)]
    assert [code for code, _ in ends] == [0, 0], "\n".join(output[-4000:] for _, output in ends)
    return [output for _, output in ends]


def workers(host: Host) -> list[int]:
    """Training processes on a host: those that have a rank and are no helpers of theirs."""
    return [pid for pid in host.pids() if "RANK" in environment_of(pid) and not is_child_of_worker(pid)]


def is_child_of_worker(pid: int) -> bool:
    parent = int(re.search(r"PPid:\s+(\d+)", Path(f"/proc/{pid}/status").read_text())[1])
    return "RANK" in environment_of(parent)


def one_node(ground: Path, run: Path, *extra: str, strategy: str = "ddp", processes: int = 2) -> Path:
    """The same run, on one node."""
    line = tiny.launch_command(
        strategy, "finetune", "--config", "store.yaml", "--output-dir", str(run), *extra, processes=processes
    )
    environment = tiny.environment()
    ended = subprocess.run(line, cwd=ground, env=environment, timeout=300, capture_output=True, text=True)
    assert ended.returncode == 0, ended.stderr[-6000:]
    return run


@pytest.fixture(scope="module")
def whole(ground: Path) -> Path:
    """Two processes on one node that nobody stopped."""
    return one_node(ground, ground / "whole")


# --- the launch lines of the page ---------------------------------------------


@with_hosts
@pytest.mark.slow
@pytest.mark.parametrize(
    ("strategy", "processes"), [("ddp", 2), ("zero2", 2), ("zero3", 2), ("ddp", 4)], ids=lambda value: str(value)
)
def test_two_nodes_train_what_one_node_with_as_many_processes_trains(
    hosts: tuple[Host, Host], ground: Path, tmp_path: Path, strategy: str, processes: int
) -> None:
    """Bit for bit."""
    run, other = tmp_path / "nodes", tmp_path / "node"
    launch = [adapted(line, run, strategy=strategy, processes=processes) for line in lines("ssh")]
    first, second = done(hosts, ground, launch)
    kind = "MULTI_CPU" if strategy == "ddp" else "DEEPSPEED"
    assert f"strategy {kind}, world_size {processes}" in first and "world_size" not in second
    assert difference(run, one_node(ground, other, strategy=strategy, processes=processes)) == 0.0


SRUN = r"""#!/bin/bash
# One task a node, as with --ntasks-per-node=1; the largest exit code.
for node in 0 1; do
    SLURM_NODEID=$node bash -c "$(sed -n "$((node + 1))p" "$HOSTS") $(printf '%q ' "$@")" & tasks[node]=$!
done
trap 'kill -TERM "${tasks[@]}"; told=yes' TERM
worst=0
for task in "${tasks[@]}"; do
    wait "$task"; code=$?
    [ -z "$told" ] || { told=; wait "$task"; code=$?; }
    [ "$code" -le "$worst" ] || worst=$code
done
exit "$worst"
"""
SCONTROL = r"""#!/bin/sh
case $1 in
    show) [ "$3" = "node-[0-1]" ] && printf 'node-0\nnode-1\n' ;;
    requeue) touch "$REQUEUED" ;;
esac
"""


@with_hosts
@pytest.mark.slow
@pytest.mark.parametrize("preempted", [False, True], ids=["to the end", "time limit"])
def test_the_batch_script_of_slurm_trains_and_goes_back_into_the_queue_at_the_time_limit(
    hosts: tuple[Host, Host], ground: Path, tmp_path: Path, whole: Path, preempted: bool
) -> None:
    """With a `srun` that starts a task on each host, and passes SIGTERM on to the launchers."""
    (script,) = re.findall(r"<<'SBATCH'\n(.*?)^SBATCH$", PAGE.read_text(encoding="utf-8"), re.MULTILINE | re.DOTALL)
    assert subprocess.run(["bash", "-n"], input=script, text=True).returncode == 0
    stubs = tmp_path / "bin"
    stubs.mkdir()
    (stubs / "srun").write_text(SRUN)
    (stubs / "scontrol").write_text(SCONTROL)
    for stub in stubs.iterdir():
        stub.chmod(0o755)
    (tmp_path / "tasks").write_text("\n".join(shlex.join(host()) for host in hosts) + "\n")
    run, often = tmp_path / "run", " ".join(FOREVER) if preempted else ""
    script = script.replace("--output-dir runs/store/nodes", f"--output-dir {run} --use_cpu {often}")
    (tmp_path / "train.sbatch").write_text(script)
    environment = tiny.environment() | {
        "SLURM_JOB_NODELIST": "node-[0-1]", "SLURM_JOB_ID": "17", "SLURM_NNODES": "2", "SLURM_GPUS_ON_NODE": "1",
        "GLOO_SOCKET_IFNAME": "eth0", "HOSTS": str(tmp_path / "tasks"), "REQUEUED": str(tmp_path / "requeued"),
        "PYTHONUNBUFFERED": "1",
    }  # fmt: skip
    environment["PATH"] = f"{stubs}{os.pathsep}{environment['PATH']}"
    job = subprocess.Popen(
        ["bash", str(tmp_path / "train.sbatch")], cwd=ground, env=environment, text=True, start_new_session=True,
        stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
    )  # fmt: skip
    if not preempted:
        code, output = end_of(job, timeout=300)
        assert code == 0 and not (tmp_path / "requeued").exists(), output[-4000:]
        assert difference(run, whole) == 0.0
        return
    read_until(job, step_line)
    listing = subprocess.run(["pgrep", "-P", str(job.pid)], capture_output=True, text=True, check=True)
    os.kill(int(listing.stdout.split()[0]), signal.SIGTERM)
    code, output = end_of(job)
    assert code == 143 and (tmp_path / "requeued").exists(), output[-4000:]
    (checkpoint,) = run.glob("checkpoint-*")
    assert is_complete(checkpoint)


def test_the_manifest_of_kubernetes_launches_the_line_of_the_page() -> None:
    """Names that have to be the same are, and numbers go together."""
    (block,) = [content for _, content in blocks(PAGE.read_text(encoding="utf-8"), "yaml")]
    parts = {part["kind"]: part for part in yaml.safe_load_all(block)}
    service, job, claim = parts["Service"], parts["Job"], parts["PersistentVolumeClaim"]
    assert [parts[kind]["apiVersion"] for kind in ("Service", "Job", "PersistentVolumeClaim")] == [
        "v1",
        "batch/v1",
        "v1",
    ]
    name = job["metadata"]["name"]
    pod = job["spec"]["template"]["spec"]
    (container,) = pod["containers"]
    assert service["spec"]["selector"] == {"job-name": name}  # the label that the Job controller gives its pods
    assert service["spec"]["clusterIP"] == "None" and service["spec"]["publishNotReadyAddresses"] is True
    assert pod["subdomain"] == service["metadata"]["name"]
    assert job["spec"]["completionMode"] == "Indexed" and pod["restartPolicy"] == "OnFailure"
    nodes = job["spec"]["completions"]
    assert job["spec"]["parallelism"] == nodes
    shell, option, command = container["command"]
    assert (shell, option, command.split()[0]) == ("sh", "-c", "exec")
    words = shlex.split(command)[1:]
    node = lines("ssh")[0]
    for flag, value in (
        ("--machine_rank", "$JOB_COMPLETION_INDEX"),
        ("--main_process_ip", f"{name}-0.{pod['subdomain']}"),
    ):
        assert words[words.index(flag) + 1] == value
        node[node.index(flag) + 1] = value
    assert words == node
    assert int(words[words.index("--num_machines") + 1]) == nodes
    gpus = container["resources"]["limits"]["nvidia.com/gpu"]
    assert int(words[words.index("--num_processes") + 1]) == nodes * gpus
    launch_file = yaml.safe_load(
        (tiny.REPOSITORY / words[words.index("--config_file") + 1]).read_text(encoding="utf-8")
    )
    assert [port["port"] for port in service["spec"]["ports"]] == [launch_file["main_process_port"]]
    volumes = {volume["name"]: volume for volume in pod["volumes"]}
    mounts = {mount["mountPath"]: volumes[mount["name"]] for mount in container["volumeMounts"]}
    assert mounts["/dev/shm"]["emptyDir"]["medium"] == "Memory"
    shared = next(volume for path, volume in mounts.items() if container["workingDir"].startswith(path))
    assert shared["persistentVolumeClaim"]["claimName"] == claim["metadata"]["name"]
    assert claim["spec"]["accessModes"] == ["ReadWriteMany"]
    seconds = next(entry["value"] for entry in container["env"] if entry["name"] == "TORCH_ELASTIC_SHUTDOWN_TIMEOUT")
    assert int(seconds) < pod["terminationGracePeriodSeconds"]


def test_every_variable_of_torch_that_the_page_names_is_one_that_torch_reads() -> None:
    named = set(re.findall(r"`(TORCH_\w+|GLOO_\w+)", PAGE.read_text(encoding="utf-8")))
    assert len(named) >= 7
    home = Path(torch.__file__).parent
    sources = [*home.glob("distributed/**/*.py"), *home.glob("include/torch/csrc/distributed/c10d/*.hpp")]
    texts = b"\n".join(path.read_bytes() for path in [*sources, *home.glob("lib/libtorch_cpu.so")])
    assert [name for name in sorted(named) if name.encode() not in texts] == []


# --- gone, cut off, told to stop ----------------------------------------------


def stepping(hosts: tuple[Host, Host], ground: Path, run: Path) -> list[subprocess.Popen[str]]:
    """Both nodes in the middle of a training without an end."""
    extra = (*FOREVER, "--ddp-timeout", str(10 * PATIENCE))
    nodes = started(hosts, ground, [adapted(line, run, *extra) for line in lines("ssh")])
    for node in nodes:
        read_until(node, step_line)
    time.sleep(2)  # everybody has given a sign of life
    return nodes


def end_within(node: subprocess.Popen[str], seconds: float) -> str:
    """Output of a node that has to fail in time; the launcher's own end is given 10 s."""
    start = time.monotonic()
    code, output = end_of(node, timeout=60)
    assert code != 0 and time.monotonic() - start < seconds + 10, output[-3000:]
    return output


@with_hosts
@pytest.mark.slow
def test_a_node_that_is_killed_is_named_by_the_other(hosts: tuple[Host, Host], ground: Path, tmp_path: Path) -> None:
    first, second = stepping(hosts, ground, tmp_path / "run")
    hosts[1].kill()
    output = end_within(first, 5)
    gone = r"error: process 1 on node-1 \(pid \d+, after step \d+\) is gone( \(what failed here: .*\))?; training ends here"
    assert re.search(gone, output)
    end_of(second)


@with_hosts
@pytest.mark.slow
def test_a_node_that_is_cut_off_is_named_and_both_end(hosts: tuple[Host, Host], ground: Path, tmp_path: Path) -> None:
    first, second = stepping(hosts, ground, tmp_path / "run")
    hosts[1].cable("down")
    output = end_within(first, PATIENCE + 2)
    assert re.search(rf"error: process 1 on node-1 \(pid .*\) gave no sign of life for {PATIENCE} s", output), output[
        -3000:
    ]
    output = end_within(second, PATIENCE + 2)
    assert f"error: the first node ({ADDRESSES[0]}:29500) has not answered for {2 * PATIENCE} s" in output, output[
        -3000:
    ]


@with_hosts
@pytest.mark.slow
def test_the_death_of_the_node_with_the_store_is_told_by_its_address(
    hosts: tuple[Host, Host], ground: Path, tmp_path: Path
) -> None:
    first, second = stepping(hosts, ground, tmp_path / "run")
    hosts[0].kill()
    output = end_within(second, 5)
    assert f"error: the first node ({ADDRESSES[0]}:29500) does not answer; training ends here" in output, output[-3000:]
    end_of(first)


@with_hosts
@pytest.mark.slow
@pytest.mark.parametrize("told", [0, 1], ids=["node 0", "node 1"])
def test_sigterm_at_the_launcher_of_one_node_saves_and_ends_both(
    hosts: tuple[Host, Host], ground: Path, tmp_path: Path, told: int
) -> None:
    nodes = stepping(hosts, ground, tmp_path / "run")
    os.kill(nodes[told].pid, signal.SIGTERM)
    ends = [end_of(node) for node in nodes]
    assert all(code != 0 for code, _ in ends)
    assert ends[0][1].count("stopped by SIGTERM; ") == 1, ends[0][1][-3000:]
    assert "error: " not in ends[0][1] + ends[1][1]
    (checkpoint,) = (tmp_path / "run").glob("checkpoint-*")
    assert is_complete(checkpoint)


@with_hosts
@pytest.mark.slow
def test_a_node_with_another_data_file_is_refused(hosts: tuple[Host, Host], ground: Path, tmp_path: Path) -> None:
    tiny.save_log(tmp_path / "other.csv", users=60, seed=1)
    one, other = (adapted(line, tmp_path / "run") for line in lines("ssh"))
    nodes = started(hosts, ground, [one, [*other, "--dataset", str(tmp_path / "other.csv")]])
    ends = [end_of(node) for node in nodes]
    for code, output in ends:
        assert code != 0 and output.count("error: launch: data is ") == 1, output[-3000:]
        assert re.search(r"in process 0 on node-0, but .* in process 1 on node-1: give every node the same", output)
    assert not list((tmp_path / "run").glob("checkpoint-*"))


# --- restarts -------------------------------------------------------------------


def saved(run: Path, nodes: list[subprocess.Popen[str]]) -> None:
    """Wait for the first whole checkpoint."""
    while not list(run.glob("checkpoint-*/manifest.json")):
        assert all(node.poll() is None for node in nodes)
        time.sleep(0.01)


def torchrun(line: list[str]) -> list[str]:
    """The launch line with the launcher that accelerate calls."""
    place = next(number for number, word in enumerate(line) if word.endswith("finetune.py"))
    (written,) = re.findall(r"`(torchrun .*?) recipes/finetune\.py …`", PAGE.read_text(encoding="utf-8"))
    words = shlex.split(written)
    words[words.index("--nproc_per_node") + 1] = "1"
    return [*line[: line.index("accelerate")], *words, *line[place:]]


@with_hosts
@pytest.mark.slow
@pytest.mark.parametrize("launcher", ["accelerate", "torchrun"])
def test_a_process_that_is_killed_is_started_anew_on_all_nodes_and_resumes(
    hosts: tuple[Host, Host], ground: Path, tmp_path: Path, whole: Path, launcher: str
) -> None:
    run = tmp_path / "run"
    launch = [adapted(line, run) for line in lines("Restarts without anybody there")]
    nodes = started(hosts, ground, [torchrun(line) for line in launch] if launcher == "torchrun" else launch)
    saved(run, nodes)
    os.kill(workers(hosts[1])[0], signal.SIGKILL)
    ends = [end_of(node, timeout=200) for node in nodes]
    assert [code for code, _ in ends] == [0, 0], "\n".join(output[-3000:] for _, output in ends)
    assert "going on from" in ends[0][1] + ends[1][1]
    assert difference(run, whole) == 0.0


@with_hosts
@pytest.mark.slow
def test_a_node_that_comes_back_is_waited_for_and_the_run_goes_on(
    hosts: tuple[Host, Host], ground: Path, tmp_path: Path, whole: Path
) -> None:
    run = tmp_path / "run"
    launch = [adapted(line, run) for line in lines("Restarts without anybody there")]
    first, second = started(hosts, ground, launch)
    saved(run, [first, second])
    hosts[1].kill()
    end_of(second)
    time.sleep(5)
    second = begun(hosts[1], ground, launch[1])
    ends = [end_of(node, timeout=200) for node in (first, second)]
    assert [code for code, _ in ends] == [0, 0], "\n".join(output[-3000:] for _, output in ends)
    assert "going on from" in ends[0][1] + ends[1][1]
    assert difference(run, whole) == 0.0
