"""A `ScriptedTeacher` that samples as well, and takes new weights: all that a `vllm serve` with every flag does."""

from __future__ import annotations

from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from tests.models.scripted_teacher import ScriptedTeacher
from tests.models.tiny import plain_logits


@dataclass
class ScriptedServer(ScriptedTeacher):
    """`with serving(folder) as server:`"""

    dtype: str = "float32"
    scale_out: bool = True  # it samples
    dev_mode: bool = True  # it takes new weights
    deaf: bool = False  # it says that it took the new weights, and goes on with the old ones
    label: str = "default"
    loaded: list[str] = field(default_factory=list)  # folders that weights came from

    @property
    def sampled(self) -> list[dict[str, Any]]:
        """The requests to sample, but for those of one token that the checks make."""
        asked = [body for path, _, body in self.requests if path == "/inference/v1/generate"]
        return [body for body in asked if body["sampling_params"]["max_tokens"] > 1]

    def _answer(self, path: str, authorization: str | None, body: Any) -> tuple[int, Any] | None:
        route = path.partition("?")[0]
        guarded = route.startswith(("/v1", "/inference"))
        if self.token is not None and guarded and authorization != f"Bearer {self.token}":
            return 401, {"error": "Unauthorized"}
        if route == "/health":
            return 200, {}
        if route == "/inference/v1/generate":
            return self._generate(body) if self.scale_out else (403, {"error": {"message": "--enable-scale-out"}})
        if route in (
            "/server_info",
            "/is_paused",
            "/pause",
            "/resume",
            "/collective_rpc",
            "/update_weight_version",
            "/weight_info",
        ):
            return self._control(route, body) if self.dev_mode else (404, {"detail": "Not Found"})
        if route in ("/tokenize", "/detokenize"):
            body = {"model": self.models[0], **body}
            authorization = None if self.token is None else f"Bearer {self.token}"  # not guarded
        return super()._answer(path, authorization, body)

    def _control(self, route: str, body: Any) -> tuple[int, Any]:
        if route == "/server_info":
            config = {"dtype": f"torch.{self.dtype}", "max_model_len": self.max_model_len}
            return 200, {"vllm_config": {"model_config": config, "lora_config": None}, "vllm_env": {}}
        if route == "/is_paused":
            return 200, {"is_paused": False}
        if route == "/weight_info":
            return 200, {"weight_version": self.label}
        if route == "/update_weight_version":
            self.label = body["new_version"]
        if route == "/collective_rpc":
            folder = body["kwargs"]["weights_path"]
            self.loaded.append(folder)
            if not self.deaf:
                self.logits = partial(plain_logits, AutoModelForCausalLM.from_pretrained(folder).eval())
        return 200, {}

    def _generate(self, body: dict[str, Any]) -> tuple[int, Any]:
        if body.get("model", self.models[0]) not in self.models:
            return 404, {"error": {"message": f"The model `{body['model']}` does not exist."}}
        how, ids = body["sampling_params"], list(body["token_ids"])
        generator, content, stopped = torch.Generator().manual_seed(how["seed"]), [], False
        while len(content) < how["max_tokens"] and not stopped:
            logprobs = (self.logits(ids)[-1] / (how["temperature"] or 1.0)).log_softmax(-1)
            draw = torch.multinomial(logprobs.exp(), 1, generator=generator)
            token = int(draw if how["temperature"] else logprobs.argmax())
            top = logprobs.topk(how["logprobs"] or 1)
            tops = [
                {"token_id": t, "logprob": v} for v, t in zip(top.values.tolist(), top.indices.tolist(), strict=True)
            ]
            content.append({"token_id": token, "logprob": logprobs[token].item(), "top_logprobs": tops})
            ids.append(token)
            stopped = token in how["stop_token_ids"]
        choice = {
            "token_ids": [entry["token_id"] for entry in content],
            "finish_reason": "stop" if stopped else "length",
            "logprobs": {"content": content},
            "weight_versions": [{"version": self.label, "start": 0, "end": len(content)}],
        }
        return 200, {"choices": [choice]}


def serving(folder: str | Path, **options: Any) -> ScriptedServer:
    """A server of the model in a folder."""
    model = AutoModelForCausalLM.from_pretrained(folder, attn_implementation="eager").eval()
    given = {"tokenizer": AutoTokenizer.from_pretrained(folder), "root": str(folder), "max_model_len": 100, **options}
    return ScriptedServer(partial(plain_logits, model), model.config.vocab_size, **given)
