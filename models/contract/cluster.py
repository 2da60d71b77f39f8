# SPDX-License-Identifier: Apache-2.0
"""Where the processes of a run are: one node, or several, told by the environment of a cluster. Torch-free.

dsw     one node, as the reference's scripts mean it: every visible device, any free port
dlc     Kubernetes jobs: WORLD_SIZE and RANK count *nodes*, MASTER_ADDR and MASTER_PORT name the first
slurm   SLURM_JOB_NUM_NODES, SLURM_NODEID and the first host of SLURM_JOB_NODELIST
hosts   an explicit list; this host's place in it is its rank
"""

import re
import socket
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

from models.contract.errors import ConfigError

Scheduler = Literal["dsw", "dlc", "slurm", "hosts"]
DEFAULT_PORT = 29500
MAX_PORT = 65535


@dataclass(frozen=True, slots=True, kw_only=True)
class Cluster:
    """The nodes of a run, seen from one of them."""

    num_nodes: int
    node_rank: int
    master_addr: str
    master_port: int
    master_source: str = "MASTER_ADDR"
    """The variable or option that names the first node."""

    def torchrun_arguments(self, processes_per_node: int) -> list[str]:
        """Options of ``python -m torch.distributed.run`` for this node."""
        if self.num_nodes == 1:
            return ["--standalone", f"--nproc-per-node={processes_per_node}"]
        return [
            f"--nnodes={self.num_nodes}", f"--node-rank={self.node_rank}",
            f"--master-addr={self.master_addr}", f"--master-port={self.master_port}",
            f"--nproc-per-node={processes_per_node}",
        ]  # fmt: skip


ONE_NODE = Cluster(num_nodes=1, node_rank=0, master_addr="localhost", master_port=DEFAULT_PORT)


def read_cluster(
    scheduler: Scheduler,
    environment: Mapping[str, str],
    *,
    hosts: Sequence[str] = (),
    this_host: str | None = None,
) -> Cluster:
    """The cluster that a scheduler's environment describes.

    Args:
        scheduler: Which environment to read.
        environment: Environment variables.
        hosts: Host names or addresses, the first is the master; for `hosts`.
        this_host: Name of this host; default: what the system says.

    Raises:
        ConfigError: a variable is missing or malformed (all of them are named), or this host is not in the list.
    """
    unused = [f"--{name}" for name, value in (("hosts", hosts), ("this-host", this_host)) if value]
    if scheduler != "hosts" and unused:
        raise ConfigError(
            f"{' and '.join(unused)} have no effect with --scheduler {scheduler}",
            fix="say --scheduler hosts, or leave them out",
        )
    if scheduler == "dsw":
        return ONE_NODE
    if scheduler == "dlc":
        return _from_counts(environment, nodes="WORLD_SIZE", rank="RANK", scheduler=scheduler)
    if scheduler == "slurm":
        return _from_counts(
            environment, nodes="SLURM_JOB_NUM_NODES", rank="SLURM_NODEID", scheduler=scheduler,
            node_list="SLURM_JOB_NODELIST",
        )  # fmt: skip
    return _from_hosts(environment, hosts, this_host or socket.gethostname())


def processes_per_node(num_processes: int, num_nodes: int) -> int:
    """Processes of each node. Raises ConfigError when they do not divide."""
    if num_processes % num_nodes:
        raise ConfigError(
            "processes do not divide over the nodes", expected=f"a multiple of {num_nodes}", got=str(num_processes),
            fix="change num_processes in the recipe, or the number of nodes",
        )  # fmt: skip
    return num_processes // num_nodes


def first_host(node_list: str) -> str:
    """First host of Slurm's compressed list: ``gpu[07-09,12],login1`` begins with ``gpu07``.

    Raises:
        ConfigError: not such a list.
    """
    match = re.fullmatch(r"([\w.-]+)(?:\[(\w+)(?:-\w+)?(?:,[\w-]+)*\]([\w.-]*))?(?:,.*)?", node_list.strip())
    if match is None:
        raise ConfigError("not a Slurm node list", where="SLURM_JOB_NODELIST", got=node_list)
    return match[1] + (match[2] or "") + (match[3] or "")


def _from_counts(
    environment: Mapping[str, str], *, nodes: str, rank: str, scheduler: str, node_list: str | None = None
) -> Cluster:
    needed = [nodes, rank, node_list or "MASTER_ADDR"]
    missing = [name for name in needed if name not in environment]
    if missing:
        raise ConfigError(
            f"not inside a {scheduler} job", where="environment variables", got=f"missing {', '.join(missing)}",
            fix="start it there, or name another scheduler",
        )  # fmt: skip
    counts = {name: environment[name] for name in (nodes, rank)}
    wrong = [f"{name}={text!r}" for name, text in counts.items() if not _is_number(text)]
    if wrong or not int(counts[rank]) < int(counts[nodes]):
        raise ConfigError(
            f"{scheduler} variables contradict each other", where="environment variables",
            expected=f"numbers with {rank} < {nodes}", got=", ".join(wrong) or f"{counts[rank]} and {counts[nodes]}",
        )  # fmt: skip
    master = first_host(environment[node_list]) if node_list else environment["MASTER_ADDR"].strip()
    if not master:
        raise ConfigError(
            "no master is named", where="MASTER_ADDR", got=f"MASTER_ADDR={environment['MASTER_ADDR']!r}"
        )
    return Cluster(
        num_nodes=int(counts[nodes]), node_rank=int(counts[rank]), master_addr=master,
        master_port=_master_port(environment), master_source=node_list or "MASTER_ADDR",
    )  # fmt: skip


def _master_port(environment: Mapping[str, str]) -> int:
    text = environment.get("MASTER_PORT", str(DEFAULT_PORT))
    if not _is_number(text) or not 1 <= int(text) <= MAX_PORT:
        raise ConfigError(
            "not a port", where="MASTER_PORT", expected=f"1 to {MAX_PORT}", got=f"MASTER_PORT={text!r}"
        )
    return int(text)


def _is_number(text: str) -> bool:
    return text.isascii() and text.isdigit()


def _from_hosts(environment: Mapping[str, str], hosts: Sequence[str], this_host: str) -> Cluster:
    if not hosts or len(set(hosts)) != len(hosts):
        raise ConfigError("the host list is empty or names a host twice", got=", ".join(hosts))
    if this_host not in hosts:
        raise ConfigError(
            "this host is not in the list", expected=f"one of {', '.join(hosts)}", got=this_host,
            fix="use the names that `hostname` prints, or say which host this is",
        )  # fmt: skip
    return Cluster(
        num_nodes=len(hosts),
        node_rank=list(hosts).index(this_host),
        master_addr=hosts[0],
        master_port=_master_port(environment),
        master_source="--hosts",
    )
