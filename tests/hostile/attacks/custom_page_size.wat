;; Has pages of one byte. Refused.
(module (memory (export "memory") 1 (pagesize 1))
  (func (export "realm_abi_version") (result i32) (i32.const 1))
  (func (export "run") (result i32) (i32.const 0)))
