;; Reaches unreachable. Traps, with the function's name in the backtrace.
(module
  (memory (export "memory") 1)
  (func $culprit (unreachable))
  (func (export "realm_abi_version") (result i32) (i32.const 1))
  (func $run (export "run") (result i32)
    (call $culprit) (i32.const 0)))
