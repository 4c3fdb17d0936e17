import json
import platform
import socket

import torch

from deploy.run.provenance import write_versions


def test_a_run_says_what_it_ran_on_and_not_where(tmp_path) -> None:
    write_versions(tmp_path)
    text = (tmp_path / "versions.json").read_text()
    (facts,) = json.loads(text)["legs"]
    assert facts["after_step"] == 0
    assert facts["python"] == platform.python_version()
    assert facts["packages"]["torch"] == torch.__version__
    assert {"adaswitch", "transformers", "ray"} <= facts["packages"].keys()
    assert "cores of" in facts["hardware"]
    assert socket.gethostname() not in text


def test_every_leg_of_a_run_is_kept(tmp_path) -> None:
    assert [write_versions(tmp_path, after_step=step) for step in (0, 20, 20)] == [1, 2, 3]
    legs = json.loads((tmp_path / "versions.json").read_text())["legs"]
    assert [leg["after_step"] for leg in legs] == [0, 20, 20]
