"""Compiles the kernels for GPUs that need not be there and prints what each needs, one JSON object a line.

Run as a program, with TRITON_INTERPRET unset: `python compile_kernels.py CAPABILITY DTYPE HEADDIM D_STATE`.
"""

import json
import re
import subprocess
import sys
import tempfile
from pathlib import Path

import torch
import triton
from mamba2_dist.kernels.conv1d.gpu import kernels as conv
from mamba2_dist.kernels.conv1d.gpu import ops as conv_ops
from mamba2_dist.kernels.norm.gpu import kernels as norm
from mamba2_dist.kernels.norm.gpu import ops as norm_ops
from mamba2_dist.kernels.ssd.gpu import backward, chunk_backward, config, forward, gate, scan, steps, sweep
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

DTYPES = {"bfloat16": ("bf16", torch.bfloat16), "float16": ("fp16", torch.float16), "float32": ("fp32", torch.float32)}
STATES = {"h_ptr", "dh_ptr"}
# pointers that hold the dtype of x; the others hold float32, and indices int32
IN_X_DTYPE = {
    "x_ptr", "dy_ptr", "z_ptr", "B_ptr", "C_ptr", "h_ptr", "dh_ptr", "dx_ptr", "y_ptr", "ungated_ptr", "Q_ptr",
    "dt_ptr", "ddt_ptr", "d_ungated_ptr", "dz_ptr", "dB_ptr", "dC_ptr", "y0_ptr", "y1_ptr", "y2_ptr", "dy0_ptr",
    "dy1_ptr", "dy2_ptr", "added_ptr", "d_added_ptr",
}  # fmt: skip


# numbers get their types from their values, so that two of one meaning may differ
KINDS = {"low": "fp32", "high": "fp32", "x_row_stride": "i64", "eps": "fp32", "per_channel": "fp32"}
STRIDES = {"B_group_stride": 1}


