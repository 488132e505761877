;; Streams other tokens into one stream each time without ever taking their text. Refused or ended before the host holds much for it.
(module
  (import "realm" "detokenize" (func $detokenize (param i32 i32 i32 i32 i32 i32) (result i32)))
  (memory (export "memory") 1)
  (func (export "realm_abi_version") (result i32) (i32.const 1))
  (func $run (export "run") (result i32) (local $i i32)
    (loop $l
      (drop (call $detokenize (i32.const 1) (i32.const 0) (i32.add (i32.const 8192) (local.get $i)) (i32.const 1) (i32.const 0) (i32.const 0)))
      (br_if $l (i32.lt_u (local.tee $i (i32.add (local.get $i) (i32.const 1))) (i32.const 1000))))
    (i32.const 0)))
