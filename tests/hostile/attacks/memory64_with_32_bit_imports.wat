;; Imports emit with 32-bit pointers beside a 64-bit memory. Refused.
(module
  (import "realm" "emit" (func (param i32 i32) (result i32)))
  (memory (export "memory") i64 1)
  (func (export "realm_abi_version") (result i32) (i32.const 1))
  (func (export "run") (result i32) (i32.const 0)))
