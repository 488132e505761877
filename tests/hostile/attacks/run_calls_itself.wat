;; Its run calls run again, with output at each depth. Traps: its stack is used up.
(module
  (import "realm" "emit" (func $emit (param i32 i32) (result i32)))
  (memory (export "memory") 1)
  (func (export "realm_abi_version") (result i32) (i32.const 1))
  (func $run (export "run") (result i32)
    (drop (call $emit (i32.const 0) (i32.const 1))) (i32.add (call $run) (i32.const 1))))
