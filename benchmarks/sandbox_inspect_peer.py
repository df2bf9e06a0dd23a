"""inspect_ai's Docker sandbox on the work of `sandbox_latency`; run by it, in an interpreter that has inspect_ai."""

from __future__ import annotations

import asyncio
import json
import sys
import tempfile
import time
from pathlib import Path

from inspect_ai.util._sandbox.docker import docker  # pyright: ignore[reportMissingImports]
from inspect_ai.util._sandbox.docker.docker import DockerSandboxEnvironment  # pyright: ignore[reportMissingImports]

COMPOSE = """services:
  default:
    image: {image}
    command: sleep infinity
    init: true
    network_mode: none
"""


async def any_engine() -> None:
    """It asks for a newer engine than Debian's; what is measured works on older ones, too."""


async def measure(image: str, commands: int) -> list[float]:
    with tempfile.TemporaryDirectory() as folder:
        config = Path(folder, "compose.yaml")
        docker.validate_prereqs = any_engine
        config.write_text(COMPOSE.format(image=image))
        await DockerSandboxEnvironment.task_init("bench", str(config))
        sandboxes = await DockerSandboxEnvironment.sample_init("bench", str(config), {})
        times = []
        for _ in range(commands):
            started = time.perf_counter()
            result = await sandboxes["default"].exec(["echo", "hi"])
            times.append(time.perf_counter() - started)
            assert result.stdout == "hi\n", result
        await DockerSandboxEnvironment.sample_cleanup("bench", str(config), sandboxes, False)
        await DockerSandboxEnvironment.task_cleanup("bench", str(config), True)
    return times


if __name__ == "__main__":
    print(json.dumps(asyncio.run(measure(sys.argv[1], int(sys.argv[2])))))
