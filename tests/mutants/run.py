"""Mutation testing: change one operator or number of a module at a time, and see whether a test notices.

``nox -s mutants`` runs it; ``nox -s mutants -- --modules budget masks`` some of it. The mutants are cosmic-ray's. Each
is compiled in memory in a fork of this process, which has torch imported already, so that it costs seconds and nothing
on disk is ever changed: library and tests are copied once into ``--folder``, and every outcome is appended to
``log.jsonl`` there. A run that was interrupted goes on where it stopped. When tests change, survivors are tried again;
when a module changes, all its mutants are.

A mutant is killed when a test fails or crashes, when nothing can be imported, or when the tests take too long.
"""

from __future__ import annotations

import argparse
import contextlib
import gc
import hashlib
import inspect
import io
import json
import os
import resource
import shutil
import signal
import sys
import time
from collections.abc import Iterator
from importlib.machinery import ModuleSpec, SourceFileLoader
from importlib.metadata import version
from importlib.util import spec_from_loader
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parent))
from mutations import Mutant, code_hash, mutants_of

ROOT = Path(__file__).resolve().parents[2]
RESULT = ROOT / "evals" / "results" / "mutants.json"
EQUIVALENT = Path(__file__).with_name("equivalent.json")
SECONDS, MEMORY = 90, 12 << 30  # for one mutant

# The tests of each module, those that see it most directly first.
SELECTION = ("test_selection", "properties/test_selection_properties")
WHOLE = ("test_attention_contracts", "test_attention", "test_attention_errors")
CALLS = "properties/test_attention_properties"
TESTS = {
    "core.budget": ("test_budget", *SELECTION, "test_attention_errors"),
    "core.softmax": ("test_softmax", "test_attention", "test_flex_eager", CALLS),
    "core.ranking": ("test_ranking", *SELECTION, "test_agreement"),
    "calibration.rotary": ("test_layout", "test_rotary", "properties/test_layout_properties"),
    "calibration.rotation_fit": ("test_layout", "test_rotary", "properties/test_layout_properties"),
    "calibration.agreement": ("test_agreement", "test_attention_errors", "properties/test_agreement_properties"),
    "core.group_reduce": ("test_scoring", *WHOLE, CALLS),
    "core.scoring": ("test_scoring", *WHOLE, CALLS),
    "core.packed_keys": ("test_packing", "test_cache"),
    "core.selection": (*SELECTION, *WHOLE, CALLS),
    "masks": ("test_masks", "properties/test_mask_properties", "test_flex_eager"),
    "core.completion": ("test_completion", "test_completion_in_models", "properties/test_completion_properties"),
    "core.criteria": ("test_criteria", "test_tables"),
    "backends.attention": (*WHOLE, "test_flex_eager", "test_packing", CALLS),
}


def source_of(tree: Path, module: str) -> Path:
    """The file of a module, ``a.b`` below fasa_flex."""
    return tree.joinpath("fasa_flex", *module.split(".")).with_suffix(".py")


class _Mutated(SourceFileLoader):
    """Loads one module from the mutant's source; a finder for it, too."""

    def __init__(self, module: str, path: Path, source: str) -> None:
        super().__init__(f"fasa_flex.{module}", str(path))
        self.source = source

    def find_spec(self, name: str, path: object = None, target: object = None) -> ModuleSpec | None:
        return spec_from_loader(name, self) if name == self.name else None

    def get_code(self, fullname: str) -> Any:
        return compile(self.source, self.path, "exec", dont_inherit=True)


def run_tests(tree: Path, module: str, source: str, show: bool = False) -> str:
    """Outcome of the module's tests with ``source`` in its place: "survived", or how it was killed."""
    child = os.fork()
    if child == 0:
        try:
            _test(tree, module, source, show)
        finally:
            os._exit(70)
    _, status = os.waitpid(child, 0)
    if os.WIFSIGNALED(status):
        return "timeout" if os.WTERMSIG(status) == signal.SIGALRM else "crashed"
    return {0: "survived", 1: "failed"}.get(os.WEXITSTATUS(status), "broken")


