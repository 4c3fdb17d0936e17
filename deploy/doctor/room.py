"""Checks of memory and disk, and of what is reached over the network: the hub and Ray. Pure."""

from deploy.doctor.facts import GIB, Facts, needs_hub
from deploy.doctor.finding import Finding, failure, ok, warning

_SMALL_SHM_BYTES = GIB  # a container's default is 64 MiB
_SMALL_DISK_BYTES = 20 * GIB


def check_shared_memory(facts: Facts) -> Finding:
    shm = facts.shm
    found = f"{gib(shm.free_bytes)} of {gib(shm.total_bytes)} free at {shm.path}"
    if shm.total_bytes < _SMALL_SHM_BYTES:
        return failure(
            "shared memory", f"{found}; give the container more: --shm-size 8g, or --ipc=host (compose: SHM_SIZE)"
        )
    if shm.free_bytes < _SMALL_SHM_BYTES:
        return warning("shared memory", f"{found}; ls {shm.path} shows who left files there")
    return ok("shared memory", found)


def check_run_folder(facts: Facts) -> Finding:
    space = facts.run_space
    if not space.is_writable:
        return failure("run_dir", f"{space.path} can't be written; choose another with --set run_dir=FOLDER")
    if space.free_bytes < _SMALL_DISK_BYTES:
        return warning(
            "run_dir",
            f"{gib(space.free_bytes)} free at {space.path}; a checkpoint takes 16 bytes a parameter of the student, "
            "and up to four are there at once",
        )
    return ok("run_dir", f"{gib(space.free_bytes)} free at {space.path}")


def check_hub_cache(facts: Facts) -> Finding | None:
    if not needs_hub(facts.wanted):
        return None
    space = facts.hub_space
    if not space.is_writable:
        return failure("HF_HOME", f"{space.path} can't be written; let HF_HOME name a folder that can")
    if space.free_bytes < _SMALL_DISK_BYTES:
        return warning(
            "HF_HOME", f"{gib(space.free_bytes)} free at {space.path}; models are fetched to there: HF_HOME moves it"
        )
    return ok("HF_HOME", f"{gib(space.free_bytes)} free at {space.path}")


def check_hub(facts: Facts) -> Finding:
    if not needs_hub(facts.wanted):
        return ok("hub", "not needed: models and data are files of this machine")
    sources = facts.wanted.sources if facts.wanted else ()
    to_fetch = [f"{source.key} ({source.name})" for source in sources if source.place == "hub"]
    if facts.hub.is_offline:
        if to_fetch:
            return failure("hub", f"HF_HUB_OFFLINE is set and the cache has no {', '.join(to_fetch)}; unset it once")
        return ok("hub", "offline (HF_HUB_OFFLINE): the cache alone")
    if facts.hub.error:
        if to_fetch:
            return failure(
                "hub",
                f"no answer ({facts.hub.error}), and the cache has no {', '.join(to_fetch)}; "
                "copy them into HF_HOME from a machine with access, or name folders",
            )
        return warning("hub", f"no answer ({facts.hub.error}); set HF_HUB_OFFLINE=1, or every start waits for it")
    token = "with HF_TOKEN" if facts.hub.has_token else "without HF_TOKEN, which gated models need"
    return ok("hub", f"answers, {token}")


def check_ray(facts: Facts) -> Finding:
    ray = facts.ray
    if ray.error:
        if ray.address:
            return failure("Ray", f"no cluster at {ray.address}: {ray.error}; start its head, or unset RAY_ADDRESS")
        return failure("Ray", f"does not import: {ray.error}; make setup installs it anew")
    if ray.address is None:
        if ray.local_cluster:
            return ok(
                "Ray",
                f"a run starts one of its own on loopback; to join the one at {ray.local_cluster} set RAY_ADDRESS=auto",
            )
        return ok("Ray", "a run starts one of its own on loopback")
    gpus = sum(node.num_gpus for node in ray.nodes)
    found = f"{len(ray.nodes)} nodes with {gpus} GPUs at {ray.address}"
    if not ray.asks_for_token:
        return warning("Ray", f"{found}; whoever reaches its ports can run code: RAY_AUTH_MODE=token on every node")
    return ok("Ray", f"{found}, with a token")


def gib(num_bytes: int) -> str:
    return f"{num_bytes / GIB:.1f} GiB"
