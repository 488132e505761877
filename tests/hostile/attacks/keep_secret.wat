;; No attack: the neighbour's own guest, which keeps its input in its store and as a saved sequence, under that name.
(module
  (import "realm" "input_read" (func $input_read (param i32 i32 i32) (result i32)))
  (import "realm" "seq_new" (func $seq_new (result i32)))
  (import "realm" "forward" (func $forward (param i32 i32 i32 i32 i32) (result i32)))
  (import "realm" "seq_save" (func $seq_save (param i32 i32 i32) (result i32)))
  (import "realm" "kv_set" (func $kv_set (param i32 i32 i32 i32) (result i32)))
  (memory (export "memory") 1)
  (func (export "realm_abi_version") (result i32) (i32.const 1))
  (func $run (export "run") (result i32) (local $n i32) (local $s i32)
    (local.set $n (call $input_read (i32.const 0) (i32.const 0) (i32.const 128)))
    (local.set $s (call $seq_new)) (drop (call $forward (local.get $s) (i32.const 256) (i32.const 4) (i32.const 0) (i32.const 0)))
    (if (i32.lt_s (call $seq_save (local.get $s) (i32.const 0) (local.get $n)) (i32.const 0)) (then (return (i32.const 1))))
    (call $kv_set (i32.const 0) (local.get $n) (i32.const 0) (local.get $n))))
