"""What the compiled code says of itself: occupancy worked by hand, instructions read from assembly, the table kept."""

import csv
import re

import pytest

pytest.importorskip("triton")

from benchmarks import static, variants
from benchmarks.static import Occupancy, Row, occupancy
from benchmarks.variants import Measured, Variant, asynchronous_copies, matrix_instructions

TARGETS = ("sm_80", "sm_90", "sm_100", "gfx942")


@pytest.mark.parametrize(
    ("arch", "used", "expected"),
    [
        # 172 registers take 176; 512 // 176 = 2 warps in each of 4 partitions; 164 KB hold two programs of 57 + 1 KB
        ("sm_80", (4, 172, 57 * 1024), Occupancy(2, 8 / 64, "registers and shared memory")),
        ("sm_80", (4, 172, 32 * 1024), Occupancy(2, 8 / 64, "registers")),
        # 129 registers take 136 and leave room for 3 warps in a partition, 128 for 4
        ("sm_90", (4, 129, 0), Occupancy(3, 12 / 64, "registers")),
        ("sm_90", (4, 128, 0), Occupancy(4, 16 / 64, "registers")),
        # three programs of 75 + 1 KB are all of 228 KB: without the reserved kilobyte 76 KB would fit three times too
        ("sm_90", (4, 32, 75 * 1024), Occupancy(3, 12 / 64, "shared memory")),
        ("sm_90", (4, 32, 76 * 1024), Occupancy(2, 8 / 64, "shared memory")),
        # 32 registers: 16 warps in each partition
        ("sm_90", (8, 32, 0), Occupancy(8, 1.0, "registers and warps")),
        ("sm_90", (1, 24, 0), Occupancy(32, 32 / 64, "programs")),
        # 255 registers take 256 of 512; a SIMD of gfx942 runs 8 waves at most
        ("gfx942", (8, 255, 16 * 1024), Occupancy(1, 8 / 32, "registers")),
        ("gfx942", (4, 64, 16 * 1024), Occupancy(4, 16 / 32, "shared memory")),
        ("gfx942", (4, 24, 1024), Occupancy(8, 1.0, "warps")),
        ("gfx942", (4, 24, 65 * 1024), Occupancy(0, 0.0, "shared memory")),
    ],
)
def test_occupancy_equals_hand_computation(arch, used, expected):
    warps, registers, shared = used
    assert occupancy(arch, warps=warps, registers=registers, shared=shared) == expected


def test_tensor_memory_limits_programs():
    assert occupancy("sm_100", warps=4, registers=64, shared=0, tensor_memory=256) == (2, 8 / 64, "tensor memory")


@pytest.mark.parametrize(
    ("line", "expected"),
    [
        ("mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 { %r1 }", "mma.sync m16n8k16"),
        ("wgmma.mma_async.sync.aligned.m64n32k16.f32.bf16.bf16 {%r1}", "wgmma m64n32k16"),
        ("wgmma.fence.sync.aligned;", "none (fma)"),
        ("@%p1 tcgen05.mma.cta_group::1.kind::f16 [ %r1 + 0 ], %rd1", "tcgen05 f16"),
        ("tcgen05.ld.sync.aligned.16x32bx2.x16.b32 {%r1}", "none (fma)"),
        ("v_mfma_f32_32x32x8_bf16 v[0:15], v[16:17], v[18:19], 0", "mfma 32x32x8"),
        ("v_mfma_f32_16x16x4_f32 a[0:3], v4, v5, 0", "mfma 16x16x4"),
        ("fma.rn.f32 %f1, %f2, %f3, %f4;", "none (fma)"),
        ("v_pk_fma_f32 v[0:1], v[2:3], v[4:5], v[6:7]", "none (fma)"),
    ],
)
def test_matrix_instruction_is_read_from_assembly(line, expected):
    assert matrix_instructions(f"\t{line}\n\t{line}\n") == expected


def test_every_kind_of_matrix_instruction_is_named():
    both = "mma.sync.aligned.m16n8k16.row.col\nwgmma.mma_async.sync.aligned.m64n64k16.f32\nmma.sync.aligned.m16n8k8.row"
    assert matrix_instructions(both) == "wgmma m64n64k16 + mma.sync m16n8k16 + mma.sync m16n8k8"


