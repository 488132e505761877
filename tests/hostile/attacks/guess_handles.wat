;; Guesses 65,537 handles from -2^31 to 2^31 - 1, and -1000 to 3000, without a sequence of its own. Finds none; returns how many it found.
(module
  (import "realm" "seq_len" (func $seq_len (param i32) (result i32)))
  (memory (export "memory") 1)
  (func (export "realm_abi_version") (result i32) (i32.const 1))
  (func $run (export "run") (result i32) (local $h i32) (local $i i32) (local $n i32)
    (local.set $h (i32.const 0x80000000))
    (loop $l
      (if (i32.ne (call $seq_len (local.get $h)) (i32.const -3)) (then (local.set $n (i32.add (local.get $n) (i32.const 1)))))
      (local.set $h (i32.add (local.get $h) (i32.const 65535)))
      (br_if $l (i32.lt_u (local.tee $i (i32.add (local.get $i) (i32.const 1))) (i32.const 65537))))
    (local.set $h (i32.const -1000))
    (loop $m
      (if (i32.ne (call $seq_len (local.get $h)) (i32.const -3)) (then (local.set $n (i32.add (local.get $n) (i32.const 1)))))
      (br_if $m (i32.lt_s (local.tee $h (i32.add (local.get $h) (i32.const 1))) (i32.const 3000))))
    (local.get $n)))
