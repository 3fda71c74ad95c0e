"""Collectives in the text of a program: loops, asynchronous pairs, fusions, all ways of groups."""

import pytest

from moi_jax.accounting.collectives import count_collectives
from moi_jax.accounting.hlo import shape_bytes

# Two loops, one in the other. The outer one runs 3 times (0, 2, 4 are less than 5). The inner one
# runs 4 times, from 0 to 3, and passes 64 numbers of 4 bytes around: a windowed matrix product.
NESTED = """HloModule step, is_scheduled=true

%inner_body (p: (s32[], f32[64])) -> (s32[], f32[64]) {
  %p = (s32[], f32[64]{0:T(128)}) parameter(0)
  %i = s32[] get-tuple-element(%p), index=0
  %one = s32[] constant(1)
  %next = s32[] add(%i, %one)
  %x = f32[64]{0:T(128)} get-tuple-element(%p), index=1
  %send = (f32[64], f32[64], u32[]) collective-permute-start(%x), source_target_pairs={{0,1},{1,0}}
  %got = f32[64]{0} collective-permute-done(%send)
  ROOT %t = (s32[], f32[64]{0}) tuple(%next, %got)
}

%inner_condition (p.1: (s32[], f32[64])) -> pred[] {
  %p.1 = (s32[], f32[64]{0}) parameter(0)
  %i.1 = s32[] get-tuple-element(%p.1), index=0
  %limit = s32[] constant(3)
  ROOT %go = pred[] compare(%i.1, %limit), direction=LE
}

%outer_body (q: (f32[64], s32[])) -> (f32[64], s32[]) {
  %q = (f32[64]{0}, s32[]) parameter(0)
  %x.1 = f32[64]{0} get-tuple-element(%q), index=0
  %j = s32[] get-tuple-element(%q), index=1
  %one.1 = s32[] constant(1)
  %step = s32[] add(%j, %one.1)
  %step.1 = s32[] add(%one.1, %step)
  %zero = s32[] constant(0)
  %copied = s32[] copy(%zero)
  %start = (s32[], f32[64]{0}) tuple(%copied, %x.1)
  %loop = (s32[], f32[64]{0}) while(%start), condition=%inner_condition, body=%inner_body
  %y = f32[64]{0} get-tuple-element(%loop), index=1
  %sum = f32[64]{0} all-reduce(%y), channel_id=2, replica_groups=[2,4]<=[8], to_apply=%add
  ROOT %t.1 = (f32[64]{0}, s32[]) tuple(%sum, %step.1)
}

%outer_condition (q.1: (f32[64], s32[])) -> pred[] {
  %q.1 = (f32[64]{0}, s32[]) parameter(0)
  %j.1 = s32[] get-tuple-element(%q.1), index=1
  %limit.1 = s32[] constant(5)
  ROOT %go.1 = pred[] compare(%j.1, %limit.1), direction=LT
}

%all-reduce-scatter.1 (r: bf16[64,8]) -> bf16[32,8] {
  %r = bf16[64,8]{1,0} parameter(0)
  %reduced = bf16[64,8]{1,0} all-reduce(%r), replica_groups={{0,1}}, to_apply=%add
  ROOT %part = bf16[32,8]{1,0} dynamic-slice(%reduced), dynamic_slice_sizes={32,8}
}

%async_start (s: f32[16]) -> f32[64] {
  %s = f32[16]{0} parameter(0)
  ROOT %g = f32[64]{0} all-gather(%s), channel_id=9, replica_groups={{0,1,2,3}}, dimensions={0}
}

%async_end (s.1: f32[16]) -> f32[64] {
  %s.1 = f32[16]{0} parameter(0)
  ROOT %g.1 = f32[64]{0} all-gather(%s.1), channel_id=9, replica_groups={{0,1,2,3}}, dimensions={0}
}

ENTRY %main (a: f32[64], b: bf16[64,8]) -> f32[64] {
  %a = f32[64]{0} parameter(0)
  %b = bf16[64,8]{1,0} parameter(1)
  %first = s32[] constant(0)
  %begin = (f32[64]{0}, /*index=1*/s32[]) tuple(%a, %first)
  %steps = (f32[64]{0}, s32[]) while(%begin), condition=%outer_condition, body=%outer_body
  %gather = (bf16[64,8], bf16[256,8]) all-gather-start(%b), replica_groups=mesh['x'=4,'y'=2] {'x'}
  %whole = bf16[256,8]{1,0} all-gather-done(%gather)
  %scattered = bf16[32,8]{1,0} fusion(%b), kind=kCustom, calls=%all-reduce-scatter.1
  %quarter = f32[16]{0} slice(%a), slice={[0:16]}
  %begun = f32[64]{0} fusion(%quarter), kind=kCustom, calls=%async_start
  %ended = f32[64]{0} fusion(%quarter), kind=kCustom, calls=%async_end
  %alone = f32[64]{0} all-reduce(%a), replica_groups={{0},{1}}, to_apply=%add
  ROOT %out = f32[64]{0} get-tuple-element(%steps), index=0
}
"""