def _test(tree: Path, module: str, source: str, show: bool) -> None:
    import pytest

    null = os.open(os.devnull, os.O_RDWR)
    for stream in (0,) if show else (0, 1, 2):
        os.dup2(null, stream)
    signal.alarm(SECONDS)
    resource.setrlimit(resource.RLIMIT_AS, (MEMORY, MEMORY))
    os.chdir(tree)
    sys.path.insert(0, str(tree))
    sys.meta_path.insert(0, _Mutated(module, source_of(tree, module), source))
    first, *others = [path for name in TESTS[module] if Path(path := f"tests/{name}.py").exists()]
    options = ["-x", "-q", "-m", "not slow", "--hypothesis-profile=mutants"]
    options += ["-pno:cacheprovider", "-pno:unraisableexception", "-pno:logging"]  # unraisable: collects garbage thrice
    code = pytest.main([*options, first])  # alone: most mutants fall here, before other files are collected
    os._exit(int(code or (pytest.main([*options, *others]) if others else 0)))


def snapshot(folder: Path) -> Path:
    """A copy of library and tests, so that edits during the run change nothing."""
    tree = folder / "tree"
    shutil.rmtree(tree, ignore_errors=True)
    for part in ("fasa_flex", "tests"):
        shutil.copytree(ROOT / part, tree / part, ignore=shutil.ignore_patterns("__pycache__", "mutants"))
    shutil.copy(ROOT / "pyproject.toml", tree)
    return tree


def _hash(*paths: Path) -> str:
    digest = hashlib.sha256()
    for path in paths:
        digest.update(path.read_bytes())
    return digest.hexdigest()[:16]


def read_log(folder: Path) -> dict[str, dict[str, Any]]:
    """The last outcome of every mutant, by its key."""
    log = folder / "log.jsonl"
    lines = log.read_text().splitlines() if log.exists() else []
    return {entry["key"]: entry for entry in map(json.loads, lines)}


def pending(tree: Path, module: str, done: dict[str, dict[str, Any]]) -> Iterator[tuple[Mutant, str, str]]:
    """Mutants without an outcome, or that survived other tests than those of now."""
    path = source_of(tree, module)
    tests = _hash(*(test for name in TESTS[module] if (test := tree / "tests" / f"{name}.py").exists()))
    source = path.read_text()
    for mutant in mutants_of(module, source):
        key = f"{code_hash(source)} {mutant.name}"
        former = done.get(key)
        if former is None or (former["outcome"] == "survived" and former["tests"] != tests):
            yield mutant, key, tests


def test_modules(folder: Path, modules: list[str]) -> None:
    """Try all pending mutants of the modules."""
    tree = snapshot(folder)
    for module in modules:
        source = (source_of(tree, module)).read_text()
        todo = list(pending(tree, module, read_log(folder)))
        print(f"{module}: {len(todo)} mutants to try", flush=True)
        if not todo:
            continue
        if (outcome := run_tests(tree, module, source)) != "survived":
            print(f"  left out: its tests do not pass without a mutation ({outcome})", flush=True)
            continue
        for mutant, key, tests in todo:
            started = time.monotonic()
            outcome = run_tests(tree, module, mutant.source)
            entry = {"key": key, "outcome": outcome, "tests": tests, "seconds": round(time.monotonic() - started, 2)}
            with (folder / "log.jsonl").open("a") as log:
                log.write(json.dumps({**entry, "module": module, **mutant.described()}) + "\n")
            if outcome == "survived":
                print(f"  survived: {mutant.line}: {mutant.before}  ->  {mutant.after}", flush=True)


def show_mutant(folder: Path, name: str) -> None:
    """Run the tests of one mutant in the open."""
    tree, module = snapshot(folder), name.split("/")[0]
    source = (source_of(tree, module)).read_text()
    mutant = next(mutant for mutant in mutants_of(module, source) if mutant.name == name)
    print(f"{mutant.line}: {mutant.before}  ->  {mutant.after}", flush=True)
    print(run_tests(tree, module, mutant.source, show=True))


