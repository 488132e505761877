;; Emits one byte 20,000 times. Allowed; every byte arrives.
(module
  (import "realm" "emit" (func $emit (param i32 i32) (result i32)))
  (memory (export "memory") 1)
  (func (export "realm_abi_version") (result i32) (i32.const 1))
  (func $run (export "run") (result i32) (local $i i32)
    (i32.store8 (i32.const 0) (i32.const 46))
    (loop $l
      (if (call $emit (i32.const 0) (i32.const 1)) (then (return (i32.const -1))))
      (br_if $l (i32.lt_u (local.tee $i (i32.add (local.get $i) (i32.const 1))) (i32.const 20000))))
    (i32.const 0)))
