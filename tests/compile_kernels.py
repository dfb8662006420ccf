"""Compile every Triton kernel for an NVIDIA GPU that need not be there: what the interpreter lets pass, this does not.

python tests/compile_kernels.py       # without TRITON_INTERPRET, which makes interpreted functions of kernels
"""

from __future__ import annotations

import subprocess
import tempfile
from typing import Any

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from fasa_flex.backends.triton import attention, blocks, completion, kernels, tip

SHARED = {80: 166912, 89: 101376, 90: 232448}
"""Bytes of shared memory that a program may use, by compute capability: A100, RTX 4090 and L4, H100."""

SHAPE = {"GROUP": 4, "GROUP_PAD": 16, "DIM": 128, "DIM_PAD": 128, "VALUE_DIM": 128, "VALUE_PAD": 128}
SHAPE |= {"KV_HEADS": 8, "KEY_STRIDE": 256, "VALUE_STRIDE": 256}
SHAPE |= {"WIDTH": 32, "PART": 32, "PART_PAD": 32, "PARTS_PAD": 16, "WANTED_PAD": 256, "BLOCK": 128, "OVERLAP": True}
SHAPE |= {"HEADS": 8, "FOLD": 1, "STAGES": 2, "INTEGER": False, "NATIVE": False, "TILE": 16}
SHAPE |= {"CHUNK": 1024, "SEGMENTS": 16, "PAGE": 0, "PAGED": False}
POINTERS = dict.fromkeys(("query", "key", "value", "keys", "values", "packed", "sinks", "out", "means"), "*bf16")
POINTERS |= dict.fromkeys(("units", "masses", "shift", "weights", "mean_key"), "*fp32")
POINTERS |= dict.fromkeys(("sums", "results", "key_sum", "value_sum", "product"), "*fp32")
POINTERS |= {"mean_value": "*bf16", "covariance": "*bf16", "covariances": "*bf16", "covered": "*i64"}
POINTERS |= {"number": "*i64", "valid": "*u8", "marks": "*u8", "sample": "*i64"}
POINTERS |= {"first": "*i64", "mass": "*fp32", "table": "*i64", "states": "*i64"}
POINTERS |= dict.fromkeys(("held_keys", "held_values"), "*bf16")
POINTERS |= dict.fromkeys(
    ("order", "maxima", "bins", "listed", "counts", "slots", "held", "held_at", "places", "absent", "scratch"), "*i32"
)
POINTERS |= {"dims": "*i64", "scales": "*fp16", "length": "*i64", "offsets": "*i64"}
NUMBERS = {
    "scaling": "fp32",
    "softcap": "fp32",
    "factor": "fp32",
    "share": "i64",
    "key_batch": "i64",
    "value_batch": "i64",
}


ABSENT = {"table": "PAGE", "states": "PAGED", "weights": "WEIGHTED", "shift": "SHIFTED", "scales": "SCALED"}
"""Tensors in whose place the query is passed if the constant says that there is none."""

FOUR_BITS = {"PART": 16, "PART_PAD": 16, "SCALED": True}
WHOLE = {**FOUR_BITS, "PART_PAD": 32, "INTEGER": True}
FOLDED = {"FOLD": 4, "HEADS": 4, "STAGES": 4, "BLOCK": 256}


