;; Fills its whole 64 MiB over and over. Ends when its fuel is burnt.
(module
  (memory (export "memory") 1024)
  (func (export "realm_abi_version") (result i32) (i32.const 1))
  (func $run (export "run") (result i32)
    (loop $l (memory.fill (i32.const 0) (i32.const 255) (i32.const 0x4000000)) (br $l)) (unreachable)))
