;; No attack: forwards one token after another until it is cancelled, so that its tenant's work is in the neighbour's batches.
(module
  (import "realm" "seq_new" (func $seq_new (result i32)))
  (import "realm" "seq_truncate" (func $seq_truncate (param i32 i32) (result i32)))
  (import "realm" "forward" (func $forward (param i32 i32 i32 i32 i32) (result i32)))
  (memory (export "memory") 1)
  (func (export "realm_abi_version") (result i32) (i32.const 1))
  (func $run (export "run") (result i32) (local $s i32) (local $t i32) (local $i i32)
    (local.set $s (call $seq_new))
    (loop $l
      (if (i32.gt_u (local.get $i) (i32.const 200)) (then (drop (call $seq_truncate (local.get $s) (i32.const 0))) (local.set $i (i32.const 0))))
      (local.set $i (i32.add (local.get $i) (i32.const 1)))
      (i32.store (i32.const 0) (local.tee $t (call $forward (local.get $s) (i32.const 0) (i32.const 1) (i32.const 64) (i32.const 0))))
      (br_if $l (i32.ge_s (local.get $t) (i32.const 0))))
    (local.get $t)))
