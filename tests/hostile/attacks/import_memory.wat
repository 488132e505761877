;; Imports its memory. Refused.
(module
  (import "env" "memory" (memory 1))
  (export "memory" (memory 0))
  (func (export "realm_abi_version") (result i32) (i32.const 1))
  (func (export "run") (result i32) (i32.const 0)))
