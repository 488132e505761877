;; Fills its whole memory over and over in its start function. Refused in time.
(module
  (memory (export "memory") 512)
  (func $fill (loop $l (memory.fill (i32.const 0) (i32.const 7) (i32.const 0x2000000)) (br $l)))
  (start $fill)
  (func (export "realm_abi_version") (result i32) (i32.const 1))
  (func $run (export "run") (result i32)
    (i32.const 0)))
