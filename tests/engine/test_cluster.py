"""Runs over several machines: two hosts in network namespaces, each with its own name, address and launcher."""

import json
import os
import re
import runpy
import shutil
import signal
import socket
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path

import pytest
import torch

from duotone.data import captioned_shapes
from duotone.data.refusal import Refused
from duotone.engine import checkpoint
from duotone.engine.command_line import parse
from duotone.engine.distributed import meeting
from duotone.engine.recipe import Recipe
from duotone.engine.train import train

RECIPE = Path(__file__).with_name("tiny_recipe.py")
BIN = Path(sys.executable).parent
WAIT = timedelta(seconds=60)


@dataclass(frozen=True)
class Machine:
    """A host that is this one, except for its name, its network and the content of /dev/shm."""

    namespace: str
    rank: int
    hosts: Path
    hostfile: Path

    def start(self, *flags: str, by: str = "deepspeed") -> subprocess.Popen:
        """Starts the recipe under this machine's own launcher, in a separate process group."""
        launcher = [*LAUNCHERS[by](self), str(RECIPE), "--speed.threads", "1"]
        own = f'hostname host-{self.rank}; mount --bind {self.hosts} /etc/hosts; mount -t tmpfs shm /dev/shm; exec "$@"'
        inside = ["ip", "netns", "exec", self.namespace, "unshare", "--mount", "--uts", "sh", "-c", own, "sh"]
        environment = os.environ | {"OMP_NUM_THREADS": "1", "PATH": f"{BIN}:{os.environ['PATH']}"}
        environment |= {"DS_ACCELERATOR": "cpu", "CUDA_VISIBLE_DEVICES": ""}
        pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True}
        return subprocess.Popen([*inside, *launcher, *flags], **pipes, env=environment, start_new_session=True)


def deepspeed(machine: Machine) -> list[str]:
    meets = ["--node_rank", str(machine.rank), "--master_addr", "10.7.0.1", "--master_port", "29511"]
    return [str(BIN / "deepspeed"), "--hostfile", str(machine.hostfile), "--no_ssh", *meets]


def torchrun(machine: Machine) -> list[str]:
    meets = ["--rdzv-backend", "c10d", "--rdzv-endpoint", "host-0:29511"]
    return [str(BIN / "torchrun"), "--nnodes", "2", "--nproc-per-node", "1", *meets]


LAUNCHERS = {"deepspeed": deepspeed, "torchrun": torchrun}


@pytest.fixture(scope="module")
def machines(tmp_path_factory):
    if os.geteuid() or shutil.which("ip") is None:
        pytest.skip("hosts in network namespaces need root and iproute2")
    folder, names = tmp_path_factory.mktemp("cluster"), [f"duotone{os.getpid()}{letter}" for letter in "ab"]
    (folder / "hosts").write_text("127.0.0.1 localhost\n10.7.0.1 host-0\n10.7.0.2 host-1\n")
    (folder / "hostfile").write_text("host-0 slots=1\nhost-1 slots=1\n")
    try:
        for name in names:
            ip("netns", "add", name)
        ip("link", "add", "cable", "netns", names[0], "type", "veth", "peer", "name", "cable", "netns", names[1])
        for i, name in enumerate(names):
            ip("-n", name, "addr", "add", f"10.7.0.{i + 1}/24", "dev", "cable")
            for link in ("lo", "cable"):
                ip("-n", name, "link", "set", link, "up")
        yield [Machine(name, i, folder / "hosts", folder / "hostfile") for i, name in enumerate(names)]
    finally:
        for name in names:
            subprocess.run(["ip", "netns", "delete", name], capture_output=True)


def ip(*words: str) -> None:
    done = subprocess.run(["ip", *words], capture_output=True, text=True)
    if done.returncode:
        pytest.skip(f"network namespaces are not to be had here: ip {' '.join(words)}: {done.stderr.strip()}")


@pytest.fixture(scope="module")
def shards(tmp_path_factory):
    folder = tmp_path_factory.mktemp("data") / "shapes"
    captioned_shapes.write(folder, count=40, size=16, seed=0)
    return folder


def ended(*processes: subprocess.Popen) -> list[tuple[int, str]]:
    """Exit codes, and the lines that this project printed."""
    try:
        said = [process.communicate(timeout=300)[0] for process in processes]
    finally:
        for process in processes:
            if process.poll() is None:
                os.killpg(process.pid, signal.SIGKILL)
    lines = [[line for line in text.splitlines() if re.match(r"\s*\d|duotone|Traceback|\[rank", line)] for text in said]
    return [(process.returncode, "\n".join(kept)) for process, kept in zip(processes, lines)]


def rows(out: Path) -> list[dict]:
    return [json.loads(line) for line in (out / "trace.jsonl").read_text().splitlines()]


