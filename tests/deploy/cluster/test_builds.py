"""When a run uses GPUs, and what it says where it does not."""

import pytest

from common.errors import UserError
from deploy.cluster.builds import Builds, choose_device

CUDA = Builds(torch="CUDA", vllm="CUDA")
CPU = Builds(torch="CPU", vllm="CPU")


def test_this_environment_is_known() -> None:
    import torch
    from vllm.platforms import current_platform

    builds = Builds.installed()
    assert (builds.torch == "CUDA") == (torch.version.cuda is not None)
    assert (builds.vllm == "CPU") == current_platform.is_cpu()


@pytest.mark.parametrize("wanted", ["auto", True])
def test_gpus_are_used_where_there_are_some_and_both_packages_can(wanted) -> None:
    device = choose_device(wanted, num_gpus=2, builds=CUDA)
    assert (device.use_gpus, device.why) == (True, "2 GPUs found")


def test_cpu_builds_leave_gpus_alone_and_say_why() -> None:
    device = choose_device("auto", num_gpus=2, builds=CPU)
    assert not device.use_gpus
    assert device.why == (
        "2 GPUs found, but the installed torch and vLLM are CPU builds; make setup GPU=1 installs the CUDA builds"
    )
    assert choose_device("auto", num_gpus=1, builds=Builds(torch="CUDA", vllm="CPU")).why == (
        "1 GPU found, but the installed vLLM is the CPU build; make setup GPU=1 installs the CUDA builds"
    )


def test_a_machine_without_gpus_computes_on_processors() -> None:
    device = choose_device("auto", num_gpus=0, builds=CPU)
    assert (device.use_gpus, device.why) == (False, "no GPU found")


def test_gpus_can_be_left_alone_on_purpose() -> None:
    assert not choose_device(False, num_gpus=8, builds=CPU).use_gpus


@pytest.mark.parametrize(
    ("wanted", "num_gpus", "builds", "said"),
    [
        (True, 0, CUDA, r"^placement\.use_gpus is true, but the cluster has no GPU$"),
        (
            True,
            2,
            CPU,
            r"^placement\.use_gpus is true, but the installed torch and vLLM are CPU builds; make setup GPU=1",
        ),
        (False, 2, CUDA, r"^placement\.use_gpus is false, 2 GPUs found: .* vLLM's CUDA build can't run on CPUs"),
        ("auto", 0, CUDA, r"^placement\.use_gpus is auto, no GPU found: the installed torch and vLLM are CUDA builds"),
        ("auto", 2, Builds(torch="CPU", vllm="CUDA"), r"the installed torch is the CPU build, and vLLM's CUDA build"),
    ],
)
def test_what_can_t_compute_is_refused_in_one_line(wanted, num_gpus, builds, said) -> None:
    with pytest.raises(UserError, match=said) as refused:
        choose_device(wanted, num_gpus=num_gpus, builds=builds)
    assert "\n" not in str(refused.value)
