;; Fills beyond its memory's end, with a length that wraps around. Traps.
(module
  (memory (export "memory") 1)
  (func (export "realm_abi_version") (result i32) (i32.const 1))
  (func $run (export "run") (result i32)
    (memory.fill (i32.const 65535) (i32.const 1) (i32.const -1)) (i32.const 0)))
