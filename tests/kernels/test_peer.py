"""The estimate by which a peer's kernels are compared with ours counts what closed forms say."""

import os
import pathlib
import subprocess
import sys

import pytest

BENCHMARKS = pathlib.Path(__file__).parents[2] / "benchmarks"
# A loop of ten instructions between two, behind a return and with a condition, as a disassembly
# names their lines. The jump back names the loop's line, one instruction comes from a function.
ASSEMBLY = """
	//## File "kernel.py", line 3
        /*0000*/                   IMAD R1, R2, R3, R4 ;
	//## File "kernel.py", line 5
        /*0010*/                   LDG R1, [R2] ;
.L_x_0:
	//## File "helper.py", line 90 inlined at "kernel.py", line 7
	//## File "kernel.py", line 7
        /*0020*/                   FADD R1, R2, R3 ;
	//## File "kernel.py", line 9
        /*0030*/                   FADD R1, R2, R3 ;
        /*0040*/                   FADD R1, R2, R3 ;
	//## File "kernel.py", line 10
        /*0050*/                   FADD R1, R2, R3 ;
        /*0060*/                   FADD R1, R2, R3 ;
        /*0070*/                   FADD R1, R2, R3 ;
        /*0080*/                   FADD R1, R2, R3 ;
        /*0090*/                   FADD R1, R2, R3 ;
        /*00a0*/                   FADD R1, R2, R3 ;
	//## File "kernel.py", line {jump}
        /*00b0*/              @!P0 BRA `(.L_x_0) ;
	//## File "kernel.py", line 11
        /*00c0*/                   STG [R2], R1 ;
        /*00d0*/                   NOP ;
"""


@pytest.fixture(autouse=True)
def _path(monkeypatch):
    monkeypatch.syspath_prepend(str(BENCHMARKS))


def _ran(*command: str) -> str:
    """What a process prints whose Triton compiles."""
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    path = [str(BENCHMARKS), environment.get("PYTHONPATH", "")]
    environment["PYTHONPATH"] = os.pathsep.join(filter(None, path))
    done = subprocess.run(
        [sys.executable, *command], env=environment, capture_output=True, text=True
    )
    assert done.returncode in (0, 1), done.stderr[-3000:]
    return done.stdout


def _touched():
    """Eight programs, two of which return; the others' loops run four times, half of these with
    the condition."""
    from traffic import Block, Touched

    touched = Touched()
    touched.programs = 8
    for block, reached, run in (
        (Block("kernel.py", 4, 4, 4, False, 11), 8, 2),
        (Block("kernel.py", 6, 7, 10, True, 0), 6, 24),
        (Block("kernel.py", 8, 9, 9, False, 0), 24, 12),
        # Of a function: each of its calls may decide otherwise.
        (Block("helper.py", 89, 90, 90, False, 0), 24, 12),
    ):
        touched.reached[block], touched.run[block] = reached, run
    return touched


def test_an_instruction_counts_as_often_as_loops_and_conditions_run():
    from machine_code import parse
    from peer import issued

    # In the loop: one instruction, two under the condition, six and the jump.
    each = 1 + 0.75 * (1 + 4 * (1 + 0.5 * 2 + 6 + 1) + 1)
    # The jump may be counted to a line inside of the loop.
    for jump in (6, 10):
        listing = parse(ASSEMBLY.format(jump=jump))
        assert issued(listing, _touched()) == pytest.approx(each)


def test_a_loop_that_the_source_does_not_have_is_an_error():
    from machine_code import parse
    from peer import issued

    with pytest.raises(RuntimeError, match="is not one loop of the source"):
        issued(parse(ASSEMBLY.format(jump=11)), _touched())


def test_the_slower_of_memory_and_schedulers_decides():
    from peer import BANDWIDTH, ISSUE, Cost

    bound = Cost.of("memory", BANDWIDTH, ISSUE / 2), Cost.of("schedulers", BANDWIDTH / 2, ISSUE * 3)
    assert [x.seconds for x in bound] == [1.0, 3.0]
    assert Cost.total("both", bound) == ("both", 1.5 * BANDWIDTH, 3.5 * ISSUE, 4.0)


def test_blocks_of_a_kernel_run_as_often_as_its_chunks():
    """The walk over a sequence of two chunks, in four programs."""
    from traffic import of_case, touched_by

    (launch,) = (
        x
        for x in of_case("linear/none", 128, "sm_90")["forward"].launches
        if x.kernel.__name__ == "linear_state_kernel"
    )
    touched = touched_by(launch)
    assert touched.programs == 4
    (loop,) = (x for x in touched.reached if x.loops)
    assert loop.file.endswith("linear.py")
    assert (touched.reached[loop], touched.run[loop]) == (4, 8)
    # Neither an initial state nor packed sequences, by conditions that are known when compiled.
    shares = {touched.run[x] / touched.reached[x] for x in touched.reached if not x.loops}
    assert shares <= {0.0, 1.0}


@pytest.mark.slow
def test_a_walk_issues_its_loop_once_a_chunk():
    """From machine code: what a chunk adds is the loop of the walk, in every warp and program."""
    program = """
import machine_code, peer, traffic

recorded = peer.ours(traffic.CASES["linear/none"](), (128, 128))
few, many = (
    peer.Launched(*(recorded(tokens, x)["forward"].launches[0] for x in (1, peer.HEADS)))
    for tokens in (64, 128)
)
code = machine_code.assemble(many.all, "sm_90")
opcodes = machine_code.main_loop(machine_code.parse(code.text))
expected = len(opcodes) * many.all.tiles.num_warps * 4 / 64
print(few.one.kernel.__name__, expected, peer.of_launch(few, many))
"""
    name, expected, *cost = _ran("-c", program).split(maxsplit=2)
    assert name == "linear_state_kernel"
    assert f"slots={expected}," in cost[0]
    # Keys and values once for each of two tiles of the other, a state of 16 bits for 64 tokens.
    assert f"bytes={2 * 2 * (128 + 128) + 2 * 128 * 128 / 64}," in cost[0]


@pytest.mark.slow
def test_what_the_peer_moves_is_counted_as_ours_is():
    """Of linear attention: operands and states as often as the tiles of its kernels read them."""
    pytest.importorskip("fla")
    options = "--peer fla --case ^linear$ --shape 64/64 --passes"
    printed = _ran(str(BENCHMARKS / "census.py"), *options.split())
    size, state = 64, 64 * 64 * 2 // 64
    # One tile of keys and values: k and v read and a state written, then q, k, v and it read.
    walk, output = 2 * 2 * size + state, 4 * 2 * size + state
    for name, moved in (("chunk_fwd_kernel_h", walk), ("chunk_fwd_kernel_o", output)):
        assert f"linear 64/64 forward, other: {name} {moved} B" in printed
