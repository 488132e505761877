;; Asks for its fuel over and over. Ends when its fuel is burnt.
(module
  (import "realm" "fuel_left" (func $fuel_left (result i64)))
  (memory (export "memory") 1)
  (func (export "realm_abi_version") (result i32) (i32.const 1))
  (func $run (export "run") (result i32)
    (loop $l (drop (call $fuel_left)) (br $l)) (unreachable)))
