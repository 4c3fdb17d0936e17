"""RunConfig: every knob of a run, its default and its owner. Knows no one.

Each part is passed on its own to the code that owns it; nothing reads the whole tree but ``deploy/``. Frozen, unknown
keys refused, choices as unions on ``type``, so that a setting which means nothing for the chosen type can't be written.
Reading YAML and ``--set`` is ``common/config/source.py``.
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
