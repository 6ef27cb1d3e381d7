"""Programs: what an engine runs for a spec, and what it takes."""

from glazoo.program.lowering import Kernel, Program, StatePart, lower
from glazoo.program.operands import Operand, Role

__all__ = ["Kernel", "Operand", "Program", "Role", "StatePart", "lower"]
