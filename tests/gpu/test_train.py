"""What part (d) would run on GPUs is a run that fits there; the rest of it needs them."""

from pathlib import Path

import pytest
import yaml

from common.config.source import read_config
from deploy.cluster.model_shape import read_shapes
from deploy.cluster.plan import Node, make_plan
from tests.gpu.context import Context
from tests.gpu.models import QWEN2_500M, config_of
from tests.gpu.train import GPUS_OF, shaped_config


@pytest.mark.parametrize("layout", GPUS_OF)
@pytest.mark.parametrize("gpu_gib", [22.0, 80.0])
def test_the_shaped_run_fits_on_gpus_of_each_layout(layout: str, gpu_gib: float, tmp_path: Path) -> None:
    config_of(QWEN2_500M).save_pretrained(tmp_path)
    file = tmp_path / "shaped.yaml"
    file.write_text(
        yaml.safe_dump(shaped_config(Context("cuda", tmp_path), QWEN2_500M, "bfloat16", tmp_path, tmp_path))
    )
    config = read_config(file, [f"placement.layout={layout}", "run_dir=runs/x"]).config
    plan = make_plan(config, read_shapes(config), [Node(num_gpus=GPUS_OF[layout], gpu_gib=gpu_gib)])
    assert plan.layout == layout
    assert plan.missing is None