def test_collectives_are_counted_by_hand():
    traffic = count_collectives(NESTED)
    counted = {kind: (c.count, c.operand_bytes, c.bytes) for kind, c in traffic.kinds.items()}
    assert counted == {
        "collective-permute": (3 * 4, 3 * 4 * 256, 3 * 4 * 256),
        # A ring of 4 sends 2 * 3 / 4 of the operand.
        "all-reduce": (3, 3 * 256, 3 * 256 * 1.5),
        # Of 4 chips each sends its part to 3 others; one is spread over two fusions.
        "all-gather": (2, 1024 + 64, 3 * 1024 + 3 * 64),
        "reduce-scatter": (1, 1024, 512),
    }
    assert traffic.unknown_loops == 0


def test_what_the_compiler_says_of_a_loop_goes_first():
    stated = 'body=%inner_body, backend_config={"known_trip_count":{"n":"10"}}'
    traffic = count_collectives(NESTED.replace("body=%inner_body", stated))
    assert traffic.kinds["collective-permute"].count == 3 * 10


def test_a_loop_of_unknown_length_is_told():
    text = NESTED.replace("%limit.1 = s32[] constant(5)", "%limit.1 = s32[] add(%j.1, %j.1)")
    traffic = count_collectives(text)
    assert traffic.unknown_loops == 1
    assert traffic.kinds["collective-permute"].count == 4


@pytest.mark.parametrize(
    ("groups", "size"),
    [
        ("{{0,1,2,3},{4,5,6,7}}", 4),
        ("[4,2]<=[2,4]T(1,0)", 2),
        ("mesh['x'=4,'y'=2] {'x','y'}", 8),
        ("mesh['x'=2,'y'=4], device_ids=([2,4]T(1,0)) {'y'}", 4),
        ("mesh['x'=8] {'x':(2)4}", 4),
    ],
)
def test_groups_are_read_in_every_notation(groups, size):
    text = NESTED.replace("{{0},{1}}", groups)
    sent = count_collectives(text).kinds["all-reduce"].bytes - 3 * 256 * 1.5
    assert sent == pytest.approx(256 * 2 * (size - 1) / size)


@pytest.mark.parametrize(
    ("shape", "size"),
    [
        ("f32[]", 4),
        ("pred[3,5]{1,0:T(8,128)(4,1)}", 15),
        ("bf16[2,64]{1,0:T(8,128)(2,1)S(1)}", 256),
        ("(f8e4m3fn[7]{0}, /*index=1*/s32[2]{0}, u32[]{:S(2)})", 7 + 8 + 4),
        ("token[]", 0),
    ],
)
def test_sizes_of_shapes(shape, size):
    assert shape_bytes(shape) == size
