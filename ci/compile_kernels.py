"""Compile every Triton kernel for every GPU we name, without a GPU, and look at the code.

For each ``CompileCase`` in ``kernels/triton/*.py`` and each target: it compiles; it keeps all its
values in registers (no stack, no local memory); its global accesses are 128 bits wide where the
case says that alignment allows it; its code is no larger than the case's ceiling. It also compiles
for sizes of 1, which Triton takes for constants.

    python ci/compile_kernels.py                 # all kernels, all targets
    python ci/compile_kernels.py normal --target cuda:90
    python ci/compile_kernels.py --out table.tsv

Stack use comes from ``cuobjdump --dump-resource-usage`` on NVIDIA targets, and from the kernel's
metadata (``.private_segment_fixed_size``) on AMD; widths from the PTX and the AMD assembly.
"""

from __future__ import annotations

import argparse
import importlib
import pkgutil
import re
import struct
import subprocess
import sys
import tempfile
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from types import ModuleType
from typing import Any

import triton
from triton import JITFunction
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from fastsvi.kernels import triton as kernels
from fastsvi.kernels.triton import launch
from fastsvi.kernels.triton.launch import CompileCase

TARGETS = {
    "cuda:80": GPUTarget("cuda", 80, 32),
    "cuda:90": GPUTarget("cuda", 90, 32),
    "cuda:100": GPUTarget("cuda", 100, 32),
    "hip:gfx942": GPUTarget("hip", "gfx942", 64),
}

CUOBJDUMP = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"


@dataclass(frozen=True)
class Report:
    """What the compiled code of a case looks like on a target."""

    case: str
    target: str
    registers: int
    stack: int  # bytes per thread, spills and local arrays together
    shared: int
    code: int  # bytes of machine code, without line tables
    wide_loads: int
    wide_stores: int

    def faults(self, case: CompileCase) -> list[str]:
        """What is wrong with it, one sentence each."""
        found = []
        if self.stack:
            found.append(f"spills: {self.stack} bytes of stack per thread")
        if self.code > case.max_bytes:
            found.append(f"too large: {self.code} bytes, ceiling {case.max_bytes}")
        for what, number, least in (
            ("loads", self.wide_loads, case.wide_loads),
            ("stores", self.wide_stores, case.wide_stores),
        ):
            if number < least:
                found.append(f"narrow accesses: {number} 128-bit {what}, expected at least {least}")
        return found


def modules() -> Iterator[ModuleType]:
    """The modules of ``kernels/triton``."""
    for module in pkgutil.iter_modules(kernels.__path__):
        yield importlib.import_module(f"{kernels.__name__}.{module.name}")


def cases() -> Iterator[CompileCase]:
    """The cases of all modules."""
    for module in modules():
        yield from getattr(module, "COMPILE_CASES", ())


def kernels_without_a_case() -> list[str]:
    """Names of the kernels (functions called ``..._kernel``) that no case compiles."""
    covered = {case.kernel for case in cases()}
    return [
        f"{module.__name__}.{name}"
        for module in modules()
        for name, value in vars(module).items()
        if name.endswith("_kernel") and isinstance(value, JITFunction) and value not in covered
    ]


def compile_case(case: CompileCase, target: str) -> Report:
    """Compile one case and inspect the result."""
    arguments = case.kernel.arg_names
    signature = {
        name: "constexpr" if name in case.constants else case.signature[name] for name in arguments
    }
    source = ASTSource(
        fn=case.kernel,
        signature=signature,
        constexprs={(arguments.index(name),): value for name, value in case.constants.items()},
        attrs={(arguments.index(name),): [["tt.divisibility", 16]] for name in case.divisible},
    )
    warps = launch.warps(case.threads, TARGETS[target].warp_size)
    options = {"num_warps": warps, **case.options}
    compiled = triton.compile(source, target=TARGETS[target], options=options)
    inspect = _inspect_cuda if target.startswith("cuda") else _inspect_hip
    return Report(case.name, target, shared=compiled.metadata.shared, **inspect(compiled.asm))


