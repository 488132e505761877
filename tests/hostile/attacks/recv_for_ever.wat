;; Waits as long as can be said for a client that says nothing. Its wall time runs out.
(module
  (import "realm" "recv" (func $recv (param i32 i32 i32) (result i32)))
  (memory (export "memory") 1)
  (func (export "realm_abi_version") (result i32) (i32.const 1))
  (func $run (export "run") (result i32)
    (call $recv (i32.const 0) (i32.const 16) (i32.const -1))))
