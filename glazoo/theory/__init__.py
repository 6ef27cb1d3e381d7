"""The theory that unites the variants, as statements that a machine checks.

`catalogue` holds the statements, `verify` runs them, `results` shows what they gave, `conformance`
runs those of one spec or of one implementation, `strategies` draws inputs for property tests,
`posterior` measures the distance of variants to exact inference, `ranking` shows it.
"""

from glazoo.theory.catalogue import ENTRIES, entry
from glazoo.theory.instances import Instance, operands, run, state
from glazoo.theory.replaying import replay

__all__ = ["ENTRIES", "Instance", "entry", "operands", "replay", "run", "state"]
