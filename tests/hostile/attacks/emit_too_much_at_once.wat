;; Emits 1 MiB and a byte at once. Refused as an invalid argument.
(module
  (import "realm" "emit" (func $emit (param i32 i32) (result i32)))
  (memory (export "memory") 17)
  (func (export "realm_abi_version") (result i32) (i32.const 1))
  (func $run (export "run") (result i32)
    (i32.add (call $emit (i32.const 0) (i32.const 0x100001)) (i32.const 1))))
