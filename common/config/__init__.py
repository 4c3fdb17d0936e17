"""RunConfig: every setting of a run and its default. Imports nothing from outside ``common``.

Each part of the tree is passed on its own to the code that uses it; only ``deploy/`` reads the whole tree. Parts are
frozen and refuse unknown keys. Choices are unions on ``type``, so a setting that has no meaning for the chosen type
can't be written. ``common/config/source.py`` reads YAML and ``--set``.
"""

from common.config.data import (
    Data,
    Evaluation,
)
from common.config.divergences import (
    JSD,
    TVD,
    CrossEntropy,
    Divergence,
    ForwardKL,
    Loss,
    ReverseKL,
    SkewedKL,
)
from common.config.engines import (
    OWN_GPU_SHARE,
    Engines,
    EngineSettings,
    Models,
    Sampling,
)
from common.config.part import (
    Fraction,
    Part,
    Positive,
    Seconds,
    Threshold,
    Weight,
)
from common.config.policies import (
    SKD,
    AdaSwitch,
    Dataset,
    Decay,
    Fixed,
    Mixture,
    OffPolicy,
    OnPolicy,
    Policy,
    Relay,
)
from common.config.recording import (
    Checkpoints,
    Logging,
    MLflow,
    Storage,
    Trace,
    Wandb,
)
from common.config.run import (
    LAYOUTS,
    Layout,
    Placement,
    RunConfig,
)
from common.config.supervision import (
    Supervision,
)
from common.config.training import (
    LoRA,
    Sync,
    Trainer,
)

__all__ = [
    "JSD",
    "LAYOUTS",
    "OWN_GPU_SHARE",
    "SKD",
    "TVD",
    "AdaSwitch",
    "Checkpoints",
    "CrossEntropy",
    "Data",
    "Dataset",
    "Decay",
    "Divergence",
    "EngineSettings",
    "Engines",
    "Evaluation",
    "Fixed",
    "ForwardKL",
    "Fraction",
    "Layout",
    "LoRA",
    "Logging",
    "Loss",
    "MLflow",
    "Mixture",
    "Models",
    "OffPolicy",
    "OnPolicy",
    "Part",
    "Placement",
    "Policy",
    "Positive",
    "Relay",
    "ReverseKL",
    "RunConfig",
    "Sampling",
    "Seconds",
    "SkewedKL",
    "Storage",
    "Supervision",
    "Sync",
    "Threshold",
    "Trace",
    "Trainer",
    "Wandb",
    "Weight",
]
