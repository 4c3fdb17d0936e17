"""Checks of driver, GPUs and CPU. Pure."""

from collections import Counter
from collections.abc import Sequence

from deploy.cluster.gpus import Gpu
from deploy.doctor.facts import Facts
from deploy.doctor.finding import Finding, failure, ok, warning
from deploy.lock.driver import NEEDED

_MIN_CAPABILITY = (7, 5)  # CUDA 13 does not support older GPUs
_BFLOAT16 = (8, 0)
_BUSY_GIB = 1.0  # a display or a CUDA context uses less
_HIDE = "set CUDA_VISIBLE_DEVICES to the GPUs to use"
_VECTORS = {"avx512_bf16": "AVX512-BF16", "avx512f": "AVX512", "avx2": "AVX2"}


def check_driver(facts: Facts) -> Finding | None:
    if facts.driver is None:
        return None  # see builds
    cuda = f", which runs CUDA up to {facts.driver.cuda[0]}.{facts.driver.cuda[1]}" if facts.driver.cuda else ""
    if not facts.driver.is_new_enough:
        say = warning if facts.build == "cpu" else failure
        return say("driver", f"{facts.driver.version}{cuda}; {NEEDED}: update it")
    return ok("driver", f"{facts.driver.version}{cuda}; {NEEDED}")


def check_gpus(facts: Facts) -> Finding | None:
    if not facts.gpus:
        return None
    kinds = Counter(describe(gpu) for gpu in facts.gpus)
    found = ", ".join(f"{count} x {kind}" for kind, count in kinds.items())
    old = [gpu for gpu in facts.gpus if gpu.compute_capability and gpu.compute_capability < _MIN_CAPABILITY]
    if old and facts.build == "cuda":
        return failure("GPUs", f"{found}; CUDA 13 does not support {names(old)}; {_HIDE}")
    faults = []
    if divided := [gpu for gpu in facts.gpus if gpu.is_mig]:
        faults.append(f"{names(divided)}: MIG is enabled, which is untested")
    if busy := [gpu for gpu in facts.gpus if gpu.used_gib > _BUSY_GIB]:
        used = ", ".join(f"{gpu.used_gib:.0f} GiB of GPU {gpu.index}" for gpu in busy)
        faults.append(f"other processes use {used} (nvidia-smi lists them)")
    if len(kinds) > 1:
        faults.append("Ray treats them as equal, so any actor may get the smallest")
    if faults:
        return warning("GPUs", f"{found}; {'; '.join(faults)}; {_HIDE}")
    return ok("GPUs", found)


def check_torch_sees_gpus(facts: Facts) -> Finding | None:
    if facts.torch_gpus is None:
        return None
    hidden = f" (CUDA_VISIBLE_DEVICES={facts.visible_devices})" if facts.visible_devices is not None else ""
    if facts.torch_gpus == 0:
        why = facts.torch_error or "CUDA finds none"
        return failure("torch", f"sees no GPU{hidden}: {why}; update the driver, or stop hiding the GPUs")
    if not facts.gpus:
        return warning("torch", f"sees {facts.torch_gpus} GPUs{hidden}, but nvidia-smi does not list them: install it")
    found = f"sees {facts.torch_gpus} of {len(facts.gpus)} GPUs{hidden}"
    if facts.torch_gpus < len(facts.gpus) and facts.visible_devices is None:
        return warning("torch", f"{found}; nvidia-smi -q shows what is wrong with the others")
    return ok("torch", found)


def check_links(facts: Facts) -> Finding | None:
    """NVLink or PCIe between the GPUs, which tensor parallelism and the weight sync use."""
    if not facts.links:
        return None
    kinds = Counter(link.kind for link in facts.links)
    found = ", ".join(f"{kind} between {count} {'pair' if count == 1 else 'pairs'}" for kind, count in kinds.items())
    if all(link.is_nvlink for link in facts.links):
        return ok("GPU links", f"NVLink between all ({found})")
    if any(link.is_nvlink for link in facts.links):
        return ok("GPU links", f"{found}; tensor parallelism is fast only between NVLink pairs")
    return ok("GPU links", f"{found}; without NVLink prefer more replicas to tensor parallelism")


def check_processor(facts: Facts) -> Finding:
    processor = facts.processor
    best = next((f" with {name}" for flag, name in _VECTORS.items() if flag in processor.flags), "")
    found = f"{processor.model}{best}, {processor.num_cores} cores, {processor.memory_gib:.0f} GiB"
    if facts.build == "cpu" and processor.architecture == "x86_64" and not best:
        return failure("processor", f"{found}; the CPU build needs AVX2, which it lacks: use another machine")
    return ok("processor", found)


def check_dtype(facts: Facts) -> Finding | None:
    """The precision of engines with dtype auto."""
    if facts.build == "cuda" and facts.gpus:
        if without := [gpu for gpu in facts.gpus if gpu.compute_capability and gpu.compute_capability < _BFLOAT16]:
            return warning(
                "dtype",
                f"{names(without)}: no bfloat16; engines with dtype auto use float16, or float32 for models that need "
                "it; set trainer.dtype: float32",
            )
        return ok("dtype", "bfloat16 in engines with dtype auto")
    if facts.build == "cpu":
        if "avx512_bf16" in facts.processor.flags:
            return ok("dtype", "bfloat16 in engines with dtype auto (the CPU has AVX512-BF16)")
        return ok("dtype", "float32 in engines with dtype auto (bfloat16 is slow without AVX512-BF16)")
    return None


def names(gpus: Sequence[Gpu]) -> str:
    return ", ".join(f"GPU {gpu.index} ({gpu.name})" for gpu in gpus)


def describe(gpu: Gpu) -> str:
    memory = f" with {gpu.gib:.0f} GiB" if gpu.gib is not None else ""
    return f"{gpu.name}{memory}"
