"""Checks of memory and disk space, and of the network services: the hub and Ray. Pure."""

import math

from deploy.doctor.facts import GIB, Facts, Space, needs_hub
from deploy.doctor.finding import Finding, failure, ok, warning

_SHM_BYTES = GIB  # for Ray's objects and vLLM's queues; a container's default is 64 MiB in total
_MODEL_BYTES = 20 * GIB  # assumed without a configuration
_WORTH_TELLING_BYTES = GIB


def check_shared_memory(facts: Facts) -> Finding:
    """Used by Ray's objects, vLLM's processes and, without NCCL, two versions of the weights."""
    shm = facts.shm
    weights = facts.plan.shm_bytes if facts.plan else 0
    needed = _SHM_BYTES + weights
    found = f"{gib(shm.free_bytes)} of {gib(shm.total_bytes)} free at {shm.path}"
    if weights >= _WORTH_TELLING_BYTES or shm.total_bytes < needed:
        found += f", {gib(needed)} needed, {gib(weights)} of it for the weights"
    if shm.total_bytes < needed:
        say = failure if shm.total_bytes < weights else warning
        size = math.ceil(needed / GIB)
        return say("shared memory", f"{found}; in a container --shm-size {size}g or --ipc=host (compose: SHM_SIZE)")
    if shm.free_bytes < needed:
        return warning("shared memory", f"{found}; ls {shm.path} shows which files are left there")
    return ok("shared memory", found)


def check_run_folder(facts: Facts) -> Finding:
    needed = facts.plan.checkpoints_bytes if facts.plan else 0
    return _disk(
        "run_dir", facts.run_space, needed=needed, for_what="checkpoints", advice="--set run_dir=FOLDER moves them"
    )


def check_hub_cache(facts: Facts) -> Finding | None:
    if not needs_hub(facts.wanted):
        return None
    needed = facts.plan.download_bytes if facts.plan else _MODEL_BYTES
    return _disk("HF_HOME", facts.hub_space, needed=needed, for_what="models", advice="set HF_HOME to another folder")


def _disk(topic: str, space: Space, *, needed: int, for_what: str, advice: str) -> Finding:
    if not space.is_writable:
        return failure(topic, f"{space.path} is not writable; {advice}")
    found = f"{gib(space.free_bytes)} free at {space.path}"
    if space.free_bytes < needed:
        return warning(topic, f"{found}, {gib(needed)} needed for {for_what}; {advice}")
    return ok(topic, found + (f", {gib(needed)} needed for {for_what}" if needed >= _WORTH_TELLING_BYTES else ""))


def check_hub(facts: Facts) -> Finding:
    if not needs_hub(facts.wanted):
        return ok("hub", "not needed: models and data are files on this machine")
    sources = facts.wanted.sources if facts.wanted else ()
    to_fetch = [f"{source.key} ({source.name})" for source in sources if source.place == "hub"]
    if facts.hub.is_offline:
        if to_fetch:
            return failure("hub", f"HF_HUB_OFFLINE is set and the cache has no {', '.join(to_fetch)}; unset it once")
        return ok("hub", "offline (HF_HUB_OFFLINE): only the cache is used")
    if facts.hub.error:
        if to_fetch:
            return failure(
                "hub",
                f"no answer ({facts.hub.error}), and the cache has no {', '.join(to_fetch)}; "
                "copy them into HF_HOME from a machine with access, or use local folders",
            )
        return warning("hub", f"no answer ({facts.hub.error}); set HF_HUB_OFFLINE=1, otherwise each start waits for it")
    token = "with HF_TOKEN" if facts.hub.has_token else "without HF_TOKEN, which gated models need"
    return ok("hub", f"answers, {token}")


def check_ray(facts: Facts) -> Finding:
    ray = facts.ray
    if ray.error:
        if ray.address:
            return failure("Ray", f"no cluster at {ray.address}: {ray.error}; start its head, or unset RAY_ADDRESS")
        return failure("Ray", f"can't be imported: {ray.error}; make setup reinstalls it")
    if ray.address is None:
        if ray.local_cluster:
            return ok(
                "Ray",
                f"a run starts its own on loopback; to use the cluster at {ray.local_cluster} set RAY_ADDRESS=auto",
            )
        return ok("Ray", "a run starts its own on loopback")
    gpus = sum(node.num_gpus for node in ray.nodes)
    found = f"{len(ray.nodes)} node{'' if len(ray.nodes) == 1 else 's'} with {gpus} GPUs at {ray.address}"
    if not ray.asks_for_token:
        return warning("Ray", f"{found}; anyone who reaches its ports can run code: RAY_AUTH_MODE=token on every node")
    return ok("Ray", f"{found}, with a token")


def gib(num_bytes: int) -> str:
    return f"{num_bytes / GIB:.1f} GiB"
