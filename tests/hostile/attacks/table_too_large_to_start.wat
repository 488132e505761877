;; Needs a larger table to start than it may have. Ends with an error that names the limit.
(module
  (memory (export "memory") 1)
  (table 1001 funcref)
  (func (export "realm_abi_version") (result i32) (i32.const 1))
  (func $run (export "run") (result i32)
    (i32.const 0)))