def report(folder: Path) -> dict[str, Any]:
    """Counts for each module as it was tried, and its survivors, those explained in ``equivalent.json`` apart."""
    tree, done = folder / "tree", read_log(folder)
    known = {(e["module"], e["before"], e["after"]): e["reason"] for e in json.loads(EQUIVALENT.read_text())}
    per_module, sources, equivalent, survivors = {}, {}, [], []
    for module in TESTS:
        source = (source_of(tree, module)).read_text()
        code = code_hash(source)
        every = mutants_of(module, source)
        outcomes = [(m, done.get(f"{code} {m.name}", {}).get("outcome")) for m in every]
        alive = [m for m, outcome in outcomes if outcome == "survived"]
        excused = [m for m in alive if (module, m.before, m.after) in known]
        equivalent += [{**_named(module, m), "reason": known[module, m.before, m.after]} for m in excused]
        survivors += [_named(module, m) for m in alive if m not in excused]
        tried = sum(outcome is not None for _, outcome in outcomes)
        per_module[module] = _counts(len(every), tried, len(alive), len(excused))
        sources[module] = code
    total = {name: sum(counts[name] for counts in per_module.values()) for name in next(iter(per_module.values()))}
    return {
        "tool": f"cosmic-ray {version('cosmic-ray')} (its operators), tests/mutants/run.py",
        "command": "nox -s mutants",
        "total": _with_ratio(total),
        "modules": {module: {**_with_ratio(n), "code": sources[module]} for module, n in per_module.items()},
        "equivalent": equivalent,
        "survivors": survivors,
    }


def _counts(mutants: int, tried: int, alive: int, equivalent: int) -> dict[str, Any]:
    return {"mutants": mutants, "untried": mutants - tried, "killed": tried - alive, "equivalent": equivalent}


def _with_ratio(counts: dict[str, Any]) -> dict[str, Any]:
    tried = counts["mutants"] - counts["untried"]
    return {
        **counts,
        "killed_of_all": round(counts["killed"] / max(1, tried), 4),
        "killed_of_not_equivalent": round(counts["killed"] / max(1, tried - counts["equivalent"]), 4),
    }


def _named(module: str, mutant: Mutant) -> dict[str, Any]:
    return {"module": module, "line": mutant.line, "before": mutant.before, "after": mutant.after}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--folder", type=Path, default=ROOT / ".nox" / "mutants-work", help="where the log is kept")
    parser.add_argument("--modules", nargs="+", choices=list(TESTS), default=list(TESTS))
    parser.add_argument("--report", action="store_true", help="write the result file from the log and try nothing")
    parser.add_argument("--show", help="try the mutant of this name (in log.jsonl) and show what the tests print")
    asked = parser.parse_args()
    asked.folder.mkdir(parents=True, exist_ok=True)
    if asked.show:
        preload()
        show_mutant(asked.folder, asked.show)
        return
    if not asked.report:
        preload()
        test_modules(asked.folder, asked.modules)
    result = report(asked.folder)
    RESULT.write_text(json.dumps(result, indent=2) + "\n")
    print(json.dumps({"total": result["total"], "modules": result["modules"]}, indent=2))


def preload() -> None:
    """Import what every mutant needs and no mutation touches."""
    import pytest
    import torch._dynamo
    from hypothesis.internal.conjecture import engine  # noqa: F401 - for the forks to have
    from transformers.models.cohere import modeling_cohere  # noqa: F401 - likewise
    from transformers.models.llama import modeling_llama  # noqa: F401 - likewise

    torch.set_num_threads(1)
    with contextlib.redirect_stdout(io.StringIO()):
        pytest.main(["--version", "--version", "-p", "no:cacheprovider"])  # loads its plugins
    inspect.getmodule(compile("0", "nowhere", "eval"))  # fills a cache that torch's custom operators need
    gc.collect()
    gc.freeze()
    assert not any(name.startswith("fasa_flex") for name in sys.modules)


if __name__ == "__main__":
    main()
