;; Claims the host's own failure by returning its code. Reported as the guest's own error.
(module
  (memory (export "memory") 1)
  (func (export "realm_abi_version") (result i32) (i32.const 1))
  (func $run (export "run") (result i32)
    (i32.const -13)))
