"""Graphs on a CPU: operations are recorded once and replayed on the same tensors, as a CUDA graph replays its kernels.

Nothing of Python runs again in a replay: a number that was read from a tensor or copied from the host stays as it was.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from importlib import import_module
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode, _disable_current_modes
from torch.utils._pytree import tree_leaves

RUNNER = import_module("transformers.generation.continuous_batching.model_runner")

KERNELS = (
    "fasa_flex.backends.triton.decode.sparse_decode",
    "fasa_flex.backends.triton.writing.write_pages",
    "fasa_flex.backends.triton.completion.cover_pages_by_kernel",
)
"""Functions that launch kernels; the interpreter runs them without a trace for PyTorch."""

_recording: list[Graph] = []


class Graph(TorchDispatchMode):
    """A graph; it records the operations under it."""

    def __init__(self) -> None:
        super().__init__()
        self.steps: list[tuple[Callable[..., Any], Any, Any, list[Any]]] = []
        self._new: set[int] = set()
        self._written: dict[int, tuple[Tensor, Tensor]] = {}
        self.replays = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return self.run(func, args, kwargs or {})

    def run(self, func: Callable[..., Any], args: Any, kwargs: Any) -> Any:
        """Run a step, and keep it unless its result is a view."""
        mutable = getattr(func, "_schema", None) is not None and func._schema.is_mutable  # type: ignore[attr-defined]
        if mutable and args[0].untyped_storage().data_ptr() not in self._new:
            self._written.setdefault(args[0].data_ptr(), (args[0], args[0].clone()))
        result = func(*args, **kwargs)
        read = {each.untyped_storage().data_ptr() for each in tree_leaves((args, kwargs)) if isinstance(each, Tensor)}
        made = [each for each in tree_leaves(result) if isinstance(each, Tensor)]
        views = made and all(each.untyped_storage().data_ptr() in read for each in made)
        if not views:
            self._new.update(each.untyped_storage().data_ptr() for each in made)
        if mutable or not views or not made:
            self.steps.append((func, args, kwargs, made))
        return result

    def replay(self) -> None:
        """Run all steps again."""
        self.replays += 1
        for func, args, kwargs, made in self.steps:
            again = [each for each in tree_leaves(func(*args, **kwargs)) if isinstance(each, Tensor)]
            for tensor, new in zip(made, again, strict=True):
                if tensor is not new:
                    tensor.copy_(new)

    def reset(self) -> None:
        """Forget the steps."""
        self.steps.clear()

    @contextlib.contextmanager
    def capture(self) -> Iterator[None]:
        """Record the operations of a block."""
        _recording.append(self)
        try:
            with self:
                yield
            for tensor, before in self._written.values():  # a capture of a CUDA graph runs nothing
                tensor.copy_(before)
        finally:
            _recording.remove(self)


def graphs_on_a_cpu(monkeypatch: pytest.MonkeyPatch) -> list[Graph]:
    """Give the manager of continuous batching such graphs, and FASA its kernels, interpreted; returns the graphs."""
    if not hasattr(RUNNER, "create_accelerator_graph"):
        pytest.skip("this release of transformers makes CUDA graphs without a function that a test can replace")
    made: list[Graph] = []

    def create() -> Graph:
        made.append(Graph())
        return made[-1]

    initialization = "transformers.generation.continuous_batching.initialization"
    monkeypatch.setattr(f"{initialization}.get_accelerator_graph_name", lambda: "CUDAGraph")
    monkeypatch.setattr(RUNNER, "create_accelerator_graph", create)
    monkeypatch.setattr(RUNNER, "get_memory_pools", lambda: (None, 0))
    monkeypatch.setattr(RUNNER, "memory_pool_context", lambda pool: contextlib.nullcontext())
    monkeypatch.setattr(RUNNER, "accelerator_graph_capture_context", lambda graph, **_: graph.capture())
    kernels_on_a_cpu(monkeypatch)
    for name in KERNELS:
        module, _, function = name.rpartition(".")
        launch = getattr(import_module(module), function)

        def recorded(*args: Any, launch: Callable[..., Any] = launch) -> Any:
            if not _recording:
                return launch(*args)
            with _disable_current_modes():
                return _recording[-1].run(launch, args, {})

        monkeypatch.setattr(name, recorded)
    return made


def kernels_on_a_cpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let continuous batching take FASA's kernels, in Triton's interpreter."""
    pytest.importorskip("triton", reason="Triton is installed with CUDA builds of torch only")
    monkeypatch.setattr("fasa_flex.paged.attention.why_no_kernels", lambda call: None)
    monkeypatch.setattr("fasa_flex.paged.pages.serves_pages", lambda *states: True)
    monkeypatch.setattr(torch.cuda, "device", lambda device: contextlib.nullcontext())
