;; Imports emit with 64-bit pointers. Refused.
(module
  (import "realm" "emit" (func (param i64 i64) (result i32)))
  (memory (export "memory") 1)
  (func (export "realm_abi_version") (result i32) (i32.const 1))
  (func (export "run") (result i32) (i32.const 0)))
