;; Forwards one token more than the context holds. Refused with CONTEXT_FULL; nothing is appended.
(module
  (import "realm" "seq_new" (func $seq_new (result i32)))
  (import "realm" "forward" (func $forward (param i32 i32 i32 i32 i32) (result i32)))
  (import "realm" "seq_len" (func $seq_len (param i32) (result i32)))
  (memory (export "memory") 1)
  (func (export "realm_abi_version") (result i32) (i32.const 1))
  (func $run (export "run") (result i32) (local $s i32)
    (local.set $s (call $seq_new))
    (i32.or (i32.ne (call $forward (local.get $s) (i32.const 0) (i32.const 8193) (i32.const 0) (i32.const 0)) (i32.const -5)) (call $seq_len (local.get $s)))))
