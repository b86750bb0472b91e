"""What Triton's compiler makes of the token statistics' kernel for GPUs that are not here, and the speed that this allows.

Compiles for each architecture and reads the machine code: registers and spills of a thread, bytes of a load, instructions of
its loops for one vocabulary entry (a policy logit and a reference logit), and of those how many occupy the float32 units. From
the GPU's data sheet follows how fast its schedulers and its float32 units could go through the entries at best; "allows" is
the slower of the two over the memory bandwidth of the data sheet. Below 1, arithmetic and not memory would limit the kernel.
This bounds the speed and does not measure it: benchmarks/kl_function.py does, on a GPU.

    python benchmarks/kernel_code.py --json benchmarks/results/kernel_code.json
"""

import re
import subprocess
import tempfile
from collections import Counter
from itertools import product
from pathlib import Path

import triton
from report import arguments, show
from triton.backends.compiler import GPUTarget

import vimpo_verl.token_statistics.triton_careful as careful
import vimpo_verl.token_statistics.triton_kernel as usual

# Of NVIDIA's data sheets and architecture papers: compute capability, processors, float32 lanes of a processor, GHz, TB/s.
GPUS = {
    "A100 80 GB": (80, 108, 64, 1.41, 2.04),
    "H100 SXM": (90, 132, 128, 1.98, 3.35),
    "H200 SXM": (90, 132, 128, 1.98, 4.8),
}
ISSUED = 128  # threads of a processor that get an instruction in a cycle: four schedulers, a warp each
KERNELS = {
    "usual": (usual.token_statistics_kernel, usual.BLOCK, usual.WARPS),
    "careful": (careful.careful_token_statistics_kernel, careful.CAREFUL_BLOCK, careful.CAREFUL_WARPS),
}
DTYPES = {"bfloat16": ("bf16", 2), "float32": ("fp32", 4)}
FLOAT32 = ("FADD", "FMUL", "FFMA", "FMNMX", "FSEL", "FSETP")
TOOLS = Path(triton.__file__).parent / "backends/nvidia/bin"


def compiled(name: str, dtype: str, capability: int, temperature: bool):
    """Triton's compiler on the kernel as it is launched, pointers and strides divisible by 16."""
    kernel, block, warps = KERNELS[name]
    types = dict.fromkeys(("policy_ptr", "ref_ptr"), f"*{dtype}")
    types |= {"labels_ptr": "*i64", "redo_ptr": "*i8", "out_ptr": "*fp32"}
    types["temperature_ptr"] = "*fp32" if temperature else "*i64"  # without one, the labels stand in its place
    signature = {
        argument: "constexpr" if argument.isupper() else types.get(argument, "i32") for argument in kernel.arg_names
    }
    aligned = {(i,): [["tt.divisibility", 16]] for i, kind in enumerate(signature.values()) if kind != "constexpr"}
    constants = {"HAS_TEMPERATURE": temperature, "BLOCK": block}
    if name == "usual":
        constants["STAGES"] = usual.STAGES
    source = triton.compiler.ASTSource(kernel, signature, constexprs=constants, attrs=aligned)
    options = {"num_warps": warps, **usual.COMPILER_OPTIONS}
    return triton.compile(source, target=GPUTarget("cuda", capability, 32), options=options)


def machine_code(cubin: bytes) -> tuple[list[str], dict[str, int]]:
    """Instructions of the innermost loops, those over the vocabulary, of which the careful kernel has two; REG, STACK, ..."""
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        listing = subprocess.run([TOOLS / "nvdisasm", "-c", file.name], check=True, capture_output=True, text=True)
        usage = subprocess.run([TOOLS / "cuobjdump", "-res-usage", file.name], capture_output=True, text=True)
    resources = {name: int(value) for name, value in re.findall(r"(\w+):(\d+)", usage.stdout + usage.stderr)}
    instructions, labels, in_loops = [], {}, []
    for line in listing.stdout.splitlines():
        if label := re.match(r"\s*(\.L_x_\d+):", line):
            labels[label[1]] = len(instructions)
        if instruction := re.search(r"/\*[0-9a-f]{4,}\*/\s+(?:@!?U?P\w+\s+)?(.*?)\s*;", line):
            instructions.append(instruction[1])
    loops = []
    for end, instruction in enumerate(instructions):
        target = re.search(r"BRA.*(\.L_x_\d+)", instruction)
        if target and labels.get(target[1], end) < end:
            loops.append((labels[target[1]], end))
    for start, end in loops:
        if not any(start <= first and last < end for first, last in loops):  # the one around it reads a row again
            in_loops += instructions[start : end + 1]
    return in_loops, resources


def row(gpu: str, name: str, dtype: str, temperature: bool) -> dict:
    capability, processors, lanes, clock, bandwidth = GPUS[gpu]
    triton_dtype, itemsize = DTYPES[dtype]
    _, block, warps = KERNELS[name]
    code, resources = machine_code(compiled(name, triton_dtype, capability, temperature).asm["cubin"])
    entries = block / (32 * warps)
    names = Counter(instruction.split()[0].split(".")[0] for instruction in code)
    loads = [
        re.match(r"LDG\S*?\.(\d+)\b", instruction) for instruction in code if re.match(r"LDG(STS)?\.", instruction)
    ]
    arithmetic = sum(names[kind] for kind in FLOAT32)
    cycles = max(len(code) / ISSUED, arithmetic / lanes) / entries
    read = (2 if name == "careful" else 1) * 2 * itemsize  # bytes an entry
    return {
        "gpu": gpu,
        "kernel": name,
        "dtype": dtype,
        "temperature": temperature,
        "registers": resources["REG"],
        "spilled bytes": resources["STACK"] + resources["LOCAL"],
        "loads in its loops": len(loads),
        "bytes a load": min(int(load[1]) // 8 if load else 4 for load in loads),
        "instructions an entry": len(code) / entries,
        "float32 instructions an entry": arithmetic / entries,
        "allows, of the memory bandwidth": processors * clock * 1e9 / cycles * read / (bandwidth * 1e12),
    }


def main() -> None:
    options = arguments(
        __doc__.splitlines()[0], dtype=list(DTYPES), kernel=list(KERNELS), gpu=list(GPUS), temperature=[0]
    )  # fmt: skip
    grid = product(options.gpu, options.kernel, options.dtype, map(bool, options.temperature))
    rows = [row(*point) for point in grid]
    show("Machine code of the token statistics' kernels", rows, options.json)


if __name__ == "__main__":
    main()
