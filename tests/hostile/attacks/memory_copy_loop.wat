;; Copies its whole memory onto itself, shifted by a byte, over and over. Ends when its fuel is burnt.
(module
  (memory (export "memory") 1024)
  (func (export "realm_abi_version") (result i32) (i32.const 1))
  (func $run (export "run") (result i32)
    (loop $l (memory.copy (i32.const 1) (i32.const 0) (i32.const 0x3ffffff)) (br $l)) (unreachable)))
