;; Has a memory and does not export it. Refused.
(module
  (memory 1)
  (func (export "realm_abi_version") (result i32) (i32.const 1))
  (func $run (export "run") (result i32)
    (i32.const 0)))
