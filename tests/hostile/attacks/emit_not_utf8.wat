;; Emits bytes that are no UTF-8: wild ones, a surrogate, an overlong slash, a cut character. Each arrives as replacement characters.
(module
  (import "realm" "emit" (func $emit (param i32 i32) (result i32)))
  (memory (export "memory") 1)
  (data (i32.const 0) "\ff\fe\80A\ed\a0\80B\c0\afC\e2\82")
  (func (export "realm_abi_version") (result i32) (i32.const 1))
  (func $run (export "run") (result i32)
    (call $emit (i32.const 0) (i32.const 13))))
