;; Imports a host function that is not there. Refused with its name.
(module
  (import "realm" "exec" (func (param i32 i32) (result i32)))
  (memory (export "memory") 1)
  (func (export "realm_abi_version") (result i32) (i32.const 1))
  (func (export "run") (result i32) (i32.const 0)))
