;; Forks and frees a sequence with tokens 20,000 times. Allowed; all of it is freed.
(module
  (import "realm" "seq_new" (func $seq_new (result i32)))
  (import "realm" "seq_fork" (func $seq_fork (param i32) (result i32)))
  (import "realm" "seq_free" (func $seq_free (param i32) (result i32)))
  (import "realm" "forward" (func $forward (param i32 i32 i32 i32 i32) (result i32)))
  (memory (export "memory") 1)
  (func (export "realm_abi_version") (result i32) (i32.const 1))
  (func $run (export "run") (result i32) (local $i i32) (local $s i32)
    (local.set $s (call $seq_new))
    (drop (call $forward (local.get $s) (i32.const 0) (i32.const 40) (i32.const 0) (i32.const 0)))
    (loop $l
      (if (call $seq_free (call $seq_fork (local.get $s))) (then (return (i32.const -1))))
      (br_if $l (i32.lt_u (local.tee $i (i32.add (local.get $i) (i32.const 1))) (i32.const 20000))))
    (i32.const 0)))
