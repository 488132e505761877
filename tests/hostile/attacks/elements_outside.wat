;; Has an element segment beyond its table. Refused.
(module
  (memory (export "memory") 1)
  (table 1 funcref)
  (elem (i32.const 1) $run)
  (func (export "realm_abi_version") (result i32) (i32.const 1))
  (func $run (export "run") (result i32)
    (i32.const 0)))
