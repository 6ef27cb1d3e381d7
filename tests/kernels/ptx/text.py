"""PTX source, read into instructions."""

from __future__ import annotations

import dataclasses
import re

TOKEN = re.compile(
    r"""\s+ | //[^\n]* | /\*.*?\*/
    | (?P<place>\.loc\b[^\n]*) | (?P<label>[$\w]+): | (?P<brace>[{}]) | (?P<statement>[^;]+);""",
    re.VERBOSE | re.DOTALL,
)
# Directives inside a function that change nothing that it computes: here, which bytes of the next
# load are used.
HINT = re.compile(r'\.pragma\s+"used_bytes_mask \w+"')
INSTRUCTION = re.compile(
    r"(?:@(?P<negated>!?)(?P<guard>%\w+)\s+)?(?P<opcode>[a-z][\w.:]*)(?P<rest>.*)"
)
# The comment of a .loc names the innermost line of Triton source.
PLACE = re.compile(r"//\s*(\S+\.py:\d+)")


class PtxError(Exception):
    """What a kernel did that no kernel may do, or what this machine cannot run."""


@dataclasses.dataclass(frozen=True)
class Instruction:
    """One instruction: its text, its parts and the line of source that it was compiled from."""

    text: str
    guard: str | None
    negated: bool
    opcode: str
    operands: tuple[str, ...]
    place: str

    def __str__(self) -> str:
        return f"{self.text}; ({self.place})"


@dataclasses.dataclass(frozen=True)
class Program:
    """A kernel: parameters by name with their types, threads of a block, instructions, labels."""

    name: str
    parameters: dict[str, str]
    threads: int
    registers: dict[str, str]
    instructions: tuple[Instruction, ...]
    labels: dict[str, int]


def split_operands(text: str) -> tuple[str, ...]:
    """Split at the commas outside of braces and brackets."""
    found, depth, start = [], 0, 0
    for i, character in enumerate(text):
        depth += (character in "{[") - (character in "}]")
        if character == "," and not depth:
            found.append(text[start:i].strip())
            start = i + 1
    last = text[start:].strip()
    return (*found, last) if last else tuple(found)


def _instruction(statement: str, place: str) -> Instruction:
    text = " ".join(statement.split())
    match = INSTRUCTION.fullmatch(text)
    if match is None:
        raise PtxError(f"cannot be read: {text}")
    return Instruction(
        text,
        match["guard"],
        match["negated"] == "!",
        match["opcode"],
        split_operands(match["rest"]),
        place,
    )


def read(ptx: str) -> Program:
    """Read the one kernel of a PTX file.

    Args:
        ptx: source as Triton emits it: one .entry, no other function, no local memory.

    Returns:
        The kernel.

    Raises:
        PtxError: there is something in it that is not understood.
    """
    head = re.search(r"\.entry\s+(\w+)\s*\((.*?)\)\s*(.*?)\{", ptx, re.DOTALL)
    if head is None:
        raise PtxError("there is no .entry")
    threads = re.search(r"\.reqntid\s+(\d+)", head[3])
    if threads is None:
        raise PtxError(f"{head[1]}: there is no .reqntid")
    parameters = {
        name: kind for kind, name in re.findall(r"\.param\s+\.(\w+)[^,]*?(\w+)\s*(?:,|$)", head[2])
    }
    instructions: list[Instruction] = []
    labels: dict[str, int] = {}
    registers: dict[str, str] = {}
    place, depth, at = "?", 1, head.end()
    while depth:
        match = TOKEN.match(ptx, at)
        if match is None:
            raise PtxError(f"{head[1]}: cannot be read: {ptx[at : at + 80]!r}")
        at = match.end()
        if match["place"]:
            found = PLACE.search(match["place"])
            place = found[1] if found else place
        elif match["label"]:
            labels[match["label"]] = len(instructions)
        elif match["brace"]:
            depth += 1 if match["brace"] == "{" else -1
        elif match["statement"]:
            statement = match["statement"]
            if not statement.startswith("."):
                instructions.append(_instruction(statement, place))
            elif depth == 1 and (of := re.fullmatch(r"\.reg\s+\.(\w+)\s+(%\w+)<\d+>", statement)):
                registers[of[2]] = of[1]
            elif not HINT.fullmatch(statement):
                raise PtxError(f"{head[1]}: unknown directive: {statement}")
    return Program(head[1], parameters, int(threads[1]), registers, tuple(instructions), labels)
