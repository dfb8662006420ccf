"""``fasa_hf``: lm-eval's Hugging Face model with sparse attention, which counts its dense and sparse queries."""

from __future__ import annotations

import logging
import os
import sys
import weakref
from collections.abc import Callable, Iterable, Sequence
from contextlib import nullcontext
from pathlib import Path
from typing import Any, Literal, TypeVar

import torch
from lm_eval.api.instance import Instance
from lm_eval.api.model import CacheHook
from lm_eval.api.registry import register_model
from lm_eval.models.huggingface import HFLM
from lm_eval.utils import get_rolling_token_windows, make_disjoint_window
from torch import Tensor
from tqdm import tqdm
from transformers import PreTrainedModel

from fasa_flex import FasaProfile, enable
from fasa_flex.baselines import Method
from fasa_flex.hf.compatibility import check_lm_eval
from fasa_flex.hf.loading import check_gguf_tokenizer, explained_gguf
from fasa_flex.hf.model_structure import attention_shape
from fasa_flex.lm_eval import arguments
from fasa_flex.lm_eval.account import Account
from fasa_flex.lm_eval.answers import claim
from fasa_flex.lm_eval.arguments import OPTIONS, path_as_written
from fasa_flex.lm_eval.passes import Answer, Passes
from fasa_flex.lm_eval.profiles import AUTO, FACTS, calibration_for, default_cache, preserved_rng
from fasa_flex.lm_eval.report import Setup, loaded_as, report_of
from fasa_flex.lm_eval.windows import Window

Request = tuple[tuple[str, str] | None, list[int], list[int]]
_log = logging.getLogger(__name__)
T = TypeVar("T")


