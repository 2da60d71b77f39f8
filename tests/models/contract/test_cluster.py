# SPDX-License-Identifier: Apache-2.0
"""Which nodes a run has, from the environment of each kind of cluster."""

from typing import Any

import pytest

from models.contract.cluster import ONE_NODE, first_host, processes_per_node, read_cluster
from models.contract.errors import ConfigError

SLURM = {"SLURM_JOB_NUM_NODES": "4", "SLURM_NODEID": "2", "SLURM_JOB_NODELIST": "gpu[07-09,12]"}
DLC = {"WORLD_SIZE": "2", "RANK": "1", "MASTER_ADDR": "master-0", "MASTER_PORT": "23456"}


def test_read_cluster_dsw_is_one_node() -> None:
    assert read_cluster("dsw", DLC) == ONE_NODE
    assert ONE_NODE.torchrun_arguments(8) == ["--standalone", "--nproc-per-node=8"]


def test_read_cluster_dlc_counts_nodes_not_processes() -> None:
    cluster = read_cluster("dlc", DLC)
    assert cluster.torchrun_arguments(8) == [
        "--nnodes=2", "--node-rank=1", "--master-addr=master-0", "--master-port=23456", "--nproc-per-node=8",
    ]  # fmt: skip


def test_read_cluster_slurm_takes_the_first_host_as_master() -> None:
    cluster = read_cluster("slurm", SLURM)
    assert (cluster.num_nodes, cluster.node_rank, cluster.master_addr) == (4, 2, "gpu07")


def test_read_cluster_hosts_ranks_by_place() -> None:
    cluster = read_cluster("hosts", {}, hosts=["a", "b", "c"], this_host="b")
    assert (cluster.num_nodes, cluster.node_rank, cluster.master_addr) == (3, 1, "a")


@pytest.mark.parametrize(
    ("node_list", "host"),
    [("gpu[07-09,12],login1", "gpu07"), ("node1", "node1"), ("n-a[1,3]", "n-a1"), ("a1,b2", "a1")],
)
def test_first_host_expands_slurm_lists(node_list: str, host: str) -> None:
    assert first_host(node_list) == host


@pytest.mark.parametrize(
    ("scheduler", "environment", "message"),
    [
        ("dlc", {"RANK": "0"}, "missing WORLD_SIZE, MASTER_ADDR"),
        ("dlc", DLC | {"RANK": "2"}, "contradict each other"),
        ("dlc", DLC | {"WORLD_SIZE": "two"}, "WORLD_SIZE='two'"),
        ("slurm", {}, "missing SLURM_JOB_NUM_NODES, SLURM_NODEID, SLURM_JOB_NODELIST"),
        ("slurm", SLURM | {"SLURM_JOB_NODELIST": "gpu[["}, "not a Slurm node list"),
        ("dlc", DLC | {"MASTER_PORT": "99999"}, "MASTER_PORT='99999'"),
        ("dlc", DLC | {"MASTER_PORT": "0"}, "MASTER_PORT='0'"),
        ("dlc", DLC | {"MASTER_ADDR": " "}, "MASTER_ADDR=' '"),
        ("dlc", DLC | {"WORLD_SIZE": "²"}, "WORLD_SIZE='²'"),
    ],
)
def test_read_cluster_names_what_is_wrong(scheduler: str, environment: dict[str, str], message: str) -> None:
    with pytest.raises(ConfigError) as caught:
        read_cluster(scheduler, environment)  # type: ignore[arg-type]
    assert message in str(caught.value)


def test_read_cluster_refuses_a_host_that_is_not_listed() -> None:
    with pytest.raises(ConfigError, match="this host is not in the list"):
        read_cluster("hosts", {}, hosts=["a", "b"], this_host="c")


@pytest.mark.parametrize("port", ["x", "99999"])
def test_read_cluster_of_hosts_refuses_a_wrong_port(port: str) -> None:
    with pytest.raises(ConfigError, match="MASTER_PORT"):
        read_cluster("hosts", {"MASTER_PORT": port}, hosts=["a", "b"], this_host="a")


@pytest.mark.parametrize("given", [{"hosts": ["a", "b"]}, {"this_host": "a"}])
def test_read_cluster_refuses_hosts_that_it_would_not_use(given: dict[str, Any]) -> None:
    with pytest.raises(ConfigError, match="have no effect") as caught:
        read_cluster("dsw", {}, **given)
    assert "--scheduler hosts" in str(caught.value)


def test_processes_must_divide_over_nodes() -> None:
    assert processes_per_node(16, 2) == 8
    with pytest.raises(ConfigError, match="do not divide"):
        processes_per_node(9, 2)
