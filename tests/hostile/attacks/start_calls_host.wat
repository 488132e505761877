;; Calls the host from its start function. Refused: no host function before run.
(module
  (import "realm" "tokens_left" (func $tokens_left (result i64)))
  (memory (export "memory") 1)
  (func $early (drop (call $tokens_left)))
  (start $early)
  (func (export "realm_abi_version") (result i32) (i32.const 1))
  (func $run (export "run") (result i32)
    (i32.const 0)))