@register_model("fasa_hf")
class FasaHFLM(HFLM):
    """A Hugging Face causal model under FASA, or under a baseline at the same budget, for lm-eval.

    Generation prefills densely and decodes sparsely. A log-likelihood is one forward pass in which the context's
    queries are dense and each query of the continuation selects its own keys, which equals decoding the continuation
    token by token (`fasa_flex.lm_eval.windows`). ``results["config"]["fasa"]`` records the parameters, profile and
    versions, and for each task the numbers of dense and sparse queries and the share of keys that sparse ones read.

    Args:
        pretrained: folder, repository or model object, as for ``hf``.
        profile: folder or repository of the model's `FasaProfile`, or the profile; ``auto``, the default, calibrates
            before the tasks and keeps the profile for later runs; with ``prompt`` the first long prompt calibrates
            (`enable`).
        method: ``fasa``, or a baseline at the same budget (`fasa_flex.baselines`): ``streaming_llm`` (sinks and recent
            tokens), ``oracle`` (exact scores), ``random_chunks``, ``adjacent_pairs``, ``snapkv``, ``h2o``, ``rkv``,
            ``quest``, ``sparq``, ``double_sparsity`` or ``vattention`` (half of the budget is a random sample; without
            a profile the other half is chosen by exact scores). ``adjacent_pairs`` and ``double_sparsity`` are
            calibrated on ``calibration_source`` before the tasks, whatever ``profile`` is.
        sparse_tail: number of a prompt's last queries that are sparse. With 0, the first token of every answer comes
            from a dense query, so a one-token continuation does not test the method.
        dense_prefix: number of queries at the start of each window of a rolling log-likelihood that stay dense. With 0,
            queries within the budget still equal dense ones, since they read every key.
        on_truncation: ``count`` inputs longer than the model's maximum, or raise an ``error``.
        calibration_source: text to calibrate on, also for ``profile=auto``: ``facts`` (documents with facts in the
            packaged text, which end on a question; the default) or the path of a text file.
        profile_cache: folder in which ``profile=auto`` keeps profiles; None for ``~/.cache/fasa_flex/profiles``.
        batch_size: requests of one forward, a number; ``auto`` is refused.
        options: every field of `fasa_flex.FasaConfig`, with its meaning and default there, and every other argument of
            ``hf``, such as ``gguf_file``, a file of ``pretrained`` (extra ``gguf``), or ``tp_plan=auto``, which shards
            the model over the processes of torchrun (lm-eval 0.4.12). A baseline's defaults are its
            paper's: ``n_sink`` is 8 for ``streaming_llm``; for ``sparq`` ``n_recent`` is a quarter of the budget and
            ``completion`` is ``mean``. ``sparq`` and ``double_sparsity`` score with ``2 * n_tip`` dimensions. An option
            that a method does not use is refused. Write ``dense_layers`` as ``0``, ``0+1`` or ``none``, and
            ``layer_budgets`` as ``uniform``, ``pyramid``, a weight for every layer (``2+1+0.5``) or for every head
            (``2:1+1:1+1:1``). ``packed_dtype=none`` is the cache's precision. With ``prefill=sparse`` every query of a
            prompt is sparse, also in log-likelihoods; ``prefill=blocks`` prefills contexts and prompts by blocks.

    Raises:
        ValueError: an argument that is unknown, out of range or not used by the method.
    """

    def __init__(
        self,
        pretrained: str | PreTrainedModel,
        profile: str | os.PathLike[str] | int | FasaProfile | None = None,
        method: Literal["fasa"] | Method = "fasa",
        sparse_tail: int = 0,
        dense_prefix: int = 0,
        on_truncation: Literal["count", "error"] = "count",
        calibration_source: str | os.PathLike[str] | int | None = None,
        profile_cache: str | os.PathLike[str] | int | None = None,
        batch_size: int | str | None = 1,
        **options: Any,
    ) -> None:
        check_lm_eval(HFLM)
        hf_args = {name: value for name, value in options.items() if name not in OPTIONS}
        pretrained = os.fsdecode(pretrained) if isinstance(pretrained, os.PathLike) else pretrained
        known, gguf_file = arguments.own_names(FasaHFLM), hf_args.get("gguf_file")
        arguments.check_batch_size(batch_size)
        arguments.check_method(method)
        arguments.check_parallel(hf_args.get("tp_plan"), loads=isinstance(pretrained, str))
        arguments.check_unknown(hf_args, known, loads=isinstance(pretrained, str))
        profile = arguments.folder_or_profile(profile)
        if profile is None and method in ("fasa", "random_chunks"):
            profile = AUTO
            _log.warning("no profile was given: calibrating before the tasks (profile=auto).")
        arguments.check_source(calibration_source, profile, method)
        if on_truncation not in ("count", "error"):
            raise ValueError(f"on_truncation={on_truncation!r} is not an option; write count or error.")
        arguments.check_tokens("sparse_tail", sparse_tail)
        arguments.check_tokens("dense_prefix", dense_prefix)
        config = arguments.config_of(method, **{name: value for name, value in options.items() if name in OPTIONS})
        with arguments.refusals_named(known), explained_gguf(str(pretrained), gguf_file, hf_args.get("revision")):
            super().__init__(pretrained, backend="causal", batch_size=batch_size, **hf_args)
        if hf_args.get("tokenizer") is None:
            check_gguf_tokenizer(self.config.get_text_config().model_type, gguf_file)
        if hasattr(self, "accelerator"):  # lm-eval sets these only if several GPUs are visible
            self._rank, self._world_size = self.accelerator.process_index, self.accelerator.num_processes
        cache = default_cache() if profile_cache is None else Path(path_as_written("profile_cache", profile_cache))
        source = FACTS if calibration_source is None else path_as_written("calibration_source", calibration_source)
        with preserved_rng():
            self.calibration = self._main_first(
                lambda: calibration_for(method, profile, self.model, self.tokenizer, source, self.max_length, cache)
            )
            self.profile, head_dim = self.calibration.profile, attention_shape(self.model)[3]
            scorer = arguments.scorer_of(method, self.calibration, config, head_dim)
            self.fasa = enable(self.model, self.profile, config, scorer=scorer)
        self.method, self.fasa_config, self.gguf_file = method, config, gguf_file
        # a model object belongs to the user: it becomes dense again when this LM is collected
        weakref.finalize(self, self.fasa.disable).atexit = False
        self.sparse_tail, self.dense_prefix, self.on_truncation = sparse_tail, dense_prefix, on_truncation
        self._setup = Setup(method, config, head_dim, self.fasa, self.calibration, sparse_tail, dense_prefix)
        self._tail = sys.maxsize if config.prefill == "sparse" else sparse_tail  # a prompt's sparse last queries
        self.account = Account(self.fasa.stats)
        self.passes = Passes(self.model, self.fasa, self.tokenizer.pad_token_id, self.softmax_dtype)

    def loglikelihood(self, requests: list[Instance], disable_tqdm: bool = False) -> list[Answer]:
        """Score continuations: the context's queries are dense, the continuation's sparse."""
        score = super().loglikelihood
        return self._by_task("loglikelihood", requests, lambda own: score(own, disable_tqdm))

    def generate_until(self, requests: list[Instance], disable_tqdm: bool = False) -> list[str]:
        """Generate with a dense prefill, or one by blocks, and sparse decoding."""
        return self._by_task(
            "generate_until", requests, lambda own: super(FasaHFLM, self).generate_until(own, disable_tqdm)
        )

    def loglikelihood_rolling(self, requests: list[Instance], disable_tqdm: bool = False) -> list[float]:
        """Score whole texts in windows of the maximum length: queries after ``dense_prefix`` are sparse."""
        return self._by_task("loglikelihood_rolling", requests, lambda own: self._rolling(own, disable_tqdm))

    def _by_task(self, kind: str, requests: list[Instance], run: Callable[[list[Instance]], list[T]]) -> list[T]:
        """Answer the requests task by task, so that each task has its own counts.

        lm-eval pads the requests of each process with copies of the last one. The copies are not run, since they would
        be counted and no forward here waits for other processes.
        """
        copies = 0
        if self.world_size > 1:
            copies = max(0, sum(request is requests[-1] for request in requests) - requests[-1].repeats)
        wanted = requests[: len(requests) - copies]
        tasks: dict[str, list[int]] = {}
        for number, request in enumerate(wanted):
            tasks.setdefault(request.task_name or "unnamed", []).append(number)
        answers: dict[int, T] = {}
        for task, numbers in tasks.items():
            with self.account.of(task, kind, len(numbers)):
                answers.update(zip(numbers, run([wanted[number] for number in numbers]), strict=True))
        return [answers[min(number, len(wanted) - 1)] for number in range(len(requests))]

    def _loglikelihood_tokens(
        self, requests: Sequence[Request], disable_tqdm: bool = False, override_bs: int | None = None
    ) -> list[Answer]:
        """Score requests by `fasa_flex.lm_eval.passes`.

        lm-eval's ``logits_cache`` groups requests by their tokens; here equal tokens with another boundary between
        context and continuation have other sparse queries, so they are scored separately.
        """
        windows = [self._window(*request) for request in requests]
        answers: dict[int, Answer] = {}
        with tqdm(total=len(requests), disable=disable_tqdm or self.rank != 0, desc="fasa_hf: log-likelihoods") as bar:
            for numbers, scored in self.passes.score(windows, override_bs or int(self.batch_size), self._autocast()):
                for number, answer in zip(numbers, scored, strict=True):
                    key = requests[number][0]
                    if key is not None:  # `_rolling` caches whole texts
                        self.cache_hook.add_partial("loglikelihood", key, answer)
                    answers[number] = answer
                bar.update(len(numbers))
        return [answers[number] for number in range(len(requests))]

    def _window(self, key: tuple[str, str] | None, context: list[int], continuation: list[int]) -> Window:
        rolling = key is None
        window = Window.of(
            context,
            continuation,
            self.max_length,
            sparse_tail=0 if rolling else self._tail,
            dense_prefix=self.dense_prefix if rolling else 0,
        )
        self.account.current.dense_answers += window.is_dense
        if window.dropped:
            self._truncate(len(context) + len(continuation))
        return window

    def _rolling(self, requests: list[Instance], disable_tqdm: bool) -> list[float]:
        texts = [text for (text,) in (request.args for request in requests)]
        windows = [[make_disjoint_window(pair) for pair in self._rolling_windows(text)] for text in texts]
        scored = iter(
            self._loglikelihood_tokens(
                [(None, *window) for own in windows for window in own], disable_tqdm=disable_tqdm
            )
        )
        totals = []
        for text, own in zip(texts, windows, strict=True):
            totals.append(sum(next(scored)[0] for _ in own))
            self.cache_hook.add_partial("loglikelihood_rolling", (text,), totals[-1])
        return totals

    def _rolling_windows(self, text: str) -> Iterable[tuple[list[int], list[int]]]:
        return get_rolling_token_windows(
            token_list=self.tok_encode(text),
            prefix_token=self.prefix_token_id,
            max_seq_len=self.max_length,
            context_len=1,
        )

    def _model_generate(self, context: Tensor, max_length: int, stop: list[str], **generation: Any) -> Tensor:
        tail = torch.tensor([max(0, context.shape[1] - self._tail)])  # one for all rows: they are padded on the left
        with self.fasa.sparse_from(tail) if self._tail else nullcontext():
            written: Tensor = super()._model_generate(context, max_length, stop, **generation)
        if len(stop) > 1 and written.shape[1] >= max_length:  # only for tasks with a stop string besides eos
            ends = generation.get("eos_token_id", self.model.generation_config.eos_token_id)
            answers = written[:, context.shape[1] :]
            self.account.current.unfinished += sum(not self._ended(row, stop, ends) for row in answers)
        return written

    def _ended(self, answer: Tensor, stop: list[str], ends: int | list[int] | None) -> bool:
        """Whether an answer, token ids [n], contains one of the model's end tokens or the task's stop strings."""
        tokens = [] if ends is None else [ends] if isinstance(ends, int) else ends
        text = self.tokenizer.decode(answer)
        return bool(torch.isin(answer.cpu(), torch.tensor(tokens)).any()) or any(end in text for end in stop)

    def _autocast(self) -> torch.autocast:
        dtype: torch.dtype | None = self.mixed_precision_dtype
        return torch.autocast(device_type=self.device.type, dtype=dtype, enabled=dtype is not None)

    def tok_batch_encode(
        self,
        strings: list[str],
        padding_side: str = "left",
        left_truncate_len: int | None = None,
        truncation: bool = False,
    ) -> tuple[Tensor, Tensor]:
        """As lm-eval's; also counts prompts that lose tokens on the left."""
        ids, mask = super().tok_batch_encode(strings, padding_side, None, truncation)
        for length in mask.sum(1).tolist() if left_truncate_len else ():
            if length > left_truncate_len:
                self._truncate(length)
        return (ids[:, -left_truncate_len:], mask[:, -left_truncate_len:]) if left_truncate_len else (ids, mask)

    def _truncate(self, length: int) -> None:
        if self.on_truncation == "error":
            raise ValueError(
                f"an input of {length} tokens exceeds the model's maximum of {self.max_length} tokens less the answer; "
                "shorten the task's documents, or pass on_truncation=count to cut it on the left."
            )
        self.account.current.truncated += 1

    def _main_first(self, make: Callable[[], T]) -> T:
        """Run ``make`` in the first process of each machine, then in the others, which find its files."""
        if self.world_size == 1:
            return make()
        with self.accelerator.local_main_process_first():
            return make()

    def gather_object(self, obj: Any, dst: int = 0) -> list[Any] | None:
        """As lm-eval's, which every process calls after its last request; the counts are sent along."""
        gathered = super().gather_object((obj, self.account.export()), dst)
        if gathered is None:
            return None
        self.account.gathered(counts for _, counts in gathered)
        return [sent for sent, _ in gathered]

    def set_cache_hook(self, cache_hook: CacheHook) -> None:
        """Refuse a ``--use_cache`` file with answers of another model or budget."""
        if cache_hook.dbdict is not None:
            claim(cache_hook.dbdict, {**loaded_as(self), **self._setup.parameters()})
        super().set_cache_hook(cache_hook)

    def get_model_info(self) -> dict[str, Any]:
        """As lm-eval's, with the settings and counts of `report_of` under ``fasa``."""
        report = report_of(self._setup, self.account, self.passes.shared_prefills, self.world_size)
        info: dict[str, Any] = super().get_model_info() | {"fasa": report}
        self.account.reported()
        return info
