"""Machine code of launches: how it is compiled, and what is read from its text."""

import os
import pathlib
import re
import subprocess
import tempfile
from collections.abc import Sequence
from typing import NamedTuple

os.environ.setdefault("TRITON_DEFAULT_FP_FUSION", "1")

import torch
import triton
from torch import Tensor
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from glazoo.kernels.common import Launch

TARGETS = {
    "sm_80": GPUTarget("cuda", 80, 32),
    "sm_90": GPUTarget("cuda", 90, 32),
    "sm_100": GPUTarget("cuda", 100, 32),
    "gfx942": GPUTarget("hip", "gfx942", 64),
}
# Bytes of shared memory that one program can have, from the vendors' documents.
SHARED_LIMIT = {"sm_80": 163 << 10, "sm_90": 227 << 10, "sm_100": 227 << 10, "gfx942": 64 << 10}
POINTERS = {
    torch.bfloat16: "*bf16",
    torch.float16: "*fp16",
    torch.float32: "*fp32",
    torch.int32: "*i32",
    torch.int64: "*i64",
}


def compile_launch(launch: Launch, target: str) -> "triton.compiler.CompiledKernel":
    """Compile a launch as it would be compiled when it runs."""
    signature, constants, attributes = {}, {}, {}
    for i, parameter in enumerate(launch.kernel.params):
        x = launch.arguments[parameter.name]
        if parameter.is_constexpr or x is None:
            signature[parameter.name] = "constexpr"
            constants[parameter.name] = x
        elif isinstance(x, Tensor):
            signature[parameter.name] = POINTERS[x.dtype]
            if x.data_ptr() % 16 == 0:
                attributes[(i,)] = [["tt.divisibility", 16]]
        elif isinstance(x, float):
            signature[parameter.name] = "fp32"
        elif x == 1 and not parameter.do_not_specialize:
            signature[parameter.name], constants[parameter.name] = "constexpr", 1
        else:
            signature[parameter.name] = "i32" if x < 2**31 else "i64"
            if not parameter.do_not_specialize and x % 16 == 0:
                attributes[(i,)] = [["tt.divisibility", 16]]
    source = ASTSource(
        fn=launch.kernel, signature=signature, constexprs=constants, attrs=attributes
    )
    options = {"num_warps": launch.tiles.num_warps, "num_stages": launch.tiles.num_stages}
    return triton.compile(source, target=TARGETS[target], options=options)


class Assembled(NamedTuple):
    """The machine code of a launch and what it needs."""

    registers: int
    spill: int
    shared: int
    text: str


def assemble(launch: Launch, target: str) -> Assembled:
    """Compile a launch and disassemble it, with the lines of its source where there is a tool."""
    compiled = compile_launch(launch, target)
    shared = compiled.metadata.shared
    if not target.startswith("sm_"):
        text = compiled.asm["amdgcn"]
        fields = ("vgpr_count", "vgpr_spill_count")
        found = [int(re.search(rf"\.{field}:\s+(\d+)", text)[1]) for field in fields]
        return Assembled(*found, shared, text)
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(compiled.asm["cubin"])
        file.flush()
        usage = _tool("cuobjdump", "--dump-resource-usage", file.name)
        text = _tool("nvdisasm", "-c", "-gi", file.name)
    found = map(int, re.search(r"REG:(\d+) STACK:(\d+)", usage).groups())
    return Assembled(*found, shared, text)


def _tool(name: str, *arguments: str) -> str:
    path = pathlib.Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / name
    return subprocess.run([path, *arguments], capture_output=True, text=True, check=True).stdout


# A line of assembly is a label or an instruction; a branch names the label it may go to.
SASS = re.compile(
    r"^(?P<label>\.L\S+):|/\*[0-9a-f]+\*/\s+(?:@!?U?P\w+\s+)?(?P<opcode>[A-Z][\w.]*)(?P<rest>.*)"
)
GCN = re.compile(r"^(?P<label>\.LBB\w+):|^\t(?P<opcode>[a-z]\w+)(?P<rest>.*)")
JUMP = re.compile(r"^(?:BRA|s_c?branch)")
TARGET_LABEL = re.compile(r"\.L\w+")
# They take no part in what a program computes.
IDLE = ("NOP", "s_nop")

REGISTER = re.compile(r"\b(U?R)(\d+)\b")
PREDICATE = re.compile(r"!?U?P[T\d]")
# Opcodes whose results are data: neither constants nor places of threads.
DATA = (
    "LD",
    "LDG",
    "LDS",
    "LDSM",
    "MUFU",
    "HGMMA",
    "HMMA",
    "FADD",
    "FMUL",
    "FFMA",
    "FMNMX",
    "F2FP",
)


