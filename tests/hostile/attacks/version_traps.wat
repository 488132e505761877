;; Traps in realm_abi_version. Refused.
(module
  (memory (export "memory") 1)
  (func (export "realm_abi_version") (result i32) (unreachable))
  (func $run (export "run") (result i32)
    (i32.const 0)))