def compiles(
    kernel: Any,
    other: tuple[str, str] = ("", ""),
    number: str = "",
    asserts: bool = False,
    warps: int = 4,
    stages: int = 2,
    capability: int = 90,
    aligned: bool = False,
    registers: int | None = None,
    in_place: bool = False,
    spills: bool = True,
    **constants: Any,
) -> None:
    """Compile to machine code, with a check in it or none; raises where that fails, or needs too much shared memory.

    An argument named by ``other``, with its type, or by ``number`` has another type than in `POINTERS`. ``aligned``
    pointers and numbers, as most are at a launch, are multiples of 16. A kernel that works ``in_place`` must have a
    barrier between what it reads and the first that it writes, since several threads read the same numbers. One that
    never ``spills`` keeps all numbers in registers.
    """
    chosen = {name: value for name, value in {**SHAPE, **constants}.items() if name in kernel.arg_names}
    others = {other[0]: other[1], number: "i32"}
    others |= {name: "*fp32" for name, present in ABSENT.items() if not chosen.get(present, True)}
    types = {**dict.fromkeys(kernel.arg_names, "i32"), **NUMBERS, **POINTERS, **others}
    signature = {name: "constexpr" if name in chosen else types[name] for name in kernel.arg_names}
    places = {(kernel.arg_names.index(name),): value for name, value in chosen.items()}
    free = [name for name in kernel.arg_names if signature[name] not in ("fp32", "constexpr")]
    even = set(free) - set(kernel.do_not_specialize or ()) if aligned else set()
    attributes = {(kernel.arg_names.index(name),): [["tt.divisibility", 16]] for name in even}
    source = ASTSource(fn=kernel, signature=signature, constexprs=places, attrs=attributes)
    options = {"debug": asserts, "num_warps": warps, "num_stages": stages, "maxnreg": registers}
    built = triton.compile(source, target=GPUTarget("cuda", capability, 32), options=options)
    assert built.metadata.shared <= SHARED[capability], (kernel.__name__, capability, built.metadata.shared)
    assert built.asm["cubin"]
    assert "pendings = 1" not in built.asm["ttgir"], f"{kernel.__name__} copies over what a product still reads"
    if in_place:
        read = built.asm["ttgir"].partition("tt.store")[0]
        assert read.rfind("barrier") > read.rfind("tt.load"), f"{kernel.__name__} writes what other threads read"
    assert ("__assertfail" in built.asm["ptx"]) == asserts
    assert spills or "STACK:0 " in resources_of(built.asm["cubin"]), f"{kernel.__name__} has too few warps"


def resources_of(cubin: bytes) -> str:
    """Registers and memory of a thread, as NVIDIA's tool names them."""
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        command = [triton.knobs.nvidia.cuobjdump.path, "--dump-resource-usage", file.name]
        return subprocess.run(command, check=True, capture_output=True, text=True).stdout


