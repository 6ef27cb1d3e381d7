"""Runs the PTX that Triton compiles kernels to on a CPU, and watches what it does.

`text` reads PTX, `semantics` says what an instruction computes, `memory` where its bytes are and
who may touch them, `machine` runs blocks of threads, `compiler` compiles kernels, `launches` sends
the launches of the host code here.
"""
