;; Calls through a typed function reference. Refused.
(module (memory (export "memory") 1) (type $f (func (result i32))) (elem declare func $run)
  (func (export "realm_abi_version") (result i32) (i32.const 1))
  (func $run (export "run") (type $f) (call_ref $f (ref.func $run))))
