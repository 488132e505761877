;; Allocates structs. Refused.
(module (memory (export "memory") 1) (type $s (struct (field i32)))
  (func (export "realm_abi_version") (result i32) (i32.const 1))
  (func (export "run") (result i32) (struct.get $s 0 (struct.new $s (i32.const 0)))))
