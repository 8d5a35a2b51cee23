"""The machine code of the CUDA kernels: it has no fault of a known kind, and is no worse than the budgets."""

from __future__ import annotations

import shutil
import subprocess
import sys
from dataclasses import dataclass, replace
from fnmatch import fnmatchcase
from pathlib import Path

import machine_code
import pytest
from machine_code import (
    ARCHITECTURES,
    Budgets,
    Instruction,
    Kernel,
    Measures,
    find_tool,
    measure,
    read_kernels,
    split_loads,
)

REPOSITORY = Path(__file__).parents[2]

# Faults that no kernel may have. Spilled registers and arrays indexed by variables both go through local memory.
RULES = {
    "local": "goes through local memory",
    "generic": "accesses memory whose kind is known only when it runs",
    "split": "loads in pieces what one wide load would do",
    "early": "waits for loads before it multiplies anything that would hide them",
}


@dataclass(frozen=True)
class Fault:
    """A known fault: a rule that kernels break today, a pattern of their names, and the reason."""

    rule: str
    kernels: str
    reason: str
    architectures: tuple[int, ...] = ARCHITECTURES


AMPERE, HOPPER, BLACKWELL = ARCHITECTURES

FAULTS = (
    Fault("local", "info_nce::multiply<TensorCores<float>, *TakeScores<float>>", "registers", (BLACKWELL,)),
    *(
        Fault("generic", f"info_nce::{kernel}", "ptxas merges addresses of parameters and results", (BLACKWELL,))
        for kernel in ("multiply<*TakeScores*", "finish_*", "measure_tiles<*", "put_positives<*", "scale_queries<*")
    ),
    Fault("local", "info_nce::contrast_sampled<double, double>", "registers", (AMPERE, HOPPER)),
    Fault("local", "info_nce::sum_sampled_keys<double, double>", "registers", (BLACKWELL,)),
    Fault("generic", "info_nce::contrast_sampled<*>", "ptxas merges addresses of parameters and keys", (BLACKWELL,)),
    Fault("generic", "info_nce::count_buckets", "ptxas merges addresses of targets and negatives", (BLACKWELL,)),
    Fault("local", "patches::extract_direct<double>", "registers", (BLACKWELL,)),
    Fault("local", "patches::extract_gathered<double>", "registers", (BLACKWELL,)),
    Fault(
        "generic", "patches::sum_patches<*, void, 1>", "ptxas merges addresses of slopes and gradients", (BLACKWELL,)
    ),
    # Channels that are not whole chunks of 16 bytes are copied value by value, values of two bytes through registers.
    *(
        Fault("early", f"masked_conv::multiply<TensorCores<{value}>, *, {loader}<{value}, false*", "odd channels")
        for value in ("BFloat16", "Half")
        for loader in ("VisibleTaps", "TapColumns")
    ),
    Fault("generic", "logistic_mixture::run_tiles<*>", "one code for parameters in shared memory and in global"),
    Fault("local", "logistic_mixture::sample_pixels", "a pixel's values are indexed by its channel"),
    Fault("early", "pixel_steps::run_steps<float>", "a step reads what is there only once the one before it is done"),
    Fault("split", "pixel_steps::run_steps<*>", "rows of weights that are no whole vectors are read one by one"),
    Fault("local", "augment::augment_patches<8, false>", "registers, where patches are in the workspace", (BLACKWELL,)),
)


@pytest.fixture
def tools() -> None:
    if missing := [name for name in ("cuobjdump", "nvdisasm") if find_tool(name) is None]:
        pytest.skip(f"no {' and no '.join(missing)}: cpc_ext[test] has them on Linux")
    if shutil.which("c++filt") is None:
        pytest.skip("no c++filt")


