"""How the processes of a run join one group: at the address that their launcher gives, or alone without a launcher."""

import os
import socket
import threading
from datetime import timedelta

import torch
import torch.distributed as dist

from duotone.data.refusal import Refused, first_line

PATIENCE = timedelta(hours=3)
"""How long ranks wait for one another: long, since rank 0 alone indexes shards that have no index yet, and draws previews. A
rank that ends is noticed earlier, by the launcher or by the connections that it closes."""
MEETING = timedelta(minutes=15)
"""How long ranks wait for the others at the start; another may have ended with Refused before it got here."""
LATE = 30
"""Seconds after which the ranks that have arrived say that they are waiting."""
STARTED_TOGETHER = ("SLURM_STEP_NUM_TASKS", "OMPI_COMM_WORLD_SIZE", "PMI_SIZE")
"""Variables in which srun and mpirun give the number of processes; neither sets a rank in a variable that torch reads."""

SET_HERE: dict[str, str] = {}  # variables set for a process without a launcher, removed when its run ends


def meet(backend: str) -> None:
    """Joins this run's process group; raises Refused if the other ranks do not come."""
    address = f"{os.environ.get('MASTER_ADDR')}:{os.environ.get('MASTER_PORT')}"
    late = threading.Timer(LATE, report_waiting, (address,))
    late.daemon = True
    late.start()
    try:
        store, rank, count = next(dist.rendezvous("env://", timeout=MEETING))
        refuse_unlike_devices(store, rank, count, backend)
        store.set_timeout(PATIENCE)
        store = dist.PrefixStore("default_pg", store)
        on = device_of(backend, count)
        dist.init_process_group(backend, store=store, rank=rank, world_size=count, timeout=PATIENCE, device_id=on)
    except (dist.DistNetworkError, dist.DistStoreError) as error:
        raise Refused(f"the ranks cannot meet at {address} ({first_line(error)}): {remedy(error)}") from None
    except ValueError as error:
        raise Refused(f"{error}: start it with deepspeed, torchrun or plain python, which set what it needs") from None
    finally:
        late.cancel()


def device_of(backend: str, count: int) -> torch.device | None:
    """The GPU to bind NCCL to if there are several ranks, as DeepSpeed does; unbound, NCCL would guess one."""
    bound = backend == "nccl" and count > 1
    return torch.device("cuda", int(os.environ["LOCAL_RANK"])) if bound else None


def refuse_unlike_devices(store: dist.Store, rank: int, count: int, backend: str) -> None:
    """Raises Refused if only some ranks have a GPU: those without would wait in another group than the others."""
    store.set(f"backend of {rank}", backend)
    theirs = [store.get(f"backend of {other}").decode() for other in range(count)]
    cpu = [number for number, name in enumerate(theirs) if name == "gloo"]
    if 0 < len(cpu) < count:
        raise Refused(
            f"rank{'s' * (len(cpu) > 1)} {', '.join(map(str, cpu))} of {count} would compute on a CPU, the others on GPUs: "
            "check why torch finds no CUDA device there, or give --speed.device cpu to all"
        )


def report_waiting(address: str) -> None:
    if int(os.environ.get("LOCAL_RANK", 0)) == 0:
        count, here = os.environ["WORLD_SIZE"], socket.gethostname()
        print(f"duotone: {here} waits for all {count} ranks to come to {address}", flush=True)


def remedy(error: Exception) -> str:
    if "EADDRINUSE" in str(error):
        return "if another run on this machine uses that port, give this run another, as in deepspeed --master_port 29501 ..."
    return "see what the other machines print, and check that each runs this command and can reach that address"


def single_process_defaults() -> None:
    """Sets the variables that a launcher would set, for a plain `python recipes/X.py`."""
    if "RANK" in os.environ:
        return
    refuse_many_without_launcher()
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    SET_HERE.update(RANK="0", WORLD_SIZE="1", LOCAL_RANK="0", MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port))
    os.environ.update(SET_HERE)


def refuse_many_without_launcher() -> None:
    """Raises Refused if several processes were started without ranks: each would train its own run."""
    for name in STARTED_TOGETHER:
        count = os.environ.get(name, "")
        if count.isdigit() and int(count) > 1:
            raise Refused(
                f"{name} is {count}, but these processes have no ranks: start the launcher once on each machine "
                f"(docs/cluster.md), or unset {name} if each is to train its own run"
            )


def clear_single_process_defaults() -> bool:
    """Removes the variables set for a process without a launcher; returns whether this was such a process."""
    alone = bool(SET_HERE)
    for name in SET_HERE:
        os.environ.pop(name, None)
    SET_HERE.clear()
    return alone
