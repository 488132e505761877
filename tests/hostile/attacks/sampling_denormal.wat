;; Asks for the smallest temperature, top_p, min_p and repetition penalty there are, and for the largest. Each draw is a token or refused; returns how many were neither.
(module
  (import "realm" "seq_new" (func $seq_new (result i32)))
  (import "realm" "forward" (func $forward (param i32 i32 i32 i32 i32) (result i32)))
  (memory (export "memory") 1)
  (data (i32.const 0) "\01\00\00\00\00\00\80\00\00\00\80\3f\00\00\c8\42")
  (func (export "realm_abi_version") (result i32) (i32.const 1))
  (func $run (export "run") (result i32) (local $s i32) (local $i i32) (local $n i32) (local $t i32)
    (local.set $s (call $seq_new))
    (loop $l
      (memory.fill (i32.const 64) (i32.const 0) (i32.const 56)) (f32.store (i32.const 64) (f32.const 1))
      (i32.store (i32.add (i32.const 64) (i32.shl (i32.and (local.get $i) (i32.const 3)) (i32.const 2))) (i32.load (i32.and (local.get $i) (i32.const -4))))
      (local.set $t (call $forward (local.get $s) (i32.const 128) (i32.const 1) (i32.const 64) (i32.const 0)))
      (if (i32.and (i32.ne (local.get $t) (i32.const -1)) (i32.ge_u (local.get $t) (i32.const 49152))) (then (local.set $n (i32.add (local.get $n) (i32.const 1)))))
      (br_if $l (i32.lt_u (local.tee $i (i32.add (local.get $i) (i32.const 1))) (i32.const 16))))
    (local.get $n)))
