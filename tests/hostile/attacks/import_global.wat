;; Imports a global under a host function's name. Refused.
(module
  (import "realm" "emit" (global i32))
  (memory (export "memory") 1)
  (func (export "realm_abi_version") (result i32) (i32.const 1))
  (func (export "run") (result i32) (i32.const 0)))
