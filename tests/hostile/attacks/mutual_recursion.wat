;; Two functions call each other without end. Traps: its stack is used up.
(module
  (memory (export "memory") 1)
  (func $ping (param i32) (result i32) (i32.add (call $pong (local.get 0)) (i32.const 1)))
  (func $pong (param i32) (result i32) (i32.add (call $ping (local.get 0)) (i32.const 1)))
  (func (export "realm_abi_version") (result i32) (i32.const 1))
  (func $run (export "run") (result i32)
    (call $ping (i32.const 0))))
