"""Queries that run in a process of their own, because they take seconds, may hang, or have side effects:

python -m deploy.doctor.probe torch          how many GPUs torch sees
python -m deploy.doctor.probe ray ADDRESS    whether Ray imports, and the nodes of the cluster at ADDRESS (- for none)
python -m deploy.doctor.probe hub            whether the hub answers

Each prints one line of JSON as its last line. Errors are returned as {"error": "..."}.
"""

import json
import re
import socket
import sys
from collections.abc import Callable
from typing import Any

Answer = dict[str, Any]
_ANSWER_TIMEOUT_S = 5.0


def _torch() -> Answer:
    import torch

    if torch.cuda.is_available():
        return {"num_gpus": torch.cuda.device_count()}
    try:
        torch.cuda.init()  # type: ignore[no-untyped-call]  # raises the reason
    except (RuntimeError, AssertionError) as error:
        return {"num_gpus": 0, "error": _line(error)}
    return {"num_gpus": 0}


def _ray(address: str) -> Answer:
    import ray

    if address == "-":
        return {"nodes": []}
    if named := re.fullmatch(r"(?:ray://)?\[?([^\[\]/]+)\]?:(\d+)", address):
        # If nothing listens there, Ray would retry for minutes.
        socket.create_connection((named[1], int(named[2])), timeout=_ANSWER_TIMEOUT_S).close()
    ray.init(address=address, log_to_driver=False, logging_level="ERROR")
    from deploy.cluster.reservation import gpu_nodes

    num_nodes = sum(node["Alive"] for node in ray.nodes())
    with_gpus = [[node.num_gpus, node.gpu_gib] for node in gpu_nodes()]
    ray.shutdown()
    return {"nodes": [*with_gpus, *[[0, None]] * (num_nodes - len(with_gpus))]}


def _hub() -> Answer:
    import urllib.error
    import urllib.request

    from huggingface_hub.constants import ENDPOINT

    try:
        urllib.request.urlopen(urllib.request.Request(ENDPOINT, method="HEAD"), timeout=_ANSWER_TIMEOUT_S).close()
    except urllib.error.HTTPError as error:
        return {"error": _line(error)} if error.code >= 500 else {}
    except OSError as error:
        return {"error": _line(error)}
    return {}


_PROBES: dict[str, Callable[..., Answer]] = {"torch": _torch, "ray": _ray, "hub": _hub}


def _line(error: Exception) -> str:
    return " ".join(str(error).split()) or type(error).__name__


def main(name: str, *arguments: str) -> None:
    try:
        answer = _PROBES[name](*arguments)
    except Exception as error:  # any error of a broken installation is a valid answer
        answer = {"error": _line(error)}
    print(json.dumps(answer))


if __name__ == "__main__":
    main(*sys.argv[1:])