def _width(parts: Sequence[str]) -> int:
    """Registers that an instruction writes, one after the other."""
    name = parts[0]
    if name == "HGMMA":
        return int(parts[1].removeprefix("64x").split("x")[0]) // 2
    if "128" in parts or name == "HMMA":
        return 4
    if name == "LDSM":
        return int(parts[-1]) if parts[-1] in ("2", "4") else 1
    return 2 if "64" in parts or "WIDE" in parts or (name == "CS2R" and "32" not in parts) else 1


def misled_products(assembly: str) -> int:
    """Products of warp groups whose operands' addresses come from data.

    The addresses are constants and places of warps. In kernels without a pipeline ptxas 12.8, which
    Triton 3.6 has, took them from registers that held entries of tensors or the number of the
    program, or that nothing had written: illegal memory accesses and wrong gradients on an H200.
    Instructions are followed in the order of the text; what a loop carries is not.
    """
    # Uniform registers are written before they are read; until then they hold anything.
    data = {("UR", i) for i in range(64)}
    misled = 0
    for line in assembly.splitlines():
        match = SASS.search(line)
        if match is None or match["label"]:
            continue
        parts = match["opcode"].split(".")
        rest = match["rest"].split(";")[0]
        operands = [x.strip() for x in re.split(r",(?![^\[]*\])", rest)]
        operands = [x for i, x in enumerate(operands) if i or not PREDICATE.fullmatch(x)]
        if parts[0] == "HGMMA":
            # Four uniform registers, two of each operand; the left one may lie in registers.
            first = int(re.search(r"gdesc\[UR(\d+)\]", rest)[1])
            left = 2 * bool(REGISTER.fullmatch(operands[1].split(".")[0]))
            misled += any(("UR", i) in data for i in range(first + left, first + 4))
        written = REGISTER.fullmatch(operands[0])
        if written is None or parts[0].startswith(("ST", "RED")):
            continue
        sources = {(kind, int(i)) for x in operands[1:] for kind, i in REGISTER.findall(x)}
        tainted = parts[0] in DATA or "SR_CTAID" in rest or bool(sources & data)
        for i in range(_width(parts)):
            register = (written[1], int(written[2]) + i)
            (data.add if tainted else data.discard)(register)
    return misled


Place = tuple[str, int]
"""A file and a line of it."""
# Lines follow each other where one is inlined at the next.
LINE = re.compile(r'^\s*//## File "(?P<file>[^"]+)", line (?P<line>\d+)(?P<inlined> inlined at)?')


class Loop(NamedTuple):
    """From its first instruction to behind its last, and where the jump back comes from."""

    start: int
    end: int
    places: tuple[Place, ...]

    def holds(self, other: "Loop") -> bool:
        return self[:2] != other[:2] and self.start <= other.start and other.end <= self.end


class Listing(NamedTuple):
    """Opcodes, the places in the source that each comes from, innermost first, and loops."""

    opcodes: list[str]
    places: list[tuple[Place, ...]]
    loops: list[Loop]


def parse(text: str) -> Listing:
    """Instructions of an assembly, of NVIDIA's or AMD's machines."""
    pattern = GCN if "amdgcn" in text else SASS
    found = Listing([], [], [])
    labels: dict[str, int] = {}
    places: tuple[Place, ...] = ()
    inlined = False
    for line in text.splitlines():
        if place := LINE.match(line):
            at = place["file"], int(place["line"])
            places = (*places, at) if inlined else (at,)
            inlined = place["inlined"] is not None
        match = pattern.search(line)
        if match is None:
            continue
        if match["label"]:
            labels[match["label"]] = len(found.opcodes)
            continue
        found.opcodes.append(match["opcode"])
        found.places.append(places)
        if JUMP.match(match["opcode"]):
            goal = TARGET_LABEL.search(match["rest"])
            start = labels.get(goal[0]) if goal else None
            # The end of a program is an endless loop of one jump.
            if start is not None and len(found.opcodes) - start > 8:
                found.loops.append(Loop(start, len(found.opcodes), places))
    return found


def main_loop(listing: Listing) -> list[str]:
    """Opcodes of the longest loop that holds no other, or of everything without a loop."""
    opcodes, _, loops = listing
    inner = [x for x in loops if not any(x.holds(y) for y in loops)]
    if inner:
        of = max(inner, key=lambda x: x.end - x.start)
        opcodes = opcodes[of.start : of.end]
    return [x for x in opcodes if x not in IDLE]
