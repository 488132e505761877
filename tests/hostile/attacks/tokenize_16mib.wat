;; Tokenizes 16 MiB at once, with fuel for it. Refused or done, while others' tokens flow.
(module
  (import "realm" "tokenize" (func $tokenize (param i32 i32 i32 i32 i32) (result i32)))
  (memory (export "memory") 257)
  (func (export "realm_abi_version") (result i32) (i32.const 1))
  (func $run (export "run") (result i32)
    (memory.fill (i32.const 0) (i32.const 97) (i32.const 0x1000000))
    (drop (call $tokenize (i32.const 0) (i32.const 0x1000000) (i32.const 0) (i32.const 0) (i32.const 0))) (i32.const 0)))
