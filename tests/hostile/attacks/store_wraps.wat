;; Stores at an address and offset that add up to more than 2^32. Traps.
(module
  (memory (export "memory") 1)
  (func (export "realm_abi_version") (result i32) (i32.const 1))
  (func $run (export "run") (result i32)
    (i64.store offset=0xfffffff8 (i32.const 16) (i64.const -1)) (i32.const 0)))
