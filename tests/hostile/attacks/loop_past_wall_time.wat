;; Calls the host once, then spins with fuel for minutes. Its wall time runs out.
(module
  (import "realm" "tokens_left" (func $tokens_left (result i64)))
  (memory (export "memory") 1)
  (func (export "realm_abi_version") (result i32) (i32.const 1))
  (func $run (export "run") (result i32)
    (drop (call $tokens_left)) (loop $l (br $l)) (unreachable)))
