import json
import platform
import socket

import torch

from deploy.provenance import write_versions


def test_a_run_says_what_it_ran_on_and_not_where(tmp_path) -> None:
    write_versions(tmp_path)
    text = (tmp_path / "versions.json").read_text()
    facts = json.loads(text)
    assert facts["python"] == platform.python_version()
    assert facts["packages"]["torch"] == torch.__version__
    assert {"adaswitch", "transformers", "ray"} <= facts["packages"].keys()
    assert "cores of" in facts["hardware"]
    assert socket.gethostname() not in text
