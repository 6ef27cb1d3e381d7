"""Programs: what an engine runs for a spec, and what it takes."""

from glazoo.program.core import Core, Kernel
from glazoo.program.lowering import Program, lower
from glazoo.program.operands import Operand, Role
from glazoo.program.steps import Env, StatePart

__all__ = ["Core", "Env", "Kernel", "Operand", "Program", "Role", "StatePart", "lower"]