def _inspect_cuda(asm: dict[str, Any]) -> dict[str, int]:
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(asm["cubin"])
        file.flush()
        usage = subprocess.run(
            [str(CUOBJDUMP), "--dump-resource-usage", file.name],
            check=True,
            capture_output=True,
            text=True,
        ).stdout
    # A double is 64 bits, so v2 of those is as wide as v4 of floats.
    wide = r"{}\.global[\w.:]*\.(v4\.(b|f|u|s)32|v2\.(b|f|u|s)64)"
    return {
        "registers": _number(r"REG:(\d+)", usage),
        "stack": _number(r"STACK:(\d+)", usage) + _number(r"LOCAL:(\d+)", usage),
        "code": _text_size(asm["cubin"]),
        "wide_loads": len(re.findall(wide.format("ld"), asm["ptx"])),
        "wide_stores": len(re.findall(wide.format("st"), asm["ptx"])),
    }


def _inspect_hip(asm: dict[str, Any]) -> dict[str, int]:
    text = asm["amdgcn"]
    return {
        "registers": _number(r"\.vgpr_count:\s+(\d+)", text),
        "stack": _number(r"\.private_segment_fixed_size:\s+(\d+)", text),
        "code": _text_size(asm["hsaco"]),
        "wide_loads": len(re.findall(r"(?:global|buffer|flat)_load_dwordx4", text)),
        "wide_stores": len(re.findall(r"(?:global|buffer|flat)_store_dwordx4", text)),
    }


def _text_size(elf: bytes) -> int:
    """Bytes of executable sections of a 64-bit ELF file (ELF specification, chapter 1)."""
    (table,) = struct.unpack_from("<Q", elf, 0x28)
    entry_size, entries = struct.unpack_from("<HH", elf, 0x3A)
    total = 0
    for i in range(entries):
        flags, _, _, size = struct.unpack_from("<QQQQ", elf, table + i * entry_size + 8)
        total += size if flags & 0x4 else 0  # SHF_EXECINSTR
    return total


def _number(pattern: str, text: str) -> int:
    match = re.search(pattern, text)
    if match is None:
        raise RuntimeError(f"no {pattern!r} in the compiler's report; has its format changed?")
    return int(match[1])


def with_ones(case: CompileCase) -> CompileCase:
    """The case as it is compiled where all its numbers are 1; any code that compiles will do."""
    numbers = [n for n, kind in case.signature.items() if kind in ("i32", "i64")]
    ones = dict.fromkeys((n for n in numbers if n not in case.never_one), 1)
    return replace(
        case,
        name=f"{case.name} (ones)",
        signature={n: kind for n, kind in case.signature.items() if n not in ones},
        constants={**case.constants, **ones},
        divisible=tuple(n for n in case.divisible if n not in ones),
        wide_loads=0,
        wide_stores=0,
    )


def check(names: Iterable[str], targets: Iterable[str]) -> Iterator[tuple[Report, list[str]]]:
    """Reports and faults of the cases whose name starts with one of ``names``."""
    prefixes = tuple(names) or ("",)
    for case in cases():
        if case.name.startswith(prefixes):
            for target in targets:
                report = compile_case(case, target)
                yield report, report.faults(case)
            ones = with_ones(case)
            report = compile_case(ones, "cuda:90")
            yield report, report.faults(ones)


def main(arguments: list[str] | None = None) -> int:
    """Print a table of all reports and the faults; the exit status is the number of bad ones."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("names", nargs="*", help="prefixes of case names; default: all")
    parser.add_argument("--target", action="append", choices=TARGETS, help="default: all")
    parser.add_argument("--out", type=Path, help="also write the table as tab-separated values")
    options = parser.parse_args(arguments)

    forgotten = kernels_without_a_case()
    if forgotten:
        print("FAULT no COMPILE_CASES entry compiles", ", ".join(forgotten))
        return 1

    header = ["case", "target", "registers", "stack", "shared", "code", "wide_loads", "wide_stores"]
    rows, bad = [header], 0
    print("{:<44}{:<12}{:>9}{:>7}{:>7}{:>8}{:>11}{:>12}".format(*header))
    for report, faults in check(options.names, options.target or TARGETS):
        row = [str(getattr(report, name)) for name in header]
        rows.append(row)
        print("{:<44}{:<12}{:>9}{:>7}{:>7}{:>8}{:>11}{:>12}".format(*row))
        for fault in faults:
            print(f"    FAULT {fault}")
        bad += bool(faults)
    if options.out:
        options.out.write_text("".join("\t".join(row) + "\n" for row in rows))
    if len(rows) == 1:
        print("no case has such a name", file=sys.stderr)
        return 1
    print(f"{len(rows) - 1} compiled, {bad} at fault")
    return min(bad, 100)


if __name__ == "__main__":
    sys.exit(main())
