;; Exports a global as run. Refused.
(module (memory (export "memory") 1) (global (export "run") i32 (i32.const 0))
  (func (export "realm_abi_version") (result i32) (i32.const 1)))
