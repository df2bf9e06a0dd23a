"""The image of a task: prebuilt by name, or built from its folder, once however many attempts ask."""

from __future__ import annotations

import re
from pathlib import Path

from envs.harbor.task import HarborTask
from sandbox.types import SandboxFactory


async def image_of(task: HarborTask, sandboxes: SandboxFactory) -> str:
    """The image's name. Raises `ImageBuildError`."""
    if task.image is not None:
        return task.image
    return await sandboxes.build_image(task.context, timeout_s=task.build_timeout_s)


def base_images(task: HarborTask) -> list[str]:
    """What its Dockerfile is `FROM`, stages of its own left out; empty for a prebuilt image."""
    if task.image is not None:
        return []
    dockerfile = Path(task.context, "Dockerfile").read_text(encoding="utf-8", errors="replace")
    found = re.findall(r"^\s*FROM\s+(?:--\S+\s+)*(\S+)(?:\s+AS\s+(\S+))?", dockerfile, re.IGNORECASE | re.MULTILINE)
    stages = {stage.lower() for _, stage in found if stage}
    return [image for image, _ in found if image.lower() not in stages]
