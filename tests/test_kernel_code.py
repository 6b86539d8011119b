"""What benchmarks.kernel_code reads out of compiled kernels, on texts like Triton's and cuobjdump's."""

from benchmarks.kernel_code import Loop, SassLoop, product_loops, sass_loops

TTGIR = """
  tt.func public @kernel(%a: !tt.ptr<bf16> {tt.divisibility = 16 : i32}) {
    %0 = ttg.async_wait %x {num = 0 : i32}
    %1:2 = scf.for %i = %c0 to %n step %c1 iter_args(%acc = %z) -> (i32)  : i32 {
      %2 = arith.divsi %i, %c64 : i64
      %3 = ttg.async_wait %t {num = WAIT : i32}
      %4 = scf.if %p -> (i32) {
        scf.yield %i : i32
      } else {
        scf.yield %j : i32
      }
      %5 = ttng.warp_group_dot %q, %k, %acc {isAsync = true} : tensor<128x64xbf16>
      scf.yield %5 : i32
    } {tt.num_stages = 3 : i32}
    scf.for %i = %c0 to %n step %c1  : i32 {
      scf.for %j = %c0 to %n step %c1  : i32 {
        %6 = ttng.warp_group_dot %q, %k, %acc : tensor<128x64xbf16>
      }
      %7 = ttg.async_wait %t {num = 0 : i32}
      %8 = arith.remsi %i, %j : i64
    }
    scf.for %i = %c0 to %n step %c1  : i32 {
      %9 = arith.divsi %i, %c64 : i64
    }
    tt.return
  }
"""
SASS = """
        /*0000*/                   MOV R1, c[0x0][0x28] ;   /* 0x00000a0000017a02 */
        /*0010*/                   HGMMA.64x64x16.F32.BF16 R24, gdesc[UR8], RZ ;   /* 0x */
        /*0020*/                   FADD R1, R2, R3 ;   /* 0x */
        /*0030*/              @!P0 BRA 0x10 ;   /* 0x */
        /*0040*/                   HGMMA.64x64x16.F32.BF16 R24, gdesc[UR8], RZ ;   /* 0x */
        /*0050*/                   CALL.REL.NOINC 0x200 ;   /* 0x */
        /*0060*/               @P1 BRA 0x40 ;   /* 0x */
        /*0070*/               @P2 BRA 0x0 ;   /* 0x */
        /*0080*/                   FADD R1, R2, R3 ;   /* 0x */
        /*0090*/               @P1 BRA 0x80 ;   /* 0x */
        /*00a0*/                   BRA 0xa0 ;   /* 0x */
"""


def test_innermost_loops_with_a_product_say_what_they_wait_for_and_divide():
    assert product_loops(TTGIR.replace("WAIT", "0")) == [Loop((0,), 1), Loop((), 0)]
    assert product_loops(TTGIR.replace("WAIT", "12")) == [Loop((12,), 1), Loop((), 0)]
    assert product_loops("") == []


def test_innermost_loops_with_a_matrix_instruction_are_counted():
    assert sass_loops(SASS) == [SassLoop(3, 0), SassLoop(3, 1)]
    assert sass_loops(SASS, "HMMA") == []
