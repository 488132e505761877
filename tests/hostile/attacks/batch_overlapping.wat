;; Has a batch of 1,024 items whose tokens and sampling lie inside the items, and whose answers overwrite them. One sequence: one item succeeds.
(module
  (import "realm" "seq_new" (func $seq_new (result i32)))
  (import "realm" "batch_forward" (func $batch_forward (param i32 i32) (result i32)))
  (memory (export "memory") 1)
  (func (export "realm_abi_version") (result i32) (i32.const 1))
  (func $run (export "run") (result i32) (local $i i32) (local $a i32)
    (drop (call $seq_new))
    (loop $l
      (local.set $a (i32.mul (local.get $i) (i32.const 40)))
      (i32.store (local.get $a) (i32.const 1)) (i32.store offset=4 (local.get $a) (i32.const 1))
      (i64.store offset=8 (local.get $a) (i64.extend_i32_u (i32.add (local.get $a) (i32.const 24))))
      (br_if $l (i32.lt_u (local.tee $i (i32.add (local.get $i) (i32.const 1))) (i32.const 1024))))
    (i32.sub (call $batch_forward (i32.const 0) (i32.const 1024)) (i32.const 1))))
