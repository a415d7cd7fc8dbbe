"""How the text of a compiled program is read."""

import pytest

from pallas_kernels.compiled_program import Program, Shape, scopes

HLO = """\
HloModule jit_step

FileNames
1 "/home/me/site-packages/flax/nnx/linear.py"
2 "/home/me/detr_jax/losses.py"

FunctionNames
1 "f"

FileLocations
1 {file_name_id=1 function_name_id=1 line=7 end_line=7 column=1 end_column=2}
2 {file_name_id=2 function_name_id=1 line=42 end_line=42 column=1 end_column=2}

StackFrames
1 {file_location_id=2 parent_frame_id=1}
2 {file_location_id=1 parent_frame_id=1}

%fused.1 (p: f32[100,8], i: s32[]) -> f32[1,8] {
  %p = f32[100,8]{1,0:T(8,128)} parameter(0)
  %i = s32[]{:T(128)} parameter(1)
  ROOT %slice.1 = f32[1,8]{1,0:T(8,128)} dynamic-slice(%p, %i, %i), dynamic_slice_sizes={1,8}
}

%fused.2 (q: bf16[1,10,10,3], k: bf16[3,3,3,16]) -> bf16[1,5,5,16] {
  %q = bf16[1,10,10,3]{3,2,1,0:T(8,128)(2,1)} parameter(0)
  %k = bf16[3,3,3,16]{3,2,1,0:T(8,128)(2,1)} parameter(1)
  ROOT %conv.1 = bf16[1,5,5,16]{3,2,1,0} convolution(%q, %k), window={size=3x3 stride=2x2 pad=1_1x1_1}, \
dim_labels=b01f_01io->b01f
}

%body.1 (t: (s32[], f32[100,8])) -> (s32[], f32[100,8]) {
  %t = (s32[], f32[100,8]) parameter(0)
  %row = f32[1,8]{1,0:T(8,128)S(1)} fusion(%table, %n), kind=kLoop, calls=%fused.1, \
backend_config={"window_config":{"estimated_cycles":"5"}}
}

%condition.1 (t: (s32[], f32[100,8])) -> pred[] {
  %limit = s32[]{:T(128)} constant(3)
}

ENTRY %main.1 (table: f32[100,8]) -> f32[] {
  %table = f32[100,8]{1,0:T(8,128)} parameter(0)
  %n = s32[]{:T(128)} constant(1)
  %image = bf16[1,10,10,3]{3,2,1,0:T(8,128)(2,1)S(1)} parameter(1)
  %kernel = bf16[3,3,3,16]{3,2,1,0:T(8,128)(2,1)S(1)} parameter(2)
  %while.1 = (s32[], f32[100,8]{1,0}) while(%table), condition=%condition.1, body=%body.1
  %map = bf16[1,5,5,16]{3,2,1,0:T(8,128)(2,1)S(1)} fusion(%image, %kernel), kind=kOutput, calls=%fused.2, \
metadata={op_name="jit(step)/transpose(jvp(backbone))/stem/conv" stack_frame_id=2}, \
backend_config={"window_config":{"estimated_cycles":"100"}}
  %product = f32[100,4]{1,0} dot(%table, %weights), lhs_contracting_dims={1}, rhs_contracting_dims={0}
  %weights = f32[8,4]{1,0} constant({...})
  %sum.1 = f32[100,8]{1,0:T(8,128)} all-reduce(%table), replica_groups={{0,1},{2,3}}, to_apply=%add, \
metadata={op_name="jit(step)/update/add" stack_frame_id=1}
}
"""


@pytest.fixture(scope="module")
def program():
    return Program(HLO)


def operation(program, label):
    (found,) = [z for z in program.operations if z.instruction.label == label]
    return found


@pytest.mark.parametrize(
    ("shape", "size", "on_chip"),
    [
        (Shape("f32", (10, 3), "1,0:T(8,128)"), 16 * 128 * 4, False),
        (Shape("bf16", (3, 10), "0,1:T(8,128)(2,1)S(1)"), 128 * 16 * 2, True),
        (Shape("f32", (130,), "0:T(128)"), 256 * 4, False),
        (Shape("pred", (5, 5), ""), 25, False),
        (Shape("f32", (), ":T(128)"), 4, False),
    ],
)
def test_bytes_with_the_padding_of_tiles(shape, size, on_chip):
    assert (shape.stored_bytes, shape.on_chip) == (size, on_chip)


def test_a_loop_repeats_what_is_in_it_and_reads_only_the_rows_that_it_slices(program):
    row = operation(program, "row")
    assert (row.runs, row.cycles) == (3, 5)
    assert row.bytes == 8 * 128 * 4 + 4  # a tile of the table, and the number; the result is on the chip


def test_convolutions_count_what_is_not_padding(program):
    """Stride 2, padding 1: of 5 outputs, the first has 2 taps inside of the 10 rows, the others 3."""
    assert operation(program, "map").flops == 2 * 14 * 14 * 3 * 16
    assert operation(program, "map").bytes == 0
    assert operation(program, "product").flops == 2 * 100 * 4 * 8


def test_scopes_direction_and_source_line(program):
    made = operation(program, "map")
    assert (made.scopes, made.backward, made.source) == (("step", "backbone", "stem"), True, "losses.py:42")
    assert operation(program, "product").source == ""
    assert scopes("jit(step)/jvp(losses)/vmap(matching)/while/body/add") == (
        "step", "losses", "matching", "while", "body",
    )  # fmt: skip


def test_collectives_have_kind_bytes_and_place(program):
    (found,) = program.collectives
    assert (found.kind, found.bytes, found.runs, found.source) == ("all-reduce", 100 * 8 * 4, 1, "losses.py:42")


def test_a_collective_of_single_devices_is_none():
    alone = HLO.replace("replica_groups={{0,1},{2,3}}", "replica_groups={{0},{1}}")
    assert Program(alone).collectives == []
