;; Asks for NaN, infinite, negative and huge temperature, top_p, min_p and repetition penalty. All refused; returns how many were not.
(module
  (import "realm" "seq_new" (func $seq_new (result i32)))
  (import "realm" "seq_len" (func $seq_len (param i32) (result i32)))
  (import "realm" "forward" (func $forward (param i32 i32 i32 i32 i32) (result i32)))
  (memory (export "memory") 1)
  (data (i32.const 0) "\00\00\c0\7f\00\00\80\7f\00\00\80\ff\00\00\80\bf\ff\ff\7f\7f\01\00\00\80")
  (func (export "realm_abi_version") (result i32) (i32.const 1))
  (func $run (export "run") (result i32) (local $s i32) (local $i i32) (local $n i32)
    (local.set $s (call $seq_new))
    (loop $l
      (memory.fill (i32.const 64) (i32.const 0) (i32.const 56))
      (i32.store (i32.add (i32.const 64) (i32.shl (i32.and (local.get $i) (i32.const 3)) (i32.const 2))) (i32.load (i32.and (local.get $i) (i32.const -4))))
      (if (i32.ne (call $forward (local.get $s) (i32.const 128) (i32.const 1) (i32.const 64) (i32.const 0)) (i32.const -1)) (then (local.set $n (i32.add (local.get $n) (i32.const 1)))))
      (br_if $l (i32.lt_u (local.tee $i (i32.add (local.get $i) (i32.const 1))) (i32.const 24))))
    (i32.add (local.get $n) (call $seq_len (local.get $s)))))