@pytest.mark.parametrize("by", ["deepspeed", pytest.param("torchrun", marks=pytest.mark.long)])
def test_two_machines_train_what_one_process_does(by, machines, shards, tmp_path):
    """Each reads its own shards; the second names another --out, although only rank 0 writes to one."""
    shutil.copytree(shards, tmp_path / "copied")
    flags = [["--data.shards", str(shards), "--out", str(tmp_path / "two"), "--images", "40"]] * 2
    flags[1] = [*flags[1], "--data.shards", str(tmp_path / "copied"), "--out", str(tmp_path / "elsewhere")]
    (code, said), (code_1, said_1) = ended(*(machine.start(*given, by=by) for machine, given in zip(machines, flags)))
    assert code == code_1 == 0, said + said_1
    assert "x 2 ranks" in said and "duotone" not in said_1
    assert f"rank 1 (host-1) does not see {tmp_path / 'elsewhere'}: the run can only be resumed where" in said
    one = ["--data.shards", str(shards), "--out", str(tmp_path / "one"), "--images", "40", "--speed.threads", "1"]
    train(parse(Recipe, one, default=runpy.run_path(str(RECIPE))["recipe"], name="tiny"))
    there, here = rows(tmp_path / "two"), rows(tmp_path / "one")
    assert [(r["images"], r["keys"], r["draws"]) for r in there] == [(r["images"], r["keys"], r["draws"]) for r in here]
    assert [r["loss"] for r in there] == pytest.approx([r["loss"] for r in here], rel=1e-4)


OTHERS = {
    "data": (["--data.shards", "{other}"], "reads other data than rank 0 \\({other} holds other images or captions\\)"),
    "flags": (["--batch-size", "16"], "is another run than rank 0's \\(batch_size: 8 there, 16 here\\)"),
}


@pytest.mark.parametrize("kind", ["data", pytest.param("flags", marks=pytest.mark.long)])
def test_a_rank_that_would_train_something_else_is_refused_by_name(shards, tmp_path, kind):
    """Otherwise rank 0 would train together with it, or wait for a step that is not the same."""
    other, (flags, says) = tmp_path / "other", OTHERS[kind]
    captioned_shapes.write(other, count=40, size=16, seed=1)
    given = ["--data.shards", str(shards), "--out", str(tmp_path / "run"), "--speed.threads", "1"]
    unlike = [*given, *(flag.format(other=other) for flag in flags)]
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    (code, said), (code_1, said_1) = ended(*(by_hand(rank, port, each) for rank, each in enumerate((given, unlike))))
    assert code == code_1 == 2, said + said_1
    host = re.escape(socket.gethostname())
    assert re.fullmatch(rf"duotone: refused: rank 1 \({host}\) {says.format(other=other)}: .*", said), said
    assert re.match(rf"duotone: refused on rank 1 \({host}\): rank 1 ", said_1) and "\n" not in said_1
    assert not (tmp_path / "run" / "recipe.json").exists()


def by_hand(rank: int, port: int, flags: list[str], script: Path = RECIPE) -> subprocess.Popen:
    """Starts a rank without a launcher, which would give both ranks the same flags and end one with the other."""
    environment = os.environ | {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": "2", "OMP_NUM_THREADS": "1"}
    environment |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "DS_ACCELERATOR": "cpu"}
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True}
    return subprocess.Popen([sys.executable, str(script), *flags], **pipes, env=environment, start_new_session=True)


@pytest.mark.long
def test_a_machine_whose_rank_ends_is_told_of_in_one_line(machines, shards, tmp_path):
    """A launcher does not end the ranks of other machines, so these must notice themselves."""
    given = ["--data.shards", str(shards), "--out", str(tmp_path / "run")]
    lost = [*given, "--data.shards", str(tmp_path / "nowhere")]
    (code, said), (code_1, said_1) = ended(machines[0].start(*given), machines[1].start(*lost))
    assert (code, code_1) == (1, 2)
    assert "nowhere: there is no such folder" in said_1
    assert re.fullmatch(r"duotone: rank 0 \(host-0\) stops: another rank has ended, .* by peer \[10.7.0.2\]\)", said)


@pytest.mark.long
def test_a_signal_to_one_machine_ends_the_run_with_a_checkpoint(machines, shards, tmp_path):
    """As a batch queue sends it to a machine that it wants back."""
    out = tmp_path / "run"
    given = ["--data.shards", str(shards), "--out", str(out), "--images", "80000", "--checkpoint.every", "80000"]
    started = [machine.start(*given, "--log.every", "1") for machine in machines]
    until = time.monotonic() + 200
    while not (out / "trace.jsonl").exists() or len(rows(out)) < 3:
        assert time.monotonic() < until and started[0].poll() is None
        time.sleep(0.05)
    os.killpg(started[1].pid, signal.SIGTERM)
    (_, said), (_, said_1) = ended(*started)
    (written,) = (out / "checkpoints").iterdir()
    assert written.name == checkpoint.name_of(rows(out)[-1]["images"])
    assert f"resumes from {written}" in said and "Traceback" not in said + said_1


