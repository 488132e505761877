;; Forwards, forks, truncates and frees handles 1 to 200 without a sequence of its own. All are refused; returns how many were not.
(module
  (import "realm" "forward" (func $forward (param i32 i32 i32 i32 i32) (result i32)))
  (import "realm" "seq_fork" (func $seq_fork (param i32) (result i32)))
  (import "realm" "seq_truncate" (func $seq_truncate (param i32 i32) (result i32)))
  (import "realm" "seq_free" (func $seq_free (param i32) (result i32)))
  (memory (export "memory") 1)
  (func (export "realm_abi_version") (result i32) (i32.const 1))
  (func $run (export "run") (result i32) (local $i i32) (local $n i32)
    (local.set $i (i32.const 1))
    (loop $l
      (if (i32.ne (call $forward (local.get $i) (i32.const 0) (i32.const 1) (i32.const 0) (i32.const 0)) (i32.const -3)) (then (local.set $n (i32.add (local.get $n) (i32.const 1)))))
      (if (i32.ne (call $seq_fork (local.get $i)) (i32.const -3)) (then (local.set $n (i32.add (local.get $n) (i32.const 1)))))
      (if (i32.ne (call $seq_truncate (local.get $i) (i32.const 0)) (i32.const -3)) (then (local.set $n (i32.add (local.get $n) (i32.const 1)))))
      (if (i32.ne (call $seq_free (local.get $i)) (i32.const -3)) (then (local.set $n (i32.add (local.get $n) (i32.const 1)))))
      (br_if $l (i32.lt_u (local.tee $i (i32.add (local.get $i) (i32.const 1))) (i32.const 201))))
    (local.get $n)))
