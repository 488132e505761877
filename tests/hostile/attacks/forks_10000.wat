;; Forks a sequence 10,000 times. Gets copies up to its limit of sequences, then LIMIT; returns how many.
(module
  (import "realm" "seq_new" (func $seq_new (result i32)))
  (import "realm" "seq_fork" (func $seq_fork (param i32) (result i32)))
  (memory (export "memory") 1)
  (func (export "realm_abi_version") (result i32) (i32.const 1))
  (func $run (export "run") (result i32) (local $s i32) (local $i i32) (local $n i32)
    (local.set $s (call $seq_new))
    (loop $l
      (if (i32.gt_s (call $seq_fork (local.get $s)) (i32.const 0)) (then (local.set $n (i32.add (local.get $n) (i32.const 1)))))
      (br_if $l (i32.lt_u (local.tee $i (i32.add (local.get $i) (i32.const 1))) (i32.const 10000))))
    (local.get $n)))
