;; Its realm_abi_version returns 64 bits. Refused.
(module
  (memory (export "memory") 1)
  (func (export "realm_abi_version") (result i64) (i64.const 1))
  (func $run (export "run") (result i32)
    (i32.const 0)))
