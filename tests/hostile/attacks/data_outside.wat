;; Has a data segment beyond its memory. Refused.
(module
  (memory (export "memory") 1)
  (data (i32.const 65535) "xy")
  (func (export "realm_abi_version") (result i32) (i32.const 1))
  (func $run (export "run") (result i32)
    (i32.const 0)))
