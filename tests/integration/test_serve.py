"""``fasa-flex serve``: transformers' server under FASA, asked over HTTP."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
import transformers

if TYPE_CHECKING:
    from openai import OpenAI

if transformers.__version__.startswith("5.17"):
    pytest.skip("transformers 5.17's own server answers no continuous batching on CPU", allow_module_level=True)
for package in ("fastapi", "uvicorn", "openai"):
    pytest.importorskip(package, reason="transformers serve needs it")

MODEL = str(Path(__file__).parents[2] / "evals" / "reference_model")
PROMPT = "The import statement finds a module, and loads it if it is not there yet. " * 12


def free_port() -> int:
    with socket.socket() as listening:
        listening.bind(("localhost", 0))
        port: int = listening.getsockname()[1]
        return port


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[str, Path]]:
    """The server's address and its log."""
    port, log = free_port(), tmp_path_factory.mktemp("serve") / "log"
    command = [sys.executable, "-m", "fasa_flex.cli", "serve", MODEL, "--n-fac", "32"]
    command += ["--server", "--port", str(port), "--device", "cpu", "--cb-num-blocks", "60"]
    with log.open("w") as out, subprocess.Popen(command, stdout=out, stderr=out, env=os.environ) as process:
        address = f"http://localhost:{port}"
        try:
            for _ in range(240):
                assert process.poll() is None, log.read_text()
                try:
                    assert get(f"{address}/health") == {"status": "ok"}
                    break
                except OSError:
                    time.sleep(0.5)
            yield address, log
        finally:
            process.terminate()
            process.wait(30)


def get(address: str) -> dict[str, Any]:
    with urllib.request.urlopen(address, timeout=30) as answer:
        found: dict[str, Any] = json.load(answer)
        return found


def client(address: str) -> OpenAI:
    from openai import OpenAI

    return OpenAI(base_url=f"{address}/v1", api_key="none", timeout=60, max_retries=0)


def test_an_openai_client_is_answered_as_by_generate(server: tuple[str, Path]) -> None:
    """The first prompt calibrates and is decoded sparsely; the log counts."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    from fasa_flex import FasaConfig, enable

    address, log = server
    answer = client(address).completions.create(model=MODEL, prompt=PROMPT, max_tokens=16, temperature=0)
    model, tokenizer = AutoModelForCausalLM.from_pretrained(MODEL), AutoTokenizer.from_pretrained(MODEL)
    ids = tokenizer(PROMPT, return_tensors="pt").input_ids
    assert answer.usage is not None
    assert answer.usage.prompt_tokens == ids.shape[1]
    with torch.no_grad(), enable(model, None, FasaConfig(n_fac=32)) as fasa:
        expected = model.generate(ids, max_new_tokens=16, do_sample=False)[0, ids.shape[1] :]
    assert answer.choices[0].text == tokenizer.decode(expected, skip_special_tokens=True)
    counted = get(f"{address}/fasa")
    assert counted["sparse_queries"] == fasa.stats.sparse_queries > 0
    assert counted["packed_bytes"] > 0
    for _ in range(60):
        if f"{counted['sparse_queries']} sparse ones" in log.read_text():
            return
        time.sleep(0.5)
    pytest.fail(log.read_text())


def test_answers_are_streamed(server: tuple[str, Path]) -> None:
    """Two streams at once, piece by piece."""
    asked = [client(server[0]) for _ in range(2)]
    whole = asked[0].completions.create(model=MODEL, prompt=PROMPT, max_tokens=12, temperature=0).choices[0].text
    streams = [
        each.completions.create(model=MODEL, prompt=PROMPT, max_tokens=12, temperature=0, stream=True) for each in asked
    ]
    for stream in streams:
        pieces = [piece.choices[0].text for piece in stream if piece.choices]
        assert len(pieces) > 3
        assert "".join(pieces) == whole


def test_a_stream_that_the_client_closes_is_cancelled(server: tuple[str, Path]) -> None:
    """It would run for 1000 tokens; the server goes on for others, and soon decodes no more for it."""
    address, _ = server
    layers = 3  # of four, and the first is dense
    begun = get(f"{address}/fasa")["sparse_queries"]
    stream = client(address).completions.create(model=MODEL, prompt=PROMPT, max_tokens=1000, temperature=0, stream=True)
    next(iter(stream))
    stream.close()
    before = -1
    for _ in range(60):
        time.sleep(0.5)
        now = get(f"{address}/fasa")["sparse_queries"]
        if now == before:
            break
        before = now
    assert now == before
    assert (now - begun) / layers < 900
    answer = client(address).completions.create(model=MODEL, prompt=PROMPT, max_tokens=4, temperature=0)
    assert answer.choices[0].text


def test_an_unknown_option_of_the_server_is_one_sentence() -> None:
    command = [sys.executable, "-m", "fasa_flex.cli", "serve", MODEL, "--server", "--colour", "red"]
    done = subprocess.run(command, capture_output=True, text=True, env=os.environ, timeout=120)
    assert done.returncode == 2
    assert "fasa-flex: transformers serve: No such option: --colour" in done.stderr
