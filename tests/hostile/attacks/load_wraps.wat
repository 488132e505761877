;; Loads at an address and offset that add up to more than 2^32. Traps.
(module
  (memory (export "memory") 1)
  (func (export "realm_abi_version") (result i32) (i32.const 1))
  (func $run (export "run") (result i32)
    (i32.load offset=0xffffffff (i32.const -1))))
