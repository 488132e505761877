;; Exports a function as its memory. Refused.
(module
  (func (export "memory"))
  (func (export "realm_abi_version") (result i32) (i32.const 1))
  (func $run (export "run") (result i32)
    (i32.const 0)))
