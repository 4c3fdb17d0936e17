"""Checks of what is installed. Pure."""

from deploy.doctor.facts import Build, Facts
from deploy.doctor.finding import Finding, failure, ok, warning
from deploy.lock.driver import CUDA


def check_python(facts: Facts) -> Finding:
    version = ".".join(map(str, facts.python))
    if not (3, 11) <= facts.python[:2] < (3, 13):
        return failure("python", f"{version}; take 3.11 or 3.12")
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
    """CPU or CUDA, whether vLLM and torch agree, and whether the machine has what they are built for."""
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
        text = "vLLM and torch are built for CUDA, and no NVIDIA driver answers here"
        if facts.ray.address:
            return ok("builds", f"{text}; the cluster at {facts.ray.address} must have the GPUs")
        return failure("builds", f"{text}; start where the GPUs are, or take the CPU build: make setup GPU=0")
    if vllm == "cpu" and facts.gpus:
        return warning(
            "builds", "vLLM and torch are CPU builds, so that the GPUs here stay unused; make setup GPU=1 takes CUDA's"
        )
    if vllm == "other":
        return warning("builds", "vLLM and torch are built for neither CUDA nor processors; nobody has tried that")
    return ok("builds", f"vLLM and torch are built for {name(vllm)}")


def check_flash_attention(facts: Facts) -> Finding | None:
    """For the learner alone: vLLM brings its own kernels."""
    if facts.build != "cuda":
        return None
    if facts.flash_attention is None:
        say = warning if facts.wanted is None or facts.wanted.wants_flash_attention else ok
        return say(
            "flash attention",
            "flash-attn is not installed, so the learner pads sequences where it could pack them; "
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
    """Only FlashInfer's kernels need one; vLLM does without FlashInfer where there is none."""
    if facts.build != "cuda":
        return None
    wanted = f"{CUDA[0]}.{CUDA[1]}"
    if facts.toolkit is None:
        return ok("CUDA toolkit", f"none, so vLLM takes no FlashInfer kernels; for those install CUDA toolkit {wanted}")
    if facts.toolkit.cuda is None or facts.toolkit.cuda[0] != CUDA[0]:
        has = ".".join(map(str, facts.toolkit.cuda)) if facts.toolkit.cuda else "an unknown version"
        return warning(
            "CUDA toolkit",
            f"{facts.toolkit.nvcc} is of CUDA {has}, torch of {wanted}, and FlashInfer would build kernels with it; "
            f"set CUDA_HOME to a toolkit {wanted}, or to an empty folder to do without FlashInfer",
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
    return {"cuda": "CUDA", "cpu": "processors"}.get(build, "something else")
