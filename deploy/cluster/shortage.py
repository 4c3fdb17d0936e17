"""Describes the resources that a run waits for: its bundles compared with the cluster. Pure; no calls to Ray."""

from collections.abc import Mapping, Sequence

Resources = Mapping[str, float]


def describe_shortage(
    bundles: Sequence[Resources], *, strategy: str, nodes: Sequence[Resources], free: Resources
) -> str:
    """One line. ``nodes``: each node's total resources; ``free``: unused resources of all nodes together.

    A bundle is always on one node, so an engine with n GPUs needs a node with n. The strategy constrains how bundles
    are distributed over nodes.
    """
    needed = _sum(bundles)
    reasons = [_whole_cluster(name, needed[name], nodes, free) for name in needed]
    reasons += [_one_node(name, bundles, strategy, nodes) for name in needed]
    if strategy == "STRICT_SPREAD" and len(nodes) < len(bundles):
        reasons.append(f"STRICT_SPREAD needs a node for each of {len(bundles)} bundles, there are {len(nodes)}")
    if found := [reason for reason in reasons if reason]:
        return "; ".join(found)
    return f"{_in_words(free)} are free, but {strategy} can't place {len(bundles)} bundles on these nodes"


def _whole_cluster(name: str, needed: float, nodes: Sequence[Resources], free: Resources) -> str:
    total, unused = _sum(nodes).get(name, 0.0), free.get(name, 0.0)
    if needed > total:
        return f"{needed:g} {name} needed, the cluster has {total:g}"
    return f"{needed:g} {name} needed, {unused:g} of {total:g} free" if needed > unused else ""


def _one_node(name: str, bundles: Sequence[Resources], strategy: str, nodes: Sequence[Resources]) -> str:
    """A requirement that is larger than every node."""
    largest = max((node.get(name, 0.0) for node in nodes), default=0.0)
    bundle = max(bundle.get(name, 0.0) for bundle in bundles)
    if bundle > largest:
        return f"one actor needs {bundle:g} {name} on one node, the largest has {largest:g}"
    whole = _sum(bundles)[name]
    if strategy == "STRICT_PACK" and whole > largest:
        return f"STRICT_PACK needs {whole:g} {name} on one node, the largest has {largest:g}"
    return ""


def _sum(resources: Sequence[Resources]) -> dict[str, float]:
    names = dict.fromkeys(name for each in resources for name in each)
    return {name: sum(each.get(name, 0.0) for each in resources) for name in names}


def _in_words(resources: Resources) -> str:
    return ", ".join(f"{amount:g} {name}" for name, amount in resources.items()) or "no resources"
