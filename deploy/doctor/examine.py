"""One examination: the settings are read, the machine is looked at, and what was found is judged."""

from collections.abc import Sequence
from pathlib import Path

from common.config import RunConfig
from common.config.source import read_config
from common.errors import UserError, one_line
from deploy.doctor.checks import check
from deploy.doctor.facts import Facts, Wanted
from deploy.doctor.finding import Finding
from deploy.doctor.gather import gather
from deploy.doctor.sources import sources_of


def examine(file: Path | None, overrides: Sequence[str]) -> tuple[Facts, tuple[Finding, ...]]:
    """This machine, with the configuration in ``file``, if one is given. What is wrong with that is a finding too."""
    wanted, config = (None, None) if file is None else _read(file, overrides)
    facts = gather(wanted, config)
    return facts, check(facts)


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
