"""What the doctor says of machines that this one is not."""

from collections.abc import Sequence
from dataclasses import replace

import pytest

from deploy.doctor.checks import check
from deploy.doctor.facts import (
    GIB,
    Compilers,
    Facts,
    Hub,
    Link,
    Node,
    PlanFacts,
    RayState,
    Source,
    Space,
    Toolkit,
    Wanted,
)
from deploy.doctor.finding import Finding
from deploy.lock.driver import Driver
from tests.deploy.doctor.machines import (
    CPU_PACKAGES,
    CUDA_PACKAGES,
    GPU_SERVER,
    H100,
    LAPTOP,
    OLD_DRIVER,
    T4,
    V100,
)


def finding(facts: Facts, topic: str) -> Finding:
    return next(one for one in check(facts) if one.topic == topic)


def topics(facts: Facts) -> list[str]:
    return [one.topic for one in check(facts)]


@pytest.mark.parametrize("facts", [LAPTOP, GPU_SERVER], ids=["laptop", "server"])
def test_a_machine_on_which_all_is_right_gets_no_warning(facts: Facts) -> None:
    assert [one for one in check(facts) if one.level != "ok"] == []


@pytest.mark.parametrize("facts", [LAPTOP, GPU_SERVER], ids=["laptop", "server"])
def test_a_topic_has_one_line(facts: Facts) -> None:
    assert len(topics(facts)) == len(set(topics(facts)))
    assert all("\n" not in one.text for one in check(facts))


def test_a_machine_without_gpus_is_told_nothing_of_them() -> None:
    assert {"driver", "GPUs", "torch", "GPU links", "flash attention"}.isdisjoint(topics(LAPTOP))


# ------------------------------------------------------------------------------------------------------------- software


def test_another_python_is_a_failure() -> None:
    assert finding(replace(LAPTOP, python=(3, 13, 0)), "python").text == "3.13.0; use 3.11 or 3.12"
    assert finding(replace(LAPTOP, python=(3, 12, 1)), "python").level == "ok"


def test_missing_packages_are_named_with_the_command_that_installs_them() -> None:
    without = tuple(
        replace(package, version=None, build=None) if package.name in ("vllm", "torch") else package
        for package in CPU_PACKAGES
    )
    found = finding(replace(LAPTOP, packages=without), "packages")
    assert found.level == "failure"
    assert found.text.startswith("vllm, torch not installed; make setup")
    assert "builds" not in topics(replace(LAPTOP, packages=without))


def test_another_version_than_the_tested_one_is_named() -> None:
    newer = tuple(
        replace(one, version="2.14.1", wanted="==2.13.0") if one.name == "torch" else one for one in CPU_PACKAGES
    )
    found = finding(replace(LAPTOP, packages=newer), "packages")
    assert found.level == "warning"
    assert "torch 2.14.1" in found.text
    assert "tested with torch==2.13.0" in found.text


def test_cpu_builds_on_a_gpu_machine_are_a_warning_with_the_way_out() -> None:
    found = finding(replace(GPU_SERVER, packages=CPU_PACKAGES, torch_gpus=None), "builds")
    assert (found.level, "make setup GPU=1" in found.text) == ("warning", True)


def test_builds_that_differ_are_a_failure() -> None:
    mixed = (*CUDA_PACKAGES[:2], *CPU_PACKAGES[2:])
    found = finding(replace(GPU_SERVER, packages=mixed), "builds")
    assert found.level == "failure"
    assert found.text.startswith("vLLM is built for CUDA, torch for CPUs")
    assert "make setup GPU=1" in found.text


def test_a_cuda_build_without_a_driver_is_a_failure_unless_a_cluster_has_the_gpus() -> None:
    alone = replace(GPU_SERVER, driver=None, gpus=(), links=(), torch_gpus=None)
    assert finding(alone, "builds").level == "failure"
    assert "make setup GPU=0" in finding(alone, "builds").text
    cluster = RayState(address="10.0.0.1:6379", nodes=(Node(num_gpus=8),), asks_for_token=True)
    assert finding(replace(alone, ray=cluster), "builds").level == "ok"


def test_flash_attention_is_missed_where_the_learner_would_use_it() -> None:
    without = replace(GPU_SERVER, flash_attention=None)
    assert finding(without, "flash attention").level == "warning"
    in_float32 = replace(without, wanted=Wanted(file="c.yaml", wants_flash_attention=False))
    assert finding(in_float32, "flash attention").level == "ok"
    in_bfloat16 = replace(without, wanted=Wanted(file="c.yaml", wants_flash_attention=True))
    assert "pip install --no-build-isolation flash-attn" in finding(in_bfloat16, "flash attention").text


