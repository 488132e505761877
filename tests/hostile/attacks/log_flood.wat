;; Logs 100 bytes 10,000 times. Refused with LIMIT once its log is full; returns 0 if it stays refused and no more was taken than its limit.
(module
  (import "realm" "log" (func $log (param i32 i32 i32) (result i32)))
  (memory (export "memory") 1)
  (func (export "realm_abi_version") (result i32) (i32.const 1))
  (func $run (export "run") (result i32) (local $i i32) (local $c i32) (local $full i32) (local $n i32)
    (loop $l
      (local.set $c (call $log (i32.const 1) (i32.const 0) (i32.const 100)))
      (if (i32.eqz (local.get $c)) (then (if (local.get $full) (then (return (i32.const 1)))) (local.set $n (i32.add (local.get $n) (i32.const 1))))
        (else (if (i32.ne (local.get $c) (i32.const -6)) (then (return (i32.const 2)))) (local.set $full (i32.const 1))))
      (br_if $l (i32.lt_u (local.tee $i (i32.add (local.get $i) (i32.const 1))) (i32.const 10000))))
    (i32.or (i32.eqz (local.get $full)) (i32.gt_u (i32.mul (local.get $n) (i32.const 100)) (i32.const 16384)))))
