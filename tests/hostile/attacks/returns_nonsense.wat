;; Returns the smallest integer. Reported as an unknown code of the guest.
(module
  (memory (export "memory") 1)
  (func (export "realm_abi_version") (result i32) (i32.const 1))
  (func $run (export "run") (result i32)
    (i32.const 0x80000000)))
