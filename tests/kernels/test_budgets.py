"""Every kernel compiles for every target inside its budget, in a process of its own."""

import os
import pathlib
import subprocess
import sys

import pytest

CENSUS = pathlib.Path(__file__).parents[2] / "benchmarks" / "census.py"
# Of delta_state_kernel, as ptxas 12.9 and 12.8 compile the same PTX.
ADDRESS = """
    /*0100*/ UMOV UR8, 0x1 ;
    /*0110*/ UMOV UR9, 0x1 ;
    /*0120*/ UMOV UR10, 0x1 ;
    /*0130*/ UMOV UR11, 0x1 ;
    /*0440*/ MOV R30, 0x400 ;
    /*08a0*/ LDSM.16.M88.4 R8, [R236] ;
    /*0c70*/ SGXT.U32 R30, R30, 0xe ;
    /*0c90*/ IADD3 {source}, P3, {source}, 0x20, RZ ;
    /*0d10*/ R2UR {uniform}, {source} ;
    /*4110*/ HGMMA.64x16x16.F32.BF16 R24, {left}gdesc[UR8].tnspB, R24 ;
"""


def census(*options: str, parts: slice | None = None) -> None:
    """Run the census; of its quick check the given parts alone."""
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    command = [sys.executable, str(CENSUS), *options]
    if parts is not None:
        program = f"import census, sys; census.QUICK = census.QUICK[{parts.start}:{parts.stop}]"
        command[1:2] = ["-c", f"{program}; sys.exit(census.main())"]
        environment["PYTHONPATH"] = str(CENSUS.parent)
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout[-6000:] + done.stderr[-3000:]


def test_kernels_stay_inside_their_budgets():
    """Of the targets that nothing else here compiles for; the others are in `test-all`."""
    census("--check", "--quick", parts=slice(-2, None))


@pytest.mark.slow
def test_the_quick_check_passes():
    census("--check", "--quick")


@pytest.mark.slow
@pytest.mark.parametrize("target", ["sm_80", "sm_90", "sm_100", "gfx942"])
def test_every_kernel_and_shape_stays_inside_its_budget(target):
    census("--check", "--target", target)


@pytest.mark.slow
@pytest.mark.parametrize("target", ["sm_80", "sm_90", "sm_100"])
def test_sums_over_passes_reach_their_goals(target):
    census("--sum", "--target", target)


def test_a_product_whose_address_is_data_is_found(monkeypatch):
    monkeypatch.syspath_prepend(str(CENSUS.parent))
    from machine_code import misled_products

    def count(source: str, uniform: str, left: str = "") -> int:
        return misled_products(ADDRESS.format(source=source, uniform=uniform, left=left))

    assert count("R30", "UR10") == 0
    assert count("R8", "UR10") == 1
    assert count("R11", "UR8") == 1
    # A left operand in registers has no address.
    assert count("R11", "UR8", left="R68, ") == 0
    assert count("R11", "UR11", left="R68, ") == 1


def test_a_product_whose_address_nothing_wrote_is_found(monkeypatch):
    """What ptxas 12.8 made of a second step over keys: a sum that starts at an unwritten number."""
    monkeypatch.syspath_prepend(str(CENSUS.parent))
    from machine_code import misled_products

    lines = ["UMOV UR4, 0x10", "UIADD3 UR6, UP1, {}, 0x40, URZ", "UMOV UR5, 0x0", "UMOV UR7, 0x0"]
    lines += ["HGMMA.64x32x16.F32.BF16 R24, gdesc[UR4], R24"]
    text = "".join(f"/*0{i}0*/ {x} ;\n" for i, x in enumerate(lines))
    assert misled_products(text.format("UR4")) == 0
    assert misled_products(text.format("UR6")) == 1
