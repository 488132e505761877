;; Fills and copies all of a 64-bit memory over and over. Ends when its fuel is burnt.
(module (memory (export "memory") i64 64)
  (func (export "realm_abi_version") (result i32) (i32.const 1))
  (func (export "run") (result i32)
    (loop $l
      (memory.fill (i64.const 0) (i32.const 1) (i64.const 0x400000)) (memory.copy (i64.const 1) (i64.const 0) (i64.const 0x3fffff))
      (br $l)) (unreachable)))
