;; Traps with sequences open and tokens in the engine. All of it is freed.
(module
  (import "realm" "seq_new" (func $seq_new (result i32)))
  (import "realm" "seq_fork" (func $seq_fork (param i32) (result i32)))
  (import "realm" "forward" (func $forward (param i32 i32 i32 i32 i32) (result i32)))
  (memory (export "memory") 1)
  (func (export "realm_abi_version") (result i32) (i32.const 1))
  (func $run (export "run") (result i32) (local $i i32)
    (local.set $i (call $seq_new))
    (drop (call $forward (local.get $i) (i32.const 0) (i32.const 32) (i32.const 0) (i32.const 0)))
    (drop (call $seq_fork (local.get $i))) (drop (call $seq_fork (local.get $i)))
    (unreachable)))