def main() -> None:
    plain = {"SCALED": False, "WEIGHTED": False, "SHIFTED": False, "CAPPED": False}
    all_of_it = {"WEIGHTED": True, "SHIFTED": True, "CAPPED": True}
    compiles(kernels.sum_keys, SAMPLED=False, **plain)
    compiles(kernels.sum_keys, ("keys", "*i8"), SAMPLED=True, SCALED=True, INTEGER=True, **all_of_it)
    for how, sums in (("softmax", False), ("softmax", True), ("max", False), ("mean", True)):
        compiles(kernels.score_keys, HOW=how, SUMS=sums, **plain)
    marked = {"HOW": "softmax", "SUMS": True}
    compiles(kernels.score_keys, ("keys", "*i8"), SCALED=True, INTEGER=True, **all_of_it, **marked, **FOLDED)
    for four in (FOUR_BITS, WHOLE, {**WHOLE, "NATIVE": True}):
        compiles(kernels.sum_keys, ("keys", "*u8"), SAMPLED=True, **{**plain, **four})
        compiles(kernels.score_keys, ("keys", "*u8"), **{**plain, **four}, **marked)
        if "INTEGER" in four:
            few = tip.MANY_REGISTERS if "NATIVE" in four else None
            compiles(kernels.score_keys, ("keys", "*u8"), registers=few, **{**plain, **four}, **marked, **FOLDED)
    covers = {"COVERED": 64, "SKIPPED": 4, "warps": completion.COVER_WARPS, "stages": completion.COVER_STAGES}
    covers |= {"aligned": True, "in_place": True}
    for page in (48, 256):
        four = {**plain, **WHOLE, "PAGE": page}
        compiles(kernels.sum_keys, ("keys", "*u8"), SAMPLED=True, **four)
        compiles(kernels.score_keys, ("keys", "*u8"), **{**four, **FOLDED}, **marked)
        compiles(kernels.attend_rows, ("packed", "*u8"), SELECTS=True, COMPLETES=True, **four)
        compiles(kernels.write_states, ("packed", "*u8"), **four, CENTRED=True, COUNTED=True, asserts=True)
        sizes = {"PART": 128, "PARTS": 1, "BLOCK": 64, "PAGE": page}
        compiles(kernels.cover_rows, **covers, **sizes)
    compiles(kernels.merge_parts, SUNK=False, COMPLETES=True, FIRST_ORDER=True, PAGED=True)
    compiles(kernels.score_keys, HOW="max", SUMS=False, TILE=1, **plain)
    for tile in (1, 16):
        compiles(kernels.list_keys, TILE=tile, BLOCK=512, SOME=1024 // tile)
    compiles(kernels.select_keys, warps=8)
    for selects in (False, True):
        four = {**plain, **(WHOLE if selects else FOUR_BITS), "NATIVE": selects}
        four |= {"COMPLETES": True, "SELECTS": selects, "CAPPED": selects}
        compiles(kernels.attend_rows, ("packed", "*u8"), BLOCK=16, **four)
        compiles(kernels.attend_rows, COMPLETES=False, SELECTS=selects, warps=8, **plain)
    for sunk, capped in ((False, False), (True, True)):
        compiles(kernels.attend_part, CAPPED=capped)
        compiles(kernels.merge_parts, SUNK=sunk, COMPLETES=True, FIRST_ORDER=sunk)
    for dim, parts, first_order in ((128, 16, True), (128, 128, False), (256, 16, True), (256, 64, True)):
        sizes = {"DIM": dim, "DIM_PAD": dim, "VALUE_DIM": dim, "VALUE_PAD": dim, "PARTS_PAD": parts}
        sizes |= {"COMPLETES": first_order, "FIRST_ORDER": first_order, "SUNK": not first_order, "aligned": True}
        compiles(kernels.merge_parts, warps=attention.merge_warps(parts, dim), spills=False, **sizes)
    for capability, dim in ((80, 256), (89, 128), (89, 256), (90, 256)):  # three stages are Triton's default
        sizes = {"DIM": dim, "DIM_PAD": dim, "VALUE_DIM": dim, "VALUE_PAD": dim, "OVERLAP": capability == 90}
        sizes |= {"BLOCK": kernels.fitting(SHARED[capability], 4 * dim, 128), "SELECTS": True}
        launch = {"stages": 3, "capability": capability, "aligned": True}
        compiles(kernels.attend_part, CAPPED=False, **launch, **sizes)
        for four in (plain, {**plain, **WHOLE, "NATIVE": True, "WIDTH": dim, "PART": dim // 2, "PART_PAD": dim // 2}):
            whole = {**four, "COMPLETES": four is not plain, **sizes}
            compiles(kernels.attend_rows, ("packed", "*u8"), **launch, **whole)
    for bounded in (False, True):
        compiles(kernels.find_rows, BOUNDED=bounded)
    compiles(kernels.fetch_rows, BLOCK=16)
    for dim, parts in ((128, 1), (256, 4), (0, 1)):
        sizes = {"DIM": dim, "PART": 128 // parts, "PARTS": parts, "VALUE_DIM": dim or 64, "VALUE_PAD": dim or 64}
        compiles(kernels.cover_rows, **covers, **sizes, BLOCK=64)
    mixed = {"DIM": 64, "PART": 64, "PARTS": 1, "VALUE_DIM": 64, "VALUE_PAD": 64, "BLOCK": 64}
    compiles(kernels.cover_rows, ("values", "*fp32"), **covers, **mixed)
    sizes = {"HEADS": 8, "SPLIT": 4, "PARTS": 4, "ROWS_PAD": 16, "WIDTH": 64, "WIDTH_PAD": 64, "KEYS": 128}
    for chosen in (False, True):
        one = {"STRONGEST": chosen, "CAPPED": chosen, "TOGETHER": 1 if chosen else 4}
        compiles(kernels.estimate_blocks, stages=blocks.ESTIMATE_STAGES, **sizes, **one)
    for centred in (False, True):
        written = {"asserts": True, "CENTRED": centred}
        compiles(kernels.write_states, SCALED=False, COUNTED=True, **written)
        compiles(kernels.write_states, ("packed", "*i8"), "length", SCALED=True, COUNTED=False, **written)
        compiles(kernels.write_states, ("packed", "*u8"), "length", **FOUR_BITS, COUNTED=False, **written)


if __name__ == "__main__":
    main()
