;; Waits 1 ms 300 times. Each wait times out, and no timer is left.
(module
  (import "realm" "recv" (func $recv (param i32 i32 i32) (result i32)))
  (memory (export "memory") 1)
  (func (export "realm_abi_version") (result i32) (i32.const 1))
  (func $run (export "run") (result i32) (local $i i32)
    (loop $l
      (if (i32.ne (call $recv (i32.const 0) (i32.const 16) (i32.const 1)) (i32.const -9)) (then (return (i32.const 1))))
      (br_if $l (i32.lt_u (local.tee $i (i32.add (local.get $i) (i32.const 1))) (i32.const 300))))
    (i32.const 0)))
