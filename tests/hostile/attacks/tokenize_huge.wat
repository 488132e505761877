;; Tokenizes 256 KiB of one letter over and over, which its fuel does not pay for. Ends when its fuel is burnt.
(module
  (import "realm" "tokenize" (func $tokenize (param i32 i32 i32 i32 i32) (result i32)))
  (memory (export "memory") 17)
  (func (export "realm_abi_version") (result i32) (i32.const 1))
  (func $run (export "run") (result i32)
    (memory.fill (i32.const 0) (i32.const 97) (i32.const 0x40000))
    (loop $l (br_if $l (i32.ge_s (call $tokenize (i32.const 0) (i32.const 0x40000) (i32.const 0) (i32.const 0) (i32.const 0)) (i32.const 0)))) (i32.const -1)))
