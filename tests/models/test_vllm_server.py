"""The double of a user's `vllm serve`: it answers, and is gone afterwards."""

from __future__ import annotations

import os
from pathlib import Path

import httpx2
import psutil
import pytest
import tiny
import vllm_server

pytest.importorskip("vllm")
pytestmark = pytest.mark.vllm


def test_it_serves_token_ids_and_leaves_no_process(tmp_path: Path):
    model = tiny.vllm_folder(tmp_path / "model", tiny.vllm_model())
    with vllm_server.serve(model, tmp_path / "log", flags=["--return-tokens-as-token-ids"]) as server:
        body = {"prompt": [1, 2, 3], "max_tokens": 4, "model": model, "logprobs": 1, "return_token_ids": True}
        answer = httpx2.post(server.url + "/v1/completions", json=body, timeout=60).json()
        pids = [server.process.pid, *(child.pid for child in psutil.Process(server.process.pid).children(True))]
    assert len(pids) >= 3, "the server, its engine and a worker"
    (choice,) = answer["choices"]
    assert len(choice["token_ids"]) == 4
    assert not [pid for pid in pids if os.path.exists(f"/proc/{pid}") and not _is_zombie(pid)]


def _is_zombie(pid: int) -> bool:
    try:
        return psutil.Process(pid).status() == psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return True