@pytest.mark.parametrize(
    ("compilers", "missing"),
    [
        (Compilers(c=None, cxx="/g++", has_python_header=True), "a C compiler"),
        (Compilers(c="/gcc", cxx=None, has_python_header=True), "a C++ compiler"),
        (Compilers(c="/gcc", cxx="/g++", has_python_header=False), "Python.h"),
    ],
)
def test_what_kernels_are_built_with_must_be_there(compilers: Compilers, missing: str) -> None:
    found = finding(replace(LAPTOP, compilers=compilers), "compiler")
    assert (found.level, found.text.startswith(f"missing: {missing}")) == ("failure", True)


def test_a_cuda_toolkit_must_be_of_torch_s_cuda_where_there_is_one() -> None:
    assert finding(GPU_SERVER, "CUDA toolkit").level == "ok"
    fitting = Toolkit(nvcc="/usr/local/cuda/bin/nvcc", cuda=(13, 0))
    assert finding(replace(GPU_SERVER, toolkit=fitting), "CUDA toolkit").text == "/usr/local/cuda/bin/nvcc, CUDA 13.0"
    old = finding(replace(GPU_SERVER, toolkit=replace(fitting, cuda=(12, 4))), "CUDA toolkit")
    assert (old.level, old.text.startswith("/usr/local/cuda/bin/nvcc is CUDA 12.4, torch uses 13.0")) == (
        "warning",
        True,
    )
    assert "CUDA toolkit" not in topics(replace(LAPTOP, toolkit=fitting))


# ------------------------------------------------------------------------------------------------------------- hardware


def test_an_old_driver_is_a_failure_that_names_both_versions() -> None:
    found = finding(replace(GPU_SERVER, driver=OLD_DRIVER), "driver")
    assert found.level == "failure"
    assert found.text == "550.90.12, which runs CUDA up to 12.4; CUDA 13.0 needs driver 580 or newer: update it"


def test_an_old_driver_does_not_keep_a_cpu_build_from_running() -> None:
    assert finding(replace(GPU_SERVER, packages=CPU_PACKAGES, driver=OLD_DRIVER), "driver").level == "warning"


def test_forward_compatibility_makes_an_old_driver_new_enough() -> None:
    compatible = Driver(version="570.86.15", cuda=(13, 0))
    assert finding(replace(GPU_SERVER, driver=compatible), "driver").level == "ok"


def test_mixed_gpus_are_a_warning() -> None:
    found = finding(replace(GPU_SERVER, gpus=(H100, replace(T4, index=1))), "GPUs")
    assert found.level == "warning"
    assert found.text.startswith(
        "1 x NVIDIA H100 80GB HBM3 with 80 GiB, 1 x Tesla T4 with 15 GiB; Ray treats them as equal"
    )
    assert "CUDA_VISIBLE_DEVICES" in found.text


def test_gpus_that_cuda_13_has_no_code_for_are_a_failure() -> None:
    found = finding(replace(GPU_SERVER, gpus=(V100,)), "GPUs")
    assert (found.level, "does not support GPU 0 (Tesla V100" in found.text) == ("failure", True)


def test_gpus_that_others_use_or_that_are_divided_are_a_warning() -> None:
    busy = finding(replace(GPU_SERVER, gpus=(replace(H100, used_gib=21.3),)), "GPUs")
    assert (busy.level, "21 GiB of GPU 0" in busy.text) == ("warning", True)
    divided = finding(replace(GPU_SERVER, gpus=(replace(H100, is_mig=True),)), "GPUs")
    assert (divided.level, "MIG" in divided.text) == ("warning", True)
    with_a_display = replace(GPU_SERVER, gpus=(replace(H100, used_gib=0.4),))
    assert finding(with_a_display, "GPUs").level == "ok"


def test_a_gpu_that_torch_does_not_see_is_a_failure_with_torch_s_reason() -> None:
    blind = replace(GPU_SERVER, torch_gpus=0, torch_error="The NVIDIA driver on your system is too old")
    assert finding(blind, "torch").level == "failure"
    assert "too old" in finding(blind, "torch").text
    hidden = replace(GPU_SERVER, torch_gpus=0, visible_devices="")
    assert "CUDA_VISIBLE_DEVICES=" in finding(hidden, "torch").text


