"""All checks. Each is a pure function of the machine's facts and says what to do about a problem."""

from collections.abc import Callable

from deploy.doctor import hardware, room, software
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
    room.check_shared_memory,
    room.check_run_folder,
    room.check_hub_cache,
    room.check_hub,
    room.check_ray,
    software.check_settings,
)


def check(facts: Facts) -> tuple[Finding, ...]:
    """The findings of all checks that apply to this machine, in display order."""
    return (*(finding for one in CHECKS if (finding := one(facts))), *seats_of_actors(facts))


def seats_of_actors(facts: Facts) -> tuple[Finding, ...]:
    """The plan of the configured run: one line for the whole, and one for each bundle with GPUs."""
    seats = facts.seats
    if seats is None:
        return ()
    whole = (
        ok("placement", seats.summary)
        if seats.missing is None
        else failure("placement", f"{seats.missing}; adaswitch config FILE --plan shows each actor's memory")
    )
    return (whole, *(ok(f"bundle {number}", text) for number, text in enumerate(seats.bundles)))
