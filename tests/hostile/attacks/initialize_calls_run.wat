;; _initialize runs run. Allowed: it emits once from each.
(module
  (import "realm" "emit" (func $emit (param i32 i32) (result i32)))
  (memory (export "memory") 1)
  (data (i32.const 0) "x")
  (func (export "_initialize") (drop (call $run)))
  (func (export "realm_abi_version") (result i32) (i32.const 1))
  (func $run (export "run") (result i32)
    (call $emit (i32.const 0) (i32.const 1))))
