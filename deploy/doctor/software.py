"""Checks of the installed software. Pure."""

from deploy.doctor.facts import Build, Facts
from deploy.doctor.finding import Finding, failure, ok, warning
from deploy.lock.driver import CUDA


def check_python(facts: Facts) -> Finding:
    version = ".".join(map(str, facts.python))
    if not (3, 11) <= facts.python[:2] < (3, 13):
        return failure("python", f"{version}; use 3.11 or 3.12")
    return ok("python", version)


def check_packages(facts: Facts) -> Finding:
    missing = [package.name for package in facts.packages if package.version is None]
    if missing:
        return failure(
            "packages",
            f"{', '.join(missing)} not installed; make setup, or pip install 'adaswitch[cuda]' (without a GPU: [cpu])",
        )
    versions = ", ".join(f"{package.name} {package.version}" for package in facts.packages)
    others = [f"{package.name}{package.wanted}" for package in facts.packages if package.wanted]
    if others:
        return warning("packages", f"{versions}; tested with {', '.join(others)}: make setup installs these")
    return ok("packages", versions)


def check_builds(facts: Facts) -> Finding | None:
    """CPU or CUDA builds: whether vLLM and torch agree, and whether the machine supports them."""
    vllm, torch = facts.package("vllm").build, facts.package("torch").build
    if vllm is None or torch is None:
        return None  # see packages
    if vllm != torch:
        return failure(
            "builds",
            f"vLLM is built for {name(vllm)}, torch for {name(torch)}; remove .venv, unset PIP_EXTRA_INDEX_URL and "
            f"make setup GPU={int(vllm == 'cuda')}",
        )
    if vllm == "cuda" and not facts.gpus and facts.driver is None:
        text = "vLLM and torch are built for CUDA, and there is no working NVIDIA driver here"
        if facts.ray.address:
            return ok("builds", f"{text}; the cluster at {facts.ray.address} must have the GPUs")
        return failure("builds", f"{text}; run this where the GPUs are, or use the CPU build: make setup GPU=0")
    if vllm == "cpu" and facts.gpus:
        return warning(
            "builds", "vLLM and torch are CPU builds, so the GPUs here are not used; make setup GPU=1 installs CUDA's"
        )
    if vllm == "other":
        return warning("builds", "vLLM and torch are built for neither CUDA nor CPUs, which has not been tested")
    return ok("builds", f"vLLM and torch are built for {name(vllm)}")


def check_flash_attention(facts: Facts) -> Finding | None:
    """Only for the learner, because vLLM has its own kernels."""
    if facts.build != "cuda":
        return None
    if facts.flash_attention is None:
        say = warning if facts.wanted is None or facts.wanted.wants_flash_attention else ok
        return say(
            "flash attention",
            "flash-attn is not installed, so the learner pads sequences instead of packing them; "
            "pip install --no-build-isolation flash-attn builds it",
        )
    return ok("flash attention", f"flash-attn {facts.flash_attention}, for the learner with trainer.dtype bfloat16")


def check_compilers(facts: Facts) -> Finding:
    missing = [
        name
        for name, is_there in {
            "a C compiler (apt-get install gcc)": facts.compilers.c,
            "a C++ compiler (apt-get install g++)": facts.compilers.cxx,
            "Python.h (apt-get install python3-dev)": facts.compilers.has_python_header,
        }.items()
        if not is_there
    ]
    if missing:
        return failure("compiler", f"missing: {', '.join(missing)}; torch and Triton build kernels at run time")
    return ok("compiler", f"{facts.compilers.c}, {facts.compilers.cxx}, Python.h")


def check_toolkit(facts: Facts) -> Finding | None:
    """Only FlashInfer's kernels need a toolkit; without one vLLM does not use FlashInfer."""
    if facts.build != "cuda":
        return None
    wanted = f"{CUDA[0]}.{CUDA[1]}"
    if facts.toolkit is None:
        return ok("CUDA toolkit", f"none, so vLLM uses no FlashInfer kernels; for those install CUDA toolkit {wanted}")
    if facts.toolkit.cuda is None or facts.toolkit.cuda[0] != CUDA[0]:
        has = ".".join(map(str, facts.toolkit.cuda)) if facts.toolkit.cuda else "an unknown version"
        return warning(
            "CUDA toolkit",
            f"{facts.toolkit.nvcc} is CUDA {has}, torch uses {wanted}, and FlashInfer would build kernels with it; "
            f"set CUDA_HOME to a toolkit {wanted}, or to an empty folder to disable FlashInfer",
        )
    return ok("CUDA toolkit", f"{facts.toolkit.nvcc}, CUDA {facts.toolkit.cuda[0]}.{facts.toolkit.cuda[1]}")


def check_settings(facts: Facts) -> Finding | None:
    if facts.wanted is None:
        return None
    if facts.wanted.error:
        return failure("settings", facts.wanted.error)
    if absent := [f"{source.key} ({source.name})" for source in facts.wanted.sources if source.place == "nowhere"]:
        return failure("settings", f"{facts.wanted.file}: no such file or folder: {', '.join(absent)}")
    return ok("settings", f"{facts.wanted.file} is valid")


def name(build: Build) -> str:
    return {"cuda": "CUDA", "cpu": "CPUs"}.get(build, "something else")
