"""One run of the doctor: reads the settings, gathers facts about the machine, and runs the checks."""

import os
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from importlib import import_module
from pathlib import Path

from common.config import RunConfig
from common.config.source import read_config
from common.errors import UserError, one_line
from deploy.doctor.checks import check
from deploy.doctor.facts import Facts, Wanted, needs_hub
from deploy.doctor.finding import Finding
from deploy.doctor.gather import gather
from deploy.doctor.sources import sources_of

_COUNT_PARAMETERS = ("torch", "transformers")


def examine(file: Path | None, overrides: Sequence[str]) -> tuple[Facts, tuple[Finding, ...]]:
    """Check this machine, and the configuration in ``file`` if given. An invalid configuration is a finding too."""
    wanted, config = (None, None) if file is None else _read(file, overrides)
    with ThreadPoolExecutor() as threads:
        if config is not None and not needs_hub(wanted):
            threads.submit(import_module, "deploy.doctor.run_plan")  # takes seconds; a failure shows up below
        facts = gather(wanted, config)
    if file is not None and config is not None and all(facts.package(name).version for name in _COUNT_PARAMETERS):
        facts = _with_plan(facts, config, file)
    return facts, check(facts)


def _with_plan(facts: Facts, config: RunConfig, file: Path) -> Facts:
    if facts.hub.error:
        os.environ["HF_HUB_OFFLINE"] = "1"  # otherwise transformers would wait for the hub; read when it is imported
    from deploy.doctor.run_plan import plan_facts_of

    return replace(facts, plan=plan_facts_of(config, file, facts))


def _read(file: Path, overrides: Sequence[str]) -> tuple[Wanted, RunConfig | None]:
    try:
        config = read_config(file, overrides).config
    except UserError as error:
        return Wanted(file=str(file), error=one_line(error)), None
    trainer = config.trainer
    return Wanted(
        file=str(file),
        run_dir=config.run_dir,
        sources=sources_of(config),
        wants_flash_attention=trainer.dtype == "bfloat16" and trainer.packing is not False,
    ), config
