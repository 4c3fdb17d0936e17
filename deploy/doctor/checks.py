"""All checks. Each is a pure function of the machine's facts and says what to do about a problem."""

from collections.abc import Callable

from deploy.doctor import hardware, resources, software
from deploy.doctor.facts import Facts
from deploy.doctor.finding import Finding, failure, ok

Check = Callable[[Facts], Finding | None]
CHECKS: tuple[Check, ...] = (
    software.check_python,
    software.check_packages,
    software.check_builds,
    hardware.check_driver,
    hardware.check_gpus,
    hardware.check_torch_sees_gpus,
    hardware.check_links,
    hardware.check_processor,
    hardware.check_dtype,
    software.check_flash_attention,
    software.check_compilers,
    software.check_toolkit,
    resources.check_shared_memory,
    resources.check_run_folder,
    resources.check_hub_cache,
    resources.check_hub,
    resources.check_ray,
    software.check_settings,
)


def check(facts: Facts) -> tuple[Finding, ...]:
    """The findings of all checks that apply to this machine, in display order."""
    return (*(finding for one in CHECKS if (finding := one(facts))), *describe_plan(facts))


def describe_plan(facts: Facts) -> tuple[Finding, ...]:
    """The plan of the configured run: one line for the whole, and one for each bundle with GPUs."""
    plan = facts.plan
    if plan is None:
        return ()
    whole = (
        ok("placement", plan.summary)
        if plan.missing is None
        else failure("placement", f"{plan.missing}; adaswitch config FILE --plan shows each actor's memory")
    )
    return (whole, *(ok(f"bundle {number}", text) for number, text in enumerate(plan.bundles)))
