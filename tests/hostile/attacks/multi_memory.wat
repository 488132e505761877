;; Has two memories. Refused.
(module (memory (export "memory") 1) (memory 1)
  (func (export "realm_abi_version") (result i32) (i32.const 1))
  (func (export "run") (result i32) (i32.const 0)))
