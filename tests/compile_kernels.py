"""Compile every Triton kernel for an NVIDIA GPU that need not be there: what the interpreter lets pass, this does not.

python tests/compile_kernels.py       # without TRITON_INTERPRET, which makes interpreted functions of kernels
"""

from __future__ import annotations

from typing import Any

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from fasa_flex import kernels

TARGET = GPUTarget("cuda", 90, 32)
SHAPE = {"GROUP": 4, "GROUP_PAD": 16, "DIM": 128, "DIM_PAD": 128, "VALUE_DIM": 128, "VALUE_PAD": 128}
SHAPE |= {"KV_HEADS": 8, "KEY_STRIDE": 256, "VALUE_STRIDE": 256}
SHAPE |= {"WIDTH": 32, "WIDTH_PAD": 32, "WANTED_PAD": 256, "BLOCK": 128, "OVERLAP": True}
POINTERS = dict.fromkeys(("query", "key", "value", "keys", "values", "packed", "sinks", "out"), "*bf16")
POINTERS |= dict.fromkeys(("scores", "top", "total", "bests", "totals", "results"), "*fp32")
POINTERS |= dict.fromkeys(("held_keys", "held_values"), "*bf16")
POINTERS |= dict.fromkeys(
    ("order", "maxima", "tiles", "slots", "held", "held_at", "places", "absent", "scratch"), "*i32"
)
POINTERS |= {"dims": "*i64", "scales": "*fp16", "codes": "*u8", "length": "*i64"}
NUMBERS = {"scaling": "fp32", "softcap": "fp32", "key_batch": "i64", "value_batch": "i64"}


def compiles(kernel: Any, int8: str = "", number: str = "", asserts: bool = False, **constants: Any) -> None:
    """Compile to machine code, with a check in it or none; raises where that fails.

    An argument named by ``int8`` or ``number`` has another type than in `POINTERS`.
    """
    chosen = {name: value for name, value in {**SHAPE, **constants}.items() if name in kernel.arg_names}
    types = {**dict.fromkeys(kernel.arg_names, "i32"), **NUMBERS, **POINTERS, int8: "*i8", number: "i32"}
    signature = {name: "constexpr" if name in chosen else types[name] for name in kernel.arg_names}
    places = {(kernel.arg_names.index(name),): value for name, value in chosen.items()}
    source = ASTSource(fn=kernel, signature=signature, constexprs=places)
    built = triton.compile(source, target=TARGET, options={"debug": asserts})
    assert built.asm["cubin"]
    assert ("__assertfail" in built.asm["ptx"]) == asserts


def main() -> None:
    for how in ("softmax", "max", "mean"):
        compiles(kernels.score_keys, HOW=how, SCALED=False)
    compiles(kernels.score_keys, int8="keys", HOW="softmax", SCALED=True)
    compiles(kernels.mix_group, GROUP_PAD=4, BLOCK=1024)
    for search in (False, True):
        chosen = {"TILES_PAD": 1024 if search else 128, "SEARCH": search, "GUESS": search}
        compiles(kernels.select_keys, **chosen)
        compiles(kernels.focus_rows, SUNK=search, CAPPED=search, **chosen)
    for sunk, capped in ((False, False), (True, True)):
        compiles(kernels.attend_rows, SUNK=sunk, CAPPED=capped)
        compiles(kernels.attend_part, CAPPED=capped)
        compiles(kernels.merge_parts, SUNK=sunk, PARTS_PAD=64)
    for bounded in (False, True):
        compiles(kernels.find_rows, BOUNDED=bounded)
    compiles(kernels.fetch_rows, BLOCK=16)
    compiles(kernels.write_states, asserts=True, SCALED=False, COUNTED=True)
    compiles(kernels.write_states, int8="packed", number="length", asserts=True, SCALED=True, COUNTED=False)


if __name__ == "__main__":
    main()
