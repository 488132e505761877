;; Opens sequences of 16 tokens each with room for 8 KV pages. Refused with LIMIT once they are taken.
(module
  (import "realm" "seq_new" (func $seq_new (result i32)))
  (import "realm" "forward" (func $forward (param i32 i32 i32 i32 i32) (result i32)))
  (memory (export "memory") 1)
  (func (export "realm_abi_version") (result i32) (i32.const 1))
  (func $run (export "run") (result i32) (local $c i32)
    (loop $l (br_if $l (i32.ge_s (local.tee $c (call $forward (call $seq_new) (i32.const 0) (i32.const 16) (i32.const 64) (i32.const 0))) (i32.const 0))))
    (local.get $c)))
