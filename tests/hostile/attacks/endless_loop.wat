;; Spins for ever. Ends when its fuel is burnt.
(module
  (memory (export "memory") 1)
  (func (export "realm_abi_version") (result i32) (i32.const 1))
  (func $run (export "run") (result i32)
    (loop $l (br $l)) (unreachable)))