def test_who_waits_for_the_others_says_so_and_not_for_ever(monkeypatch, capsys):
    """A rank may have been refused before it joined, on a machine whose launcher ends nobody here."""
    monkeypatch.setattr(meeting, "LATE", 0.2)
    monkeypatch.setattr(meeting, "MEETING", timedelta(seconds=2))
    there = {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "0"}
    for name, value in there.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(
        Refused, match=r"cannot meet at 127.0.0.1:0 \(.*1/2 clients joined.*see what the other machines"
    ):
        meeting.meet("gloo")
    assert "waits for all 2 ranks to come to 127.0.0.1:0" in capsys.readouterr().out


@pytest.mark.parametrize("name", meeting.STARTED_TOGETHER)
def test_many_processes_without_ranks_are_no_runs_of_one(name, monkeypatch):
    """`srun python recipes/X.py` would otherwise train as many separate runs, all in the same folder."""
    monkeypatch.delenv("RANK", raising=False)
    monkeypatch.setenv(name, "1")
    meeting.refuse_many_without_launcher()
    monkeypatch.setenv(name, "4")
    with pytest.raises(Refused, match=f"{name} is 4, .*docs/cluster.md"):
        meeting.single_process_defaults()
    assert not meeting.SET_HERE


def test_ranks_on_unlike_devices_are_refused_before_they_wait_for_each_other():
    """Gloo and NCCL would each wait for a group that never becomes complete."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    stores = [
        torch.distributed.TCPStore("127.0.0.1", port, 2, is_master=first, wait_for_workers=False, timeout=WAIT)
        for first in (True, False)
    ]
    with ThreadPoolExecutor() as pool:
        asked = [
            pool.submit(meeting.refuse_unlike_devices, stores[i], i, 2, name) for i, name in enumerate(("nccl", "gloo"))
        ]
        for told in asked:
            with pytest.raises(Refused, match="rank 1 of 2 would compute on a CPU, the others on GPUs"):
                told.result(timeout=60)
    for i in range(2):
        stores[0].set(f"backend of {i}", "gloo")
    meeting.refuse_unlike_devices(stores[0], 0, 2, "gloo")


STARTS = """
import sys, torch
from types import SimpleNamespace
from duotone.engine.distributed import agreement, zero
from duotone.data.refusal import Refused
from duotone.engine.optimizers.adamw import AdamW
from duotone.engine.distributed.sharded import Sharded
ranks = zero.join("cpu")
torch.manual_seed(ranks.rank)
network = torch.nn.Linear(9, 33)
mine = network.weight.detach().clone()
settings = dict(batch=4, micro=2, accumulation=1, precision=sys.argv[1], clip=1.0)
made = Sharded(network, AdamW().build(network), zero.settings(zero.Zero(stage=1), **settings))
of_rank_0 = zero.from_rank_0(mine)
assert ranks.rank == 0 or not torch.equal(of_rank_0, mine)
for kind in ("weight", "ema"):
    found = made.gather(kind, to_rank_0=False)
    assert torch.equal(found["weight"], of_rank_0), kind
torch.manual_seed(0)
held = SimpleNamespace(frozen_modules=[torch.nn.Linear(2, 2)])
agreement.check_frozen(held, ranks)
if ranks.rank == 1:
    held.frozen_modules[0].bias.data += 1
try:
    agreement.check_frozen(held, ranks)
except Refused as refusal:
    print("duotone: refused:", refusal, flush=True)
made.close()
zero.leave()
"""


def test_all_ranks_begin_from_rank_0s_weights_and_the_same_encoder(tmp_path):
    """Each rank may have read or drawn its own weights; in bf16, each would otherwise train its shard of those."""
    script = tmp_path / "starts.py"
    script.write_text(STARTS)
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    found = ended(*(by_hand(rank, port, ["bf16"], script) for rank in range(2)))
    assert [code for code, _ in found] == [0, 0], found
    for _, said in found:
        assert re.fullmatch(
            r"duotone: refused: rank 1 .* \(its text encoder has other weights\): copy rank 0's .*", said
        )


def test_ranks_without_an_address_are_refused(monkeypatch):
    monkeypatch.setenv("RANK", "0")
    for name in ("WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT"):
        monkeypatch.delenv(name, raising=False)
    with pytest.raises(Refused, match="WORLD_SIZE expected.*start it with deepspeed"):
        meeting.meet("gloo")
