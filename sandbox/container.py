"""A sandbox as the engine is told of it: what it may do, how much, who owns it, and when it ends by itself."""

from __future__ import annotations

import logging
import math
import threading
import time
from dataclasses import dataclass
from typing import Any

import docker
import docker.errors
from docker.types import Mount

from errors import SandboxError
from sandbox.docker_engine import Lifeline, as_sandbox_errors
from sandbox.processes import MARK
from sandbox.reap import LEASE_LABEL, OWNER_LABEL, SANDBOX_LABEL, Owner
from sandbox.types import SandboxConfig

log = logging.getLogger(__name__)

MB = 2**20
SHM_MB = 64
DEAF = "trap '' TERM HUP INT QUIT USR1 USR2"  # a command that ends all processes has not meant the sandbox
NO_BASH = "a container of image {image} ends as soon as it starts: a sandbox needs an image that has bash"


@dataclass(frozen=True)
class Container:
    """A started container. `init_pid` is a number on the engine's machine."""

    id: str
    name: str
    image: str
    image_user: str  # whom its image runs as; empty: root
    init_pid: int
    lifeline: Lifeline


def container_options(
    client: docker.APIClient, image: str, name: str, run: str, config: SandboxConfig, cores: int
) -> dict[str, Any]:
    """Arguments of the SDK's `create_container`."""
    cpus = config.cpus
    if cpus > cores:
        log.warning("a sandbox asks for %g CPUs, the engine has %d: it gets these", cpus, cores)
        cpus = float(cores)
    host = client.create_host_config(
        network_mode=config.network,
        auto_remove=True,
        init=True,
        cap_drop=["ALL"],
        cap_add=list(config.capabilities),
        security_opt=["no-new-privileges"],
        pids_limit=config.pids,
        mem_limit=config.memory_mb * MB,
        memswap_limit=config.memory_mb * MB,  # no swap
        shm_size=min(SHM_MB, config.memory_mb // 4) * MB,
        nano_cpus=int(cpus * 1e9),
        log_config={"Type": "none", "Config": {}},  # a flood would fill the engine's disk
        read_only=config.read_only_root,
        tmpfs={path: f"size={size}m,mode=1777,exec" for path, size in config.tmpfs_mb.items()},
        mounts=[Mount(inside, path, type="bind", read_only=True) for path, inside in config.mounts.items()],
        runtime=config.runtime,
    )
    return {
        "image": image,
        "name": name,
        "hostname": "sandbox",
        # Its first program waits for its input's end, which is its owner's, or for the end of the lease. It kills the
        # others itself: init would first wait for the last of a fork bomb's dead.
        "entrypoint": ["bash", "-p", "-c", f"{DEAF}; read -r -t {math.ceil(config.lease_s)}; kill -9 -1"],
        "command": [],
        # Root's programs get the capabilities that this one has: none, were it the image's user's.
        "user": "0:0",
        "working_dir": config.workdir,
        "environment": {**config.env, MARK: f"{name}-keeper"},
        "stdin_open": True,
        "labels": {
            SANDBOX_LABEL: run,
            OWNER_LABEL: Owner.this_process().label(),
            LEASE_LABEL: str(int(time.time() + config.lease_s)),
        },
        "healthcheck": {"test": ["NONE"]},
        "host_config": host,
        "use_config_proxy": False,  # nothing of this machine's environment
    }


def start_container(client: docker.APIClient, options: dict[str, Any], abandoned: threading.Event) -> Container:
    """Blocks. What has been made when it fails or is `abandoned` is removed by the caller, by its name.

    Raises `docker.errors.ImageNotFound` and `SandboxError`.
    """
    name, image = options["name"], options["image"]
    with as_sandbox_errors(f"creating a sandbox of image {image}"):
        try:
            container = client.create_container(**options)["Id"]
        except docker.errors.ImageNotFound as error:
            raise MissingImage(image) from error
        image_user = client.inspect_image(image)["Config"].get("User") or ""
        lifeline = Lifeline(client.attach_socket(container, params={"stdin": 1, "stream": 1}))
        try:
            client.start(container)
            init_pid = client.inspect_container(container)["State"]["Pid"]
        except docker.errors.NotFound as error:  # it has ended and is removed
            lifeline.close()
            raise SandboxError(NO_BASH.format(image=image)) from error
        except BaseException:
            lifeline.close()
            raise
    if init_pid == 0:
        lifeline.close()
        raise SandboxError(NO_BASH.format(image=image))
    if abandoned.is_set():
        lifeline.close()
        raise SandboxError(f"nobody waits for sandbox {name} any longer")
    return Container(container, name, image, image_user, init_pid, lifeline)


class MissingImage(Exception):
    """The engine does not have an image; perhaps a registry does."""