def broken_rules(kernels: dict[str, Kernel], architecture: int) -> list[str]:
    """Return complaints about faults that are not known, and about known faults that are mended."""
    measures = {name: measure(kernel) for name, kernel in kernels.items()}
    known = [fault for fault in FAULTS if architecture in fault.architectures]

    def covers(fault: Fault, rule: str, name: str) -> bool:
        return fault.rule == rule and fnmatchcase(name, fault.kernels)

    found = [(rule, name) for name in measures for rule in RULES if getattr(measures[name], rule) > 0]
    complaints = [
        f"{name} {RULES[rule]}: {rule} {getattr(measures[name], rule)}"
        for rule, name in found
        if not any(covers(fault, rule, name) for fault in known)
    ]
    mended = [fault for fault in known if not any(covers(fault, rule, name) for rule, name in found)]
    return complaints + [f"mended, take it out of FAULTS: {fault.rule} of {fault.kernels}" for fault in mended]


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_no_kernel_has_a_known_fault_or_is_over_budget(architecture, tools):
    module, nvcc = machine_code.compiled_module()
    if nvcc is None:
        pytest.skip(f"{module} has no CUDA code: built without nvcc")
    kernels = read_kernels(module, architecture)
    if not kernels:
        pytest.skip(f"{module} has no code for compute capability {architecture}")
    complaints = broken_rules(kernels, architecture)
    budgets = Budgets.load()
    if nvcc != budgets.nvcc:
        pytest.skip(f"the budgets are of nvcc {budgets.nvcc}, this is {nvcc}; without them: {complaints}")
    of_these = {name: budget for (sm, name), budget in budgets.measures.items() if sm == architecture}
    for name, kernel in kernels.items():
        lost = machine_code.worse_than(of_these[name], measure(kernel)) if name in of_these else ["no budget"]
        complaints += [f"{name}: {what}" for what in lost]
    complaints += [f"{name} has a budget and is gone" for name in of_these.keys() - kernels.keys()]
    assert not complaints, f"sm_{architecture}, see CONTRIBUTING.md, Machine code:\n" + "\n".join(complaints)


# --- The measures themselves ---


def test_planted_faults_are_found(tools, tmp_path):
    nvcc = find_tool("nvcc")
    if nvcc is None:
        pytest.skip("no nvcc")
    cubin = tmp_path / "planted.cubin"
    options = ("-std=c++20", "--expt-relaxed-constexpr", f"-I{REPOSITORY / 'csrc'}", "-arch=sm_90", "-cubin")
    subprocess.run([nvcc, *options, Path(__file__).with_name("planted_faults.cu"), "-o", cubin], check=True)
    found = {name: measure(kernel) for name, kernel in read_kernels(cubin, 90).items()}
    broken = {(name, rule) for name, measures in found.items() for rule in RULES if getattr(measures, rule) > 0}
    assert broken == {
        ("split_by_reference", "split"),
        ("local_array", "local"),
        ("generic_access", "generic"),
        ("prefetch<true>", "early"),
    }
    assert found["split_by_reference"].split % 8 == 0
    assert found["whole_by_value"].load_bytes == 16 * found["whole_by_value"].loads
    assert found["local_array"].stack == 64
    assert {name for name, measures in found.items() if measures.calls} == {"long_division"}
    for name, early in (("prefetch<true>", 1), ("prefetch<false>", 0)):
        one = found[name]
        assert (one.tensor, one.loads, one.waits, one.early) == (4, 1, 1, early)


def instruction(opcode, operands="", *, address=0, guard="", barrier=7, waits=0):
    return Instruction(address, guard, opcode, operands, barrier << 5 | waits << 11)


def code_of(*instructions):
    return [replace(given, address=16 * i) for i, given in enumerate(instructions)]


def test_a_module_without_cuda_code_is_named(tools, monkeypatch):
    python = Path(sys.executable)
    monkeypatch.setattr(machine_code, "compiled_module", lambda: (python, None))
    monkeypatch.setattr(sys, "argv", ["machine_code.py"])
    with pytest.raises(SystemExit, match=f"{python} has no code for sm_90: .* does not contain device code"):
        machine_code.main(machine_code.parse_arguments())