def test_fewer_visible_gpus_are_a_warning_unless_they_were_hidden() -> None:
    assert finding(replace(GPU_SERVER, torch_gpus=1), "torch").level == "warning"
    assert finding(replace(GPU_SERVER, torch_gpus=1, visible_devices="0"), "torch").level == "ok"


@pytest.mark.parametrize(
    ("kinds", "said"),
    [
        (["NV18", "NV18", "NV18"], "NVLink between all (NV18 between 3 pairs)"),
        (["NV4", "SYS", "SYS"], "only between NVLink pairs"),
        (["PHB", "PHB", "PHB"], "prefer more replicas"),
    ],
)
def test_the_links_say_what_tensor_parallelism_goes_over(kinds: Sequence[str], said: str) -> None:
    pairs = [(0, 1), (0, 2), (1, 2)]
    links = tuple(Link(first=a, second=b, kind=kind) for (a, b), kind in zip(pairs, kinds, strict=True))
    found = finding(replace(GPU_SERVER, links=links), "GPU links")
    assert (found.level, said in found.text) == ("ok", True)


def test_a_processor_without_avx2_fails_the_cpu_build_alone() -> None:
    old = replace(LAPTOP.processor, flags=frozenset({"sse4_2", "avx"}))
    assert finding(replace(LAPTOP, processor=old), "processor").level == "failure"
    assert finding(replace(GPU_SERVER, processor=old), "processor").level == "ok"
    arm = replace(LAPTOP.processor, architecture="aarch64", flags=frozenset({"asimd", "bf16"}))
    assert finding(replace(LAPTOP, processor=arm), "processor").level == "ok"


def test_the_dtype_follows_from_the_hardware() -> None:
    assert finding(LAPTOP, "dtype").text.startswith("float32")
    with_bfloat16 = replace(LAPTOP.processor, flags=frozenset({"avx2", "avx512f", "avx512_bf16"}))
    assert finding(replace(LAPTOP, processor=with_bfloat16), "dtype").text.startswith("bfloat16")
    assert finding(GPU_SERVER, "dtype").text.startswith("bfloat16")
    without = finding(replace(GPU_SERVER, gpus=(T4,)), "dtype")
    assert (without.level, "no bfloat16" in without.text) == ("warning", True)


# ----------------------------------------------------------------------------------------------------------------- room


def test_a_container_s_default_shared_memory_is_a_warning() -> None:
    docker = Space(path="/dev/shm", total_bytes=64 * 2**20, free_bytes=64 * 2**20)
    found = finding(replace(LAPTOP, shm=docker), "shared memory")
    assert (found.level, "--shm-size 1g" in found.text) == ("warning", True)


def test_the_weights_must_have_room_in_shared_memory() -> None:
    plan = PlanFacts(summary="one_gpu", shm_bytes=int(7.1 * GIB))
    seven = Space(path="/dev/shm", total_bytes=7 * GIB, free_bytes=7 * GIB)
    found = finding(replace(GPU_SERVER, shm=seven, plan=plan), "shared memory")
    assert (found.level, "--shm-size 9g" in found.text) == ("failure", True)
    assert "8.1 GiB needed, 7.1 GiB of it for the weights" in found.text
    assert finding(replace(GPU_SERVER, plan=plan), "shared memory").level == "ok"