def cases(choice, dtype):
    """Every kernel with the constants that make it largest."""
    precision = "tf32x3" if dtype == torch.float32 else "tf32"
    scaled = {"SCALED": dtype != torch.float32}
    state = {"P": choice.P, "PT": choice.P_tiles, "PRECISION": precision}
    yield (
        "sweep", sweep.sweep_kernel, choice.sweep,
        state | {"L": choice.chunk, "N": choice.sweep_N, "NT": choice.N // choice.sweep_N, "HAS_ROWS": True,
                 "STORE": True, **scaled, "PREFETCH": True},
    )  # fmt: skip
    for gated in (False, True):
        yield (
            f"scan{'_gated' * gated}", scan.scan_kernel, choice.scan,
            state | {"L": choice.scan_chunk, "N": choice.N, "HAS_D": True, "HAS_Z": gated, "KEEP_UNGATED": gated,
                     "PREFETCH": True},
        )  # fmt: skip
    chunk = state | {"L": choice.chunk, "N": choice.N, "FLAT": True}
    blocks = chunk | {"K": choice.block}
    yield "pairs", chunk_backward.pairs_kernel, choice.pairs, blocks | {"STAGES": choice.pairs.stages}
    yield (
        "dx",
        chunk_backward.dx_kernel,
        choice.dx,
        blocks | {**scaled, "HAS_DY": True, "HAS_D": True, "STAGES": choice.dx.stages},
    )
    yield (
        "outside", chunk_backward.outside_kernel, choice.outside,
        chunk | scaled | {"HAS_DY": True, "ADD": True, "STAGES": choice.outside.stages},
    )  # fmt: skip
    few = config.Launch(4, 3)
    step = {"L": choice.chunk, "HAS_BIAS": True, "SOFTPLUS": True}
    yield "discretize", steps.discretize_kernel, few, step | {"H": forward.HEADS_PER_STEP_PROGRAM}
    tiles = {"K": choice.block, "P": choice.P, "PT": choice.P_tiles}
    more = tiles | {"H": backward.HEADS_PER_PROGRAM}
    yield "discretize_backward", steps.discretize_backward_kernel, few, step | more
    size = choice.N * choice.P * choice.P_tiles
    yield "pass", sweep.pass_kernel, few, {"SIZE": size, "BLOCK": min(size, 1024), "REVERSE": False, "STORE": True}
    yield "sum_chunks", steps.sum_chunks_kernel, few, {"ROWS": 128, "COLUMNS": 16}
    yield "skip", chunk_backward.skip_kernel, few, {"L": choice.chunk, "P": choice.P, "PT": choice.P_tiles}
    channels = choice.state_shape[0]
    gated = {"T": backward.GATED_TILE // channels, "P": channels, "HAS_D": True}
    yield "gate_backward", gate.gate_backward_kernel, few, gated
    yield from others(dtype)


def others(dtype):
    """The convolution and the norms, which depend on none of these sizes."""
    flags = {"WIDTH": 4, "HAS_BIAS": True, "HAS_STATE": True, "SILU": True}
    for name, kernel, how in (
        ("conv", conv.conv_kernel, conv_ops.FORWARD), ("conv_backward", conv.conv_backward_kernel, conv_ops.BACKWARD)
    ):  # fmt: skip
        launch = config.Launch(how.warps, how.stages)
        for width in (1, 8):
            widths = {"WIDTH": width, "BLOCK": how.channels, "UNROLL": how.unroll, "STAGES": how.stages}
            yield f"{name}_{width}", kernel, launch, flags | widths
        yield name, kernel, launch, flags | {"BLOCK": how.channels, "UNROLL": how.unroll, "STAGES": how.stages}
    for group_size, gated in ((5120, True), (1024, True), (2560, False)):
        for reverse in (False, True):
            tiles = norm_ops.tiles_for(group_size, 3 * dtype.itemsize if reverse else 0)
            constants = {"ROWS": tiles.rows, "BLOCK": tiles.block, "TILES": tiles.count, "STAGES": tiles.stages,
                         "HAS_Z": gated, "BEFORE": False, "HAS_ADDED": not gated}  # fmt: skip
            how = {"HAS_CARRIED": not gated, "PRODUCTS": "here"} if reverse else {"SQUARES": "here"}
            kernel = norm.norm_backward_kernel if reverse else norm.norm_kernel
            name = f"norm{'_backward' * reverse}_{group_size}"
            yield name, kernel, config.Launch(tiles.warps, tiles.stages), constants | how


def compile_kernel(kernel, launch, constants, dtype, capability):
    constants = {name: value for name, value in STRIDES.items() if name in kernel.arg_names} | constants
    kinds = dict.fromkeys(IN_X_DTYPE, dtype)
    if constants.get("SCALED"):
        kinds |= dict.fromkeys(STATES, "fp16")
    signature = {}
    for name in kernel.arg_names:
        if name in constants:
            signature[name] = "constexpr"
        elif name.endswith("_ptr"):
            integers = name in ("chunks_ptr", "spans_ptr", "documents_ptr", "blocks_ptr") or "index" in name
            signature[name] = "*i32" if integers else f"*{kinds.get(name, 'fp32')}"
        else:
            signature[name] = KINDS.get(name, "i32")
    sizes = ("_stride", "group_size", "size0", "size1", "size2")
    even = [name for name, kind in signature.items() if kind.startswith("*") or name.endswith(sizes)]
    source = ASTSource(
        fn=kernel,
        signature=signature,
        constexprs=constants,
        attrs={(kernel.arg_names.index(name),): [["tt.divisibility", 16]] for name in even},
    )
    options = {"num_warps": launch.warps, "num_stages": launch.stages, "maxnreg": launch.registers}
    return triton.compile(source, target=GPUTarget("cuda", capability, 32), options=options)


def resources(compiled):
    """Registers and stack bytes of a thread, shared memory of a program."""
    tool = next((Path(triton.__file__).parent / "backends/nvidia/bin").glob("cuobjdump*"))
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(compiled.asm["cubin"])
        file.flush()
        usage = subprocess.run([tool, "-res-usage", file.name], capture_output=True, text=True, check=True).stdout
    registers, stack = re.search(r"REG:(\d+) STACK:(\d+)", usage).groups()
    ptx = compiled.asm["ptx"]
    return {
        "registers": int(registers), "stack": int(stack), "shared": compiled.metadata.shared,
        "wgmma": ptx.count("wgmma.mma_async"), "tma": ptx.count("cp.async.bulk.tensor"),
    }  # fmt: skip


if __name__ == "__main__":
    capability, dtype, headdim, d_state = int(sys.argv[1]), sys.argv[2], int(sys.argv[3]), int(sys.argv[4])
    short, torch_dtype = DTYPES[dtype]
    choice = config.choose(headdim, d_state, torch_dtype, capability)
    for name, kernel, launch, constants in cases(choice, torch_dtype):
        compiled = compile_kernel(kernel, launch, constants, short, capability)
        print(json.dumps({"kernel": name, "warps": launch.warps, **resources(compiled)}), flush=True)