# Output of cuobjdump for 9.0: two loads, which set barriers 2 and 3, and an addition that waits for both.
PRINTED = """
\t\tFunction : _Z3addPKfPf
\t.headerflags\t@"EF_CUDA_SM90 EF_CUDA_VIRTUAL_SM(EF_CUDA_SM90)"
        /*0080*/                   LDG.E R0, desc[UR4][R2.64] ;          /* 0x0000000402007981 */
                                                                         /* 0x000ea8000c1e1900 */
        /*0090*/              @!P0 LDG.E R9, desc[UR4][R4.64+0x10] ;     /* 0x0000100404098981 */
                                                                         /* 0x000ee2000c1e1900 */
        /*00a0*/                   FADD R9, R0, R9 ;                     /* 0x0000000900097221 */
                                                                         /* 0x00cfca0000000000 */
"""


def test_instructions_and_their_schedule_are_read():
    (function, first), (_, second), (_, add) = machine_code.parse_code(PRINTED.splitlines())
    assert function == "_Z3addPKfPf"
    assert (first.address, first.guard, first.name, first.operands) == (0x80, "", "LDG", "R0, desc[UR4][R2.64]")
    assert (second.guard, second.opcode) == ("!P0", "LDG.E")
    assert (first.barrier, second.barrier, add.barrier) == (2, 3, None)
    assert [barrier for barrier in range(6) if add.waits_for(barrier)] == [2, 3]


@pytest.mark.parametrize(
    ("opcode", "width"),
    [("LDG.E", 4), ("LDG.E.U16.CONSTANT", 2), ("LDG.E.S8", 1), ("LDGSTS.E.BYPASS.128", 16), ("STS.64", 8)],
)
def test_widths_of_accesses(opcode, width):
    assert instruction(opcode).width == width


@pytest.mark.parametrize("product", ["HMMA.16816.F32", "FFMA", "DFMA"])
@pytest.mark.parametrize("staged", [True, False])
def test_loads_are_early_unless_products_lie_between(product, staged):
    hidden = instruction("LDG.E", "R1, [R2.64]", barrier=0)
    shown = instruction("LDG.E", "R3, [R4.64]", barrier=1)
    loop = code_of(
        instruction("FADD", "R5, R1, R1", waits=0b01),  # Waits for the load of the iteration before.
        hidden,
        *[instruction(product)] * 3,
        shown,
        instruction("FADD", "R5, R3, R3", waits=0b10),
        instruction("BAR.SYNC" if staged else "NOP"),
        instruction("DEPBAR.LE", "SB0, 0x2"),
        instruction("BRA", "0x0"),
    )
    measures = measure(Kernel("made", 90, 20, 0, 0, loop))
    assert (measures.loads, measures.waits, measures.ahead) == (2, 2, 2)
    # Without tensor cores, a loop that does not share what it loads is a sum, such as a dot product.
    assert measures.early == (1 if staged or measures.tensor else 0)
    assert (measures.tensor, measures.multiplies) == ((3, 0) if "HMMA" in product else (0, 3))


def test_a_few_multiply_adds_are_no_product():
    loop = code_of(*[instruction("FFMA")] * 2, *[instruction("IMAD")] * 7, instruction("BRA", "0x0"))
    assert measure(Kernel("made", 90, 20, 0, 0, loop)).multiplies == 0


def test_a_wait_for_fewer_copies_is_no_wait_for_a_load():
    assert instruction("DEPBAR.LE", "SB1, 0x0").waits_for(1)
    assert not instruction("DEPBAR.LE", "SB1, 0x2").waits_for(1)
    assert not instruction("DEPBAR.LE", "SB1, 0x0").waits_for(0)