def test_shared_memory_that_others_fill_is_a_warning() -> None:
    full = Space(path="/dev/shm", total_bytes=16 * GIB, free_bytes=GIB // 2)
    assert finding(replace(LAPTOP, shm=full), "shared memory").level == "warning"


SMALL = Space(path="/runs", total_bytes=1000 * GIB, free_bytes=5 * GIB)
READ_ONLY = Space(path="/runs", total_bytes=1000 * GIB, free_bytes=500 * GIB, is_writable=False)


def test_a_run_folder_must_be_writable_and_hold_the_checkpoints() -> None:
    assert finding(replace(LAPTOP, run_space=READ_ONLY), "run_dir").level == "failure"
    plan = PlanFacts(checkpoints_bytes=32 * GIB)
    found = finding(replace(LAPTOP, run_space=SMALL, plan=plan), "run_dir")
    assert (found.level, "32.0 GiB needed for checkpoints" in found.text) == ("warning", True)
    assert finding(replace(LAPTOP, plan=plan), "run_dir").level == "ok"


def test_the_hub_s_folder_must_be_writable_and_hold_the_models() -> None:
    assert finding(replace(LAPTOP, hub_space=SMALL), "HF_HOME").level == "warning"
    assert finding(replace(LAPTOP, hub_space=READ_ONLY), "HF_HOME").level == "failure"
    fetched = replace(LAPTOP, hub_space=SMALL, wanted=wants("cache"), plan=PlanFacts())
    assert finding(fetched, "HF_HOME").level == "ok"
    assert "HF_HOME" not in topics(replace(LAPTOP, hub_space=SMALL, wanted=wants("machine")))


def test_the_plan_is_told_bundle_by_bundle() -> None:
    plan = PlanFacts(summary="spread (2 GPUs found), weights by nccl", bundles=("1 GPU: teacher", "1 GPU: learner"))
    fits = replace(GPU_SERVER, wanted=wants("machine"), plan=plan)
    assert finding(fits, "placement").level == "ok"
    assert [one.text for one in check(fits) if one.topic.startswith("bundle")] == ["1 GPU: teacher", "1 GPU: learner"]
    too_large = replace(fits, plan=replace(plan, missing="placement.layout: 34.0 GiB of one GPU"))
    found = finding(too_large, "placement")
    assert (found.level, found.text.startswith("placement.layout: 34.0 GiB of one GPU; ")) == ("failure", True)


# --------------------------------------------------------------------------------------------------------- hub and Ray


def wants(*places: str) -> Wanted:
    sources = tuple(Source(key=f"models.m{n}", name=f"org/m{n}", place=place) for n, place in enumerate(places))  # type: ignore[arg-type]
    return Wanted(file="c.yaml", sources=sources)


SILENT = Hub(is_offline=False, has_token=False, error="timed out")
OFFLINE = Hub(is_offline=True, has_token=False)


@pytest.mark.parametrize(
    ("hub", "wanted", "level"),
    [
        (SILENT, None, "warning"),
        (SILENT, wants("machine", "machine"), "ok"),
        (SILENT, wants("machine", "cache"), "warning"),
        (SILENT, wants("machine", "hub"), "failure"),
        (OFFLINE, None, "ok"),
        (OFFLINE, wants("cache", "cache"), "ok"),
        (OFFLINE, wants("cache", "hub"), "failure"),
        (LAPTOP.hub, wants("hub"), "ok"),
    ],
)
def test_the_hub_matters_as_far_as_something_must_come_from_it(hub: Hub, wanted: Wanted | None, level: str) -> None:
    found = finding(replace(LAPTOP, hub=hub, wanted=wanted), "hub")
    assert found.level == level
    if level == "failure":
        assert "models.m1 (org/m1)" in found.text


def test_a_cluster_without_a_token_is_a_warning() -> None:
    cluster = RayState(address="10.0.0.1:6379", nodes=(Node(num_gpus=8), Node(num_gpus=4)))
    found = finding(replace(GPU_SERVER, ray=cluster), "Ray")
    assert (found.level, "RAY_AUTH_MODE=token" in found.text) == ("warning", True)
    found = finding(replace(GPU_SERVER, ray=replace(cluster, asks_for_token=True)), "Ray")
    assert (found.level, found.text) == ("ok", "2 nodes with 12 GPUs at 10.0.0.1:6379, with a token")


def test_a_cluster_that_does_not_answer_is_a_failure() -> None:
    silent = RayState(address="10.0.0.1:6379", error="no answer within 20 s")
    assert finding(replace(LAPTOP, ray=silent), "Ray").level == "failure"


def test_a_cluster_of_this_machine_that_nobody_named_is_told() -> None:
    found = finding(replace(LAPTOP, ray=RayState(address=None, local_cluster="127.0.0.1:6379")), "Ray")
    assert (found.level, "RAY_ADDRESS=auto" in found.text) == ("ok", True)


def test_settings_that_can_t_be_read_are_a_failure() -> None:
    refused = Wanted(file="c.yaml", error="policy.window must be >= 1, got 0")
    assert finding(replace(LAPTOP, wanted=refused), "settings").text == "policy.window must be >= 1, got 0"
    absent = finding(replace(LAPTOP, wanted=wants("machine", "nowhere")), "settings")
    assert (absent.level, "models.m1 (org/m1)" in absent.text) == ("failure", True)
