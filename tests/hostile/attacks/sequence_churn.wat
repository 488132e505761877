;; Opens and frees a sequence 50,000 times. No handle comes twice; returns the last.
(module
  (import "realm" "seq_new" (func $seq_new (result i32)))
  (import "realm" "seq_free" (func $seq_free (param i32) (result i32)))
  (memory (export "memory") 1)
  (func (export "realm_abi_version") (result i32) (i32.const 1))
  (func $run (export "run") (result i32) (local $i i32) (local $s i32) (local $n i32)
    (loop $l
      (if (i32.le_s (local.tee $s (call $seq_new)) (local.get $n)) (then (return (i32.const -1))))
      (if (call $seq_free (local.tee $n (local.get $s))) (then (return (i32.const -1))))
      (br_if $l (i32.lt_u (local.tee $i (i32.add (local.get $i) (i32.const 1))) (i32.const 50000))))
    (local.get $n)))
