;; Throws an exception. Refused.
(module (memory (export "memory") 1) (tag $t)
  (func (export "realm_abi_version") (result i32) (i32.const 1))
  (func (export "run") (result i32) (throw $t)))
