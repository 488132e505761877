;; Keeps the logits of one sequence after another, 192 KiB each. Refused with LIMIT once they are as much as its memory limit; returns how many it got.
(module
  (import "realm" "seq_new" (func $seq_new (result i32)))
  (import "realm" "forward" (func $forward (param i32 i32 i32 i32 i32) (result i32)))
  (memory (export "memory") 1)
  (func (export "realm_abi_version") (result i32) (i32.const 1))
  (func $run (export "run") (result i32) (local $s i32) (local $n i32) (local $c i32)
    (loop $l
      (local.set $s (call $seq_new))
      (if (i32.gt_s (local.get $s) (i32.const 0)) (then
        (local.set $c (call $forward (local.get $s) (i32.const 0) (i32.const 1) (i32.const 0) (i32.const 0)))
        (if (i32.eq (local.get $c) (i32.const -6)) (then (return (local.get $n))))
        (if (local.get $c) (then (return (i32.const -1))))
        (local.set $n (i32.add (local.get $n) (i32.const 1))) (br $l))))
    (i32.const -1)))
