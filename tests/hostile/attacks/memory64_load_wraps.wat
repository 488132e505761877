;; Loads from a 64-bit memory at an address and offset that add up to more than 2^64. Traps.
(module (memory (export "memory") i64 1)
  (func (export "realm_abi_version") (result i32) (i32.const 1))
  (func (export "run") (result i32) (i32.load offset=0xfffffffffffffff0 (i64.const 32))))
