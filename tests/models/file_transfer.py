"""A transport for vLLM's weight transfer on CPUs: the tensors lie in a file, and the worker is told its name.

It is known to vLLM by its own registry, and reaches its worker as a plugin, as anybody's transport would.
"""

from __future__ import annotations

import sys
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

from safetensors.torch import load_file, save_file
from vllm.distributed.weight_transfer.base import (
    TrainerInitInfo,
    TrainerWeightTransferEngine,
    WeightTransferEngine,
    WeightTransferInitInfo,
    WeightTransferUpdateInfo,
)
from vllm.distributed.weight_transfer.factory import WeightTransferEngineFactory, WeightTransferTrainerFactory
from vllm.model_executor.model_loader.reload import finalize_layerwise_reload, initialize_layerwise_reload

NAME = "file"
AT_A_TIME = 5  # tensors: an update has several parts


@dataclass
class InitInfo(WeightTransferInitInfo):
    greeting: str


@dataclass
class UpdateInfo(WeightTransferUpdateInfo):
    file: str


class Worker(WeightTransferEngine[InitInfo, UpdateInfo]):
    init_info_cls, update_info_cls = InitInfo, UpdateInfo

    def init_transfer_engine(self, init_info: InitInfo) -> None:
        assert init_info.greeting == "hello"

    def start_weight_update(self) -> None:
        initialize_layerwise_reload(self.model)

    def update_weights(self, update_info: dict[str, Any]) -> None:
        self.receive_weights(self.parse_update_info(update_info))  # and no accelerator to wait for

    def receive_weights(self, update_info: UpdateInfo) -> None:
        self.model.load_weights(load_file(update_info.file).items())

    def finish_weight_update(self) -> None:
        finalize_layerwise_reload(self.model, self.model_config)

    def shutdown(self) -> None: ...


@dataclass
class TrainerInfo(TrainerInitInfo):
    backend: ClassVar[str] = NAME


class Trainer(TrainerWeightTransferEngine[TrainerInfo]):
    init_info_cls = TrainerInfo
    made: ClassVar[list[Trainer]] = []
    sent: ClassVar[list[list[str]]] = []  # names, of every update
    before_part: ClassVar[Callable[[int], None]] = staticmethod(lambda part: None)
    fault: ClassVar[str | None] = None  # lost: the file is gone; silent: nothing is sent

    @classmethod
    def trainer_init(cls, init_info: TrainerInfo, *, client: Any, source: Any = None) -> Trainer:
        client.init_weight_transfer_engine({"greeting": "hello"})
        cls.made.append(cls(client=client, source=source))
        return cls.made[-1]

    def send_weights(self) -> None:
        assert self.source is not None
        tensors = list(self.source)
        self.sent.append([name for name, _ in tensors])
        if self.fault == "silent":
            return
        self.client.start_weight_update()
        for part, start in enumerate(range(0, len(tensors), AT_A_TIME)):
            self.before_part(part)
            with tempfile.TemporaryDirectory() as folder:
                file = Path(folder) / "part.safetensors"
                if self.fault != "lost":
                    save_file({name: tensor.contiguous() for name, tensor in tensors[start : start + AT_A_TIME]}, file)
                self.client.update_weights({"file": str(file)})
        self.client.finish_weight_update()


def register() -> None:
    """Called by vLLM in each of its processes, once or more often."""
    for factory, engine in ((WeightTransferEngineFactory, Worker), (WeightTransferTrainerFactory, Trainer)):
        if NAME not in factory._registry:
            factory.register_engine(NAME, engine)


def install(site: Path, monkeypatch: Any) -> None:
    """As a package that vLLM finds, in this process and in those that it starts."""
    info = site / "protege_file_transfer-0.dist-info"
    info.mkdir(parents=True)
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: protege-file-transfer\nVersion: 0\n")
    (info / "entry_points.txt").write_text("[vllm.general_plugins]\nfile_transfer = file_transfer:register\n")
    monkeypatch.syspath_prepend(str(site))
    assert str(Path(__file__).parent) in sys.path, "imported by the name that the plugin has"
