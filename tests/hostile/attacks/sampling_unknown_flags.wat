;; Sets flags that do not exist and a mask size without a mask. Refused; returns how many were not.
(module
  (import "realm" "seq_new" (func $seq_new (result i32)))
  (import "realm" "forward" (func $forward (param i32 i32 i32 i32 i32) (result i32)))
  (memory (export "memory") 1)
  (func (export "realm_abi_version") (result i32) (i32.const 1))
  (func $run (export "run") (result i32) (local $s i32) (local $n i32)
    (local.set $s (call $seq_new)) (i32.store (i32.const 84) (i32.const 0x80000000))
    (if (i32.ne (call $forward (local.get $s) (i32.const 128) (i32.const 1) (i32.const 64) (i32.const 0)) (i32.const -1)) (then (local.set $n (i32.add (local.get $n) (i32.const 1)))))
    (i32.store (i32.const 84) (i32.const 0)) (i32.store (i32.const 112) (i32.const 1536))
    (if (i32.ne (call $forward (local.get $s) (i32.const 128) (i32.const 1) (i32.const 64) (i32.const 0)) (i32.const -1)) (then (local.set $n (i32.add (local.get $n) (i32.const 1)))))
    (local.get $n)))
