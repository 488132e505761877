;; Puts a sequence into a batch twice. The second gets BAD_HANDLE, the first its answer.
(module
  (import "realm" "seq_new" (func $seq_new (result i32)))
  (import "realm" "batch_forward" (func $batch_forward (param i32 i32) (result i32)))
  (import "realm" "seq_len" (func $seq_len (param i32) (result i32)))
  (memory (export "memory") 1)
  (func (export "realm_abi_version") (result i32) (i32.const 1))
  (func $run (export "run") (result i32) (local $s i32)
    (local.set $s (call $seq_new))
    (i32.store (i32.const 64) (local.get $s)) (i32.store (i32.const 68) (i32.const 1)) (i64.store (i32.const 72) (i64.const 32))
    (i32.store (i32.const 104) (local.get $s)) (i32.store (i32.const 108) (i32.const 1)) (i64.store (i32.const 112) (i64.const 32))
    (if (i32.ne (call $batch_forward (i32.const 64) (i32.const 2)) (i32.const 1)) (then (return (i32.const 1))))
    (i32.or (i32.ne (i32.load (i32.const 128)) (i32.const -3)) (i32.ne (call $seq_len (local.get $s)) (i32.const 1)))))
