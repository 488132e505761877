;; Copies from beyond its memory's end, where the sum wraps around. Traps.
(module
  (memory (export "memory") 1)
  (func (export "realm_abi_version") (result i32) (i32.const 1))
  (func $run (export "run") (result i32)
    (memory.copy (i32.const 0) (i32.const -16) (i32.const 32)) (i32.const 0)))
