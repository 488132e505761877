;; Calls beyond its table's end. Traps.
(module
  (memory (export "memory") 1)
  (table 1 funcref)
  (func (export "realm_abi_version") (result i32) (i32.const 1))
  (func $run (export "run") (result i32)
    (call_indirect (result i32) (i32.const -1))))
