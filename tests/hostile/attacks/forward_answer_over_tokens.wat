;; Lets the answer overwrite the tokens and the sampling it is made from. The draw is as asked; returns 0.
(module
  (import "realm" "seq_new" (func $seq_new (result i32)))
  (import "realm" "forward" (func $forward (param i32 i32 i32 i32 i32) (result i32)))
  (memory (export "memory") 1)
  (func (export "realm_abi_version") (result i32) (i32.const 1))
  (func $run (export "run") (result i32) (local $s i32) (local $a i32)
    (local.set $s (call $seq_new)) (i32.store (i32.const 32) (i32.const 7))
    (if (i32.lt_s (local.tee $a (call $forward (local.get $s) (i32.const 32) (i32.const 1) (i32.const 64) (i32.const 32))) (i32.const 0)) (then (return (i32.const 1))))
    (if (i32.ne (i32.load (i32.const 32)) (local.get $a)) (then (return (i32.const 2))))
    (if (i32.lt_s (local.tee $a (call $forward (local.get $s) (i32.const 32) (i32.const 1) (i32.const 64) (i32.const 64))) (i32.const 0)) (then (return (i32.const 3))))
    (i32.ne (i32.load (i32.const 64)) (local.get $a))))
