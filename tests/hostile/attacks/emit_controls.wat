;; Emits NULs, terminal escapes and quotes. They arrive as they are.
(module
  (import "realm" "emit" (func $emit (param i32 i32) (result i32)))
  (memory (export "memory") 1)
  (data (i32.const 0) "\00\1b[2J\07\22}\5c\0d\0a\7f")
  (func (export "realm_abi_version") (result i32) (i32.const 1))
  (func $run (export "run") (result i32)
    (call $emit (i32.const 0) (i32.const 12))))
