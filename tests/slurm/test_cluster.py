"""The cluster of these tests is a Slurm: nodes of their own, GPUs handed out, nodes that go and come back."""

from __future__ import annotations

from tests.slurm.cluster import GPUS, Cluster


def test_tasks_run_on_nodes_with_names_and_devices_of_their_own(slurm: Cluster) -> None:
    script = "echo $(hostname) $SLURMD_NODENAME $CUDA_VISIBLE_DEVICES $$"
    everywhere = ("srun", f"-N{len(slurm.nodes)}", "--ntasks-per-node=1", "--gres=gpu:8")
    lines = slurm.command(*everywhere, "bash", "-c", script).splitlines()
    devices = ",".join(map(str, range(GPUS)))
    assert sorted(line.split()[:3] for line in lines) == [[node, node, devices] for node in slurm.nodes]


def test_two_jobs_on_one_node_are_given_different_devices(slurm: Cluster) -> None:
    step = "srun -N1 -n1 --exact --gres=gpu:4 bash -c 'echo $CUDA_VISIBLE_DEVICES'"
    out = slurm.command("srun", "-N1", "-n2", "--gres=gpu:8", "--ntasks-per-node=1", "-w", "node1", "true")
    assert out == ""
    both = slurm.command("salloc", "-Q", "-N1", "-n2", "--gres=gpu:8", "bash", "-c", f"{step} & {step} & wait")
    assert sorted(both.split()) == ["0,1,2,3", "4,5,6,7"]


def test_a_node_goes_down_and_comes_back(slurm: Cluster) -> None:
    slurm.power_off("node4")
    assert slurm.states()["node4"].rstrip("*") == "down"
    slurm.power_on("node4")
    assert slurm.command("srun", "-w", "node4", "hostname") == "node4\n"
