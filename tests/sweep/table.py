"""Makes the committed result of a sweep, and the page and README's sentence that show it.

python tests/sweep/table.py --collect FOLDER    # the records that run.py left there
python tests/sweep/table.py                     # page and sentence from the committed result
"""

from __future__ import annotations

import argparse
import json
import re
import sys
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[2]
RESULT = ROOT / "evals" / "results" / "families.json"
PAGE = ROOT / "evals" / "docs" / "families.md"
README = ROOT / "README.md"
STATES = {"linear_attention", "conv", "hybrid"}
"""Kinds of layers with a recurrent state or a convolution."""

Record = dict[str, Any]


def collect(folder: Path) -> None:
    """Join the records of a folder in the committed result, without times."""
    import torch
    import transformers

    classes = {}
    for path in sorted(folder.glob("*.json")):
        record = json.loads(path.read_text())
        name = record.pop("name")
        del record["seconds"]
        record["reason"] = record["reason"][:300]
        record["ways"] = {way: result[:120] for way, result in record["ways"].items()}
        classes[name] = record
    versions = {"transformers": transformers.__version__, "torch": torch.__version__}
    RESULT.write_text(json.dumps({"versions": versions, "classes": classes}, indent=1) + "\n")


def committed() -> dict[str, Any]:
    result: dict[str, Any] = json.loads(RESULT.read_text())
    return result


def _of(*statuses: str) -> dict[str, Record]:
    return {name: record for name, record in committed()["classes"].items() if record["status"] in statuses}


def _family(name: str) -> str:
    short = re.sub(r"(ForCausalLM|LMHeadModel)$", "", name)
    return re.sub(r"ForConditionalGeneration$", " (multimodal)", short)


def is_hybrid(record: Record) -> bool:
    return bool(STATES & set(record["kinds"]))


def sentence() -> str:
    """README's sentence: how many classes work, stay dense and are refused."""
    counts, works = Counter(record["status"] for record in committed()["classes"].values()), _of("works")
    families = {record["family"].removesuffix("_text") for record in works.values()}
    hybrids = {record["family"].removesuffix("_text") for record in works.values() if is_hybrid(record)}
    return (
        f"Of the {sum(counts.values())} causal, vision-language and audio-language classes of transformers "
        f"{committed()['versions']['transformers']}, built small from their own\ndefaults, **{len(works)} decode with "
        f"sparse layers** ({len(families)} families, {len(hybrids)} of them hybrids with recurrent layers or\n"
        f"convolutions), {counts['dense'] + counts['no text']} stay dense, {counts['refused']} are refused in one "
        f"sentence, {counts['not built']} could not be built, and {counts['raw']} end in a raw error\n"
        "([every class](evals/docs/families.md))."
    )


def works_table() -> str:
    """Classes with sparse layers."""
    lines = ["| class | hybrid | sparse layers | dense layers, and why | ways | not by the model itself |"]
    lines.append("| --- | :-: | --- | --- | --: | --- |")
    for name, record in sorted(_of("works").items(), key=lambda item: item[0].lower()):
        unable = [way for way, result in record["ways"].items() if result not in ("yes", "dense")]
        able = len(record["ways"]) - len(unable)
        hybrid, sparse = "yes" if is_hybrid(record) else "", f"{len(record['sparse'])} of {record['layers']}"
        cells = (_family(name), hybrid, sparse, _reasons(record), str(able), ", ".join(unable))
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def dense_table() -> str:
    """Classes that are enabled and have no sparse layer, or generate nothing from text alone."""
    lines = ["| class | why |", "| --- | --- |"]
    for name, record in sorted(_of("dense", "no text").items(), key=lambda item: item[0].lower()):
        generates = "" if record["status"] == "dense" else "; its own generate wants more than text"
        lines.append(f"| {_family(name)} | {_reasons(record) or 'all layers are sparse'}{generates} |")
    return "\n".join(lines)


def refused_table() -> str:
    """Refused classes, by reason."""
    return _by_reason(_of("refused"), lambda reason: reason)


def unbuilt_table() -> str:
    """Classes that could not be built small, by reason."""
    return _by_reason(_of("not built"), lambda reason: reason.removeprefix("StrictDataclassClassValidationError: "))


def raw_table() -> str:
    """Classes that end in a raw error, or differ from the matrix."""
    found = _of("raw")
    return _by_reason(found, lambda reason: reason) if found else "None."


def _reasons(record: Record) -> str:
    layers: dict[str, list[str]] = defaultdict(list)
    for layer, reason in record["dense"].items():
        layers[reason].append(layer)
    return "; ".join(f"{', '.join(numbers)}: {reason}" for reason, numbers in layers.items())


def _by_reason(records: dict[str, Record], short: Callable[[str], str]) -> str:
    names: dict[str, list[str]] = defaultdict(list)
    for name, record in records.items():
        names[short(record["reason"]).replace(name, "it").replace("|", "/")].append(_family(name))
    lines = ["| classes | reason |", "| --- | --- |"]
    for reason, own in sorted(names.items(), key=lambda item: (-len(item[1]), item[0])):
        lines.append(f"| {_joined(own)} | {reason} |")
    return "\n".join(lines)


def _joined(names: Iterable[str]) -> str:
    return ", ".join(sorted(names, key=str.lower))


TABLES: dict[Path, dict[str, Callable[[], str]]] = {
    README: {"families": sentence},
    PAGE: {
        "works": works_table,
        "dense": dense_table,
        "refused": refused_table,
        "not built": unbuilt_table,
        "raw": raw_table,
    },
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--collect", type=Path, help="folder of records")
    options = parser.parse_args()
    if options.collect:
        collect(options.collect)
    sys.path.insert(0, str(ROOT))
    from evals.marked import fill

    for page, tables in TABLES.items():
        fill(page, tables)
    if raw := _of("raw"):
        raise SystemExit(f"{', '.join(raw)} end in a raw error; see {PAGE.relative_to(ROOT)}.")


if __name__ == "__main__":
    main()
