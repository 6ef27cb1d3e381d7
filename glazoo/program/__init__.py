"""Programs: what an engine runs for a spec, and what it takes; made and shown without torch."""

from glazoo.program.core import Core, Kernel, automatic
from glazoo.program.lowering import Program, lower
from glazoo.program.operands import Operand, Role
from glazoo.program.steps import OneToken, StatePart

__all__ = [
    "Core",
    "Kernel",
    "OneToken",
    "Operand",
    "Program",
    "Role",
    "StatePart",
    "automatic",
    "lower",
]
