;; Writes 1 KiB under one key after another. Refused with LIMIT when its store is full.
(module
  (import "realm" "kv_set" (func $kv_set (param i32 i32 i32 i32) (result i32)))
  (memory (export "memory") 1)
  (func (export "realm_abi_version") (result i32) (i32.const 1))
  (func $run (export "run") (result i32) (local $i i32) (local $c i32)
    (loop $l
      (i32.store (i32.const 0) (i32.add (i32.const 0x21212121) (local.tee $i (i32.add (local.get $i) (i32.const 1)))))
      (br_if $l (i32.eqz (local.tee $c (call $kv_set (i32.const 0) (i32.const 4) (i32.const 64) (i32.const 1024))))))
    (local.get $c)))
