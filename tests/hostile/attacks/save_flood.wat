;; Saves a sequence under one name after another. Refused with LIMIT once it has as many as it may.
(module
  (import "realm" "seq_new" (func $seq_new (result i32)))
  (import "realm" "forward" (func $forward (param i32 i32 i32 i32 i32) (result i32)))
  (import "realm" "seq_save" (func $seq_save (param i32 i32 i32) (result i32)))
  (memory (export "memory") 1)
  (func (export "realm_abi_version") (result i32) (i32.const 1))
  (func $run (export "run") (result i32) (local $s i32) (local $i i32) (local $c i32)
    (local.set $s (call $seq_new)) (drop (call $forward (local.get $s) (i32.const 64) (i32.const 4) (i32.const 0) (i32.const 0)))
    (loop $l
      (i32.store (i32.const 0) (i32.add (i32.const 0x21212121) (local.tee $i (i32.add (local.get $i) (i32.const 1)))))
      (br_if $l (i32.ge_s (local.tee $c (call $seq_save (local.get $s) (i32.const 0) (i32.const 4))) (i32.const 0))))
    (local.get $c)))