def test_the_main_loop_is_the_smallest_around_the_products():
    nop, product = instruction("NOP"), instruction("HMMA.16816.F32", "")
    code = code_of(
        nop,
        instruction("LDG.E", "R1, [R2.64]"),  # 0x10: a loop that only loads.
        instruction("BRA", "0x10"),
        nop,  # 0x30: a loop around the products and around the inner loop.
        product,
        instruction("BRA", "0x40"),
        nop,
        instruction("BRA", "0x30"),
        instruction("BRA", "0x80"),  # The endless branch at the end of kernels.
    )
    kernel = Kernel("made", 90, 20, 0, 0, code)
    assert [(loop[0].address, loop[-1].address) for loop in kernel.loops] == [(0x10, 0x20), (0x30, 0x70), (0x40, 0x50)]
    assert (kernel.main_loop[0].address, kernel.main_loop[-1].address) == (0x40, 0x50)


def test_split_loads_are_neighbours_of_one_guard_in_one_block():
    def loads(*offsets, guard="", base="R2"):
        return [instruction("LDG.E.U16", f"R1, [{base}.64+{hex(at)}]", guard=guard) for at in offsets]

    assert [len(run) for run in split_loads(code_of(*loads(2, 0, 4, 6)))] == [4]
    assert not split_loads(code_of(*loads(0, 2, 4)))
    assert not split_loads(code_of(*loads(0, 2), *loads(4, 6, guard="P0")))
    assert not split_loads(code_of(*loads(0, 2), *loads(4, 6, base="R8")))
    assert not split_loads(code_of(*loads(0, 2), instruction("BRA", "0x500", guard="P0"), *loads(4, 6)))
    assert not split_loads(code_of(*loads(0, 4, 8, 12)))
    jumps = instruction("BRA", "0x20", guard="P0")  # To the third load, where another basic block begins.
    assert not split_loads(code_of(*loads(0, 2), *loads(4, 6), jumps))


MEASURES = Measures(40, 1024, 0, 0, 0, 0, 0, 100, 16, 0, 2, 4, 64, 1, 0, 2)


@pytest.mark.parametrize(
    ("change", "lost"),
    [
        ({"registers": 33}, ""),
        ({"registers": 41}, "registers 41, budget 40"),
        ({"loop": 105}, ""),
        ({"loop": 106}, "loop 106, budget 100"),
        ({"loop": 200, "tensor": 32, "loads": 8}, "loop 200, budget 100"),
        ({"tensor": 15}, "tensor 15 in a loop of 100, budget 16 in 100"),
        ({"loads": 4, "load_bytes": 32}, "4 loads of 32 bytes, budget 4 of 64"),
        ({"ahead": 1}, "ahead 1, budget 2"),
        ({"barriers": 3}, "barriers 3, budget 2"),
        ({"early": 1}, "early 1, budget 0"),
        ({"loop": 50, "barriers": 1, "loads": 2, "load_bytes": 32, "tensor": 8}, ""),
    ],
)
def test_what_is_worse_than_a_budget(change, lost):
    complaints = machine_code.worse_than(MEASURES, replace(MEASURES, **change))
    assert (lost in complaints) if lost else not complaints


def test_registers_are_handed_out_in_eights():
    assert not machine_code.worse_than(replace(MEASURES, registers=33), MEASURES)


def test_budgets_come_back_as_they_were_saved(tmp_path):
    budgets = Budgets("13.0", {(90, "op::kernel<float, Tile<2, 2>>"): MEASURES, (80, "op::other"): MEASURES})
    budgets.save(tmp_path / "budgets.csv")
    assert Budgets.load(tmp_path / "budgets.csv") == budgets


def test_names_are_as_in_the_sources(tools):
    mangled = (
        "_ZN3cpc11masked_conv4cuda15sum_weight_gradINS_4cuda11TensorCoresINS_4HalfEEENS1_4TileILi4ELi2ELb1EEEEEvPKT_"
    )
    assert machine_code.short_names([mangled]) == {
        mangled: "masked_conv::sum_weight_grad<TensorCores<Half>, Tile<4, 2, true>>"
    }
