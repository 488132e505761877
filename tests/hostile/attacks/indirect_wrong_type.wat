;; Calls through a table a function of another type. Traps.
(module
  (memory (export "memory") 1)
  (table funcref (elem $run))
  (func (export "realm_abi_version") (result i32) (i32.const 1))
  (func $run (export "run") (result i32)
    (call_indirect (param i64) (result i32) (i64.const 1) (i32.const 0))))