@pytest.mark.parametrize(
    ("line", "expected"),
    [
        ("cp.async.cg.shared.global [ %r1 + 0 ], [ %rd1 + 0 ], 0x10, %r2;", "cp.async"),
        ("cp.async.commit_group;", "none"),
        ("cp.async.bulk.tensor.2d.shared::cluster.global.mbarrier [%r1], [%rd1]", "TMA"),
        ("buffer_load_dwordx4 v1, s[0:3], 0 offen lds", "load to LDS"),
        ("global_load_lds_dwordx4 v[2:3], off", "load to LDS"),
        ("global_load_dwordx4 v[0:3], v[4:5], off", "none"),
        ("ld.global.v4.b32 { %r1, %r2, %r3, %r4 }, [ %rd1 + 0 ];", "none"),
    ],
)
def test_asynchronous_copy_is_read_from_assembly(line, expected):
    assert asynchronous_copies(line) == expected


@pytest.mark.parametrize(
    ("target", "matrix", "copies"),
    [
        ("sm_80", "mma.sync", "cp.async"),
        ("sm_90", "wgmma", "cp.async"),
        ("sm_100", "tcgen05", "cp.async"),
        ("gfx942", "mfma", "none"),
    ],
)
def test_many_rows_use_the_matrix_instruction_of_the_target(target, matrix, copies):
    measured = variants.measure(most_rows(target))
    row = Row.of(measured)
    assert row.matrix.split()[0] == matrix
    assert row.copies == copies
    assert row.programs >= 1
    assert (measured.tensor_memory > 0) == (matrix == "tcgen05")


def test_occupancy_agrees_with_the_amd_compiler():
    variant = most_rows("gfx942")
    compiled = variants.compile_variant(variant)
    waves = int(re.search(r"; Occupancy: (\d+)", compiled.asm["amdgcn"])[1])  # per SIMD, of registers alone
    measured = variants.read_amd(variant, compiled)
    assert occupancy("gfx942", warps=4, registers=measured.registers, shared=0).share * 8 == waves


def most_rows(target):
    return Variant(target, "attention_contribution_split", "bf16", 128, 128, 16, "none").fullest[-1]


def test_two_programs_of_64_rows_share_a_multiprocessor_of_an_h100():
    variant = most_rows("sm_90")
    assert variant.rows == 64
    assert Row.of(variants.measure(variant)).programs == 2


@pytest.mark.parametrize("target", TARGETS)
def test_every_kernel_and_every_way_to_sum_spans_is_compiled(target):
    shipped = list(variants.variants([target]))
    assert {variant.kernel for variant in shipped} == set(variants.KERNELS)
    for kernel in ("attention_contribution_split", "ov_contribution_split"):
        unrolled = {variants.UNROLLED_SPANS[v.features] for v in shipped if v.kernel == kernel and v.rows > 16}
        assert unrolled == {0, 1, 16}
    assert len(set(shipped)) == len(shipped)


def test_file_keeps_other_targets_and_replaces_what_was_run(tmp_path):
    path = tmp_path / "static.csv"
    static.write(path, [row("sm_90", 16, 90), row("sm_90", 64, 91), row("sm_80", 16, 80)], whole=["sm_80", "sm_90"])
    static.write(path, [row("sm_90", 64, 92)], whole=[])
    assert registers(path) == {("sm_80", 16): 80, ("sm_90", 16): 90, ("sm_90", 64): 92}
    static.write(path, [row("sm_90", 64, 93)], whole=["sm_90"])
    assert registers(path) == {("sm_80", 16): 80, ("sm_90", 64): 93}


def row(target, rows, registers):
    variant = Variant(target, "span_output", "bf16", 128, 128, rows, "none")
    matrix, copies = "mma.sync m16n8k16", "none"
    return Row.of(Measured(variant, 4, registers, 0, 1024, 0, wide=1, narrow=0, matrix=matrix, copies=copies))


def registers(path):
    with path.open(newline="") as file:
        table = list(csv.DictReader(file))
    assert all(entry["triton"] and entry["commit"] and entry["date"] for entry in table)
    return {(entry["target"], int(entry["rows"])): int(entry["registers"]) for entry in table}


def test_sentence_counts_the_variants_of_a_target():
    rows = [row("sm_90", 16, 128), row("sm_90", 64, 129)._replace(matrix="none (fma)")]
    assert static.sentence("sm_90", rows) == (
        "sm_90: 2 variants; matrix instructions: mma.sync in 1, none (fma) in 1; asynchronous copies: none in 2; "
        "19% to 25% of the warps resident, limited by registers in 2; none with spills."
    )
