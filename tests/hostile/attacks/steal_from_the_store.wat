;; Reads, and opens as a sequence, what another tenant has under the name that its input says. Neither is there; returns how many were.
(module
  (import "realm" "input_read" (func $input_read (param i32 i32 i32) (result i32)))
  (import "realm" "input_len" (func $input_len (result i32)))
  (import "realm" "kv_get" (func $kv_get (param i32 i32 i32 i32) (result i32)))
  (import "realm" "seq_open" (func $seq_open (param i32 i32) (result i32)))
  (memory (export "memory") 1)
  (func (export "realm_abi_version") (result i32) (i32.const 1))
  (func $run (export "run") (result i32) (local $n i32)
    (drop (call $input_read (i32.const 0) (i32.const 0) (i32.const 128)))
    (if (i32.ne (call $kv_get (i32.const 0) (call $input_len) (i32.const 256) (i32.const 1024)) (i32.const -7)) (then (local.set $n (i32.add (local.get $n) (i32.const 1)))))
    (if (i32.ne (call $seq_open (i32.const 0) (call $input_len)) (i32.const -7)) (then (local.set $n (i32.add (local.get $n) (i32.const 1)))))
    (local.get $n)))
